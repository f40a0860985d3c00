//! What the preload library costs a server that nobody changes: NSD, asked directly and with
//! the library, in turn. And the memory of its table of clients beside that of the Rust SDK.
//!
//! Queries come as fast as they are answered, and then at a fixed rate. A server that is asked
//! faster than it answers never sleeps, and takes less CPU for each query than one that waits
//! for the next: what is behind a proxy on the same cores is compared at the same rate only.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use ppv2_lab::dig::program;
use ppv2_lab::port;
use tempfile::TempDir;

use crate::host::{self, Cores, Machine, Priority};
use crate::load::{Report, Senders, write_header};
use crate::measure::Spread;
use crate::output;
use crate::process::{End, Tree};
use crate::tag::{Shape, Tag};

/// CPU of the server for each query, with the library, beside that without.
const AT_MOST: f64 = 1.10;

/// Bytes of a question: one label that has room for a tag.
const SIZE: usize = 64;

/// How long a program may take until it answers.
const READY_WITHIN: Duration = Duration::from_secs(15);

/// How long a first question waits for its answer.
const PATIENCE: Duration = Duration::from_millis(50);

/// Clients whose entries' memory is looked at.
const MANY: usize = 100_000;

/// What is measured.
#[derive(Args, Clone, Debug)]
pub(crate) struct Preload {
    /// The library
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/preload/libppv2_preload.so"
    )]
    library: PathBuf,
    /// The proxy
    #[arg(long, value_name = "FILE", default_value = "target/release/ppv2-proxy")]
    proxy: PathBuf,
    /// How often each is measured
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Milliseconds of each measurement
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(100..=60_000))]
    time: u32,
    /// Clients that ask at once
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    clients: u32,
    /// Queries a second, of the second table
    #[arg(long, default_value_t = 30_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
}

/// One way in which NSD is asked.
struct Way {
    name: &'static str,
    /// Where the clients write to.
    target: SocketAddrV4,
    senders: Senders,
    server: Vec<i32>,
}

/// A program that ends with the value.
struct Program {
    child: Child,
    tree: Tree,
    _end: End,
}

impl Program {
    /// Starts it on a core, and waits until it answers at an address.
    fn start(command: &mut Command, core: usize, ready: impl Fn() -> Result<bool>) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let spawn = || command.spawn().context("a program can't be started");
        let mut child = on_core(core, spawn).with_context(|| format!("{command:?}"))?;
        let begun = Instant::now();
        while !ready()? {
            if let Some(status) = child.try_wait()? {
                anyhow::bail!("{command:?} ended with {status}");
            }
            ensure!(begun.elapsed() < READY_WITHIN, "{command:?} doesn't answer");
        }
        let tree = Tree::of(child.id())?;
        Ok(Self {
            child,
            _end: End::of(&tree)?,
            tree,
        })
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs all of it, and prints a table.
pub(crate) fn run(options: &Preload) -> Result<()> {
    host::enter_namespace()?;
    let library = options
        .library
        .canonicalize()
        .with_context(|| format!("{}: run `make bench-preload`", options.library.display()))?;
    let cores = Cores::find()?;
    let bench = Bench {
        folder: tempfile::tempdir()?,
        library,
        cores,
    };
    let priority = Priority::raise(false);
    output::line(&format!("{}, {priority}", Machine::describe()?))?;
    let ratios = bench.cpu(options)?;
    bench.memory()?;
    let missed: Vec<String> = ratios
        .iter()
        .filter(|(_, ratio)| ratio.median > AT_MOST)
        .map(|(what, ratio)| format!("{what}: {ratio}"))
        .collect();
    ensure!(
        missed.is_empty(),
        "more than {AT_MOST} times the CPU of NSD asked directly: {}",
        missed.join("; ")
    );
    Ok(())
}

struct Bench {
    folder: TempDir,
    library: PathBuf,
    cores: Cores,
}

impl Bench {
    /// Prints what each query costs. Returns the ratios that have a target.
    fn cpu(&self, options: &Preload) -> Result<Vec<(String, Spread)>> {
        let (direct, direct_at) = self.nsd(false)?;
        let (wrapped, wrapped_at) = self.nsd(true)?;
        let (_plain, plain_at) = self.proxy(&options.proxy, direct_at, "plain")?;
        let (_proxy, proxy_at) = self.proxy(&options.proxy, wrapped_at, "ppv2")?;
        let way = |name, target, senders, server: &Program| Way {
            name,
            target,
            senders,
            server: server.tree.pids().collect(),
        };
        let asked = way("asked directly", direct_at, Senders::Clients, &direct);
        let headers = way("library, headers", wrapped_at, Senders::One, &wrapped);
        let plain = "behind a proxy without headers";
        let plain = way(plain, plain_at, Senders::Clients, &direct);
        let proxied = "library, behind the proxy";
        let proxied = way(proxied, proxy_at, Senders::Clients, &wrapped);

        let around = self.cores.around;
        let fast = table(
            "as fast as it answers",
            &[&asked, &headers],
            None,
            options,
            around,
        )?;
        let at_rate = format!("at {} queries a second", options.rate);
        let ways = [&asked, &headers, &plain, &proxied];
        let paced = table(&at_rate, &ways, Some(options.rate), options, around)?;
        let name = |way: &Way, of: &str| format!("{}, {of}", way.name);
        Ok(vec![
            (name(&headers, "as fast as it answers"), fast[1]),
            (name(&proxied, &at_rate), paced[3]),
        ])
    }

    /// The memory that a table of many clients takes, in NSD and in a server on the SDK.
    fn memory(&self) -> Result<()> {
        output::line("")?;
        output::line(&format!("| {MANY} clients | memory for each, bytes |"))?;
        output::line("|---|---|")?;
        let nsd = self.nsd(true)?;
        let sdk = self.sdk()?;
        for (name, (program, target)) in [("library", nsd), ("Rust SDK", sdk)] {
            let before = program.tree.memory();
            let load = Load {
                target,
                senders: Senders::One,
                clients: MANY,
                server: &[],
                time: 3_000,
                rate: None,
            };
            let report = load.run(self.cores.around)?;
            let sent = report.sent + report.sent_before;
            ensure!(sent >= MANY as u64, "{name}: only {sent} queries were sent");
            let grown = program.tree.memory().saturating_sub(before);
            output::line(&format!("| {name} | {:.0} |", grown as f64 / MANY as f64))?;
        }
        Ok(())
    }

    fn nsd(&self, is_wrapped: bool) -> Result<(Program, SocketAddrV4)> {
        let port = port();
        let folder = self.folder.path().join(port.to_string());
        std::fs::create_dir(&folder)?;
        let path = folder.display();
        let config = format!(
            "server:\n ip-address: 127.0.0.1@{port}\n server-count: 1\n username: \"\"\n chroot: \"\"\n \
             zonesdir: \"{path}\"\n database: \"\"\n pidfile: \"\"\n xfrdfile: \"{path}/xfrd.state\"\n \
             zonelistfile: \"{path}/zone.list\"\n rrl-ratelimit: 0\n\
             remote-control:\n control-enable: no\nzone:\n name: .\n zonefile: zone\n"
        );
        let zone = ". 0 IN SOA ns. admin. 1 3600 3600 3600 0\n. 0 IN NS ns.\n* 0 IN A 192.0.2.1\n";
        std::fs::write(folder.join("nsd.conf"), config)?;
        std::fs::write(folder.join("zone"), zone)?;
        let mut nsd = Command::new("setpriv");
        nsd.args(["--pdeathsig", "KILL"]).arg(program("nsd", "nsd"));
        nsd.arg("-d").arg("-c").arg(folder.join("nsd.conf"));
        // What it says of its start.
        nsd.stderr(Stdio::null());
        if is_wrapped {
            nsd.env("LD_PRELOAD", &self.library);
            nsd.env("PPV2_TRUSTED", "127.0.0.0/8");
            nsd.env("PPV2_MAX_CLIENTS", (2 * MANY).to_string());
        }
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        let program = Program::start(&mut nsd, self.cores.proxy, || answers(address, is_wrapped))?;
        Ok((program, address))
    }

    fn proxy(
        &self,
        proxy: &Path,
        server: SocketAddrV4,
        mode: &str,
    ) -> Result<(Program, SocketAddrV4)> {
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port());
        let mut command = Command::new(proxy);
        command.arg("run").args(["--listen", &address.to_string()]);
        command.args(["--upstream", &server.to_string(), "--mode", mode]);
        command.stderr(Stdio::null());
        let ready = || answers(address, false);
        let program = Program::start(&mut command, self.cores.around, ready)?;
        Ok((program, address))
    }

    /// A server on the Rust SDK.
    fn sdk(&self) -> Result<(Program, SocketAddrV4)> {
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port());
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["echo", "--listen", &address.to_string(), "--dns"]);
        command.args(["--header", "every", "--server", "sdk"]);
        let ready = || answers(address, true);
        let program = Program::start(&mut command, self.cores.proxy, ready)?;
        Ok((program, address))
    }
}

/// Asks in each way in turn, and prints what each query costs. Returns, for each way, the CPU
/// beside the first.
fn table(
    name: &str,
    ways: &[&Way],
    rate: Option<u32>,
    options: &Preload,
    around: usize,
) -> Result<Vec<Spread>> {
    let mut samples = vec![Vec::new(); ways.len()];
    for round in 0..=options.rounds {
        for (way, samples) in ways.iter().zip(&mut samples) {
            let load = Load {
                target: way.target,
                senders: way.senders,
                clients: options.clients.try_into()?,
                server: &way.server,
                time: options.time,
                rate,
            };
            let report = load.run(around).context(way.name)?;
            // What comes first finds cold caches.
            if round > 0 {
                samples.push(report.cpu.server as f64 / report.received as f64);
            }
        }
    }
    output::line("")?;
    output::line(&format!(
        "| NSD, {name} | CPU for each query, ns | beside asked directly | beside the same without library |"
    ))?;
    output::line("|---|---|---|---|")?;
    let ratio = |ours: usize, other: usize| {
        let pairs = samples[ours].iter().zip(&samples[other]);
        Spread::of(pairs.map(|(ours, other)| ours / other).collect())
            .context("nothing was measured")
    };
    let mut beside = Vec::new();
    for (index, (way, samples)) in ways.iter().zip(&samples).enumerate() {
        let cpu = Spread::of(samples.clone()).context("nothing was measured")?;
        // With the library and without, in turn.
        let same = match index % 2 {
            1 => ratio(index, index - 1)?.to_string(),
            _ => "–".to_owned(),
        };
        let direct = ratio(index, 0)?;
        output::line(&format!("| {} | {cpu} | {direct} | {same} |", way.name))?;
        beside.push(direct);
    }
    Ok(beside)
}

/// What the generator is to do.
struct Load<'a> {
    target: SocketAddrV4,
    senders: Senders,
    clients: usize,
    server: &'a [i32],
    time: u32,
    rate: Option<u32>,
}

impl Load<'_> {
    fn run(&self, core: usize) -> Result<Report> {
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .arg(std::env::current_exe()?)
            .args(["load", "--dns"])
            .args(["--target", &self.target.to_string()])
            .args(["--senders", self.senders.name()])
            .args(["--clients", &self.clients.to_string()])
            .args(["--size", &SIZE.to_string()])
            .args(["--time", &self.time.to_string()]);
        for pid in self.server {
            command.args(["--server", &pid.to_string()]);
        }
        if let Some(rate) = self.rate {
            command.args(["--rate", &rate.to_string()]);
        }
        command.stdin(Stdio::null()).stderr(Stdio::inherit());
        let output = on_core(core, || Ok(command.output()?))?;
        ensure!(
            output.status.success(),
            "the generator ended with {}",
            output.status
        );
        let report: Report = serde_json::from_slice(&output.stdout)?;
        ensure!(report.wrong == 0, "{} wrong answers", report.wrong);
        ensure!(report.received > 0, "no answers");
        Ok(report)
    }
}

/// What is started meanwhile stays on a core.
fn on_core<T>(core: usize, start: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = rustix::thread::sched_getaffinity(None)?;
    host::stay_on(&[core])?;
    let started = start();
    rustix::thread::sched_setaffinity(None, &before)?;
    started
}

/// Whether a question to an address is answered within a moment.
fn answers(address: SocketAddrV4, behind_header: bool) -> Result<bool> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let senders = match behind_header {
        true => Senders::One,
        false => Senders::Clients,
    };
    let client = SocketAddrV4::new(Ipv4Addr::LOCALHOST, socket.local_addr()?.port());
    let mut question = vec![0; senders.header_len()];
    question.extend(Shape::Dns.template(SIZE)?);
    let tag = Tag {
        client,
        load: 0,
        sequence: 0,
        sent: 0,
    };
    tag.write(write_header(senders, client, &mut question)?, Shape::Dns);
    socket.send_to(&question, address)?;
    Ok(socket.recv_from(&mut [0; 1500]).is_ok())
}
