//! The session table driven through hours without waiting for any of them.

use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Instant;

use proptest::prelude::*;

use super::*;
use crate::address::ServerAddr;
use crate::capacity::{Capacity, Full, Need, Permit};
use crate::listener::Rules;

mod passing;
mod resting;
mod restored;
mod unanswered;

const ONE: Amount = Amount {
    datagrams: 1,
    bytes: 100,
};

const RULES: Rules = Rules {
    idle_timeout: Duration::from_secs(30),
    responses: 0,
    requests: 0,
    amplification: None,
};

fn settings(rules: Rules) -> Arc<ListenerSettings> {
    Arc::new(ListenerSettings::new(Listener::new("l", 1), rules))
}

fn servers<const N: usize>() -> [Arc<Server>; N] {
    let address = |port| ServerAddr(([192, 0, 2, 1], port).into());
    std::array::from_fn(|n| {
        let port = 53 + u16::try_from(n).unwrap();
        Server::new("u", &n.to_string(), address(port), 1)
    })
}

/// A table whose sessions rest at their end, and what it logs.
fn table<C>(now: Instant, capacity: &Arc<Capacity>) -> (Table<C>, Receiver<Ended>) {
    let mut table = Table::new(now, 0, capacity, |_| AfterEnd::RestForReuse);
    let (log, ended) = sync_channel(4096);
    table.log_to(Some(log));
    (table, ended)
}

struct Bench {
    table: Table<&'static str>,
    settings: Arc<ListenerSettings>,
    servers: [Arc<Server>; 3],
    capacity: Arc<Capacity>,
    now: Instant,
    log: Receiver<Ended>,
    ended: Vec<(Key, EndReason)>,
}

impl Bench {
    fn new(rules: Rules, max_sessions: usize, more_sockets: usize) -> Self {
        let capacity = Capacity::new(max_sessions, max_sessions + more_sockets);
        Self::of(rules, capacity)
    }

    fn of(rules: Rules, capacity: Arc<Capacity>) -> Self {
        let now = Instant::now();
        let (table, log) = table(now, &capacity);
        Self {
            table,
            settings: settings(rules),
            servers: servers(),
            capacity,
            now,
            log,
            ended: Vec::new(),
        }
    }

    fn pass(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
        self.table.expire(self.now, |_| true);
        self.note_ended();
    }

    fn note_ended(&mut self) {
        let ended = self.log.try_iter();
        self.ended
            .extend(ended.map(|ended| (ended.key, ended.reason)));
    }

    fn close_one(&mut self, need: Need) -> bool {
        close_one(&mut self.table, self.now, need)
    }

    fn open(&mut self, key: Key, server: usize, permit: Permit) -> SessionId {
        let server = &self.servers[server];
        self.table
            .open(self.now, key, &self.settings, server, permit, "socket")
    }

    /// A datagram from a client: the session that took it, or none without a permit.
    fn datagram(&mut self, key: Key) -> Option<SessionId> {
        self.table.request(self.now, &key, ONE).or_else(|| {
            let permit = match self.capacity.take() {
                Err(Full::Sockets) if self.close_one(Need::Now) => self.capacity.take().ok()?,
                taken => taken.ok()?,
            };
            let opened = self.open(key, 0, permit);
            assert_eq!(self.table.request(self.now, &key, ONE), Some(opened));
            Some(opened)
        })
    }

    fn reply(&mut self, id: SessionId) -> Option<Reply> {
        let reply = self.table.reply(self.now, id, ONE);
        self.note_ended();
        reply
    }

    fn end(&mut self, id: SessionId, reason: EndReason) {
        self.table.end(self.now, id, reason);
    }

    fn reusable(&self, need: Need) -> Option<SessionId> {
        let (listener, server) = (&self.settings.listener, &self.servers[0]);
        self.table.reusable(self.now, listener, server, need)
    }
}

/// Closes the ended session that may go best; false if there is none.
fn close_one<C>(table: &mut Table<C>, now: Instant, need: Need) -> bool {
    let id = table.closable(now, need, |_| true);
    id.is_some_and(|id| table.take(now, id).is_some())
}

fn key(client: u16) -> Key {
    key_at(client, 53)
}

fn key_at(client: u16, local: u16) -> Key {
    Key::direct(
        ClientAddr(([203, 0, 113, 11], client).into()),
        ListenerAddr(([198, 51, 100, 10], local).into()),
    )
}

#[test]
fn clients_that_differ_in_the_port_alone_share_nothing() {
    let mut bench = Bench::new(RULES, 10, 10);
    let (a, b) = (
        bench.datagram(key(1)).unwrap(),
        bench.datagram(key(2)).unwrap(),
    );
    assert_ne!(a, b);
    assert_eq!(bench.reply(a).unwrap().to, key(1).client);
    assert_eq!(bench.reply(b).unwrap().to, key(2).client);
    assert_eq!(bench.datagram(key(1)), Some(a));
}

#[test]
fn one_client_at_two_local_addresses_has_two_sessions() {
    let mut bench = Bench::new(RULES, 10, 10);
    let a = bench.datagram(key_at(1, 53)).unwrap();
    let b = bench.datagram(key_at(1, 54)).unwrap();
    assert_eq!(bench.reply(a).unwrap().from, key_at(1, 53).local);
    assert_eq!(bench.reply(b).unwrap().from, key_at(1, 54).local);
}

#[test]
fn a_session_lives_as_long_as_datagrams_come_from_either_side() {
    let mut bench = Bench::new(RULES, 10, 10);
    let id = bench.datagram(key(1)).unwrap();
    for _ in 0..200 {
        bench.pass(29);
        assert_eq!(bench.datagram(key(1)), Some(id));
        bench.pass(29);
        assert!(bench.reply(id).is_some());
    }
    assert!(bench.ended.is_empty());
    bench.pass(31);
    assert_eq!(bench.ended, [(key(1), EndReason::Idle)]);
    assert_ne!(bench.datagram(key(1)), Some(id));
}

#[test]
fn an_ended_session_delivers_nothing_and_holds_its_socket_for_a_while() {
    let mut bench = Bench::new(RULES, 10, 10);
    let id = bench.datagram(key(1)).unwrap();
    bench.pass(31);
    assert_eq!(bench.table.active(), 0);
    assert_eq!(bench.table.get(id).unwrap().connection, "socket");
    assert_eq!(bench.reply(id), None);
    assert_eq!(bench.capacity.taken(), 0);
    bench.pass((MAX_REST + SPARE).as_secs() + 1);
    assert!(bench.table.get(id).is_none());
    assert_eq!(bench.table.retired(), 0);
}

#[test]
fn many_sessions_give_back_their_sockets_a_few_at_a_time() {
    let mut bench = Bench::new(RULES, 1000, 1000);
    for client in 0..1000 {
        bench.datagram(key(client)).unwrap();
    }
    bench.pass(31);
    assert_eq!((bench.table.active(), bench.table.retired()), (0, 1000));
    // None is closed before its time.
    bench.pass((MAX_REST + SPARE).as_secs() - 1);
    assert_eq!(bench.table.retired(), 1000);
    bench.pass(2);
    for left in (0..1000).rev().step_by(64).skip(1) {
        assert_eq!(bench.table.retired(), left + 1);
        assert!(bench.table.next_deadline().unwrap() <= bench.now);
        bench.pass(0);
    }
    assert_eq!(bench.table.retired(), 0);
    assert_eq!(bench.table.next_deadline(), None);
}

#[test]
fn a_session_that_was_moved_passes_replies_until_it_has_rested() {
    let mut bench = Bench::new(RULES, 10, 10);
    let end = |bench: &mut Bench, reason| {
        let id = bench.datagram(key(1)).unwrap();
        bench.end(id, reason);
        id
    };
    let moved = end(&mut bench, EndReason::Moved);
    assert_ne!(bench.datagram(key(1)), Some(moved));
    bench.pass(MIN_REST.as_secs() - 1);
    assert_eq!(bench.reply(moved).unwrap().to, key(1).client);
    bench.pass(1);
    assert_eq!(bench.reply(moved), None);

    let silent = end(&mut bench, EndReason::Moved);
    assert!(bench.reply(silent).is_some());
    bench.table.get_mut(silent).unwrap().silence();
    assert_eq!(bench.reply(silent), None);
    for reason in [EndReason::Denied, EndReason::Stopped] {
        let ended = end(&mut bench, reason);
        assert_eq!(bench.reply(ended), None);
    }

    let rules = Rules {
        responses: 1,
        ..RULES
    };
    let mut bench = Bench::new(rules, 10, 10);
    let moved = end(&mut bench, EndReason::Moved);
    assert!(bench.reply(moved).is_some());
    assert_eq!(bench.reply(moved), None);
    assert_eq!(
        (bench.table.retired(), bench.ended),
        (1, vec![(key(1), EndReason::Moved)])
    );
}

const ONE_RESPONSE: Rules = Rules {
    responses: 1,
    ..RULES
};

#[test]
fn responses_count_for_each_datagram_of_the_client() {
    let rules = Rules {
        responses: 2,
        ..RULES
    };
    let mut bench = Bench::new(rules, 10, 10);
    let id = bench.datagram(key(1)).unwrap();
    assert_eq!(bench.datagram(key(1)), Some(id));
    for _ in 0..3 {
        bench.reply(id).unwrap();
        assert_eq!(bench.ended, []);
    }
    assert_eq!(bench.reply(id).unwrap().to, key(1).client);
    assert_eq!(bench.ended, [(key(1), EndReason::Responses)]);
    assert_eq!(bench.reply(id), None);
}

#[test]
fn after_its_requests_a_session_only_passes_replies() {
    let rules = Rules {
        requests: 2,
        ..RULES
    };
    let mut bench = Bench::new(rules, 10, 10);
    let first = bench.datagram(key(1)).unwrap();
    assert_eq!(bench.datagram(key(1)), Some(first));
    let second = bench.datagram(key(1)).unwrap();
    assert_ne!(first, second);
    assert_eq!(bench.reply(first).unwrap().to, key(1).client);
    assert_eq!(bench.datagram(key(1)), Some(second));
    bench.pass(31);
    assert_eq!(bench.ended.len(), 2);
}

#[test]
fn a_flood_of_new_clients_ends_no_session_of_old_ones() {
    let mut bench = Bench::new(RULES, 2, 10);
    let old = bench.datagram(key(1)).unwrap();
    bench.datagram(key(2)).unwrap();
    for client in 3..1000 {
        assert_eq!(bench.datagram(key(client)), None);
    }
    assert_eq!(bench.datagram(key(1)), Some(old));
    assert_eq!(bench.capacity.taken(), 2);
}

#[test]
fn a_session_out_of_requests_goes_on_if_there_is_no_other() {
    let rules = Rules {
        requests: 1,
        ..RULES
    };
    let mut bench = Bench::new(rules, 1, 10);
    let only = bench.datagram(key(1)).unwrap();
    assert_eq!(bench.datagram(key(1)), None);
    assert_eq!(bench.table.overdraw(bench.now, &key(1), ONE), Some(only));
    assert_eq!(bench.reply(only).unwrap().to, key(1).client);
    assert_eq!(bench.table.overdraw(bench.now, &key(2), ONE), None);
}

#[test]
fn a_stop_waits_for_as_many_replies_as_there_were_requests() {
    let mut bench = Bench::new(RULES, 2, 10);
    assert!(!bench.table.awaits_replies());
    let id = bench.datagram(key(1)).unwrap();
    bench.datagram(key(1)).unwrap();
    bench.reply(id).unwrap();
    assert!(bench.table.awaits_replies());
    bench.reply(id).unwrap();
    assert!(!bench.table.awaits_replies());
}

#[test]
fn an_aborted_session_leaves_nothing() {
    let mut bench = Bench::new(RULES, 1, 10);
    let id = bench.datagram(key(1)).unwrap();
    bench.table.abort(id);
    assert_eq!((bench.table.active(), bench.table.retired()), (0, 0));
    assert!(bench.datagram(key(2)).is_some());
}

#[test]
fn ids_survive_packing() {
    let mut bench = Bench::new(RULES, 3, 0);
    for client in 0..3 {
        let id = bench.datagram(key(client)).unwrap();
        assert_eq!(SessionId::from_bits(id.to_bits()), id);
        // Leaves room below for the numbers of sockets that are no session's.
        assert!(id.to_bits() >= 1 << 32);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Datagram(u16),
    Reply(usize),
    Pass(u64),
    Close(Need),
    TakeOver(Need),
}

fn needs() -> impl Strategy<Value = Need> {
    prop_oneof![Just(Need::None), Just(Need::Supply), Just(Need::Now)]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u16..12).prop_map(Step::Datagram),
        4 => (0usize..64).prop_map(Step::Reply),
        2 => (0u64..50).prop_map(Step::Pass),
        1 => needs().prop_map(Step::Close),
        1 => needs().prop_map(Step::TakeOver),
    ];
    proptest::collection::vec(step, 0..200)
}

proptest! {
    /// Whatever happens in whatever order: a reply goes to the client whose
    /// datagram opened the session or to nobody, no bound is exceeded, and no
    /// session outlives its time.
    #[test]
    fn a_reply_reaches_its_own_client_or_nobody(
        steps in steps(),
        responses in 0u64..3,
        requests in 0u64..4,
        max_sessions in 1usize..6,
        more_sockets in 0usize..4,
    ) {
        let rules = Rules { responses, requests, ..RULES };
        let mut bench = Bench::new(rules, max_sessions, more_sockets);
        let mut opened: Vec<(SessionId, Key)> = Vec::new();
        for step in steps {
            match step {
                Step::Datagram(client) => {
                    if let Some(id) = bench.datagram(key(client)) {
                        match opened.iter().find(|(known, _)| *known == id) {
                            Some((_, owner)) => prop_assert_eq!(*owner, key(client)),
                            None => opened.push((id, key(client))),
                        }
                    }
                }
                Step::Reply(nth) if !opened.is_empty() => {
                    let (id, owner) = opened[nth % opened.len()];
                    if let Some(reply) = bench.reply(id) {
                        prop_assert_eq!((reply.to, reply.from), (owner.client, owner.local));
                    }
                }
                Step::Reply(_) => {}
                Step::Pass(seconds) => bench.pass(seconds),
                Step::Close(need) => _ = bench.close_one(need),
                Step::TakeOver(need) => {
                    let id = bench.reusable(need);
                    id.map(|id| bench.table.take(bench.now, id));
                }
            }
            prop_assert!(bench.table.active() <= max_sessions);
            let sockets = bench.table.active() + bench.table.retired();
            prop_assert_eq!(sockets, bench.capacity.sockets());
            prop_assert!(sockets <= max_sessions + more_sockets);
            prop_assert_eq!(bench.table.active(), bench.capacity.taken());
            for (_, session) in bench.table.iter_from(0) {
                let idle = bench.now - bench.table.clock().instant(session.last_active);
                prop_assert!(idle <= RULES.idle_timeout + 2 * wheel::TICK);
            }
        }
        bench.pass(60);
        bench.pass((MAX_REST + SPARE).as_secs() + 1);
        prop_assert_eq!((bench.table.active(), bench.table.retired()), (0, 0));
        prop_assert_eq!(bench.table.next_deadline(), None);
    }
}

#[test]
fn a_socket_that_no_other_client_can_get_is_closed_at_the_end() {
    let now = Instant::now();
    let rules = Rules {
        responses: 1,
        ..RULES
    };
    let capacity = Capacity::new(10, 10);
    let mut table = Table::new(now, 0, &capacity, |kept: &AfterEnd| *kept);
    let (log, ended) = sync_channel(10);
    table.log_to(Some(log));
    let (settings, [server]) = (settings(rules), servers());
    let kinds = [
        AfterEnd::CloseOnceRead,
        AfterEnd::Close,
        AfterEnd::RestForReuse,
    ];
    let ids = kinds.map(|kept| {
        let key = key(kept as u16);
        let permit = capacity.take().unwrap();
        let id = table.open(now, key, &settings, &server, permit, kept);
        table.request(now, &key, ONE).unwrap();
        id
    });
    assert!(table.awaits_replies());
    table.reply(now, ids[0], ONE).unwrap();
    // Once what waits there has been read.
    assert_eq!(table.next_to_close(), Some(ids[0]));
    assert!(table.take(now, ids[0]).is_some());
    assert_eq!((table.next_to_close(), table.reclaimed()), (None, 0));
    table.reply(now, ids[2], ONE).unwrap();
    assert!(table.get(ids[2]).is_some());
    // Of the one that is left, no reply is read.
    assert_eq!((table.active(), table.retired()), (1, 1));
    assert!(!table.awaits_replies());
    let later = now + rules.idle_timeout;
    ended.try_iter().for_each(drop);
    table.expire(later, |_| true);
    let ended: Vec<_> = ended.try_iter().map(|one| (one.key, one.reason)).collect();
    let closed = key(AfterEnd::Close as u16);
    assert_eq!(ended, [(closed, EndReason::Idle)]);
    assert_eq!((table.active(), capacity.sockets()), (0, 1));
    assert_eq!(table.request(later, &closed, ONE), None);
}

#[test]
fn replies_beyond_what_the_client_sent_are_told() {
    for enforce in [false, true] {
        let rules = Rules {
            amplification: Some(Amplification { limit: 3, enforce }),
            ..RULES
        };
        let mut bench = Bench::new(rules, 10, 10);
        let id = bench.datagram(key(1)).unwrap();
        let exceeds = |bench: &mut Bench| bench.reply(id).unwrap().exceeds.is_some();
        for _ in 0..3 {
            assert!(!exceeds(&mut bench));
        }
        assert!(exceeds(&mut bench));
        assert!(exceeds(&mut bench));
        // What was dropped has not reached the client, and needs no making up for.
        bench.datagram(key(1)).unwrap();
        assert!(!exceeds(&mut bench));
        let passed = bench.table.get(id).unwrap().reply_bytes;
        assert_eq!(passed, if enforce { 400 } else { 600 });
    }
}

#[test]
fn with_a_number_of_requests_a_session_ends_once_all_are_answered() {
    let rules = Rules {
        requests: 3,
        responses: 1,
        ..RULES
    };
    let mut bench = Bench::new(rules, 10, 10);
    let id = bench.datagram(key(1)).unwrap();
    for _ in 0..2 {
        bench.reply(id).unwrap();
        assert_eq!(bench.datagram(key(1)), Some(id));
    }
    assert_eq!(bench.ended, []);
    bench.reply(id).unwrap();
    assert_eq!(bench.ended, [(key(1), EndReason::Responses)]);
    assert_ne!(bench.datagram(key(1)), Some(id));
}

#[test]
fn sessions_out_of_requests_take_turns_if_there_is_no_other() {
    let rules = Rules {
        requests: 1,
        ..RULES
    };
    let mut bench = Bench::new(rules, 3, 10);
    let mut ids = [(); 3].map(|()| bench.datagram(key(1)).unwrap());
    let take = |bench: &mut Bench| bench.table.overdraw(bench.now, &key(1), ONE).unwrap();
    for _ in 0..2 {
        assert_eq!([(); 3].map(|()| take(&mut bench)), ids);
    }
    // The others go on when one that took datagrams has ended.
    bench.end(ids[2], EndReason::Moved);
    ids[2] = bench.datagram(key(1)).unwrap();
    let mut taken = [(); 3].map(|()| take(&mut bench));
    taken.sort_by_key(|id| ids.iter().position(|known| known == id));
    assert_eq!(taken, ids);
    bench.pass(31);
    assert_eq!(bench.table.overdraw(bench.now, &key(1), ONE), None);
    assert_eq!(bench.ended.len(), 4);
}
