//! Finds servers that answer from another address or port than they were asked at. The
//! kernel drops such replies unseen. The sign is a server that does not answer while the
//! kernel drops as many datagrams for which no socket is open.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::metrics::Traffic;

/// How many unanswered datagrams make a server suspect.
const AT_LEAST: u64 = 10;

/// How long unanswered datagrams are counted together: over a longer time, more of what
/// the host drops has nothing to do with a server.
const WINDOW: Duration = Duration::from_secs(60);

/// What is known of one server.
#[derive(Debug)]
struct Known {
    since: Instant,
    before: Traffic,
    dropped_before: u64,
    was_logged: bool,
}

/// Compares what servers were sent with what the kernel dropped.
#[derive(Debug, Default)]
pub(super) struct Silence {
    /// By the server's id.
    servers: HashMap<u64, Known>,
}

impl Silence {
    /// Forgets servers that `is_there` doesn't know by their id.
    pub(super) fn retain(&mut self, is_there: impl Fn(u64) -> bool) {
        self.servers.retain(|id, _| is_there(*id));
    }

    /// How many datagrams the server has left unanswered, if that is to be logged now:
    /// once, until it answers. `dropped` is what the kernel has dropped so far.
    pub(super) fn due(
        &mut self,
        server: u64,
        traffic: Traffic,
        dropped: u64,
        now: Instant,
    ) -> Option<u64> {
        let fresh = |was_logged| Known {
            since: now,
            before: traffic,
            dropped_before: dropped,
            was_logged,
        };
        let known = self.servers.entry(server).or_insert_with(|| fresh(false));
        if traffic.replies != known.before.replies {
            *known = fresh(false);
            return None;
        }
        // A server on this host that is gone: the kernel drops what is sent to it.
        if traffic.refusals != known.before.refusals {
            *known = fresh(known.was_logged);
            return None;
        }
        let unanswered = traffic.sent.saturating_sub(known.before.sent);
        let dropped = dropped.saturating_sub(known.dropped_before);
        let was_logged = known.was_logged;
        if !was_logged && unanswered >= AT_LEAST && dropped >= unanswered / 2 {
            known.was_logged = true;
            return Some(unanswered);
        }
        if now.saturating_duration_since(known.since) >= WINDOW {
            *known = fresh(was_logged);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_told_of_once_until_it_answers() {
        let (mut silence, start) = (Silence::default(), Instant::now());
        let mut logged = Vec::new();
        let (mut traffic, mut dropped) = (Traffic::default(), 0);
        for second in 0..300u64 {
            // It answers rightly for two minutes in between, and nothing gets lost.
            if (100..220).contains(&second) {
                traffic.replies += 5;
            } else {
                dropped += 5;
            }
            traffic.sent += 5;
            let now = start + Duration::from_secs(second);
            let due = silence.due(0, traffic, dropped, now);
            logged.extend(due.map(|unanswered| (second, unanswered)));
        }
        assert_eq!(logged, [(2, 10), (221, 10)]);
    }

    #[test]
    fn silence_alone_is_not_told_nor_are_a_few_drops_of_others() {
        let (mut silence, start) = (Silence::default(), Instant::now());
        for second in 0..300 {
            let traffic = Traffic {
                sent: second * 5,
                ..Traffic::default()
            };
            let now = start + Duration::from_secs(second);
            assert_eq!(silence.due(0, traffic, second, now), None);
        }
    }

    #[test]
    fn a_server_that_refuses_is_not_told_of() {
        let (mut silence, start) = (Silence::default(), Instant::now());
        for second in 0..300 {
            let traffic = Traffic {
                sent: second * 5,
                refusals: second,
                ..Traffic::default()
            };
            let now = start + Duration::from_secs(second);
            assert_eq!(silence.due(0, traffic, second * 5, now), None);
        }
    }
}
