//! Sessions that go on in another table, as in another process, do what they would have done.

use std::cmp::Reverse;

use super::*;
use crate::handover::Phase;
use crate::session::Restored;
use crate::session::wheel::TICK;

/// A table whose sessions each keep a number.
struct Numbered {
    table: Table<u32>,
    capacity: Arc<Capacity>,
    settings: Arc<ListenerSettings>,
    server: Arc<Server>,
    begun: u32,
}

impl Numbered {
    fn new(now: Instant, settings: &Arc<ListenerSettings>, server: &Arc<Server>) -> Self {
        let capacity = Capacity::new(1000, 1000);
        Self {
            table: Table::new(now, 0, &capacity, |_| AfterEnd::RestForReuse),
            capacity,
            settings: Arc::clone(settings),
            server: Arc::clone(server),
            begun: 0,
        }
    }

    /// The number of the session that takes a client's datagram, begun if need be.
    fn datagram(&mut self, now: Instant, client: u16) -> u32 {
        let key = key(client);
        let id = self.table.request(now, &key, ONE).unwrap_or_else(|| {
            let permit = self.capacity.take().unwrap();
            let (settings, server) = (&self.settings, &self.server);
            self.table
                .open(now, key, settings, server, permit, self.begun);
            self.begun += 1;
            self.table.request(now, &key, ONE).unwrap()
        });
        self.table.get(id).unwrap().connection
    }

    fn id(&self, number: u32) -> Option<SessionId> {
        let mut all = self.table.iter();
        let (id, _) = all.find(|(_, session)| session.connection == number)?;
        Some(id)
    }

    /// What becomes of a reply to the session of this number.
    fn reply(&mut self, now: Instant, number: u32) -> Option<Reply> {
        let id = self.id(number)?;
        self.table.reply(now, id, ONE)
    }

    fn end(&mut self, now: Instant, number: u32, reason: EndReason) {
        if let Some(id) = self.id(number) {
            self.table.end(now, id, reason);
        }
    }

    /// What can be seen of each session.
    fn seen(&self, now: Instant) -> Vec<(u32, Phase, Duration, Duration, [u64; 4])> {
        let moment = self.table.clock().moment(now);
        let all = self.table.iter();
        let mut seen: Vec<_> = all
            .map(|(_, session)| {
                let counts = [
                    session.requests,
                    session.request_bytes,
                    session.replies,
                    session.reply_bytes,
                ];
                (
                    session.connection,
                    self.table.phase(now, session).unwrap(),
                    moment.since(session.started),
                    moment.since(session.last_active),
                    counts,
                )
            })
            .collect();
        seen.sort_by_key(|(number, ..)| *number);
        seen
    }

    /// Another table that goes on with all sessions.
    fn hand_over(&self, now: Instant) -> Self {
        let mut next = Self::new(now, &self.settings, &self.server);
        next.begun = self.begun;
        let moment = self.table.clock().moment(now);
        let mut all: Vec<_> = self
            .table
            .iter()
            .map(|(_, session)| (self.table.phase(now, session).unwrap(), session))
            .collect();
        all.sort_by_key(|(phase, session)| {
            let rank = match phase {
                Phase::Resting { .. } => 0,
                Phase::Detached => 1,
                Phase::Live => 2,
            };
            (rank, Reverse(moment.since(session.last_active)))
        });
        for (phase, session) in all {
            let restored = Restored {
                age: moment.since(session.started),
                idle: moment.since(session.last_active),
                requests: Amount {
                    datagrams: session.requests,
                    bytes: session.request_bytes,
                },
                replies: Amount {
                    datagrams: session.replies,
                    bytes: session.reply_bytes,
                },
                phase,
                needs_socket: session.needs_socket,
                unique_id: None,
            };
            let permit = next.capacity.take().unwrap();
            next.table.restore(
                now,
                session.key(),
                None,
                &session.settings,
                &session.server,
                permit,
                session.connection,
                restored,
            );
        }
        next
    }
}

#[derive(Clone, Debug)]
enum Step {
    Datagram(u16),
    Reply(u32),
    End(u32, EndReason),
    /// So many ticks of the wheel, which both tables then have at the same times.
    Pass(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let reason = prop::sample::select(vec![
        EndReason::Moved,
        EndReason::Network,
        EndReason::Denied,
        EndReason::Unanswered,
    ]);
    prop_oneof![
        4 => (0..5u16).prop_map(Step::Datagram),
        3 => (0..12u32).prop_map(Step::Reply),
        1 => (0..12u32, reason).prop_map(|(number, reason)| Step::End(number, reason)),
        2 => (1..900u32).prop_map(Step::Pass),
    ]
}

impl Step {
    /// Does it, and says what came of it.
    fn take(&self, table: &mut Numbered, now: &mut Instant) -> Option<String> {
        match self {
            Self::Datagram(client) => Some(table.datagram(*now, *client).to_string()),
            Self::Reply(number) => table.reply(*now, *number).map(|reply| format!("{reply:?}")),
            Self::End(number, reason) => {
                table.end(*now, *number, *reason);
                None
            }
            Self::Pass(ticks) => {
                *now += TICK * *ticks;
                table.table.expire(*now, |_| true);
                None
            }
        }
    }
}

fn is_resting_silently(phase: Phase) -> bool {
    matches!(
        phase,
        Phase::Resting {
            rest: crate::handover::Rest::Silent,
            ..
        }
    )
}

proptest! {
    /// Whatever has happened, what happens after the hand-over is what would have happened
    /// without it: each datagram and reply belongs to the same session, counts and times are
    /// the same, and no port rests for less long.
    #[test]
    fn nothing_changes_by_a_hand_over(
        requests in 0..4u64,
        responses in 0..3u64,
        before in prop::collection::vec(step(), 0..40),
        after in prop::collection::vec(step(), 0..40),
    ) {
        let rules = Rules { requests, responses, ..RULES };
        let (settings, [server]) = (settings(rules), servers());
        let mut now = Instant::now();
        let mut old = Numbered::new(now, &settings, &server);
        for step in &before {
            step.take(&mut old, &mut now);
        }
        let mut new = old.hand_over(now);
        prop_assert_eq!(old.seen(now), new.seen(now));
        prop_assert_eq!(old.capacity.taken(), new.capacity.taken());
        prop_assert_eq!(old.capacity.sockets(), new.capacity.sockets());
        prop_assert_eq!(old.table.active(), new.table.active());
        let mut also = now;
        for step in &after {
            let expected = step.take(&mut old, &mut now);
            prop_assert_eq!(step.take(&mut new, &mut also), expected, "{:?}", step);
            prop_assert_eq!(old.seen(now), new.seen(also));
        }
        // All comes to an end, and gives back what it had.
        also += Duration::from_secs(3600);
        new.table.expire(also, |_| true);
        also += Duration::from_secs(3600);
        new.table.expire(also, |_| true);
        prop_assert_eq!(new.seen(also), vec![]);
        prop_assert_eq!((new.capacity.taken(), new.capacity.sockets()), (0, 0));
    }

    /// Nobody takes over the socket of a session that another process has made.
    #[test]
    fn no_session_gets_an_inherited_socket_by_its_listener(
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let rules = Rules { responses: 1, ..RULES };
        let (settings, [server]) = (settings(rules), servers());
        let mut now = Instant::now();
        let mut old = Numbered::new(now, &settings, &server);
        for step in &steps {
            step.take(&mut old, &mut now);
        }
        let new = old.hand_over(now);
        now += MAX_REST;
        let listener = &settings.listener;
        prop_assert_eq!(new.table.reusable(now, listener, &server, Need::Now), None);
        let phases = new.seen(now).into_iter().map(|(_, phase, ..)| phase);
        let silent = phases.filter(|phase| is_resting_silently(*phase)).count();
        // They can be closed.
        let closable = new.table.closable(now, Need::Now, |session| !session.is_active());
        prop_assert!(silent == 0 || closable.is_some());
    }
}
