//! One test for every mode: all that a mode promises, step after step.

use std::net::SocketAddr;

use super::peers::EXCHANGES;
use super::{Answering, Client, Echo, Family, Lab, Proxy, Scheme, Side, exchange};
use crate::{eventually, receive_nothing};

/// A mode, and what is expected of it.
#[derive(Clone, Copy, Debug)]
pub struct ModeTest {
    pub scheme: Scheme,
    /// Keys of the proxy's listeners.
    pub mode: &'static str,
    /// The capabilities that the proxy keeps, all of those that it needs.
    pub capabilities: u64,
    /// How servers answer.
    pub answering: Answering,
    /// They see the client's port, too.
    pub port: bool,
    /// Replies come to the proxy.
    pub through_proxy: bool,
}

impl ModeTest {
    /// Runs it on both families, in a topology that has nothing of it before and
    /// after.
    #[track_caller]
    pub fn run(&self, test: &str, side: Side) {
        let Some(lab) = Lab::enter(test, side) else {
            return;
        };
        // Forwarded replies must not depend on it: a connected socket that one
        // matched would have the kernel drop it.
        let early_demux = lab.sh("proxy", "cat /proc/sys/net/ipv4/udp_early_demux");
        assert_eq!(early_demux.trim(), "1");
        let setup = lab.set_up(self.scheme);
        let proxy = lab.proxy(self.mode);
        proxy.assert_standing(self.capabilities);
        for family in Family::BOTH {
            let clients = [1, 2].map(|number| Client::new(&lab, family, number, 0));
            let before = Counts::of(&proxy, family);
            let server = Echo::new(&lab, family, self.answering);
            exchange(&clients, self.port);
            let asked = u64::try_from(2 * EXCHANGES).unwrap();
            assert_eq!(server.seen().len(), 2 * EXCHANGES);
            let replies = if self.through_proxy { asked } else { 0 };
            // A client may have the last one before it is counted.
            eventually("all replies to be counted", || {
                Counts::of(&proxy, family).replies - before.replies >= replies
            });
            let now = Counts::of(&proxy, family);
            assert_eq!(now.requests - before.requests, asked);
            assert_eq!(now.replies - before.replies, replies);
            assert_eq!(now.sessions - before.sessions, 2);
            self.source_is_right(family, &clients, &server);

            for client in &clients {
                for size in [0, 1, 1400, 3000, 9000] {
                    client.ask(&vec![b'x'; size]);
                }
            }
            drop(server);
            if family == Family::V4 && self.answering == Answering::Back {
                let _server = Echo::new(&lab, family, Answering::Unchecked);
                for client in &clients {
                    client.ask(b"without a checksum");
                    client.ask(&[b'y'; 3000]);
                }
            }
            self.survives_a_restart_of_the_server(&lab, family, &clients);
            self.passes_a_link_with_a_small_mtu(&lab, family, &clients);
        }
        drop(proxy);
        setup.undo();
    }

    fn source_is_right(&self, family: Family, clients: &[Client], server: &Echo) {
        let seen = server.seen();
        if self.answering == Answering::ByHeader {
            assert!(seen.iter().all(|source| source.ip() == family.proxy()));
            return;
        }
        for client in clients {
            let is_clients = |source: &&SocketAddr| source.ip() == client.address.ip();
            assert_eq!(seen.iter().filter(is_clients).count(), EXCHANGES);
        }
    }

    /// While no server is there, clients get nothing; then they are answered
    /// again, in the sessions that they had.
    fn survives_a_restart_of_the_server(&self, lab: &Lab, family: Family, clients: &[Client]) {
        for client in clients {
            for number in 0..3 {
                client.send(format!("to nobody {number}").as_bytes());
            }
        }
        for client in clients {
            receive_nothing(&client.socket);
        }
        let _server = Echo::new(lab, family, self.answering);
        for client in clients {
            client.ask(b"to somebody again");
        }
    }

    /// Answers that are too long for a link beyond the router. Over IPv4 routers
    /// fragment what the proxy sends. Over IPv6 no router does, and the proxy believes
    /// no ICMP, which can be forged: its interface must have the link's MTU. A server
    /// that answers clients itself is never told, and must know.
    fn passes_a_link_with_a_small_mtu(&self, lab: &Lab, family: Family, clients: &[Client]) {
        let _server = Echo::new(lab, family, self.answering);
        let [wide, narrow] = clients else {
            panic!("two clients");
        };
        lab.set_mtu_of_client2(1300);
        let question = [b'z'; 1400];
        if self.through_proxy {
            if family == Family::V6 {
                for _ in 0..2 {
                    assert_eq!(narrow.try_ask(&question), None);
                }
                narrow.ask(b"short ones pass");
                lab.set_mtu_of_proxy(1300);
                // The other client's host learns of it by what it loses.
                assert_eq!(wide.try_ask(&question), None);
            }
        } else {
            for _ in 0..2 {
                assert_eq!(narrow.try_ask(&question), None);
            }
            narrow.ask(b"short ones pass");
            lab.set_mtu_of_servers_route(Some(1280));
        }
        for _ in 0..20 {
            narrow.ask(&question);
            wide.ask(&question);
        }
        narrow.ask(&[b'z'; 3000]);
        lab.set_mtu_of_servers_route(None);
        lab.set_mtu_of_client2(1500);
        lab.set_mtu_of_proxy(1500);
    }
}

/// What the proxy has counted.
struct Counts {
    requests: u64,
    replies: u64,
    sessions: u64,
}

impl Counts {
    fn of(proxy: &Proxy<'_>, family: Family) -> Self {
        Self {
            requests: proxy.of(family, "ppv2_client_datagrams_total"),
            replies: proxy.of(family, "ppv2_reply_datagrams_total"),
            sessions: proxy.of(family, "ppv2_sessions_opened_total"),
        }
    }
}
