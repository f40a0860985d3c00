//! Which sessions give way when they run out.

use super::*;
use crate::client_limits::ClientSessions;

/// A table with room for sessions of two servers, and the time that it begins.
fn two_servers() -> (Bench, Duration) {
    let mut bench = Bench::new(RULES, 100, 100);
    for (client, server) in [(1, 0), (2, 1)] {
        let id = bench.open_at(client, server);
        bench.reply(id).unwrap();
    }
    // Both answer at once, which is taken to be somewhat more.
    (bench, Duration::from_millis(50))
}

impl Bench {
    fn open_at(&mut self, client: u16, server: usize) -> SessionId {
        let permit = self.capacity.take().unwrap();
        let id = self.open(key(client), server, permit);
        assert_eq!(self.table.request(self.now, &key(client), ONE), Some(id));
        id
    }

    /// The client whose session gives way, which ends.
    fn give_way(&mut self) -> Option<ClientAddr> {
        let id = self.table.giving_way(self.now, None)?;
        let client = self.table.get(id).unwrap().key().client;
        self.end(id, EndReason::Unanswered);
        Some(client)
    }
}

#[test]
fn the_oldest_unanswered_session_gives_way_and_answered_ones_stay() {
    let (mut bench, usual) = two_servers();
    let ids: Vec<_> = (3..7).map(|client| bench.open_at(client, 0)).collect();
    bench.reply(ids[0]).unwrap();
    bench.now += usual - Duration::from_millis(1);
    assert_eq!(bench.give_way(), None);
    bench.now += Duration::from_millis(1);
    assert_eq!(bench.give_way(), Some(key(4).client));
    assert_eq!(bench.give_way(), Some(key(5).client));
    // Its answer still reaches it, and it alone.
    assert_eq!(bench.reply(ids[1]).unwrap().to, key(4).client);
    bench.pass(MIN_REST.as_secs());
    assert_eq!(bench.reply(ids[2]), None);
    assert_eq!(bench.give_way(), Some(key(6).client));
    assert_eq!(bench.give_way(), None);
    assert_eq!(bench.table.active(), 3);
    assert_eq!(bench.capacity.taken(), 3);
}

#[test]
fn a_session_is_given_the_time_that_its_server_takes() {
    let (mut bench, usual) = two_servers();
    // The second server has become slow.
    for client in 100..130 {
        let id = bench.open_at(client, 1);
        bench.now += Duration::from_secs(1);
        bench.reply(id).unwrap();
    }
    bench.open_at(3, 1);
    bench.open_at(4, 0);
    bench.now += usual;
    assert_eq!(bench.give_way(), Some(key(4).client));
    assert_eq!(bench.give_way(), None);
    bench.now += Duration::from_secs(2);
    assert_eq!(bench.give_way(), Some(key(3).client));
}

#[test]
fn workers_tell_each_other_how_long_servers_take() {
    let (bench, usual) = two_servers();
    let mut other = Bench {
        servers: bench.servers.clone(),
        ..Bench::of(RULES, Arc::clone(&bench.capacity))
    };
    other.open_at(3, 1);
    other.open_at(4, 2);
    other.now += usual;
    assert_eq!(other.give_way(), Some(key(3).client));
    assert_eq!(other.give_way(), None);
}

#[test]
fn sockets_are_crowded_by_sessions_that_are_to_be_answered() {
    // With a number of responses, servers are taken to answer; others must have done so.
    for (responses, answers, crowded) in [(1, false, true), (0, true, true), (0, false, false)] {
        let rules = Rules { responses, ..RULES };
        let mut bench = Bench::new(rules, 50, 50);
        let first = bench.open_at(1, 0);
        if answers {
            bench.reply(first).unwrap();
        }
        for client in 2..=49 {
            bench.open_at(client, 0);
        }
        assert!(!bench.capacity.is_flooded());
        for client in 2..=49 {
            let id = bench.table.find(&key(client)).unwrap();
            bench.end(id, EndReason::Unanswered);
        }
        bench.open_at(50, 0);
        bench.open_at(51, 0);
        assert_eq!(bench.capacity.is_flooded(), crowded, "{responses}");
    }
}

#[test]
fn sessions_of_a_server_that_never_answers_stay_while_they_are_used() {
    let mut bench = Bench::new(RULES, 100, 100);
    for client in 0..40 {
        bench.open_at(client, 0);
    }
    for _ in 0..40 {
        bench.now += Duration::from_millis(100);
        for client in (0..40).filter(|client| *client != 30) {
            bench.datagram(key(client)).unwrap();
        }
    }
    let mut gave_way = None;
    for _ in 0..40 {
        gave_way = gave_way.or(bench.give_way());
    }
    assert_eq!(gave_way, Some(key(30).client));
    assert_eq!(bench.table.active(), 39);
}

#[test]
fn within_a_clients_bound_its_own_unanswered_sessions_give_way() {
    let (mut bench, usual) = two_servers();
    let clients = ClientSessions::new(2, 64);
    let v6 = |host: u16, port| Key {
        client: ClientAddr(
            (
                std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host),
                port,
            )
                .into(),
        ),
        ..key(1)
    };
    let mut of_victim = Vec::new();
    bench.open_at(3, 0);
    for host in [1, 2] {
        let key = v6(host, 1000);
        let right = clients.take(key.client.0.ip()).unwrap();
        let permit = bench.capacity.take().unwrap().of_client(Some(right));
        of_victim.push(bench.open(key, 0, permit));
    }
    bench.reply(of_victim[0]).unwrap();
    bench.now += usual;
    let victim = v6(9, 1).client.0.ip();
    assert!(clients.take(victim).is_none());
    let network = clients.network(victim);
    // Another listener's bound is another.
    let listener = bench.settings.listener.id();
    let other = bench
        .table
        .giving_way(bench.now, Some((listener + 1, network)));
    assert_eq!(other, None);
    let id = bench.table.giving_way(bench.now, Some((listener, network)));
    assert_eq!(id, Some(of_victim[1]));
    bench.end(of_victim[1], EndReason::Unanswered);
    assert_eq!(
        bench.table.giving_way(bench.now, Some((listener, network))),
        None
    );
    assert!(clients.take(victim).is_some());
}

#[derive(Clone, Debug)]
enum Step {
    Datagram(u16),
    Reply(usize),
    Pass(u64),
    GiveWay,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0u16..6).prop_map(Step::Datagram),
        3 => (0usize..64).prop_map(Step::Reply),
        3 => (0u64..20_000).prop_map(Step::Pass),
        2 => Just(Step::GiveWay),
    ];
    proptest::collection::vec(step, 0..200)
}

proptest! {
    /// Whatever happens in whatever order: datagrams beyond the number of requests go to
    /// sessions of their own client, replies as well, only what is active and was never
    /// answered gives way, and nothing is left at the end.
    #[test]
    fn clients_share_nothing_when_sessions_run_out(
        steps in steps(),
        responses in 0u64..3,
        requests in 0u64..3,
        max_sessions in 1usize..6,
    ) {
        let rules = Rules { responses, requests, ..RULES };
        let mut bench = Bench::new(rules, max_sessions, 100);
        let mut opened: Vec<(SessionId, Key)> = Vec::new();
        for step in steps {
            match step {
                Step::Datagram(client) => {
                    let key = key(client);
                    let taken = bench.datagram(key);
                    let taken = taken.or_else(|| bench.table.overdraw(bench.now, &key, ONE));
                    let has_any = bench.table.iter_from(0).any(|(_, session)| session.key() == key);
                    prop_assert_eq!(taken.is_some(), has_any);
                    if let Some(id) = taken {
                        let session = bench.table.get(id).unwrap();
                        prop_assert!(session.key() == key && session.is_active());
                        opened.push((id, key));
                    }
                }
                Step::Reply(nth) if !opened.is_empty() => {
                    let (id, owner) = opened[nth % opened.len()];
                    if let Some(reply) = bench.reply(id) {
                        prop_assert_eq!((reply.to, reply.from), (owner.client, owner.local));
                    }
                }
                Step::Reply(_) => {}
                Step::Pass(millis) => {
                    bench.now += Duration::from_millis(millis);
                    bench.pass(0);
                }
                Step::GiveWay => {
                    if let Some(id) = bench.table.giving_way(bench.now, None) {
                        let session = bench.table.get(id).unwrap();
                        prop_assert!(session.is_active() && session.replies == 0);
                        bench.end(id, EndReason::Unanswered);
                    }
                }
            }
            prop_assert_eq!(bench.table.active(), bench.capacity.taken());
        }
        for _ in 0..4 {
            bench.pass(60);
        }
        prop_assert_eq!((bench.table.active(), bench.table.retired()), (0, 0));
        prop_assert_eq!(bench.table.giving_way(bench.now, None), None);
        prop_assert_eq!(bench.table.next_deadline(), None);
        prop_assert!(!bench.capacity.is_flooded());
    }
}
