//! Two hosts and a router as network namespaces: the test runs on the proxy's host, the
//! server's is behind it, and the router leads to clients.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

/// `ip netns` keeps its files under /run, and `host-setup` its own.
///
/// The proxy's host has `pub` 198.51.100.10 and 2001:db8:a::10, and `priv`
/// 10.0.0.1 and fd00:a::1; the server `priv` 10.0.0.2 and fd00:a::2, and `pub`
/// 192.0.2.20 and 2001:db8:e::20, from which the router leads to clients, too.
pub const SETUP: &str = "
mount -t tmpfs tmpfs /run
ip netns add server; ip netns add router
ip link add priv type veth peer name priv netns server
ip link add pub type veth peer name proxy netns router
ip -n server link add pub type veth peer name server netns router
run() { ip netns exec \"$@\"; }
# Link-local addresses of the kernel's own would appear in the middle of a test.
up() { ip $1 link set lo up; ip $1 link set $2 addrgenmode none; ip $1 link set $2 up; ip $1 addr add $3 dev $2; ip $1 addr add $4 dev $2 nodad; ip $1 addr add $5/64 dev $2 nodad; }
up '' priv 10.0.0.1/24 fd00:a::1/64 fe80::1
up '' pub 198.51.100.10/24 2001:db8:a::10/64 fe80::1
up '-n server' priv 10.0.0.2/24 fd00:a::2/64 fe80::2
up '-n server' pub 192.0.2.20/24 2001:db8:e::20/64 fe80::2
up '-n router' proxy 198.51.100.1/24 2001:db8:a::1/64 fe80::3
up '-n router' server 192.0.2.1/24 2001:db8:e::1/64 fe80::3
ip -n router addr add 203.0.113.11/32 dev lo; ip -n router addr add 2001:db8:c::11/128 dev lo nodad
ip route add default via 198.51.100.1; ip -6 route add default via 2001:db8:a::1
run router sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
for host in '' 'run server'; do $host sysctl -q -w net.ipv4.conf.all.rp_filter=1; done
";

/// How a command of a host's is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    Proxy,
    Server,
}

impl Host {
    fn command(self, program: impl AsRef<OsStr>) -> Command {
        match self {
            Self::Proxy => Command::new(program),
            Self::Server => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", "server"]).arg(program);
                command
            }
        }
    }

    /// Runs a shell script, which must succeed, and returns what it printed.
    #[track_caller]
    pub fn shell(self, script: &str) -> String {
        let output = self.command("sh").args(["-ec", script]).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success(),
            "{script}\n{}{}",
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    /// Runs a shell script with bash and has it killed, with all that it has started,
    /// before the `number`th of the commands that read or change anything. `false`
    /// if it has come to its end, successfully.
    #[track_caller]
    pub fn killed_at(self, number: usize, script: &std::path::Path) -> bool {
        let killer = format!(
            r#"n=0; set -T
            trap 'case $BASH_COMMAND in
                ip\ *|nft\ *|echo\ *|cat\ *|tac\ *|rm\ *)
                    n=$((n + 1)); [ $n -ne {number} ] || kill -KILL 0 ;;
            esac' DEBUG
            . "$0""#
        );
        let mut command = self.command("setsid");
        command.args(["--wait", "bash", "-c", &killer]).arg(script);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let killed = output.status.signal() == Some(9) || output.status.code() == Some(137);
        assert!(
            killed || output.status.success(),
            "{}: {said}",
            output.status
        );
        killed
    }

    /// Runs the proxy's binary: how it ended, and what it printed.
    pub fn proxy(self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = self.command(crate::binary()).args(arguments).output();
        let output = output.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        )
    }

    /// Everything that a setup may change.
    pub fn state(self) -> String {
        self.shell(
            "ip -4 rule; ip -6 rule; ip -4 route show table all; ip -6 route show table all
             ip -o addr show dev lo; nft list ruleset; ls /run
             cd /proc/sys/net; grep -rs . ipv4/conf ipv6/conf ipv4/ip_forward || :",
        )
    }
}

/// Lines that one state has and the other doesn't.
pub fn difference(a: &str, b: &str) -> Vec<String> {
    let only = |a: &str, b: &str, sign: char| {
        let others: HashSet<_> = b.lines().collect();
        let missing = a.lines().filter(|line| !others.contains(line));
        missing
            .map(|line| format!("{sign}{line}"))
            .collect::<Vec<_>>()
    };
    [only(a, b, '-'), only(b, a, '+')].concat()
}
