//! Another configuration: made ready beside the one that holds, which goes on
//! meanwhile; what of it takes a restart; and what has come and gone, in words.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tokio::task::{JoinSet, spawn_blocking};

use super::bind;
use super::lame_duck::identity;
use super::snapshot::Log;
use crate::access_log::Unlogged;
use crate::admin::ReloadRequest;
use crate::config::{AccessLog, Answers, Config, Expanded, Listener};
use crate::discovery::{Candidate, Running};
use crate::registry::ActiveConfig;
use crate::topology;

/// How long names have to be resolved before the proxy starts without what they lead
/// to, or puts another configuration in force.
pub(super) const FIRST_ANSWERS: Duration = Duration::from_secs(5);

/// How long reading a configuration may take, with the plain names in it.
const PATIENCE: Duration = Duration::from_secs(60);

/// What came of a reload, in words.
pub(super) type Outcome = Result<String, String>;

/// The reload that is under way, if one is, and those that are to follow.
#[derive(Default)]
pub(super) struct Reloads {
    /// At most one task. It ends with the value.
    under_way: JoinSet<Result<Ready, String>>,
    /// Who waits for what comes of it.
    asked: Vec<ReloadRequest>,
    /// Another was asked for after it had begun, when the file may have been another.
    again: bool,
    /// Who did, and waits.
    asked_again: Vec<ReloadRequest>,
}

impl Reloads {
    /// Notes a request, whose asker perhaps waits for the outcome. Whether a reload begins
    /// now: otherwise it does when the one under way has ended.
    pub(super) fn ask(&mut self, asker: Option<ReloadRequest>) -> bool {
        if self.under_way.is_empty() {
            self.asked.extend(asker);
            return true;
        }
        self.again = true;
        self.asked_again.extend(asker);
        false
    }

    pub(super) fn begin(
        &mut self,
        ready: impl Future<Output = Result<Ready, String>> + Send + 'static,
    ) {
        self.under_way.spawn(ready);
    }

    pub(super) fn are_under_way(&self) -> bool {
        !self.under_way.is_empty()
    }

    /// Waits for the one that is under way, for ever if none is. Nothing is lost if
    /// the future is dropped.
    pub(super) async fn ready(&mut self) -> Result<Ready, String> {
        match self.under_way.join_next().await {
            Some(Ok(ready)) => ready,
            Some(Err(error)) => Err(error.to_string()),
            None => std::future::pending().await,
        }
    }

    /// Tells who waits what came of it. Whether another is to begin now.
    pub(super) fn end(&mut self, outcome: &Outcome) -> bool {
        for asker in self.asked.drain(..) {
            // The asker may have gone.
            let _ = asker.send(outcome.clone());
        }
        self.asked.append(&mut self.asked_again);
        std::mem::take(&mut self.again)
    }
}

/// Beside what a configuration is made ready.
pub(super) struct Beside {
    pub(super) file: Option<PathBuf>,
    pub(super) active: Arc<ActiveConfig>,
    /// Addresses that this process has sockets for.
    pub(super) held: BTreeSet<SocketAddr>,
    /// Addresses that the service manager has bound for it.
    pub(super) inherited: BTreeSet<SocketAddr>,
    /// Ports of source networks that it sends or once sent from, and which worker did.
    pub(super) source_ports: BTreeMap<SocketAddr, usize>,
    pub(super) names: Running,
    /// The access log that is open.
    pub(super) log: Option<AccessLog>,
    pub(super) unlogged: Unlogged,
}

/// A configuration that can be put in force.
pub(super) struct Ready {
    pub(super) written: Config,
    pub(super) candidate: Candidate,
    /// It, with what its names lead to.
    pub(super) expanded: Expanded,
    /// Its access log, if that is another.
    pub(super) log: Option<Log>,
}

/// Reads the configuration again and finds out all that can be wrong with it. Takes
/// its time where names, the file or the host do.
pub(super) async fn make_ready(beside: Beside) -> Result<Ready, String> {
    let Some(file) = beside.file else {
        return Err(
            "the proxy was started by flags; start it with --config FILE to reload that".to_owned(),
        );
    };
    let (mut held, active, open) = (beside.held, beside.active, beside.log);
    held.extend(beside.inherited);
    let name = file.display().to_string();
    let unlogged = beside.unlogged;
    let ports = beside.source_ports;
    let read = spawn_blocking(move || {
        read(
            &file,
            &active.config,
            &held,
            &ports,
            open.as_ref(),
            &unlogged,
        )
    });
    let Ok(read) = tokio::time::timeout(PATIENCE, read).await else {
        return Err(format!(
            "{name} could not be read within {} s; see that its file system and DNS answer",
            PATIENCE.as_secs()
        ));
    };
    let (written, log) = read.map_err(|error| error.to_string())??;
    let candidate = beside.names.prepare(&written, FIRST_ANSWERS).await;
    let expanded = expand(&written, candidate.answers.clone()).await?;
    Ok(Ready {
        written,
        candidate,
        expanded,
        log,
    })
}

/// Reads the file and looks into the host. Opens the access log, if it is another than
/// the one that is `open`.
fn read(
    file: &Path,
    before: &Config,
    held: &BTreeSet<SocketAddr>,
    source_ports: &BTreeMap<SocketAddr, usize>,
    open: Option<&AccessLog>,
    unlogged: &Unlogged,
) -> Result<(Config, Option<Log>), String> {
    let name = file.display();
    let metadata = fs::metadata(file).map_err(|error| format!("{name}: {error}"))?;
    if !metadata.is_file() {
        return Err(format!("{name} is not a regular file; a reload needs one"));
    }
    let config = Config::from_file(file).map_err(|error| error.to_string())?;
    if let Some(why) = takes_restart(before, &config) {
        return Err(why);
    }
    // The operator can reload again when a tentative address no longer is.
    bind::probe_but(&config, held, Duration::ZERO).map_err(|error| error.to_string())?;
    bind::probe_sources(&config, Duration::ZERO).map_err(|error| error.to_string())?;
    bind::probe_source_ports(&config, source_ports).map_err(|error| error.to_string())?;
    topology::check_host(&config).map_err(|error| error.to_string())?;
    let another = config.access_log.as_ref().filter(|log| open != Some(*log));
    // Unlike at a start, what was in force goes on.
    let log = another
        .map(|log| Log::open(log, unlogged, false))
        .transpose();
    let log = log.map_err(|error| error.to_string())?;
    Ok((config, log))
}

/// `written` with the servers that its names lead to and that this host can serve.
/// The host is asked, which may take a moment.
pub(super) async fn expand(written: &Config, answers: Answers) -> Result<Expanded, String> {
    let written = written.clone();
    let expanded = spawn_blocking(move || topology::expand(&written, &answers));
    // It fails only where the runtime is ending.
    expanded.await.map_err(|error| error.to_string())
}

/// What can't change while the proxy runs, and would, in words, and what to do.
fn takes_restart(old: &Config, new: &Config) -> Option<String> {
    let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "unset".to_owned());
    let differs = |key: &str, old: String, new: String| {
        (old != new).then(|| {
            format!("{key} is {old} and would be {new}, which takes a restart; set it back, or restart the proxy")
        })
    };
    let count = |config: &Config| config.worker_count().to_string();
    let admin = |config: &Config| config.admin().map(|address| address.to_string());
    let upgrade = |config: &Config| {
        let upgrade = config.upgrade.as_ref();
        upgrade.map(|upgrade| upgrade.socket.to_string())
    };
    differs("workers", count(old), count(new))
        .or_else(|| {
            let (old, new) = (old.reuse_port.0, new.reuse_port.0);
            differs("reuse_port", old.to_string(), new.to_string())
        })
        .or_else(|| differs("admin.listen", shown(&admin(old)), shown(&admin(new))))
        .or_else(|| {
            (old.admin_token() != new.admin_token()).then(|| {
                "the token of admin.token_file is another, which takes a restart; set it back, or restart the proxy".to_owned()
            })
        })
        .or_else(|| differs("upgrade.socket", shown(&upgrade(old)), shown(&upgrade(new))))
        .or_else(|| differs("user", shown(&old.user), shown(&new.user)))
        .or_else(|| overlapping_networks(old, new))
        .or_else(|| shifted_ports(old, new))
}

/// A port that another worker sends from before: it keeps its socket for its sessions, and
/// the worker that would have the port could open none.
fn shifted_ports(old: &Config, new: &Config) -> Option<String> {
    let (before, after) = (bind::source_ports(old), bind::source_ports(new));
    let shifted = |(port, worker): (&SocketAddr, &usize)| {
        let holder = before.get(port).filter(|holder| *holder != worker)?;
        let port = port.port();
        Some(format!(
            "source_port: worker {worker} would send from port {port}, which worker {holder} sends from now; give ports that are at least {} apart from those in force, or restart the proxy",
            old.worker_count()
        ))
    };
    after.iter().find_map(shifted)
}

/// A source network that has addresses of another one before: a session that has one of
/// those now and a new one could get the same.
fn overlapping_networks(old: &Config, new: &Config) -> Option<String> {
    let networks = |config: &Config| -> Vec<_> {
        let all = config.source_networks().into_iter();
        all.map(|(_, source)| source.network).collect()
    };
    let before = networks(old);
    networks(new).into_iter().find_map(|after| {
        let overlaps = |before: &&IpNet| {
            **before != after && (before.contains(&after) || after.contains(*before))
        };
        let before = before.iter().find(overlaps)?;
        Some(format!(
            "source network {after} overlaps with {before}, of which sessions have addresses now; take another network, or restart the proxy"
        ))
    })
}

/// The name of an upstream that has no servers at all in `new`, if one has not, but
/// for those that have none as it is.
pub(super) fn without_servers<'a>(old: &Config, new: &'a Config) -> Option<&'a str> {
    let empty = |config: &'_ Config| -> BTreeSet<_> {
        let listeners = config.listeners.iter();
        let empty = listeners.filter(|listener| listener.servers.is_empty());
        empty.map(|listener| listener.upstream.clone()).collect()
    };
    let known = empty(old);
    let mut listeners = new.listeners.iter();
    let is_new = |listener: &&Listener| !known.contains(&listener.upstream);
    let listener = listeners.find(|listener| listener.servers.is_empty() && is_new(listener));
    listener.map(|listener| listener.upstream.as_str())
}

/// What has come and gone from one configuration to another.
pub(super) fn news(old: &Config, new: &Config) -> String {
    fn change<T: Ord>(what: &str, old: &BTreeSet<T>, new: &BTreeSet<T>) -> String {
        let come = new.difference(old).count();
        let gone = old.difference(new).count();
        let plural = if new.len() == 1 { "" } else { "s" };
        format!("{} {what}{plural} ({come} new, {gone} gone)", new.len())
    }
    fn listeners(config: &Config) -> BTreeSet<&str> {
        let listeners = config.listeners.iter();
        listeners.map(|listener| listener.name.as_str()).collect()
    }
    fn servers(config: &Config) -> BTreeSet<(&str, SocketAddr)> {
        let servers = config.servers.iter().filter(|server| !server.leaving);
        servers.map(identity).collect()
    }
    let listeners = change("listener", &listeners(old), &listeners(new));
    let servers = change("server", &servers(old), &servers(new));
    format!("{listeners}, {servers}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(first_port: u16) -> Config {
        let content = format!(
            "workers = 2\n[[listener]]\nbind = [\"127.0.0.1:53\"]\nupstream = \"u\"\n[upstream.u]\n\
             source = [\"127.64.0.0/10\"]\nsource_port = {first_port}\nservers = [\"127.0.0.1:54\"]\n"
        );
        Config::from_toml("x", &content).unwrap()
    }

    #[test]
    fn a_reload_gives_no_worker_the_port_of_another() {
        let before = config(7000);
        for (first_port, parts) in [
            (7001, "worker 0 would send from port 7001, which worker 1"),
            (6999, "worker 1 would send from port 7000, which worker 0"),
        ] {
            let why = takes_restart(&before, &config(first_port)).unwrap();
            assert!(why.contains(parts), "{why}");
            assert!(why.contains("at least 2 apart"), "{why}");
        }
        for first_port in [6998, 7000, 7002] {
            assert_eq!(takes_restart(&before, &config(first_port)), None);
        }
    }
}
