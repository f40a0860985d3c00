//! What is known of the names, for whoever follows them, for metrics and the log.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use tokio::sync::Notify;

use super::state::{Asked, Outcome, Saying, State};
use crate::config::{Answers, Name, Resolver};
use crate::metrics::{Samples, count, gauge};

/// What is known of all names.
#[derive(Debug, Default)]
pub struct Board {
    entries: Mutex<BTreeMap<Name, State>>,
    /// Told when an answer has changed.
    changed: Notify,
    /// Told after each lookup.
    asked: Notify,
}

impl Board {
    fn entries(&self) -> MutexGuard<'_, BTreeMap<Name, State>> {
        // Nothing that holds the lock can leave half of a change behind.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over these names, and what is known of those that stay.
    pub(super) fn follow(&self, names: &BTreeSet<&Name>) {
        let mut entries = self.entries();
        entries.retain(|name, _| names.contains(name));
        for name in names {
            entries.entry((*name).clone()).or_default();
        }
    }

    /// Takes over what another has found out.
    pub(super) fn absorb(&self, other: &Self) {
        let mut entries = self.entries();
        for (name, found) in std::mem::take(&mut *other.entries()) {
            entries.entry(name).or_default().absorb(found);
        }
        // Answers may have come since somebody looked.
        self.changed.notify_one();
    }

    /// Has all names asked for again at once.
    pub(super) fn ask_anew(&self) {
        self.entries().values_mut().for_each(State::ask_anew);
    }

    /// When to ask for a name again, if it is not at once.
    pub(super) fn ask_at(&self, name: &Name) -> Option<Instant> {
        self.entries().get(name)?.ask_at()
    }

    /// Whether a name is here.
    pub(super) fn has(&self, name: &Name) -> bool {
        self.entries().contains_key(name)
    }

    /// Notes and logs what came of a lookup, and returns the time until the next.
    pub(super) fn note(
        &self,
        name: &Name,
        asked: Asked,
        settings: &Resolver,
        now: Instant,
    ) -> Duration {
        let (noted, servers) = {
            let mut entries = self.entries();
            let Some(state) = entries.get_mut(name) else {
                return Resolver::MAX_RETRY;
            };
            let noted = state.note(asked, settings, now);
            (noted, state.answers().len())
        };
        for saying in noted.sayings {
            say(name, servers, saying);
        }
        if noted.changed {
            self.changed.notify_one();
        }
        self.asked.notify_waiters();
        noted.pause
    }

    /// What the names lead to, those that lead nowhere left out.
    pub(super) fn answers(&self) -> Answers {
        let entries = self.entries();
        let known = entries.iter().map(|(name, state)| (name, state.answers()));
        known
            .filter(|(_, answers)| !answers.is_empty())
            .map(|(name, answers)| (name.clone(), answers.to_vec()))
            .collect()
    }

    /// Waits until an answer has changed since this last returned.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Waits until each name has been asked for.
    pub(super) async fn all_asked(&self) {
        loop {
            let asked = self.asked.notified();
            if self.entries().values().all(State::is_asked) {
                return;
            }
            asked.await;
        }
    }
}

fn say(name: &Name, servers: usize, saying: Saying) {
    match saying {
        Saying::Failing { why, kept: 0 } => {
            tracing::warn!(%name, why, "name does not resolve; it is asked for again and again");
        }
        Saying::Failing { why, kept } => {
            tracing::warn!(%name, why, servers = kept, "name does not resolve; its last answer is kept");
        }
        Saying::Recovered => tracing::info!(%name, servers, "name resolves again"),
        Saying::Changed {
            added,
            removed: 0,
            left_out: 0,
        } if added == servers => tracing::info!(%name, servers, "name resolves"),
        Saying::Changed {
            added,
            removed,
            left_out: 0,
        } => tracing::info!(%name, servers, added, removed, "name leads to other servers"),
        Saying::Changed {
            added,
            removed,
            left_out,
        } => tracing::warn!(
            %name, servers, added, removed, left_out,
            "name leads to other servers; it has more SRV records than are followed"
        ),
    }
}

impl Collector for Board {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let entries = self.entries();
        let named: Vec<_> = entries
            .iter()
            .map(|(name, state)| (name.to_string(), state))
            .collect();
        let samples = |read: fn(&State) -> u64| -> Samples<'_> {
            let all = named.iter();
            all.map(|(name, state)| (vec![("name", name.as_str())], read(state)))
                .collect()
        };
        let lookups = named.iter().flat_map(|(name, state)| {
            Outcome::ALL.map(|outcome| {
                let labels = vec![("name", name.as_str()), ("result", outcome.label())];
                (labels, state.outcomes(outcome))
            })
        });
        let to = &mut encoder;
        count(
            to,
            "name_lookups",
            "Lookups of servers' names, by result",
            lookups.collect(),
        )?;
        count(
            to,
            "name_changes",
            "Times that a name came to lead to other servers",
            samples(State::changes),
        )?;
        gauge(
            to,
            "name_addresses",
            "Servers that names lead to, those that can't be used included",
            samples(|state| state.answers().len() as u64),
        )?;
        gauge(
            to,
            "name_failing",
            "Whether the last lookup of a name failed, its last answer being kept",
            samples(|state| u64::from(state.failing().is_some())),
        )
    }
}

#[cfg(test)]
mod tests;
