//! A small internet in network namespaces: two clients, a router, the proxy's
//! host and the server's, with IPv4 and IPv6, for what can't be shown on one
//! host. `hosts` has what modes ask of these hosts, `peers` clients and servers.

mod mode_test;
mod modes;
mod peers;

use std::fmt;
use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::dig::program;
use crate::{Process, binary, http, http_get, metric};

pub use mode_test::ModeTest;
pub use modes::{Scheme, Setup};
pub use peers::{Answering, Client, Echo, exchange, forged_v4, raw_icmp, raw_udp, unchecked};

/// Tells a test that it is run inside, and with which [`Rights`].
const INSIDE: &str = "PPV2_TEST_LAB";

/// Where the proxy's binary is, for a user who may not look into `target`; see
/// [`binary`](crate::binary).
const BINARY_INSIDE: &str = "PPV2_PROXY";

/// The ordinary user that root becomes.
const NOBODY: u32 = 65_534;

const ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9901);

/// Capabilities by their bits in /proc/PID/status (capability.h).
pub const NET_BIND_SERVICE: u64 = 1 << 10;
pub const NET_RAW: u64 = 1 << 13;

/// The user that a test runs as inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// As the machine's root.
    Root,
    /// As an ordinary user, who is root of a user namespace that has no other user.
    Ordinary,
}

impl Rights {
    const ALL: [Self; 2] = [Self::Root, Self::Ordinary];

    /// What makes namespaces with these rights, for a user that has more or just
    /// them.
    fn unshare(self) -> Command {
        let mut command = match (self, is_root()) {
            (Self::Ordinary, true) => {
                let mut command = Command::new("setpriv");
                command
                    .arg(format!("--reuid={NOBODY}"))
                    .arg(format!("--regid={NOBODY}"))
                    .args(["--clear-groups", "unshare"]);
                command
            }
            _ => Command::new("unshare"),
        };
        if self == Self::Ordinary {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["--net", "--mount"]);
        command
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Root => "as root",
            Self::Ordinary => "as an ordinary user in a user namespace",
        })
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Which route the server's host has to clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// It has none, and leaves by the proxy's host.
    Private,
    /// It leaves by the router, and only the proxy writes to it by the private side.
    Public,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The address of client 1 or 2.
    pub fn client(self, number: usize) -> IpAddr {
        self.ip(match number {
            1 => ["203.0.113.11", "2001:db8:c:1::11"],
            2 => ["203.0.113.27", "2001:db8:c:2::12"],
            _ => panic!("there are two clients"),
        })
    }

    /// Where clients write to.
    pub fn listener(self) -> SocketAddr {
        SocketAddr::new(self.ip(["198.51.100.10", "2001:db8:a::10"]), 9000)
    }

    /// Where the proxy writes to.
    pub fn server(self) -> SocketAddr {
        SocketAddr::new(self.ip(["10.0.0.2", "fd00:a::2"]), 9001)
    }

    /// The proxy's address on the server's side.
    pub fn proxy(self) -> IpAddr {
        self.ip(["10.0.0.1", "fd00:a::1"])
    }

    fn ip(self, choice: [&str; 2]) -> IpAddr {
        choice[usize::from(self == Self::V6)].parse().unwrap()
    }
}

/// The hosts and their links, without routes of any mode. Strict reverse path
/// filters are what many distributions have.
const LINKS: &str = r"
for host in client1 client2 router proxy server; do
    ip netns add $host
    strict=1; [ $host != router ] || strict=0
    ip netns exec $host sh -ec '
        cd /proc/sys/net; ip link set lo up
        echo 0 >ipv6/conf/default/accept_dad; echo 0 >ipv6/conf/all/accept_dad
        echo 0 >ipv4/conf/all/rp_filter; echo '$strict' >ipv4/conf/default/rp_filter
        echo 0 >ipv4/conf/all/src_valid_mark; echo 0 >ipv4/ip_forward'
done
ip -batch - <<END
link add c0 netns client1 type veth peer name r1 netns router
link add c0 netns client2 type veth peer name r2 netns router
link add rp netns router type veth peer name pub netns proxy
link add priv netns proxy type veth peer name s0 netns server
END
up() { # HOST DEVICE ADDRESS...
    host=$1 device=$2; shift 2
    { for address; do echo addr add $address dev $device; done; echo link set $device up; } |
        ip -n $host -batch -
}
up client1 c0 203.0.113.11/28 2001:db8:c:1::11/64
up client2 c0 203.0.113.27/28 2001:db8:c:2::12/64
up router r1 203.0.113.1/28 2001:db8:c:1::1/64
up router r2 203.0.113.17/28 2001:db8:c:2::1/64
up router rp 198.51.100.1/24 2001:db8:a::1/64
up proxy pub 198.51.100.10/24 2001:db8:a::10/64
up proxy priv 10.0.0.1/24 fd00:a::1/64
up server s0 10.0.0.2/24 fd00:a::2/64
via() { ip -n $1 route add default via $2; ip -n $1 -6 route add default via $3; }
via client1 203.0.113.1 2001:db8:c:1::1
via client2 203.0.113.17 2001:db8:c:2::1
via proxy 198.51.100.1 2001:db8:a::1
ip netns exec router sh -ec 'echo 1 | tee /proc/sys/net/ipv4/ip_forward >/proc/sys/net/ipv6/conf/all/forwarding'
";

const PRIVATE: &str = "via server 10.0.0.1 fd00:a::1";

const PUBLIC: &str = r"
ip link add rs netns router type veth peer name public netns server
up router rs 192.0.2.1/24 2001:db8:b::1/64
up server public 192.0.2.20/24 2001:db8:b::20/64
via server 192.0.2.1 2001:db8:b::1
";

/// The topology, from inside.
#[derive(Debug)]
pub struct Lab {
    pub rights: Rights,
    pub side: Side,
}

impl Lab {
    /// The topology, if the calling test runs inside namespaces of its own. If
    /// not, the test is run again inside: by root as root and as an ordinary
    /// user, by others as they are. Its success is asserted, and the caller has
    /// nothing left to do. All is gone with the processes inside.
    #[must_use]
    #[track_caller]
    pub fn enter(test: &str, side: Side) -> Option<Self> {
        if let Ok(inside) = std::env::var(INSIDE) {
            let rights = Rights::ALL.into_iter().find(|r| r.to_string() == inside);
            let rights = rights.unwrap();
            return Some(Self::build(rights, side));
        }
        for (package, name) in [("iproute2", "ip"), ("nftables", "nft")] {
            program(name, package);
        }
        for rights in Rights::ALL {
            if rights == Rights::Root && !is_root() {
                continue;
            }
            let output = run_inside(test, rights);
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let (out, err) = (text(&output.stdout), text(&output.stderr));
            assert!(
                output.status.success() && out.contains("1 passed"),
                "{test} failed {rights}: {}\n{out}\n{err}",
                output.status
            );
            eprintln!("{test}: passed {rights}");
        }
        None
    }

    fn build(rights: Rights, side: Side) -> Self {
        let more = match side {
            Side::Private => PRIVATE,
            Side::Public => PUBLIC,
        };
        run(&format!("{LINKS}{more}"));
        Self { rights, side }
    }

    /// Does `work` on a host: sockets and processes made there stay there.
    pub fn at<T: Send>(&self, host: &str, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let namespace = File::open(format!("/run/netns/{host}")).unwrap();
                let network = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(namespace.as_fd(), network).unwrap();
                work()
            });
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Runs a shell script on a host, and returns what it printed.
    pub fn sh(&self, host: &str, script: &str) -> String {
        self.at(host, || run(script))
    }

    /// The proxy on its host, with a listener of each family in this mode, from
    /// [`Family::listener`] to [`Family::server`]. `mode` is keys of a listener.
    pub fn proxy(&self, mode: &str) -> Proxy<'_> {
        self.proxy_with(&listeners(mode))
    }

    /// The proxy on its host with this file, to which `[admin]` is added.
    pub fn proxy_with(&self, config: &str) -> Proxy<'_> {
        self.proxy_by(&[], config)
    }

    /// The proxy, started by the command `wrapper`.
    pub fn proxy_by(&self, wrapper: &[&str], config: &str) -> Proxy<'_> {
        let file = tempfile::NamedTempFile::new().unwrap();
        write_config(file.path(), config);
        let mut words = wrapper
            .iter()
            .map(PathBuf::from)
            .chain([binary().to_owned()]);
        let mut command = Command::new(words.next().unwrap());
        command
            .args(words)
            .args(["run", "--config"])
            .arg(file.path());
        let mut process = self.at("proxy", || Process::start(&mut command));
        process.wait_for("ready");
        Proxy {
            lab: self,
            process,
            file,
        }
    }

    /// Runs on a host what `host-setup` prints there for this configuration.
    pub fn host_setup(&self, host: &str, config: &str, options: &[&str]) {
        let file = tempfile::NamedTempFile::new().unwrap();
        write_config(file.path(), config);
        let mut command = Command::new(binary());
        command.args(["host-setup", "--config"]).arg(file.path());
        let output = self.at(host, || command.args(options).output().unwrap());
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let (script, said) = (text(output.stdout), text(output.stderr));
        assert!(output.status.success(), "{config}{said}");
        self.sh(host, &script);
    }

    /// Has client 2 behind a link with this MTU.
    pub fn set_mtu_of_client2(&self, mtu: u32) {
        self.sh("router", &format!("ip link set r2 mtu {mtu}"));
        self.sh("client2", &format!("ip link set c0 mtu {mtu}"));
    }

    /// Has the proxy's host send to clients by a link with this MTU.
    pub fn set_mtu_of_proxy(&self, mtu: u32) {
        self.sh("proxy", &format!("ip link set pub mtu {mtu}"));
        self.sh("router", &format!("ip link set rp mtu {mtu}"));
    }

    /// Has the server send to clients in pieces of this size, or as the kernel
    /// chooses.
    pub fn set_mtu_of_servers_route(&self, mtu: Option<u32>) {
        let (v4, v6) = match self.side {
            Side::Private => ("10.0.0.1", "fd00:a::1"),
            Side::Public => ("192.0.2.1", "2001:db8:b::1"),
        };
        let (lock, mtu) = match mtu {
            Some(mtu) => (format!("mtu lock {mtu}"), format!("mtu {mtu}")),
            None => Default::default(),
        };
        let script = format!(
            "ip route replace default via {v4} {lock}; ip -6 route replace default via {v6} {mtu}"
        );
        self.sh("server", &script);
    }
}

fn write_config(file: &Path, config: &str) {
    let config = format!("{config}\n[admin]\nlisten = \"{ADMIN}\"\n");
    fs::write(file, config).unwrap();
    // A reload reads it as another user.
    fs::set_permissions(file, fs::Permissions::from_mode(0o644)).unwrap();
}

/// A listener and its server, named by their family.
pub fn listener(family: Family, mode: &str) -> String {
    let (bind, server) = (family.listener(), family.server());
    format!(
        r#"
[[listener]]
name = "{family:?}"
bind = ["{bind}"]
upstream = "{family:?}"
{mode}
[upstream.{family:?}]
servers = ["{server}"]
"#
    )
}

/// One of each family.
pub fn listeners(mode: &str) -> String {
    Family::BOTH.map(|family| listener(family, mode)).concat()
}

/// The proxy, running on its host.
pub struct Proxy<'l> {
    lab: &'l Lab,
    pub process: Process,
    file: tempfile::NamedTempFile,
}

impl Proxy<'_> {
    /// Writes this configuration and has the proxy reload it.
    pub fn reload(&self, config: &str) {
        write_config(self.file.path(), config);
        let (status, said) = self.lab.at("proxy", || http(ADMIN, "POST /reload", ""));
        assert_eq!(status, 200, "{said}");
    }

    /// The value of a metric, labels included in `name`.
    pub fn metric(&self, name: &str) -> u64 {
        self.lab.at("proxy", || metric(ADMIN, name))
    }

    /// The value of a metric of the family's listener.
    pub fn of(&self, family: Family, name: &str) -> u64 {
        self.metric(&format!("{name}{{listener=\"{family:?}\"}}"))
    }

    /// What the family's listener has dropped for `reason`.
    pub fn dropped(&self, family: Family, reason: &str) -> u64 {
        let name = "ppv2_dropped_datagrams_total";
        self.metric(&format!(
            "{name}{{listener=\"{family:?}\",reason=\"{reason}\"}}"
        ))
    }

    /// What the admin address says of sessions.
    pub fn sessions(&self) -> String {
        self.lab.at("proxy", || http_get(ADMIN, "/sessions").1)
    }

    /// Asserts that all threads are an ordinary user's, with these capabilities
    /// and no others.
    pub fn assert_standing(&self, capabilities: u64) {
        let user = match self.lab.rights {
            Rights::Root => NOBODY.to_string(),
            // The user namespace has no other user.
            Rights::Ordinary => "0".to_owned(),
        };
        let threads = format!("/proc/{}/task", self.process.pid());
        let mut count = 0;
        for thread in fs::read_dir(threads).unwrap() {
            let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap().split_whitespace().collect::<Vec<_>>()
            };
            assert_eq!(field("Uid:"), [user.as_str(); 4]);
            for set in ["CapEff:", "CapPrm:"] {
                assert_eq!(field(set), [format!("{capabilities:016x}")], "{set}");
            }
            for set in ["CapInh:", "CapAmb:"] {
                assert_eq!(field(set), [format!("{:016x}", 0)], "{set}");
            }
            count += 1;
        }
        assert!(count > 1, "{count} threads");
    }
}

/// Runs the test inside. Root has bind mounts show an ordinary user the two
/// binaries, which may stand where only root may go.
fn run_inside(test: &str, rights: Rights) -> Output {
    let tried = rights
        .unshare()
        .arg("true")
        .output()
        .unwrap_or_else(|error| {
            panic!("unshare(1) and setpriv(1) are in the Debian package util-linux: {error}")
        });
    assert!(
        tried.status.success(),
        "namespaces can't be made {rights}: {}allow user namespaces (sysctl \
         kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)",
        String::from_utf8_lossy(&tried.stderr)
    );
    let unshare = rights.unshare();
    let words = [unshare.get_program()]
        .into_iter()
        .chain(unshare.get_args());
    let words: Vec<_> = words.map(|word| word.to_str().unwrap()).collect();
    let words = words.join(" ");
    let inside = r#"mount -t tmpfs none /run; exec "$0" --exact "$2" --nocapture"#;
    let script = if rights == Rights::Ordinary && is_root() {
        format!(
            r#"mount -t tmpfs -o mode=755 none /mnt
            touch /mnt/test /mnt/proxy
            mount --bind "$0" /mnt/test
            mount --bind "$1" /mnt/proxy
            export {BINARY_INSIDE}=/mnt/proxy
            exec {words} sh -ec '{inside}' /mnt/test /mnt/proxy "$2""#
        )
    } else {
        format!(r#"exec {words} sh -ec '{inside}' "$0" "$1" "$2""#)
    };
    let mut command = if is_root() {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh"]);
        command
    } else {
        Command::new("sh")
    };
    command
        .args(["-ec", &script])
        .arg(std::env::current_exe().unwrap())
        .arg(binary())
        .arg(test)
        .env(INSIDE, rights.to_string())
        .output()
        .unwrap()
}

/// Runs a shell script that must succeed, and returns what it printed.
fn run(script: &str) -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("sh")
        .args(["-ec", script])
        // Debian keeps ip and nft where ordinary users don't look.
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert!(output.status.success(), "{script}\n{out}\n{err}");
    out
}
