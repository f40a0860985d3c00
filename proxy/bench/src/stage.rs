//! One proxy with its server behind it, ready for loads, and what a load on it
//! comes to.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::slice::from_ref;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::echo::{Header, Seen};
use crate::host::Cores;
use crate::hosts;
use crate::kernel_memory::Group;
use crate::load::{FIRST_ADDRESS, Load, Report, Senders, write_header};
use crate::peer::{Peer, Programs, Setup};
use crate::process::{End, Place, Tree};
use crate::tag::{Shape, Tag};
use crate::unprivileged;

/// How long a proxy may take until the first reply comes.
const READY_WITHIN: Duration = Duration::from_secs(15);

/// What may be lost in a search for the highest rate: one of 10,000. The
/// generator shares a core with the server, and both with the kernel.
const LOSS: f64 = 1e-4;

/// Datagrams a second between which the highest rate is looked for.
const LOWEST: u64 = 30_000;
const HIGHEST: u64 = 480_000;

/// Seven steps tell the rate to 2 %.
const STEPS: usize = 7;

/// Lines of a program's output that tell why it ended.
const LAST_LINES: usize = 6;

/// What all measurements share.
pub(crate) struct Ground {
    pub(crate) cores: Cores,
    pub(crate) preload: PathBuf,
    pub(crate) programs: Programs,
    /// Configurations and logs of the proxies, a folder for each.
    pub(crate) folder: PathBuf,
    pub(crate) real_time: bool,
    /// Descriptors that a process may have.
    pub(crate) descriptors: u64,
    /// Ports given out so far.
    pub(crate) used: u16,
}

/// How a proxy and its server are set up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    pub(crate) shape: Shape,
    /// A session ends with its first reply.
    pub(crate) one_reply: bool,
    /// Clients, proxy and server are hosts of their own.
    pub(crate) hosts: bool,
    /// The proxy runs as `nobody`, without any capability, if root is here to see to it.
    pub(crate) unprivileged: bool,
    /// How many clients there will be at once.
    pub(crate) clients: usize,
}

impl Ground {
    fn place<'a>(&'a self, cores: &'a [usize], host: Option<&'static str>) -> Place<'a> {
        Place {
            cores,
            preload: &self.preload,
            real_time: self.real_time,
            host,
            unprivileged: false,
        }
    }

    /// For clients and servers.
    fn around(&self, host: Option<&'static str>) -> Place<'_> {
        self.place(from_ref(&self.cores.around), host)
    }
}

/// What one load on one proxy came to.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sample {
    pub(crate) load: Report,
    /// Nanoseconds of CPU that the proxy spent on each datagram that it
    /// delivered, replies counted too.
    pub(crate) cpu: f64,
    /// Part of its core that the proxy used: near 1, the proxy is what limits
    /// throughput.
    pub(crate) busy: f64,
    /// Nanoseconds of CPU that proxy, server and clients together spent on each round
    /// trip.
    pub(crate) whole: f64,
    /// Clients, each of which has a session.
    pub(crate) clients: usize,
    /// Bytes of memory at the end.
    pub(crate) memory: f64,
    /// Those less the ones before the first client, for each client.
    pub(crate) session_memory: f64,
    /// The same of the kernel's memory for the process, if that is known.
    pub(crate) kernel_memory: Option<f64>,
    /// Descriptors at the end.
    pub(crate) descriptors: u64,
    /// Datagrams that reached the server without their header, or with a wrong
    /// one, where there should be one.
    pub(crate) wrong_headers: u64,
    /// Datagrams a second, of a search for the highest rate.
    pub(crate) rate: Option<f64>,
}

/// A proxy and its server. Both end when it is dropped.
pub(crate) struct Stage {
    pub(crate) peer: Peer,
    listen: SocketAddrV4,
    terms: Terms,
    tree: Tree,
    _end: End,
    /// Reaped at the end.
    proxy: Child,
    echo: Echo,
    /// After the end.
    group: Option<Group>,
    memory_before: u64,
    kernel_memory_before: Option<u64>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = self.proxy.kill();
        let _ = self.proxy.wait();
    }
}

impl Stage {
    pub(crate) fn set(ground: &mut Ground, peer: Peer, terms: Terms) -> Result<Self> {
        let hosts = terms.hosts;
        ground.used += 1;
        let (listener, server) = match (hosts, peer.is_returned()) {
            (false, _) => (Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST),
            (true, false) => (hosts::LISTENER, hosts::ANSWERING),
            (true, true) => (hosts::LISTENER, hosts::RETURNING),
        };
        let listen = SocketAddrV4::new(listener, 7_000 + ground.used);
        let server = SocketAddrV4::new(server, 12_000 + ground.used);
        if hosts {
            hosts::make()?;
        }
        if peer.is_returned() && peer.header() == Header::None {
            hosts::rewrite(server, listen)?;
        }
        let own = format!("{peer:?}").to_lowercase();
        let program = ground.programs.file(peer.program());
        let copies = match terms.unprivileged && unprivileged::can_be() {
            true => Some(unprivileged::copies(&[&program, &ground.preload])?),
            false => None,
        };
        let (folder, program, preload) = match &copies {
            Some(copies) => (copies.folder.join(own), &copies.files[0], &copies.files[1]),
            None => (ground.folder.join(own), &program, &ground.preload),
        };
        fs::create_dir_all(&folder)?;
        let echo = Echo::start(ground, server, listen, peer, terms)?;
        let setup = Setup {
            folder: &folder,
            listen,
            server,
            one_reply: terms.one_reply,
            clients: terms.clients,
            descriptors: ground.descriptors,
        };
        let log = File::create(folder.join("output"))?;
        let cores = if peer.everywhere() {
            &ground.cores.all[..]
        } else {
            from_ref(&ground.cores.proxy)
        };
        let place = Place {
            preload,
            unprivileged: copies.is_some(),
            ..ground.place(cores, hosts.then_some(hosts::PROXY))
        };
        let mut configured = Ok(());
        let mut child = place.start(program, |command| {
            configured = peer.configure(&setup, command);
            command.stdin(Stdio::null());
            if let Ok(other) = log.try_clone() {
                command.stdout(other);
            }
            command.stderr(log);
        })?;
        // Whatever comes up late, a worker process say, must be found as well.
        let ready = configured.and_then(|()| {
            let client = if hosts {
                hosts::client()?
            } else {
                UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?
            };
            await_reply(&mut child, &client, listen, terms.shape, peer.senders())
        });
        let found = Tree::of(child.id()).and_then(|tree| Ok((End::of(&tree)?, tree)));
        ready.with_context(|| format!("{} ({})", peer.name(), last_words(&folder)))?;
        let (end, tree) = found?;
        let group = Group::make(child.id());
        if let Some(group) = &group {
            tree.pids().for_each(|pid| group.add(pid));
        }
        Ok(Self {
            peer,
            listen,
            terms,
            memory_before: tree.memory(),
            kernel_memory_before: group.as_ref().and_then(Group::bytes),
            tree,
            _end: end,
            proxy: child,
            echo,
            group,
        })
    }

    /// Looks for the highest rate at which no more than [`LOSS`] is lost, halving
    /// the range where it lies so many [`STEPS`] times, from a [`LOWEST`] to a
    /// [`HIGHEST`] that no proxy here reaches. The sample is the one of that rate.
    pub(crate) fn search(&mut self, ground: &Ground, load: &Load) -> Result<Sample> {
        let (mut low, mut high) = (LOWEST, HIGHEST);
        let mut best = None;
        for _ in 0..STEPS {
            let rate = (low * high).isqrt();
            let load = Load {
                rate: Some(rate),
                ..load.clone()
            };
            let sample = self.measure(ground, &load)?;
            let sent = sample.load.sent as f64;
            let offered = sent / sample.load.seconds;
            if sample.load.lost as f64 <= sent * LOSS {
                low = rate;
                best = Some(Sample {
                    rate: Some(offered),
                    ..sample
                });
                // The clients can't do more.
                if offered < rate as f64 * 0.95 {
                    break;
                }
            } else {
                high = rate;
            }
        }
        best.with_context(|| format!("more than {LOSS} was lost even at the lowest rate"))
    }

    /// Applies a load.
    pub(crate) fn measure(&mut self, ground: &Ground, load: &Load) -> Result<Sample> {
        let seen_before = self.echo.seen()?;
        let from = if self.terms.hosts {
            hosts::FIRST_CLIENT
        } else {
            FIRST_ADDRESS
        };
        let host = self.terms.hosts.then_some(hosts::CLIENTS);
        let mut generator = ground
            .around(host)
            .start(&std::env::current_exe()?, |command| {
                command
                    .arg("load")
                    .args(["--target", &self.listen.to_string()])
                    .args(["--from", &from.to_string()])
                    .args(["--clients", &load.clients.to_string()])
                    .args(["--first", &load.first.to_string()])
                    .args(["--ports", &load.ports.to_string()])
                    .args(["--size", &load.size.to_string()])
                    .args(["--burst", &load.burst.to_string()])
                    .args(["--flight", &load.flight.to_string()])
                    .args(["--senders", self.peer.senders().name()])
                    .args(["--warm-up", &load.warm_up.to_string()])
                    .args(["--time", &load.time.to_string()])
                    .args(load.rate.map(|rate| format!("--rate={rate}")))
                    .args(load.fresh.then_some("--fresh"))
                    .args((self.terms.shape == Shape::Dns).then_some("--dns"))
                    .args(self.tree.pids().map(|pid| format!("--proxy={pid}")))
                    .args(self.echo.tree.pids().map(|pid| format!("--server={pid}")))
                    .stdout(Stdio::piped());
            })?;
        let output = generator.stdout.take().context("a pipe")?;
        let load: Report = read_json(&mut BufReader::new(output))?;
        ensure!(generator.wait()?.success(), "the load generator failed");
        let seen = self.echo.seen()?;
        if let Some(status) = self.proxy.try_wait()? {
            bail!("{} ended under load: {status}", self.peer.name());
        }
        // What reached the server is known for the warm-up and the measurement
        // together.
        let arrived = (seen.received - seen_before.received) as f64
            / (load.sent_before + load.sent).max(1) as f64;
        let delivered = load.received as f64 + load.sent as f64 * arrived.min(1.0);
        let spent = load.cpu.proxy as f64;
        let clients = self.terms.clients;
        let per_client = |now: u64, before: u64| (now as f64 - before as f64) / clients as f64;
        let memory = self.tree.memory();
        let kernel_memory = self.group.as_ref().and_then(Group::bytes);
        Ok(Sample {
            cpu: spent / delivered.max(1.0),
            busy: spent / 1e9 / load.seconds,
            whole: load.cpu.all() as f64 / load.received.max(1) as f64,
            clients,
            memory: memory as f64,
            session_memory: per_client(memory, self.memory_before),
            kernel_memory: kernel_memory
                .zip(self.kernel_memory_before)
                .map(|(now, before)| per_client(now, before)),
            descriptors: self.tree.descriptors(),
            // Since the proxy was started, warm-ups included.
            wrong_headers: seen.wrong,
            rate: None,
            load,
        })
    }
}

/// The server.
struct Echo {
    child: Child,
    tree: Tree,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Echo {
    fn start(
        ground: &Ground,
        listen: SocketAddrV4,
        listener: SocketAddrV4,
        peer: Peer,
        terms: Terms,
    ) -> Result<Self> {
        let by_itself = peer.header() != Header::None && peer.is_returned();
        let host = terms.hosts.then_some(hosts::SERVER);
        let mut child = ground
            .around(host)
            .start(&std::env::current_exe()?, |command| {
                command
                    .args(["echo", "--listen", &listen.to_string()])
                    .args(["--header", peer.header().name()])
                    .args(["--server", peer.server().name()])
                    .args(peer.is_spoofing().then_some("--spoofed"))
                    .args(by_itself.then(|| format!("--reply-from={listener}")))
                    .args((terms.shape == Shape::Dns).then_some("--dns"))
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped());
            })?;
        let questions = child.stdin.take().context("a pipe")?;
        let answers = BufReader::new(child.stdout.take().context("a pipe")?);
        let mut echo = Self {
            tree: Tree::of(child.id())?,
            child,
            questions,
            answers,
        };
        // Its answer tells that it is bound. A proxy that is told "port
        // unreachable" may tell its client so, by an empty datagram say.
        echo.seen()?;
        Ok(echo)
    }

    fn seen(&mut self) -> Result<Seen> {
        writeln!(self.questions)?;
        read_json(&mut self.answers)
    }
}

fn read_json<T: DeserializeOwned>(from: &mut impl BufRead) -> Result<T> {
    let mut line = String::new();
    from.read_line(&mut line)?;
    serde_json::from_str(&line).with_context(|| format!("unexpected output: {line}"))
}

/// Asks until the server's answer comes back through the proxy.
fn await_reply(
    proxy: &mut Child,
    socket: &UdpSocket,
    listen: SocketAddrV4,
    shape: Shape,
    senders: Senders,
) -> Result<()> {
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let SocketAddr::V4(client) = socket.local_addr()? else {
        bail!("an IPv4 socket has an IPv6 address");
    };
    let client = SocketAddrV4::new(senders.behind(*client.ip()), client.port());
    let mut datagram = [&vec![0; senders.header_len()][..], &shape.template(64)?].concat();
    let tag = Tag {
        client,
        load: 0,
        sequence: 0,
        sent: 0,
    };
    tag.write(write_header(senders, client, &mut datagram)?, shape);
    let deadline = Instant::now() + READY_WITHIN;
    let mut reply = [0; 2_048];
    let mut other = None;
    while Instant::now() < deadline {
        if let Some(status) = proxy.try_wait()? {
            bail!("ended at start: {status}");
        }
        socket.send_to(&datagram, listen)?;
        match socket.recv_from(&mut reply) {
            Ok((len, _)) if Tag::read(&reply[..len], shape) == Some(tag) => return Ok(()),
            Ok((len, from)) => other = Some((len, from)),
            Err(_) => {}
        }
    }
    match other {
        Some((len, from)) => bail!("of another reply than asked for: {len} bytes from {from}"),
        None => bail!("no reply within {READY_WITHIN:?}"),
    }
}

/// What a program said last: the lines of an error that end its output.
fn last_words(folder: &Path) -> String {
    let text = fs::read_to_string(folder.join("output")).unwrap_or_default();
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    let last = lines[lines.len().saturating_sub(LAST_LINES)..].join(" ");
    match last.trim() {
        "" => "it said nothing".to_owned(),
        last => last.chars().take(300).collect(),
    }
}
