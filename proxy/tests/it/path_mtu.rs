//! What the kernel is told of a path's MTU can be forged: it changes nothing.

use std::net::{IpAddr, SocketAddr};

use ppv2_lab::eventually;
use ppv2_lab::network::{Answering, Client, Echo, Family, Lab, Scheme, Side, raw_icmp};
use ppv2_lab::test_name;

/// The smallest MTU that Linux believes in by default.
fn least_mtu(family: Family) -> usize {
    match family {
        Family::V4 => 552,
        Family::V6 => 1280,
    }
}

/// Longer than that with headers, and short enough for the links with them.
const PAYLOAD: [u8; 1300] = [b'x'; 1300];

const MODES: [(&str, Option<Scheme>); 3] = [
    ("mode = \"plain\"", None),
    ("mode = \"transparent\"", Some(Scheme::Transparent)),
    ("mode = \"dsr\"", Some(Scheme::RewriteOnProxy)),
];

#[test]
fn forged_path_mtu_neither_loses_nor_fragments_datagrams() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    for (mode, scheme) in MODES {
        let setup = scheme.map(|scheme| lab.set_up(scheme));
        for df in [true, false] {
            let proxy = lab.proxy(&format!("{mode}\ndont_fragment = {df}"));
            for family in Family::BOTH {
                let server = Echo::new(&lab, family, Answering::Back);
                let client = Client::new(&lab, family, 1, 0);
                let session = client.ask(&PAYLOAD);
                // Of the client, the path is that of the server's host in mode dsr.
                let mut paths = vec![(family.server(), session)];
                if scheme != Some(Scheme::RewriteOnProxy) {
                    paths.push((client.address, family.listener()));
                }
                for (to, from) in paths {
                    believe(&lab, family, from, to);
                }
                let before = fragments(&lab);
                for _ in 0..20 {
                    assert_eq!(client.ask(&PAYLOAD), session);
                }
                let another = Client::new(&lab, family, 1, 0);
                another.ask(&PAYLOAD);
                assert_eq!(fragments(&lab), before, "{mode} df={df} {family:?}");
                assert_eq!(proxy.dropped(family, "oversize"), 0);
                assert_eq!(proxy.dropped(family, "reply_oversize"), 0);
                lab.sh("proxy", "ip route flush cache; ip -6 route flush cache");
                drop(server);
            }
        }
        if let Some(setup) = setup {
            setup.undo();
        }
    }
}

/// A report is counted apart from refusals, which judge servers.
#[test]
fn forged_path_mtu_does_not_count_as_a_refusal() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    let proxy = lab.proxy("mode = \"plain\"\ndont_fragment = true");
    for family in Family::BOTH {
        let _server = Echo::new(&lab, family, Answering::Back);
        let client = Client::new(&lab, family, 1, 0);
        let session = client.ask(&PAYLOAD);
        forge(&lab, family, session, family.server(), quoted_udp);
        let of = |name: &str| {
            let server = family.server();
            let labels = format!("{{upstream=\"{family:?}\",server=\"{server}\"}}");
            proxy.metric(&format!("ppv2_upstream_{name}_total{labels}"))
        };
        eventually("the report to be counted", || of("icmp_too_big") == 1);
        client.ask(&PAYLOAD);
        assert_eq!(of("icmp_errors"), 0);
    }
}

/// Has the kernel of the proxy's host believe in the smallest MTU of the path to
/// `to`, by a report that quotes a datagram of the proxy's and by one that quotes an
/// echo reply, which no socket of the proxy's hears of.
fn believe(lab: &Lab, family: Family, from: SocketAddr, to: SocketAddr) {
    forge(lab, family, from, to, quoted_udp);
    forge(lab, family, from, to, quoted_echo);
    let host = to.ip();
    eventually(&format!("a smaller MTU of the path to {host}"), || {
        let mtu = format!("mtu {}", least_mtu(family));
        let route = lab.sh("proxy", &format!("ip route get {host}"));
        route.replace("mtu lock", "mtu").contains(&mtu)
    });
}

/// Sends the proxy's host a report from client 2 that what it sent from `from` to
/// `to` was too long.
fn forge(
    lab: &Lab,
    family: Family,
    from: SocketAddr,
    to: SocketAddr,
    quoted: fn(Family, SocketAddr, SocketAddr) -> Vec<u8>,
) {
    let quoted = quoted(family, from, to);
    let mtu = u32::try_from(least_mtu(family)).unwrap();
    // Type and code of RFC 792 and RFC 4443, section 3.2, a checksum that the kernel
    // or this function fills in, and the MTU.
    let mut message = match family {
        Family::V4 => vec![3, 4, 0, 0],
        Family::V6 => vec![2, 0, 0, 0],
    };
    message.extend(mtu.to_be_bytes());
    message.extend(quoted);
    if family == Family::V4 {
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    let target = SocketAddr::new(family.listener().ip(), 0);
    let attacker = lab.at("client2", || raw_icmp(family));
    attacker.send_to(&message, &target.into()).unwrap();
}

/// The IP header and the first bytes of a UDP datagram.
fn quoted_udp(family: Family, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let mut quoted = ip_header(family, from.ip(), to.ip(), 17);
    for field in [from.port(), to.port(), 1308, 0] {
        quoted.extend(field.to_be_bytes());
    }
    quoted
}

/// The same of an echo reply.
fn quoted_echo(family: Family, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let (protocol, kind) = match family {
        Family::V4 => (1, 0),
        Family::V6 => (58, 129),
    };
    // In mode transparent `from` is the client's, which is not the host's own.
    let own = if to == family.server() {
        family.proxy()
    } else {
        from.ip()
    };
    let mut quoted = ip_header(family, own, to.ip(), protocol);
    quoted.extend([kind, 0, 0, 0, 0, 1, 0, 1]);
    quoted
}

fn ip_header(family: Family, from: IpAddr, to: IpAddr, protocol: u8) -> Vec<u8> {
    let mut header = match family {
        Family::V4 => vec![0x45, 0, 0x05, 0x30, 0, 1, 0x40, 0, 64, protocol, 0, 0],
        Family::V6 => vec![0x60, 0, 0, 0, 0x05, 0x1c, protocol, 64],
    };
    for ip in [from, to] {
        match ip {
            IpAddr::V4(ip) => header.extend(ip.octets()),
            IpAddr::V6(ip) => header.extend(ip.octets()),
        }
    }
    header
}

/// RFC 1071.
fn checksum(message: &[u8]) -> u16 {
    let words = message.as_chunks::<2>().0.iter();
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap()
}

/// How many fragments the client's and the server's hosts have received.
fn fragments(lab: &Lab) -> Vec<String> {
    let counts = "awk '/^Ip:/ { print $15 }' /proc/net/snmp
                  awk '/^Ip6ReasmReqds/ { print }' /proc/net/snmp6";
    ["client1", "server"]
        .map(|host| lab.sh(host, counts))
        .to_vec()
}
