//! How much memory sessions take, by what their table allocates: there may be a million.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ppv2_engine::accept::{Accept, Direct, Formats, LocalHeaders, Remember, Senders};
use ppv2_engine::address::{ClientAddr, ListenerAddr, ServerAddr};
use ppv2_engine::capacity::{Capacity, Need};
use ppv2_engine::counters::EndReason;
use ppv2_engine::listener::{Listener, ListenerSettings, Rules};
use ppv2_engine::server::Server;
use ppv2_engine::session::{AfterEnd, Amount, Key, ReplyHeader, SessionId, Table, Via};

/// As much as a worker keeps with a session that has no socket of its own.
type Kept = [u64; 8];

fn source_of(kept: &Kept) -> Option<IpAddr> {
    u32::try_from(kept[0])
        .ok()
        .map(|client| Ipv4Addr::from(client).into())
}

struct Bench {
    table: Table<Kept>,
    settings: Arc<ListenerSettings>,
    server: Arc<Server>,
    capacity: Arc<Capacity>,
    now: Instant,
}

impl Bench {
    fn new(max_sessions: usize) -> Self {
        let now = Instant::now();
        let rules = Rules {
            idle_timeout: Duration::from_secs(30),
            responses: 0,
            requests: 0,
            amplification: None,
        };
        let address = ServerAddr(([192, 0, 2, 1], 53).into());
        let capacity = Capacity::new(max_sessions, max_sessions);
        Self {
            table: Table::new(now, 0, &capacity, |_| AfterEnd::Pass).with_sources(source_of),
            settings: Arc::new(ListenerSettings::new(Listener::new("l", 1), rules)),
            server: Server::new("u", "s", address, 1),
            capacity,
            now,
        }
    }

    fn begin(&mut self, client: u32) -> SessionId {
        let key = Key::direct(
            ClientAddr((Ipv4Addr::from(client), 1024).into()),
            ListenerAddr(([198, 51, 100, 10], 53).into()),
        );
        let permit = self.capacity.take().unwrap();
        let (settings, server) = (&self.settings, &self.server);
        let id = self
            .table
            .open(self.now, key, settings, server, permit, [client.into(); 8]);
        let amount = Amount {
            datagrams: 1,
            bytes: 64,
        };
        assert_eq!(self.table.request(self.now, &key, amount), Some(id));
        id
    }
}

impl Bench {
    /// A session of a client that comes by a port of its own of a proxy in front.
    fn begin_behind(&mut self, senders: &mut Senders, accept: &Accept, client: u32) {
        let from = SocketAddr::from((Ipv4Addr::from(1 << 24 | client >> 14), 1024 + port(client)));
        let to = SocketAddr::from(([192, 0, 2, 20], 5300));
        let address = SocketAddr::from((Ipv4Addr::from(client | 1 << 25), 1024));
        let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
        let header = ppv2::encode_udp(address, to, &mut buffer).unwrap();
        let arrival = senders
            .read(accept, 1, (from, to), header, self.now)
            .unwrap();
        let sender = senders.get(arrival.key.sender).unwrap();
        let via = Box::new(Via {
            sender: Arc::clone(sender),
            heard: self.table.clock().moment(self.now),
            changes: sender.changes(),
            reply_header: ReplyHeader::None,
        });
        let permit = self.capacity.take().unwrap();
        let (settings, server) = (&self.settings, &self.server);
        let kept = [client.into(); 8];
        self.table.open_via(
            self.now,
            arrival.key,
            Some(via),
            settings,
            server,
            permit,
            kept,
        );
    }
}

fn port(client: u32) -> u16 {
    u16::try_from(client % (1 << 14)).unwrap()
}

/// What is allocated while it runs and not freed, in bytes for each of so many sessions.
fn allocated(sessions: u32, run: impl FnOnce()) -> u64 {
    let measured = allocation_counter::measure(run);
    u64::try_from(measured.bytes_current).unwrap() / u64::from(sessions)
}

#[test]
fn sessions_take_few_bytes_and_no_more_when_they_end_or_others_follow() {
    // Where arrays have just doubled, half of what is allocated isn't touched; where they
    // are full, nearly all is.
    for (sessions, at_most) in [(100_000, 310), (131_072, 240)] {
        let mut bench = Bench::new(sessions as usize);
        let mut ids = Vec::with_capacity(sessions as usize);
        let bytes = allocated(sessions, || {
            ids.extend((0..sessions).map(|client| bench.begin(client)));
        });
        assert!(bytes <= at_most, "{sessions} sessions: {bytes} bytes each");

        // All but the first few, one after the other, while their late replies pass.
        let bytes = allocated(sessions, || {
            for id in &ids[10..] {
                bench.table.end(bench.now, *id, EndReason::Moved);
            }
        });
        assert_eq!(bytes, 0, "{sessions} ended sessions");
        assert_eq!(bench.table.retired(), sessions as usize - 10);

        // Tombstones may have the indices double once.
        let bytes = allocated(sessions, || {
            for client in 0..3 * sessions {
                let id = bench.table.closable(bench.now, Need::Now, |_| true);
                bench.table.take(bench.now, id.unwrap()).unwrap();
                let id = bench.begin(1 << 24 | client);
                bench.table.end(bench.now, id, EndReason::Moved);
            }
        });
        assert!(bytes <= 20, "{bytes} bytes more for each that follows");
    }
}

#[test]
fn a_proxy_in_front_takes_few_bytes_for_each_session_or_client_that_it_has_said() {
    const SESSIONS: u32 = 131_072;
    let accept = |remember| Accept {
        from: Vec::new(),
        formats: Formats {
            v2: true,
            spp: false,
        },
        direct: Direct::Drop,
        local: LocalHeaders::Forward,
        passes_tlvs: false,
        remember,
    };
    let remember = Remember {
        idle: Duration::from_secs(30),
        max: SESSIONS as usize,
        forwards_empty: false,
    };
    for accept in [accept(None), accept(Some(remember))] {
        let mut bench = Bench::new(SESSIONS as usize);
        let mut senders = Senders::default();
        let bytes = allocated(SESSIONS, || {
            for client in 0..SESSIONS {
                bench.begin_behind(&mut senders, &accept, client);
            }
        });
        assert!(bytes <= 720, "{bytes} bytes each");
    }
}
