//! The host setup that each mode needs, and its removal. Without one of these, no reply of
//! the server reaches the client.

use super::Lab;
use crate::eventually;
use crate::two_hosts::difference;

/// How the server's replies reach the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// The proxy's host has replies come to the proxy.
    Transparent,
    /// The proxy's host forwards replies and writes the listener's address in.
    RewriteOnProxy,
    /// The server's host does so, and sends them by itself.
    RewriteOnServer,
    /// The server owns the listener's address, and leaves by the proxy's host.
    SdkByProxy,
    /// The server owns the listener's address, and leaves by itself.
    Sdk,
}

/// A host, what to do there, and how to undo it.
type Step = (&'static str, &'static str, &'static str);

const TRANSPARENT: &[Step] = &[(
    "proxy",
    "ip    rule add pref 100 iif priv from 10.0.0.2/32   lookup 100
     ip    route add local 0.0.0.0/0 dev lo table 100
     ip -6 rule add pref 100 iif priv from fd00:a::2/128 lookup 100
     ip -6 route add local ::/0 dev lo table 100",
    "ip    rule del pref 100; ip    route flush table 100
     ip -6 rule del pref 100; ip -6 route flush table 100",
)];

const FORWARD: Step = (
    "proxy",
    "echo 1 | tee /proc/sys/net/ipv4/ip_forward >/proc/sys/net/ipv6/conf/all/forwarding",
    "echo 0 | tee /proc/sys/net/ipv4/ip_forward >/proc/sys/net/ipv6/conf/all/forwarding",
);

const REWRITE_ON_PROXY: &[Step] = &[
    FORWARD,
    (
        "proxy",
        r#"nft -f - <<END
table inet ppv2_dsr {
    chain pre {
        type filter hook prerouting priority raw;
        iifname "priv" ip saddr 10.0.0.2 udp sport 9001 notrack
        iifname "priv" ip6 saddr fd00:a::2 udp sport 9001 notrack
    }
    chain defrag {
        type filter hook prerouting priority mangle;
        meta mark 0xdef0dead meta l4proto udp tproxy to :1
    }
    chain out {
        type filter hook output priority raw;
        ip daddr 10.0.0.2 udp dport 9001 notrack
        ip6 daddr fd00:a::2 udp dport 9001 notrack
    }
    chain post {
        type filter hook postrouting priority 300;
        oifname "pub" ip saddr 10.0.0.2 udp sport 9001 udp checksum 0 udp sport set 9000 ip saddr set 198.51.100.10 udp checksum set 0 accept
        oifname "pub" ip saddr 10.0.0.2 udp sport 9001 udp sport set 9000 ip saddr set 198.51.100.10
        oifname "pub" ip6 saddr fd00:a::2 udp sport 9001 udp sport set 9000 ip6 saddr set 2001:db8:a::10
    }
}
END"#,
        "nft delete table inet ppv2_dsr",
    ),
];

const REWRITE_ON_SERVER: &[Step] = &[
    (
        "server",
        "echo 2 >/proc/sys/net/ipv4/conf/s0/rp_filter",
        "echo 1 >/proc/sys/net/ipv4/conf/s0/rp_filter",
    ),
    (
        "server",
        r#"nft -f - <<END
table inet ppv2_dsr {
    chain post {
        type filter hook postrouting priority 300;
        oifname "public" meta nfproto ipv4 udp sport 9001 udp checksum 0 udp sport set 9000 ip saddr set 198.51.100.10 udp checksum set 0 accept
        oifname "public" meta nfproto ipv4 udp sport 9001 udp sport set 9000 ip saddr set 198.51.100.10
        oifname "public" meta nfproto ipv6 udp sport 9001 udp sport set 9000 ip6 saddr set 2001:db8:a::10
    }
}
END"#,
        "nft delete table inet ppv2_dsr",
    ),
];

/// IPv6 takes nothing: IPV6_FREEBIND does.
const SDK: &[Step] = &[(
    "server",
    "ip addr add 198.51.100.10/32 dev lo",
    "ip addr del 198.51.100.10/32 dev lo",
)];

/// Replies come in with an address of the proxy's host as their source.
const SDK_BY_PROXY: &[Step] = &[
    SDK[0],
    FORWARD,
    (
        "proxy",
        "echo 1 >/proc/sys/net/ipv4/conf/priv/accept_local
         echo 2 >/proc/sys/net/ipv4/conf/priv/rp_filter",
        "echo 0 >/proc/sys/net/ipv4/conf/priv/accept_local
         echo 1 >/proc/sys/net/ipv4/conf/priv/rp_filter",
    ),
];

/// All that setting up could leave behind on a host.
const EVERYTHING: &str = "
ip -o addr; ip -4 rule; ip -6 rule; ip -4 route show table all; ip -6 route show table all
nft list ruleset
find /proc/sys/net/ipv4 /proc/sys/net/ipv6 -type f -perm -u=r -exec grep -Hs . {} + || true";

const HOSTS: [&str; 2] = ["proxy", "server"];

impl Lab {
    /// Sets the hosts up for a scheme.
    pub fn set_up(&self, scheme: Scheme) -> Setup<'_> {
        let steps = match scheme {
            Scheme::Transparent => TRANSPARENT,
            Scheme::RewriteOnProxy => REWRITE_ON_PROXY,
            Scheme::RewriteOnServer => REWRITE_ON_SERVER,
            Scheme::SdkByProxy => SDK_BY_PROXY,
            Scheme::Sdk => SDK,
        };
        let before = self.settled();
        for (host, set_up, _) in steps {
            self.sh(host, set_up);
        }
        Setup {
            lab: self,
            steps,
            before,
        }
    }

    /// Everything, once what the kernel does by itself to a new interface is done.
    fn settled(&self) -> [String; 2] {
        let mut seen = self.everything();
        eventually("the hosts to settle", || {
            let before = std::mem::replace(&mut seen, self.everything());
            seen == before && !seen.iter().any(|host| host.contains("tentative"))
        });
        seen
    }

    fn everything(&self) -> [String; 2] {
        HOSTS.map(|host| self.sh(host, EVERYTHING))
    }
}

/// Hosts that are set up.
pub struct Setup<'l> {
    lab: &'l Lab,
    steps: &'static [Step],
    before: [String; 2],
}

impl Setup<'_> {
    /// Removes it again, and asserts that no rule, route, address or sysctl is
    /// left that was not there before, and that there was something to remove.
    pub fn undo(self) {
        let with = self.lab.everything();
        assert!(with != self.before, "nothing was set up");
        for (host, _, undo) in self.steps.iter().rev() {
            self.lab.sh(host, undo);
        }
        let after = self.lab.everything();
        for ((host, before), after) in HOSTS.iter().zip(&self.before).zip(&after) {
            let changes = difference(before, after);
            assert!(changes.is_empty(), "{host}: {changes:#?}");
        }
    }
}
