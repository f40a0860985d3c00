//! What bounds the proxy without stopping it: open files, buffers, and what goes
//! in one piece.

use std::io;

use socket2::{Domain, Protocol, Socket, Type};

use super::Finding;
use crate::config::Config;
use crate::host;
use crate::limits::Ceiling;
use crate::memory;
use ppv2_engine::mode::{Mode, RewriteOn};
use ppv2_udp::LISTENER_BUFFER;

pub(super) fn examine(config: &Config) -> Vec<Finding> {
    let mut findings = vec![sessions(config), buffer()];
    findings.extend(memory());
    findings.extend(pieces(config));
    findings
}

fn sessions(config: &Config) -> Finding {
    let ceiling = Ceiling::of(config);
    let what = "sessions (open files, local ports and memory)";
    match ceiling.shortfall() {
        Some(shortfall) => Finding::advice(
            what,
            shortfall,
            "LimitNOFILE= or MemoryMax= in the systemd unit, `ulimit -n`, or sysctl -w net.ipv4.ip_local_port_range=…",
        ),
        None => Finding::right(what, format!("at most {}", ceiling.max_sessions)),
    }
}

/// The limit of the process that looks, which may be another than the proxy's: a service
/// has a control group of its own.
fn memory() -> Option<Finding> {
    let limit = memory::limit()?;
    let (megabytes, said_by) = (limit.bytes >> 20, limit.said_by.display());
    Some(Finding::right(
        "memory",
        format!(
            "{megabytes} MiB, by {said_by}; a session takes about 4 kB, most of it the kernel's"
        ),
    ))
}

/// What the kernel grants is asked of it: in a network namespace there may be no
/// `rmem_max` to read.
fn buffer() -> Finding {
    let what = "receive buffer of listeners";
    match granted() {
        Ok(granted) if granted < LISTENER_BUFFER => Finding::advice(
            what,
            format!(
                "{granted} bytes instead of {LISTENER_BUFFER}: a burst that exceeds them is lost"
            ),
            format!("sysctl -w net.core.rmem_max={LISTENER_BUFFER}"),
        ),
        Ok(granted) => Finding::right(what, format!("{granted} bytes")),
        Err(error) => Finding::right(what, format!("unknown: {error}")),
    }
}

fn granted() -> io::Result<usize> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_recv_buffer_size(LISTENER_BUFFER)?;
    // The kernel doubles what was asked for (socket(7), SO_RCVBUF).
    Ok(socket.recv_buffer_size()? / 2)
}

/// The longest datagram of a client that goes to each server in one piece.
fn pieces(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (listener, server, mode) in config.served() {
        let address = server.address.0;
        let crc32c = match mode {
            Mode::Ppv2 { crc32c, .. } | Mode::Dsr(RewriteOn::Sdk { crc32c }) => crc32c,
            Mode::Transparent { .. } | Mode::Dsr(_) | Mode::Plain => continue,
        };
        // The header's length is that of the client's family, the listener's.
        let longest = if listener.bind.iter().any(std::net::SocketAddr::is_ipv6) {
            ppv2::IPV6_HEADER_LEN
        } else {
            ppv2::IPV4_HEADER_LEN
        };
        let header = longest + if crc32c { 7 } else { 0 };
        let what = format!("MTU of the interface towards server {address}");
        let Ok(mtu) = host::interface_mtu(address.ip()) else {
            continue;
        };
        let room = host::payload_of(mtu, address.ip()).saturating_sub(header);
        let becomes = if listener.dont_fragment {
            "dropped (df)"
        } else {
            "fragmented"
        };
        let beyond = if address.is_ipv4() && !listener.dont_fragment {
            "fragments what is too long for it"
        } else {
            "drops what is too long for it: set the interface's MTU to that of the hop"
        };
        findings.push(Finding::right(
            what,
            format!(
                "{mtu}; the header takes {header} bytes, and datagrams above {room} are {becomes}; \
                 a hop beyond that has a smaller MTU {beyond}"
            ),
        ));
    }
    findings
}
