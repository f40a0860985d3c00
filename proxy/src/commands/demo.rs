//! `demo`: a server, the proxy and clients on loopback, and what each saw.
//!
//! The proxy is this program's own `run` in a process of its own. The server
//! reads the header with the SDK, and looks at the raw datagram besides.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use ppv2_sdk::Trust;

const TIMEOUT: Duration = Duration::from_secs(10);

/// Runs the demo and returns what to show.
///
/// # Errors
///
/// When a part could not be set up, or the server saw anything but the client's
/// true address.
pub fn run() -> anyhow::Result<String> {
    let mut text = String::new();
    let mut families = vec![("127.0.0.1", "127.0.0.77")];
    if UdpSocket::bind("[::1]:0").is_ok() {
        families.push(("::1", "::1"));
    }
    for (host, client) in families {
        show_family(&mut text, host.parse()?, client.parse()?)?;
    }
    Ok(text)
}

fn show_family(text: &mut String, host: IpAddr, client: IpAddr) -> anyhow::Result<()> {
    let server = UdpSocket::bind((host, 0)).context("the server's socket")?;
    server.set_read_timeout(Some(TIMEOUT))?;
    let server_address = server.local_addr()?;
    let listener = free_address(host)?;
    let proxy = Proxy::start(listener, server_address)?;
    let client = UdpSocket::bind((client, 0)).context("the client's socket")?;
    client.set_read_timeout(Some(TIMEOUT))?;
    let client_address = client.local_addr()?;

    client.send_to(b"hello", listener)?;
    let mut raw = [0; 512];
    let (len, peer) = server
        .recv_from(&mut raw)
        .context("the proxy passed nothing on to the server")?;
    let trust = Trust::networks([host])
        .build()
        .context("the server's trust")?;
    let received = ppv2_sdk::Demux::new(trust)
        .receive(std::time::Instant::now(), peer, None, &raw[..len])
        .map_err(|reason| anyhow::anyhow!("the server dropped the datagram: {reason}"))?;
    let (seen, written_to) = (received.client, received.destination);
    let payload = String::from_utf8_lossy(received.payload).into_owned();
    server.send_to(format!("you are {seen}").as_bytes(), peer)?;
    let mut answer = [0; 512];
    let (answer_len, answered_from) = client
        .recv_from(&mut answer)
        .context("the proxy passed no answer on to the client")?;

    let family = if host.is_ipv4() { "IPv4" } else { "IPv6" };
    let uid = proxy.uid()?;
    writeln!(text, "{family}, proxy running with uid {uid}")?;
    if uid == 0 {
        writeln!(text, "  (it needs nothing of root: run it as any user)")?;
    }
    writeln!(
        text,
        "  client  {client_address} sends \"hello\" to {listener}"
    )?;
    writeln!(text, "  server  gets {len} bytes from {peer}, the proxy:")?;
    for line in super::decode::explain(&raw[..len])?.lines() {
        writeln!(text, "          {line}")?;
    }
    let written_to = written_to.map_or_else(|| "nothing".to_owned(), |a| a.to_string());
    writeln!(
        text,
        "  server  reads: client {seen}, wrote to {written_to}, payload \"{payload}\""
    )?;
    let answer = String::from_utf8_lossy(&answer[..answer_len]);
    writeln!(text, "  client  gets \"{answer}\" from {answered_from}")?;

    ensure!(
        seen == client_address,
        "the server took {client_address} for {seen}"
    );
    ensure!(
        payload == "hello",
        "the server got another payload: {payload}"
    );
    ensure!(
        answered_from == listener,
        "the answer came from {answered_from}"
    );
    ensure!(
        answer == format!("you are {client_address}"),
        "another answer came: {answer}"
    );
    writeln!(
        text,
        "  the client's address as the server read it is the client's own\n"
    )?;
    Ok(())
}

/// A port that is free now; `run` takes no port 0, since no client could know it.
fn free_address(host: IpAddr) -> io::Result<SocketAddr> {
    UdpSocket::bind((host, 0))?.local_addr()
}

/// The proxy in a process of its own, which ends with this value.
struct Proxy {
    process: Child,
    // Kept open, so that the proxy can go on logging.
    _log: BufReader<ChildStderr>,
}

impl Proxy {
    fn start(listen: SocketAddr, upstream: SocketAddr) -> anyhow::Result<Self> {
        let this = std::env::current_exe().context("the path of this program")?;
        let mut process = Command::new(this)
            .args(["run", "--workers", "1", "--listen", &listen.to_string()])
            .args(["--upstream", &upstream.to_string()])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting the proxy")?;
        let stderr = process.stderr.take().context("the proxy's log")?;
        let mut log = BufReader::new(stderr);
        let mut lines = String::new();
        while !lines.contains("ready") {
            if log.read_line(&mut lines)? == 0 {
                let _ = process.wait();
                bail!("the proxy did not start:\n{lines}");
            }
        }
        Ok(Self { process, _log: log })
    }

    /// The user that the proxy runs as, by the kernel's word.
    fn uid(&self) -> anyhow::Result<u32> {
        let pid = i32::try_from(self.process.id())?;
        Ok(procfs::process::Process::new(pid)?.uid()?)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // It has nothing left to lose; errors mean that it has ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
