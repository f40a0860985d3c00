//! Ports of ended sessions: how long they rest, and which are used again first.

use super::*;

/// What a server that answers at once is taken to need for an answer.
const ANSWER_TIME: Duration = Duration::from_millis(50);

/// Ends a session by its one answer, as others do after it.
fn answered(bench: &mut Bench, client: u16) -> SessionId {
    let id = bench.datagram(key(client)).unwrap();
    bench.reply(id).unwrap();
    id
}

/// Ends a session that owes its client an answer.
fn unanswered(bench: &mut Bench, client: u16) -> SessionId {
    let id = bench.datagram(key(client)).unwrap();
    bench.end(id, EndReason::Denied);
    id
}

#[test]
fn a_port_rests_for_as_long_as_there_are_enough_others() {
    let capacity = Capacity::new(10, 10);
    assert_eq!(capacity.need(), Need::None);
    let mut permits: Vec<_> = (0..10).map(|_| capacity.take().unwrap()).collect();
    // All are with sessions that run.
    assert_eq!(capacity.need(), Need::None);
    permits[..4].iter_mut().for_each(Permit::rest);
    assert_eq!(capacity.need(), Need::None);
    permits[4].rest();
    assert_eq!(capacity.need(), Need::Supply);
    assert!(capacity.is_nearly_used_up());
    permits.truncate(5);
    assert!(!capacity.is_nearly_used_up());

    for (need, rest) in [(Need::None, MAX_REST), (Need::Supply, MIN_REST)] {
        let mut bench = Bench::new(ONE_RESPONSE, 10, 10);
        answered(&mut bench, 1);
        unanswered(&mut bench, 2);
        bench.pass(rest.as_secs() - 1);
        assert_eq!(bench.reusable(need), None);
        assert!(!bench.close_one(need));
        bench.pass(1);
        assert!(bench.reusable(need).is_some());
        assert!(bench.close_one(need) && bench.close_one(need));
        assert_eq!((bench.table.retired(), bench.table.reclaimed()), (0, 0));
    }
}

#[test]
fn a_port_that_owes_an_answer_rests_whatever_is_needed() {
    let mut bench = Bench::new(ONE_RESPONSE, 2, 0);
    unanswered(&mut bench, 1);
    answered(&mut bench, 2);
    // The answered one gives way, once no other answer is to be expected; then there is
    // none.
    assert_eq!(bench.datagram(key(3)), None);
    bench.now += ANSWER_TIME;
    let third = bench.datagram(key(3)).unwrap();
    assert_eq!(bench.table.reclaimed(), 1);
    assert_eq!(bench.datagram(key(4)), None);
    bench.end(third, EndReason::Denied);
    bench.pass(MIN_REST.as_secs() - 1);
    assert_eq!(bench.datagram(key(4)), None);
    bench.pass(1);
    assert!(bench.datagram(key(4)).is_some());
    assert!(bench.datagram(key(5)).is_some());
    assert_eq!(bench.table.reclaimed(), 1);
}

#[test]
fn a_port_is_used_early_only_after_another_answer_would_have_come() {
    let mut bench = Bench::new(ONE_RESPONSE, 10, 0);
    let reusable = |bench: &Bench| bench.reusable(Need::Now);
    let id = answered(&mut bench, 1);
    // A server that sends two answers has sent one so far.
    bench.now += ANSWER_TIME - Duration::from_millis(1);
    assert_eq!(reusable(&bench), None);
    assert!(!bench.close_one(Need::Now));
    bench.now += Duration::from_millis(1);
    assert_eq!(reusable(&bench), Some(id));
    assert!(bench.close_one(Need::Now));

    // It has become slow.
    for client in 2..100 {
        let id = bench.datagram(key(client)).unwrap();
        bench.now += Duration::from_secs(1);
        bench.reply(id).unwrap();
        bench.end(id, EndReason::Responses);
        bench.table.take(bench.now, id);
    }
    answered(&mut bench, 100);
    bench.now += ANSWER_TIME;
    assert_eq!(reusable(&bench), None);
    bench.pass(2);
    assert!(reusable(&bench).is_some());
}

#[test]
fn a_port_that_was_streamed_to_up_to_its_end_is_not_used_early() {
    let mut bench = Bench::new(RULES, 10, 0);
    let ids = [1, 2, 3].map(|client| bench.datagram(key(client)).unwrap());
    for id in ids {
        bench.reply(id).unwrap();
    }
    bench.reply(ids[0]).unwrap();
    bench.reply(ids[1]).unwrap();
    let silent = |bench: &Bench| bench.table.closable(bench.now, Need::Now, |_| true);
    bench.end(ids[0], EndReason::Denied);
    bench.pass(MIN_REST.as_secs() - 1);
    assert_eq!(silent(&bench), None);
    // The stream to this one has been over for long.
    bench.pass(1);
    bench.table.take(bench.now, ids[0]);
    bench.end(ids[1], EndReason::Denied);
    bench.now += ANSWER_TIME;
    assert_eq!(silent(&bench), Some(ids[1]));
}

#[test]
fn what_matches_is_not_looked_for_among_all_that_rest() {
    let mut bench = Bench::new(ONE_RESPONSE, 3000, 0);
    for client in 0..2000 {
        answered(&mut bench, client);
    }
    let owing: Vec<_> = (2000..2003)
        .map(|client| unanswered(&mut bench, client))
        .collect();
    // A late reply does not make it an answered one.
    assert_eq!(bench.reply(owing[0]), None);
    bench.pass(MIN_REST.as_secs());
    for expected in [Some(owing[1]), Some(owing[2]), Some(owing[0]), None] {
        let looks = std::cell::Cell::new(0);
        let found = bench.table.closable(bench.now, Need::Supply, |session| {
            looks.set(looks.get() + 1);
            session.replies == 0
        });
        assert_eq!(found, expected);
        assert!(looks.get() < 200, "{} looks", looks.get());
        found.and_then(|id| bench.table.take(bench.now, id));
    }
}

#[test]
fn a_late_reply_restarts_the_rest() {
    let mut bench = Bench::new(ONE_RESPONSE, 10, 0);
    let id = answered(&mut bench, 1);
    for _ in 0..3 {
        bench.pass(MIN_REST.as_secs() - 1);
        assert_eq!(bench.reply(id), None);
        assert_eq!(bench.reusable(Need::Now), None);
        assert!(!bench.close_one(Need::Now));
    }
    assert_eq!(bench.table.renewed(), 3);
    bench.pass(MIN_REST.as_secs());
    // It may be closed, and its port is another's with some luck; it is not handed on.
    assert_eq!(bench.reusable(Need::Now), None);
    assert_eq!(
        bench.table.closable(bench.now, Need::Now, |_| true),
        Some(id)
    );
    // What waits there when its time is up is read first.
    bench.now += MAX_REST + SPARE;
    bench.table.expire(bench.now, |_| false);
    assert_eq!((bench.table.retired(), bench.table.renewed()), (1, 4));
    bench.now += MAX_REST + SPARE;
    bench.pass(1);
    assert_eq!(bench.table.retired(), 0);
}

#[test]
fn a_moved_session_that_gets_its_answer_owes_nothing() {
    let mut bench = Bench::new(RULES, 10, 0);
    let id = bench.datagram(key(1)).unwrap();
    bench.end(id, EndReason::Moved);
    assert!(!bench.close_one(Need::Now));
    assert!(bench.reply(id).is_some());
    bench.now += ANSWER_TIME;
    assert_eq!(bench.reusable(Need::Now), Some(id));
    // Its server sends more than it was asked for.
    assert!(bench.reply(id).is_some());
    bench.now += ANSWER_TIME;
    assert_eq!(bench.reusable(Need::Now), None);
    assert!(!bench.close_one(Need::Now));
}

#[test]
fn what_rested_for_longest_goes_first_and_what_owes_goes_last() {
    let mut bench = Bench::new(ONE_RESPONSE, 10, 0);
    let owing = unanswered(&mut bench, 1);
    bench.pass(1);
    let old = answered(&mut bench, 2);
    bench.pass(1);
    let young = answered(&mut bench, 3);
    let order = |bench: &mut Bench, need| {
        let mut order = Vec::new();
        while let Some(id) = bench.table.closable(bench.now, need, |_| true) {
            order.push(id);
            bench.table.take(bench.now, id);
        }
        order
    };
    bench.pass(MIN_REST.as_secs() - 1);
    // The youngest has not rested, and is still silent.
    assert_eq!(order(&mut bench, Need::Now), [old, owing, young]);
    assert_eq!(bench.table.reclaimed(), 1);

    let matching = answered(&mut bench, 4);
    answered(&mut bench, 5);
    bench.now += ANSWER_TIME;
    let is_fifth = |session: &Session<_>| session.key() == key(5);
    let fifth = bench.table.closable(bench.now, Need::Now, is_fifth);
    assert_ne!(fifth, Some(matching));
    assert_eq!(bench.table.get(fifth.unwrap()).unwrap().key(), key(5));
}

#[test]
fn what_is_set_aside_rests_and_is_not_taken_over() {
    let mut bench = Bench::new(ONE_RESPONSE, 10, 0);
    let first = answered(&mut bench, 1);
    bench.pass(1);
    answered(&mut bench, 2);
    let (listener, server) = (bench.settings.listener.id(), bench.servers[0].id());
    bench.table.set_aside(listener, server);
    let third = answered(&mut bench, 3);
    bench.now += ANSWER_TIME;
    let reusable = |bench: &Bench| bench.reusable(Need::Now);
    assert_eq!(reusable(&bench), Some(third));
    assert_eq!(
        bench.table.closable(bench.now, Need::Now, |_| true),
        Some(first)
    );
    assert_eq!(bench.table.retired(), 3);
    bench.pass((MAX_REST + SPARE).as_secs() + 1);
    assert_eq!(bench.table.retired(), 0);
}

#[test]
fn sockets_of_ended_sessions_count_until_they_are_given_back() {
    let capacity = Capacity::new(2, 3);
    let now = Instant::now();
    let (mut table, _log) = table(now, &capacity);
    let (settings, [server]) = (settings(ONE_RESPONSE), servers());
    for client in 0..3 {
        let permit = capacity.take().unwrap();
        let id = table.open(now, key(client), &settings, &server, permit, "socket");
        table.request(now, &key(client), ONE).unwrap();
        table.reply(now, id, ONE).unwrap();
    }
    assert_eq!(capacity.taken(), 0);
    assert_eq!(capacity.take().err(), Some(Full::Sockets));
    assert!(close_one(&mut table, now + ANSWER_TIME, Need::Now));
    assert_eq!(table.reclaimed(), 1);
    let _permit = capacity.take().unwrap();
}

#[test]
fn what_a_session_owned_is_taken_over_once_it_has_rested() {
    let capacity = Capacity::new(2, 3);
    let begun = Instant::now();
    let (mut table, _log) = table(begun, &capacity);
    let settings = [settings(ONE_RESPONSE), settings(ONE_RESPONSE)];
    let servers = servers::<3>();
    for (client, server) in [(1, 0), (2, 1)] {
        let (settings, server) = (&settings[0], &servers[server]);
        let permit = capacity.take().unwrap();
        let id = table.open(begun, key(client), settings, server, permit, client);
        table.request(begun, &key(client), ONE).unwrap();
        table.reply(begun, id, ONE).unwrap();
    }
    let rested = begun + MIN_REST;
    let early = rested - Duration::from_millis(1);
    let mut taken = |now, listener: usize, server: usize, need| {
        let (listener, server) = (&settings[listener].listener, &servers[server]);
        let id = table.reusable(now, listener, server, need)?;
        table.take(now, id)
    };
    assert!(taken(early, 0, 1, Need::Supply).is_none());
    // Another listener's sockets have other options, another server's another
    // address.
    assert!(taken(rested, 1, 1, Need::Supply).is_none());
    assert!(taken(rested, 0, 2, Need::Supply).is_none());
    let (permit, connection) = taken(rested, 0, 1, Need::Supply).unwrap();
    assert_eq!(connection, 2);
    assert!(taken(rested, 0, 1, Need::Supply).is_none());

    // The permit counts as a session again, and its socket did all along.
    assert_eq!(capacity.taken(), 0);
    let _permit = permit.renew().unwrap();
    assert_eq!(capacity.taken(), 1);
    let _second = capacity.take().unwrap();
    assert!(capacity.is_full());
    assert_eq!(capacity.take().err(), Some(Full::Sessions));

    let (permit, connection) = taken(early, 0, 0, Need::Now).unwrap();
    assert_eq!((connection, table.retired(), table.reclaimed()), (1, 0, 1));
    assert_eq!(permit.renew().err(), Some(Full::Sessions));
}
