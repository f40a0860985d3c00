//! Upgrades under load, many times in a row: a process takes over from another one, or a service
//! manager restarts the proxy. Some of the processes that take over are killed at random moments
//! before they serve. Nothing may be lost and no session may move. How long clients waited stands
//! beside how long they wait anyhow.

mod restarted;

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::{Args, ValueEnum};
use ppv2_lab::continuity::{Clients, Load, Server};
use ppv2_lab::{Process, address};
use tempfile::TempDir;

use crate::output;
use restarted::Restarted;

/// Servers of each address family.
const SERVERS: usize = 2;

/// How long the old process may take to read that it may let go.
const LAST_WORD: Duration = Duration::from_millis(20);

/// How another process comes to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Way {
    /// It takes over from the running one (`run --takeover`)
    Takeover,
    /// A small service manager restarts the proxy, and stores its sockets and sessions meanwhile
    Store,
    /// As `systemctl restart` with the unit of the packages, by a systemd in namespaces of its own;
    /// needs root
    Systemd,
}

/// What an upgrade is measured with.
#[derive(Args, Clone, Debug)]
pub(crate) struct Upgrade {
    /// How another process comes to serve
    #[arg(long, value_enum, default_value_t = Way::Takeover)]
    by: Way,
    /// The proxy, before and after
    #[arg(long, value_name = "FILE", default_value = "target/release/ppv2-proxy")]
    proxy: PathBuf,
    /// The proxy that is there before the first upgrade, if that is another build
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Sessions, half of them over IPv6
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(2..=50_000))]
    sessions: u32,
    /// Datagrams a second of all clients
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// Upgrades in a row
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    upgrades: u32,
    /// New processes that are killed at random moments before they serve, with `--by takeover`
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=1000))]
    kills: u32,
    /// Workers before and after
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: u32,
}

/// The proxy between listeners of both families and their servers.
struct Bench {
    folder: TempDir,
    listeners: [SocketAddr; 2],
    servers: [Vec<Server>; 2],
    workers: u32,
}

impl Bench {
    fn new(workers: u32) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        // Started as root, the proxy is another user, whose socket is in there.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777))?;
        let ips = ["127.0.0.1", "::1"];
        let servers = |ip| {
            (0..SERVERS)
                .map(|_| Server::start(address(ip), false))
                .collect()
        };
        Ok(Self {
            folder,
            listeners: ips.map(address),
            servers: ips.map(servers),
            workers,
        })
    }

    /// With the socket that a process takes over by, if that is the way.
    fn config(&self, way: Way) -> String {
        let mut text = format!("workers = {}\n", self.workers);
        if way == Way::Takeover {
            text += &format!("[upgrade]\nsocket = {:?}\n", self.socket());
        }
        for (bind, servers) in self.listeners.iter().zip(&self.servers) {
            let name = if bind.is_ipv4() { "v4" } else { "v6" };
            let servers: Vec<_> = servers.iter().map(|one| one.address.to_string()).collect();
            text += &format!(
                "[[listener]]\nname = \"{name}\"\nbind = [\"{bind}\"]\nupstream = \"{name}\"\nidle_timeout = \"10m\"\n\
                 [upstream.{name}]\nhash_on = \"client_addr\"\nservers = {servers:?}\n"
            );
        }
        text
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("upgrade.sock")
    }

    fn file(&self, way: Way) -> Result<PathBuf> {
        let file = self.folder.path().join("proxy.toml");
        fs::write(&file, self.config(way))?;
        Ok(file)
    }

    fn command(&self, proxy: &Path) -> Result<Command> {
        let mut command = Command::new(proxy);
        command
            .args(["run", "--config"])
            .arg(self.file(Way::Takeover)?);
        Ok(command)
    }

    fn taking(&self, proxy: &Path) -> Result<Command> {
        let mut command = self.command(proxy)?;
        command.arg("--takeover").arg(self.socket());
        Ok(command)
    }

    fn start(&self, options: &Upgrade) -> Result<Running> {
        let way = options.by;
        Ok(match way {
            Way::Takeover => {
                let first = options.from.as_ref().unwrap_or(&options.proxy);
                let mut proxy = Process::start(&mut self.command(first)?);
                proxy.wait_for("ready");
                Running::Alone(proxy)
            }
            Way::Store => {
                Running::Managed(Restarted::by_stand_in(&options.proxy, &self.file(way)?)?)
            }
            Way::Systemd => {
                Running::Managed(Restarted::by_systemd(&options.proxy, &self.config(way))?)
            }
        })
    }
}

/// The proxy that serves.
enum Running {
    Alone(Process),
    /// By a service manager.
    Managed(Restarted),
}

impl Running {
    /// Has another process serve. Returns how long that took and, if it is known, for how long
    /// nobody looked at the sockets.
    fn upgrade(&mut self, bench: &Bench, proxy: &Path) -> Result<(Duration, String)> {
        match self {
            Self::Alone(old) => {
                let began = Instant::now();
                let mut new = Process::start(&mut bench.taking(proxy)?);
                new.wait_for("ready");
                let whole = began.elapsed();
                let log = ended(old)?;
                *old = new;
                Ok((whole, frozen(&log).unwrap_or("?").to_owned()))
            }
            Self::Managed(one) => Ok((one.restart()?, "–".to_owned())),
        }
    }

    fn stop(self) -> Result<()> {
        match self {
            Self::Alone(mut proxy) => {
                proxy.signal("TERM");
                ended(&mut proxy).map(drop)
            }
            Self::Managed(one) => one.stop(),
        }
    }
}

/// The log of a process that has to end with success.
fn ended(proxy: &mut Process) -> Result<String> {
    let (status, log) = proxy.wait();
    ensure!(status.success(), "a process ended with {status}:\n{log}");
    Ok(log)
}

/// Runs all of it, and prints a table.
pub(crate) fn run(options: &Upgrade) -> Result<()> {
    let needed = u64::from(options.sessions) + 1000;
    let limit = rlimit::increase_nofile_limit(u64::MAX)?;
    ensure!(
        limit >= needed,
        "the proxy and the clients need {needed} open files each, and the limit is {limit}: raise it (ulimit -n)"
    );
    let bench = Bench::new(options.workers)?;
    ensure!(
        options.from.is_none() || options.by == Way::Takeover,
        "--from needs --by takeover"
    );
    let mut proxy = bench.start(options)?;
    let half = usize::try_from(options.sessions / 2)?;
    let groups = bench.listeners.map(|to| Clients::new(to, half));
    let load = Load::start(&groups, options.rate);
    load.wait_for_all();

    output::line(
        "| what | whole | frozen | longest gap of a client | longest wait for an answer |",
    )?;
    output::line("|---|---|---|---|---|")?;
    let pause = |load: &Load| {
        // So many that each client has had its turn after what happened.
        load.wait_for_a_round();
        load.wait_for_a_round();
        load.wait_for_a_round();
    };
    load.take_longest();
    pause(&load);
    let row = |what: &str, whole: Option<Duration>, frozen: &str| {
        let (gap, wait) = load.take_longest();
        let whole = whole.map_or("–".to_owned(), |whole| format!("{whole:.0?}"));
        output::line(&format!(
            "| {what} | {whole} | {frozen} | {gap:.0?} | {wait:.1?} |"
        ))
    };
    row("no upgrade", None, "–")?;
    let mut longest = Duration::ZERO;
    for number in 1..=options.upgrades {
        let (whole, frozen) = proxy.upgrade(&bench, &options.proxy)?;
        longest = longest.max(whole);
        pause(&load);
        row(&format!("upgrade {number}"), Some(whole), &frozen)?;
    }
    if let Running::Alone(proxy) = &mut proxy {
        let killed = kill_some(&bench, options, proxy, longest, &load)?;
        pause(&load);
        row(&format!("{killed} killed before they served"), None, "–")?;
    }
    let outcome = load.finish();
    output::line("")?;
    output::line(&outcome.to_string())?;
    ensure!(outcome.is_clean(), "datagrams were lost, or sessions moved");
    proxy.stop()
}

/// Starts processes that are killed before they serve. Returns how many were.
fn kill_some(
    bench: &Bench,
    options: &Upgrade,
    proxy: &mut Process,
    longest: Duration,
    load: &Load,
) -> Result<u32> {
    let mut killed = 0;
    for _ in 0..options.kills {
        let new = Process::start(&mut bench.taking(&options.proxy)?);
        thread::sleep(longest.mul_f64(fastrand::f64()));
        // To kill it as it stands, unless the old one has let go already: it needs a moment to
        // learn that it may.
        new.signal("STOP");
        thread::sleep(LAST_WORD);
        if proxy.has_ended() || proxy.log().contains("handed over ") {
            new.signal("CONT");
            ended(proxy)?;
            *proxy = new;
            continue;
        }
        new.signal("KILL");
        drop(new);
        killed += 1;
        load.wait_for_a_round();
        if proxy.has_ended() {
            bail!(
                "a process was killed after the other one had let go, which loses what any killed process loses; run it again"
            );
        }
    }
    Ok(killed)
}

/// For how long nobody looked at the sockets, as the old process's log says.
fn frozen(log: &str) -> Option<&str> {
    let line = log.lines().find(|line| line.contains("handed over "))?;
    line.split("took=").nth(1)?.split_whitespace().next()
}
