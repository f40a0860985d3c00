//! Three hosts, as network namespaces: clients, the proxy and the server, for
//! modes in which the server answers a client's address and not the proxy's.
//!
//! ```text
//! clients 198.18.0.0/15 ── 10.1.0.2 │ 10.1.0.1 proxy 10.2.0.1 │ 10.2.0.2, .3 server
//! ```
//!
//! What the server sends from the first of its addresses is for the proxy
//! process, from the second it is forwarded and made to come from the listener.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

pub(crate) const CLIENTS: &str = "clients";
pub(crate) const PROXY: &str = "proxy";
pub(crate) const SERVER: &str = "server";

/// Where clients write to.
pub(crate) const LISTENER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
/// A server whose replies come to the proxy process.
pub(crate) const ANSWERING: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 2);
/// A server whose replies the proxy's host forwards.
pub(crate) const RETURNING: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 3);
/// All hosts of 198.18.0.0/15 (RFC 2544, for benchmarks) are clients.
pub(crate) const FIRST_CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
/// The client that asks whether a proxy is ready.
const FIRST_OF_ALL: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);

const SETUP: &str = "
mount -t tmpfs tmpfs /run
mkdir -p /run/netns
for host in clients proxy server; do
    ip netns add $host
    ip -n $host link set lo up
done
join() {
    ip link add $2 netns $1 type veth peer name $4 netns $3
    ip -n $1 link set $2 up
    ip -n $3 link set $4 up
}
join clients out proxy front
join proxy back server in
ip -n clients addr add 10.1.0.2/24 dev out
ip -n clients route add local 198.18.0.0/15 dev lo
ip -n proxy addr add 10.1.0.1/24 dev front
ip -n proxy addr add 10.2.0.1/24 dev back
ip -n proxy route add 198.18.0.0/15 via 10.1.0.2
ip -n proxy rule add pref 100 iif back from 10.2.0.2 lookup 100
ip -n proxy route add local 0.0.0.0/0 dev lo table 100
ip netns exec proxy sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0 \
    net.ipv4.conf.back.rp_filter=0 net.ipv4.conf.back.accept_local=1
ip -n server addr add 10.2.0.2/24 dev in
ip -n server addr add 10.2.0.3/24 dev in
ip -n server addr add 10.1.0.1/32 dev lo
ip -n server route add default via 10.2.0.1
";

/// Makes the hosts, once.
pub(crate) fn make() -> Result<()> {
    if fs::exists(format!("/run/netns/{SERVER}"))? {
        return Ok(());
    }
    feed(Command::new("sh").args(["-e", "-s"]), SETUP).context("making three hosts")
}

/// Has the proxy's host make what comes from `server` come from `listener`.
pub(crate) fn rewrite(server: SocketAddrV4, listener: SocketAddrV4) -> Result<()> {
    let (ip, port) = (server.ip(), server.port());
    let rules = format!(
        "table ip dsr{port} {{
  chain pre {{ type filter hook prerouting priority raw; iifname back ip saddr {ip} udp sport {port} notrack; }}
  chain out {{ type filter hook output priority raw; ip daddr {ip} udp dport {port} notrack; }}
  chain post {{ type filter hook postrouting priority 300;
    oifname front ip saddr {ip} udp sport {port} udp sport set {} ip saddr set {}; }}
}}
",
        listener.port(),
        listener.ip()
    );
    let mut nft = Command::new("ip");
    nft.args(["netns", "exec", PROXY, "nft", "-f", "-"]);
    feed(&mut nft, &rules).context("rewriting replies, by nft of the Debian package nftables")
}

/// A socket of a client's.
pub(crate) fn client() -> Result<UdpSocket> {
    // A socket stays in the namespace of the thread that made it.
    let made = thread::spawn(|| {
        let namespace = fs::File::open(format!("/run/netns/{CLIENTS}"))?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(UdpSocket::bind((FIRST_OF_ALL, 0))?)
    });
    made.join().unwrap_or_else(|_| anyhow::bail!("no socket"))
}

fn feed(command: &mut Command, text: &str) -> Result<()> {
    let mut child = command.stdin(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().context("a pipe")?;
    input.write_all(text.as_bytes())?;
    drop(input);
    let status = child.wait()?;
    ensure!(status.success(), "{status}");
    Ok(())
}
