//! The session table driven through hours without waiting for any of them.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;

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

struct Bench {
    table: Table<&'static str>,
    budget: Arc<Budget>,
    now: Instant,
    ended: Vec<(Key, EndReason)>,
}

impl Bench {
    fn new(rules: Rules, max_sessions: usize, max_retired: usize) -> Self {
        let now = Instant::now();
        Self {
            table: Table::new(now, vec![rules], max_retired),
            budget: Budget::new(max_sessions, max_sessions + max_retired),
            now,
            ended: Vec::new(),
        }
    }

    fn pass(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
        let ended = &mut self.ended;
        self.table.expire(self.now, |session, reason| {
            ended.push((session.key, reason))
        });
    }

    /// A datagram from a client: the session that took it, or none for want of
    /// a seat.
    fn datagram(&mut self, key: Key) -> Option<SessionId> {
        self.table.request(self.now, &key, ONE).or_else(|| {
            let seat = match self.budget.take() {
                Err(Full::Sockets) if self.table.reclaim() => self.budget.take().ok()?,
                taken => taken.ok()?,
            };
            let opened = self.table.open(self.now, key, 0, 0, seat, "socket");
            assert_eq!(self.table.request(self.now, &key, ONE), Some(opened));
            Some(opened)
        })
    }

    fn reply(&mut self, id: SessionId) -> Option<Reply> {
        let ended = &mut self.ended;
        self.table.reply(self.now, id, ONE, |session, reason| {
            ended.push((session.key, reason))
        })
    }
}

fn key(client: u16) -> Key {
    key_at(client, 53)
}

fn key_at(client: u16, local: u16) -> Key {
    Key {
        client: ClientAddr(([203, 0, 113, 11], client).into()),
        local: ListenerAddr(([198, 51, 100, 10], local).into()),
    }
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
    assert_eq!(bench.table.get(id).unwrap().link, "socket");
    assert_eq!(bench.reply(id), None);
    assert_eq!(bench.budget.taken(), 0);
    bench.pass(LINGER.as_secs() + SPARE.as_secs() + 1);
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
    bench.pass(LINGER.as_secs() + SPARE.as_secs() - 1);
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
        bench.table.end(bench.now, id, reason, |_| {});
        id
    };
    let moved = end(&mut bench, EndReason::Moved);
    assert_ne!(bench.datagram(key(1)), Some(moved));
    bench.pass(LINGER.as_secs() - 1);
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
    assert_eq!((bench.table.retired(), bench.ended), (1, vec![]));
}

#[test]
fn held_sockets_are_bounded_and_given_back_oldest_first() {
    let rules = Rules {
        responses: 1,
        ..RULES
    };
    let mut bench = Bench::new(rules, 10, 3);
    let ids: Vec<_> = (0..5)
        .map(|client| {
            let id = bench.datagram(key(client)).unwrap();
            bench.reply(id).unwrap();
            id
        })
        .collect();
    assert_eq!(bench.table.retired(), 3);
    let held = |bench: &Bench| -> Vec<_> {
        ids.iter()
            .map(|id| bench.table.get(*id).is_some())
            .collect()
    };
    assert_eq!(held(&bench), [false, false, true, true, true]);
    assert!(bench.table.reclaim());
    assert_eq!(held(&bench), [false, false, false, true, true]);
    assert!(bench.table.reclaim() && bench.table.reclaim());
    assert!(!bench.table.reclaim());
}

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
fn a_flood_of_new_clients_takes_no_seat_from_old_ones() {
    let mut bench = Bench::new(RULES, 2, 10);
    let old = bench.datagram(key(1)).unwrap();
    bench.datagram(key(2)).unwrap();
    for client in 3..1000 {
        assert_eq!(bench.datagram(key(client)), None);
    }
    assert_eq!(bench.datagram(key(1)), Some(old));
    assert_eq!(bench.budget.taken(), 2);
}

#[test]
fn a_session_out_of_requests_goes_on_for_want_of_another() {
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
fn sockets_of_ended_sessions_count_until_they_are_given_back() {
    let rules = Rules {
        responses: 1,
        ..RULES
    };
    let budget = Budget::new(2, 3);
    let mut table = Table::new(Instant::now(), vec![rules], 10);
    let now = Instant::now();
    for client in 0..3 {
        let seat = budget.take().unwrap();
        let id = table.open(now, key(client), 0, 0, seat, "socket");
        table.request(now, &key(client), ONE).unwrap();
        table.reply(now, id, ONE, |_, _| {}).unwrap();
    }
    assert_eq!(budget.taken(), 0);
    assert_eq!(budget.take().err(), Some(Full::Sockets));
    assert!(table.reclaim());
    assert_eq!(table.reclaimed(), 1);
    let _seat = budget.take().unwrap();
}

#[test]
fn what_a_session_owned_is_taken_over_once_it_has_rested() {
    let rules = Rules {
        responses: 1,
        ..RULES
    };
    let budget = Budget::new(2, 3);
    let begun = Instant::now();
    let mut table = Table::new(begun, vec![rules, rules], 10);
    for (client, server) in [(1, 0), (2, 1)] {
        let seat = budget.take().unwrap();
        let id = table.open(begun, key(client), 0, server, seat, client);
        table.request(begun, &key(client), ONE).unwrap();
        table.reply(begun, id, ONE, |_, _| {}).unwrap();
    }
    let rested = begun + LINGER;
    let early = rested - Duration::from_millis(1);
    assert!(table.take_rested(early, 0, 1).is_none());
    // Another listener's sockets have other options, another server's another
    // address.
    assert!(table.take_rested(rested, 1, 1).is_none());
    assert!(table.take_rested(rested, 0, 2).is_none());
    let (seat, link) = table.take_rested(rested, 0, 1).unwrap();
    assert_eq!((link, table.retired(), table.reclaimed()), (2, 1, 0));
    assert!(table.take_rested(rested, 0, 1).is_none());

    // The seat counts as a session again, and its socket did all along.
    assert_eq!(budget.taken(), 0);
    let _seat = seat.renew().unwrap();
    assert_eq!(budget.taken(), 1);
    let _second = budget.take().unwrap();
    assert_eq!(budget.take().err(), Some(Full::Sessions));

    let (seat, link) = table.take_resting(0, 0).unwrap();
    assert_eq!((link, table.retired(), table.reclaimed()), (1, 0, 1));
    assert_eq!(seat.renew().err(), Some(Full::Sessions));
}

#[test]
fn what_a_session_owned_is_not_taken_over_while_an_answer_may_come() {
    let budget = Budget::new(10, 10);
    let begun = Instant::now();
    let mut table = Table::new(begun, vec![RULES], 10);
    let mut now = begun;
    for (client, answered) in [(1, false), (2, true), (3, false)] {
        // They end in their order.
        now += 2 * wheel::TICK;
        let seat = budget.take().unwrap();
        let id = table.open(now, key(client), 0, 0, seat, client);
        table.request(now, &key(client), ONE).unwrap();
        if answered {
            table.reply(now, id, ONE, |_, _| {}).unwrap();
        }
    }
    let ended = now + RULES.idle_timeout + 2 * wheel::TICK;
    table.expire(ended, |_, _| {});
    assert_eq!(table.retired(), 3);
    assert!(table.take_resting(0, 0).is_none());
    let rested = ended + LINGER;
    let (_, link) = table.take_rested(rested, 0, 0).unwrap();
    assert_eq!(link, 2);
    assert!(table.take_rested(rested, 0, 0).is_none());
    assert_eq!((table.retired(), table.reclaimed()), (0, 0));
}

#[test]
fn what_rested_and_nobody_takes_is_let_go() {
    let rules = Rules {
        responses: 1,
        ..RULES
    };
    let mut bench = Bench::new(rules, 10, 10);
    let id = bench.datagram(key(1)).unwrap();
    bench.reply(id).unwrap();
    bench.pass(LINGER.as_secs() + SPARE.as_secs() - 1);
    assert_eq!(bench.table.retired(), 1);
    bench.pass(2);
    assert_eq!(bench.table.retired(), 0);
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
    Reclaim,
    TakeRested,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u16..12).prop_map(Step::Datagram),
        4 => (0usize..64).prop_map(Step::Reply),
        2 => (0u64..50).prop_map(Step::Pass),
        1 => Just(Step::Reclaim),
        1 => Just(Step::TakeRested),
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
        max_retired in 0usize..4,
    ) {
        let rules = Rules { responses, requests, ..RULES };
        let mut bench = Bench::new(rules, max_sessions, max_retired);
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
                Step::Reclaim => {
                    bench.table.reclaim();
                }
                Step::TakeRested => {
                    bench.table.take_rested(bench.now, 0, 0);
                }
            }
            prop_assert!(bench.table.active() <= max_sessions);
            prop_assert!(bench.table.retired() <= max_retired);
            prop_assert_eq!(bench.table.active(), bench.budget.taken());
            for (_, session) in bench.table.iter_from(0) {
                let idle = bench.now - session.last_active;
                prop_assert!(idle <= RULES.idle_timeout + 2 * wheel::TICK);
            }
        }
        bench.pass(60);
        bench.pass(60);
        prop_assert_eq!((bench.table.active(), bench.table.retired()), (0, 0));
        prop_assert_eq!(bench.table.next_deadline(), None);
    }
}

#[test]
fn what_nobody_else_can_get_or_answer_is_gone_at_its_end() {
    let now = Instant::now();
    let rules = Rules {
        responses: 1,
        ..RULES
    };
    let budget = Budget::new(10, 10);
    let mut table = Table::new(now, vec![rules], 10).with_afterlife(|kept: &Afterlife| *kept);
    let ids = [Afterlife::None, Afterlife::Unheard, Afterlife::Rest].map(|kept| {
        let key = key(kept as u16);
        let id = table.open(now, key, 0, 0, budget.take().unwrap(), kept);
        table.request(now, &key, ONE).unwrap();
        id
    });
    assert!(table.awaits_replies());
    table.reply(now, ids[0], ONE, |_, _| {}).unwrap();
    assert!(table.get(ids[0]).is_none());
    table.reply(now, ids[2], ONE, |_, _| {}).unwrap();
    assert!(table.get(ids[2]).is_some());
    // Of the one that is left, nobody will hear.
    assert_eq!((table.active(), table.retired()), (1, 1));
    assert!(!table.awaits_replies());
    let mut ended = Vec::new();
    let later = now + rules.idle_timeout;
    table.expire(later, |session, reason| ended.push((session.link, reason)));
    assert_eq!(ended, [(Afterlife::Unheard, EndReason::Idle)]);
    assert_eq!((table.active(), budget.sockets()), (0, 0));
    assert_eq!(
        table.request(later, &key(Afterlife::Unheard as u16), ONE),
        None
    );
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
        let exceeds = |bench: &mut Bench| bench.reply(id).unwrap().exceeds;
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
fn sessions_out_of_requests_take_turns_for_want_of_another() {
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
    bench.table.end(bench.now, ids[2], EndReason::Moved, |_| {});
    ids[2] = bench.datagram(key(1)).unwrap();
    let mut taken = [(); 3].map(|()| take(&mut bench));
    taken.sort_by_key(|id| ids.iter().position(|known| known == id));
    assert_eq!(taken, ids);
    bench.pass(31);
    assert_eq!(bench.table.overdraw(bench.now, &key(1), ONE), None);
    assert_eq!(bench.ended.len(), 3);
}
