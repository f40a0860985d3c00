//! The proxy's session table under anything that clients, servers and time can
//! do to it, in any order, beside a record of who opened which session.
#![no_main]

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ppv2_engine::address::{ClientAddr, ListenerAddr, ServerAddr};
use ppv2_engine::capacity::{Capacity, Full, Need};
use ppv2_engine::counters::EndReason;
use ppv2_engine::listener::{Listener, ListenerSettings, Rules};
use ppv2_engine::server::Server;
use ppv2_engine::session::{AfterEnd, Amount, Ended, Key, MAX_REST, SessionId, Table};

const ONE: Amount = Amount {
    datagrams: 1,
    bytes: 64,
};

#[derive(Arbitrary, Debug)]
struct Input {
    responses: u8,
    requests: u8,
    idle_seconds: u8,
    max_sessions: u8,
    max_sockets: u8,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Datagram { client: u8, local: bool },
    Reply { session: u8 },
    Abort { session: u8 },
    Pass { millis: u16 },
    Close { need: u8 },
    TakeOver { need: u8 },
    SetAside,
}

fn need(of: u8) -> Need {
    [Need::None, Need::Supply, Need::Now][usize::from(of % 3)]
}

fn key(client: u8, local: bool) -> Key {
    // Clients share addresses and ports in every combination.
    let ip = IpAddr::from([203, 0, 113, client >> 4]);
    Key::direct(
        ClientAddr(SocketAddr::new(ip, u16::from(client & 15) + 1)),
        ListenerAddr(SocketAddr::from((
            [198, 51, 100, 10],
            53 + u16::from(local),
        ))),
    )
}

struct Bench {
    table: Table<Key>,
    settings: Arc<ListenerSettings>,
    server: Arc<Server>,
    ended: Receiver<Ended>,
    capacity: Arc<Capacity>,
    now: Instant,
    owners: HashMap<u64, Key>,
    opened: Vec<SessionId>,
}

impl Bench {
    fn datagram(&mut self, key: Key) {
        if let Some(id) = self.table.request(self.now, &key, ONE) {
            assert_eq!(self.owners.get(&id.to_bits()), Some(&key));
            return;
        }
        let permit = match self.capacity.take() {
            Err(Full::Sockets) => {
                assert!(self.table.retired() > 0, "sockets are with ended sessions");
                if !self.close(Need::Now) {
                    return;
                }
                self.capacity.take().ok()
            }
            taken => taken.ok(),
        };
        let Some(permit) = permit else {
            assert_eq!(self.table.active(), self.capacity.max());
            return;
        };
        let id = self
            .table
            .open(self.now, key, &self.settings, &self.server, permit, key);
        assert_eq!(self.table.request(self.now, &key, ONE), Some(id));
        assert_eq!(
            self.owners.insert(id.to_bits(), key),
            None,
            "an id was used again"
        );
        self.opened.push(id);
    }

    fn reply(&mut self, id: SessionId) {
        let owner = self.owners[&id.to_bits()];
        let before = self.table.get(id).map(|session| session.is_active());
        match self.table.reply(self.now, id, ONE) {
            Some(reply) => assert_eq!((reply.to, reply.from), (owner.client, owner.local)),
            None => assert_ne!(before, Some(true), "a session that lives lost a reply"),
        }
    }

    fn close(&mut self, need: Need) -> bool {
        let id = self.table.closable(self.now, need, |_| true);
        id.is_some_and(|id| self.table.take(self.now, id).is_some())
    }

    fn check(&self, idle: Duration) {
        assert_eq!(self.table.active(), self.capacity.taken());
        let sockets = self.table.active() + self.table.retired();
        assert_eq!(sockets, self.capacity.sockets());
        assert!(sockets <= self.capacity.max_sockets());
        for (_, session) in self.table.iter_from(0) {
            assert_eq!(session.key(), session.connection);
            let last_active = self.table.clock().instant(session.last_active);
            assert!(self.now - last_active <= idle + Duration::from_millis(100));
        }
    }
}

fuzz_target!(|input: Input| {
    let idle = Duration::from_secs(u64::from(input.idle_seconds) + 1);
    let rules = Rules {
        idle_timeout: idle,
        responses: u64::from(input.responses % 4),
        requests: u64::from(input.requests % 4),
        amplification: None,
    };
    let now = Instant::now();
    let most = usize::from(input.max_sessions % 16) + 1;
    let capacity = Capacity::new(most, most + usize::from(input.max_sockets % 8));
    let mut table = Table::new(now, 0, &capacity, |_: &Key| AfterEnd::RestForReuse);
    let (log, ended) = sync_channel(1024);
    table.log_to(Some(log));
    let server = ServerAddr(SocketAddr::from(([192, 0, 2, 1], 53)));
    let mut bench = Bench {
        table,
        settings: Arc::new(ListenerSettings::new(Listener::new("l", 1), rules)),
        server: Server::new("u", "s", server, 1),
        ended,
        capacity,
        now,
        owners: HashMap::new(),
        opened: Vec::new(),
    };
    let pick =
        |opened: &[SessionId], n: u8| opened.get(usize::from(n) % opened.len().max(1)).copied();
    for step in input.steps {
        match step {
            Step::Datagram { client, local } => bench.datagram(key(client, local)),
            Step::Reply { session } => {
                if let Some(id) = pick(&bench.opened, session) {
                    bench.reply(id);
                }
            }
            Step::Abort { session } => {
                if let Some(id) = pick(&bench.opened, session) {
                    let abortable = |table: &Table<Key>| {
                        table
                            .get(id)
                            .is_some_and(|s| s.is_active() && s.requests == 1)
                    };
                    if abortable(&bench.table) && bench.opened.last() == Some(&id) {
                        bench.table.abort(id);
                        assert!(bench.table.get(id).is_none());
                    }
                }
            }
            Step::Pass { millis } => {
                bench.now += Duration::from_millis(u64::from(millis));
                let active = |bench: &Bench| -> Vec<_> {
                    let sessions = bench.table.iter_from(0);
                    sessions.map(|(_, s)| (s.key(), s.last_active)).collect()
                };
                let now = bench.table.clock().moment(bench.now);
                let young: Vec<_> = active(&bench)
                    .into_iter()
                    .filter(|(_, last_active)| now.since(*last_active) < idle)
                    .collect();
                bench.ended.try_iter().for_each(drop);
                bench.table.expire(bench.now, |_| true);
                let left = active(&bench);
                assert!(young.iter().all(|one| left.contains(one)));
                for ended in bench.ended.try_iter() {
                    assert_eq!(ended.reason, EndReason::Idle);
                }
            }
            Step::Close { need: of } => {
                let before = bench.table.retired();
                assert_eq!(bench.close(need(of)), bench.table.retired() < before);
            }
            Step::TakeOver { need: of } => {
                let before = bench.table.retired();
                let id = {
                    let listener = &bench.settings.listener;
                    bench
                        .table
                        .reusable(bench.now, listener, &bench.server, need(of))
                };
                let taken = id.and_then(|id| bench.table.take(bench.now, id));
                assert_eq!(taken.is_some(), bench.table.retired() < before);
            }
            Step::SetAside => {
                let (listener, server) = (bench.settings.listener.id(), bench.server.id());
                bench.table.set_aside(listener, server);
            }
        }
        bench.check(idle);
    }
    // A few at a time.
    for passes in [idle, MAX_REST, MAX_REST, MAX_REST] {
        bench.now += passes + Duration::from_secs(60);
        bench.table.expire(bench.now, |_| true);
    }
    assert_eq!((bench.table.active(), bench.table.retired()), (0, 0));
});
