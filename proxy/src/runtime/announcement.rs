//! What a start is told as: lines of the log, or a few lines for people at a terminal.

use std::fmt::Write as _;

use crate::capacity::HostCapacity;
use crate::config::{AdminAddress, Config, Listener};
use crate::log::{self, Colour, Terminal};
use crate::privilege::Standing;

/// Listeners, and servers of each, that a terminal shows. `check` shows all.
const MAX_LISTENERS: usize = 16;
const MAX_SERVERS: usize = 8;

/// Tells which user and capabilities the process has.
pub fn announce_privileges(standing: &Standing) {
    let Standing { user, capabilities } = standing;
    let Some(terminal) = log::terminal() else {
        tracing::info!(user, ?capabilities, "privileges");
        return;
    };
    let name = terminal.paint(Colour::Bold, "ppv2-proxy");
    let mut text = format!("{name} {} as user {user}", env!("CARGO_PKG_VERSION"));
    if !capabilities.is_empty() {
        let _ = write!(text, " with {}", capabilities.join(", "));
    }
    terminal.show(&text);
}

/// Tells what is served, and that it is.
pub(super) fn announce(config: &Config, host_capacity: HostCapacity, admin: Option<&AdminAddress>) {
    let workers = config.worker_count();
    let max_sessions = host_capacity.max_sessions;
    if let Some(terminal) = log::terminal() {
        terminal.show(&for_people(terminal, config, max_sessions, admin));
        return;
    }
    for listener in &config.listeners {
        let servers = listener.servers.iter().map(|(index, mode)| {
            let server = &config.servers[*index];
            format!("{} ({})", server.shown_address(), mode.name())
        });
        tracing::info!(
            listener = listener.name,
            bind = ?listener.bind,
            upstream = listener.upstream,
            servers = %servers.collect::<Vec<_>>().join(", "),
            accept = listener.accept.as_ref().map(tracing::field::display),
            "listening"
        );
    }
    let admin = admin.map(tracing::field::display);
    tracing::info!(workers, max_sessions, admin, "ready");
}

fn for_people(
    terminal: &Terminal,
    config: &Config,
    max_sessions: usize,
    admin: Option<&AdminAddress>,
) -> String {
    let mut text = String::new();
    for listener in config.listeners.iter().take(MAX_LISTENERS) {
        write_listener(&mut text, terminal, config, listener);
    }
    if let Some(more @ 1..) = config.listeners.len().checked_sub(MAX_LISTENERS) {
        let _ = writeln!(text, "  and {more} more listeners");
    }
    match admin {
        Some(AdminAddress::Ip(address)) => _ = writeln!(text, "  admin API: http://{address}/"),
        Some(address) => _ = writeln!(text, "  admin API: {address}"),
        None => {}
    }
    let ready = terminal.paint(Colour::Green, "ready");
    let workers = match config.worker_count() {
        1 => "1 worker".to_owned(),
        workers => format!("{workers} workers"),
    };
    let _ = write!(
        text,
        "{ready}: {workers}, at most {max_sessions} sessions; Ctrl+C stops it after outstanding replies",
    );
    text
}

fn write_listener(text: &mut String, terminal: &Terminal, config: &Config, listener: &Listener) {
    let bind: Vec<_> = listener.bind.iter().map(ToString::to_string).collect();
    let (name, bind) = (
        terminal.paint(Colour::Bold, &listener.name),
        bind.join(", "),
    );
    let _ = write!(text, "  {name}  {bind} → {}", listener.upstream);
    if let Some(accept) = &listener.accept {
        let _ = write!(text, ", accepts {accept}");
    }
    text.push('\n');
    for (index, mode) in listener.servers.iter().take(MAX_SERVERS) {
        let server = &config.servers[*index];
        let remarks: Vec<_> = [format!("mode {}", mode.name())]
            .into_iter()
            .chain(server.remarks())
            .collect();
        let remarks = terminal.paint(Colour::Dim, remarks.join(", "));
        let _ = writeln!(text, "    {}  {remarks}", server.shown_address());
    }
    match listener.servers.len().checked_sub(MAX_SERVERS) {
        Some(more @ 1..) => _ = writeln!(text, "    and {more} more servers"),
        _ if listener.servers.is_empty() => _ = writeln!(text, "    no server yet"),
        _ => {}
    }
}
