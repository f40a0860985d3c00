//! Sessions without a socket of their own: how long late replies pass, and what their
//! owner gets back.

use std::net::IpAddr;

use super::*;

/// Sessions to which a number is kept that the owner wants back.
struct Passing {
    table: Table<u16>,
    settings: Arc<ListenerSettings>,
    server: Arc<Server>,
    capacity: Arc<Capacity>,
    now: Instant,
}

impl Passing {
    fn new(rules: Rules, max_sessions: usize) -> Self {
        let now = Instant::now();
        let [server] = servers();
        let capacity = Capacity::new(max_sessions, max_sessions);
        Self {
            table: Table::new(now, 0, &capacity, |_| AfterEnd::Pass),
            settings: settings(rules),
            server,
            capacity,
            now,
        }
    }

    fn begin(&mut self, client: u16) -> SessionId {
        let (settings, server) = (&self.settings, &self.server);
        let permit = self.capacity.take().unwrap();
        let key = key(client);
        let id = self
            .table
            .open(self.now, key, settings, server, permit, client);
        assert_eq!(self.table.request(self.now, &key, ONE), Some(id));
        id
    }

    fn end(&mut self, id: SessionId, reason: EndReason) {
        self.table.end(self.now, id, reason);
    }

    fn reply(&mut self, id: SessionId) -> Option<Reply> {
        self.table.reply(self.now, id, ONE)
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.table
            .expire(self.now, |_| panic!("there is no socket to be read"));
    }

    fn removed(&mut self) -> Vec<u16> {
        let mut removed: Vec<_> = std::iter::from_fn(|| self.table.next_removed()).collect();
        removed.sort_unstable();
        removed
    }
}

#[test]
fn what_ended_is_given_back_at_once_or_when_late_replies_have_passed() {
    let mut bench = Passing::new(ONE_RESPONSE, 10);
    assert!(!bench.table.awaits_replies());
    let answered = bench.begin(1);
    assert!(bench.table.awaits_replies());
    assert_eq!(bench.reply(answered).unwrap().to, key(1).client);
    let denied = bench.begin(2);
    bench.end(denied, EndReason::Denied);
    let aborted = bench.begin(3);
    bench.table.abort(aborted);
    assert_eq!(bench.removed(), [1, 2, 3]);
    bench.begin(4);
    bench.pass(RULES.idle_timeout);
    assert_eq!(bench.removed(), [4]);
    for id in [answered, denied, aborted] {
        assert!(bench.table.get(id).is_none());
    }
    let passing = [EndReason::Moved, EndReason::Network, EndReason::Unanswered];
    let ids = passing.map(|reason| {
        let client = 10 + u16::try_from(reason as usize).unwrap();
        let id = bench.begin(client);
        bench.end(id, reason);
        (id, client)
    });
    bench.pass(MIN_REST - wheel::TICK);
    for (id, client) in ids {
        assert_eq!(bench.reply(id).unwrap().to, key(client).client);
        // As many as were asked for.
        assert_eq!(bench.reply(id), None);
        bench.table.hear(bench.now, id);
    }
    assert_eq!((bench.removed(), bench.table.retired()), (vec![], 3));
    bench.pass(2 * wheel::TICK);
    let mut clients = ids.map(|(_, client)| client);
    clients.sort_unstable();
    assert_eq!(
        (bench.removed(), bench.table.retired()),
        (clients.to_vec(), 0)
    );
    assert_eq!(bench.table.next_deadline(), None);
    assert_eq!((bench.table.renewed(), bench.table.reclaimed()), (0, 0));
    assert_eq!(bench.capacity.sockets(), 0);
}

fn source(number: u16) -> IpAddr {
    let [a, b] = number.to_be_bytes();
    IpAddr::from([10, 99, a, b])
}

#[test]
fn sessions_are_found_by_their_source_as_long_as_they_are_there() {
    let mut bench = Passing::new(RULES, 3000);
    bench.table = Table::new(bench.now, 0, &bench.capacity, |_| AfterEnd::Pass)
        .with_sources(|number| (*number > 0).then(|| source(*number)));
    let found = |bench: &Passing, number| bench.table.find_by_source(source(number));
    let ids: Vec<_> = (0..3000).map(|number| bench.begin(number)).collect();
    let is_found =
        |bench: &Passing, number: u16| found(bench, number) == Some(ids[usize::from(number)]);
    assert!((1..3000).all(|number| is_found(&bench, number)));
    assert_eq!(found(&bench, 0), None);
    for (number, id) in (0u16..).zip(&ids) {
        let reason = [EndReason::Denied, EndReason::Moved][usize::from(number % 2)];
        bench.end(*id, reason);
    }
    // Late replies pass for every second one.
    assert!((1..3000).all(|number| is_found(&bench, number) == (number % 2 == 1)));
    let first = bench.table.take(bench.now, ids[1]);
    assert_eq!(
        (first.map(|(_, number)| number), found(&bench, 1)),
        (Some(1), None)
    );
    bench.pass(MIN_REST + wheel::TICK);
    bench.pass(Duration::ZERO);
    assert!((1..3000).all(|number| found(&bench, number).is_none()));
    // The address is another session's now, in a slot that had another one.
    let id = bench.begin(2);
    assert_eq!(found(&bench, 2), Some(id));
}

#[test]
fn what_only_passes_replies_makes_room_when_there_is_need() {
    for need in [Need::None, Need::Supply, Need::Now] {
        let mut bench = Passing::new(RULES, 1);
        let id = bench.begin(1);
        bench.end(id, EndReason::Moved);
        let found = bench.table.closable(bench.now, need, |_| true);
        assert_eq!(found, (need > Need::None).then_some(id));
        let taken = found.and_then(|id| bench.table.take(bench.now, id));
        let given_back = taken.map(|(_, client)| client);
        assert_eq!(given_back, found.map(|_| 1));
        // It isn't given back twice.
        assert_eq!((bench.removed(), bench.table.reclaimed()), (vec![], 0));
    }
}

#[test]
fn many_sessions_end_a_few_at_a_time() {
    let mut bench = Passing::new(RULES, 5000);
    for client in 0..5000 {
        bench.begin(client);
    }
    bench.now += RULES.idle_timeout;
    let mut rounds = 0;
    while bench.table.active() > 0 {
        assert!(bench.table.next_deadline().unwrap() <= bench.now);
        bench.pass(Duration::ZERO);
        assert!((1..=1024).contains(&bench.removed().len()));
        rounds += 1;
    }
    assert_eq!(rounds, 5);
}
