//! What is known of all names, for the control path and metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use tokio::sync::Notify;

use super::state::{Found, Outcome, State};
use crate::config::{Answers, Name, Resolver};
use crate::metrics::{Samples, count, gauge};

/// What is known of all names.
#[derive(Debug, Default)]
pub struct Status {
    names: Mutex<BTreeMap<Name, State>>,
    /// Notified when an answer has changed.
    changed: Notify,
}

impl Status {
    fn names(&self) -> MutexGuard<'_, BTreeMap<Name, State>> {
        // No panic can leave half of a change behind.
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all names but these, and takes over what was found out about them.
    pub(super) fn reconfigure(&self, wanted: &BTreeSet<&Name>, found: BTreeMap<Name, State>) {
        let mut names = self.names();
        names.retain(|name, _| wanted.contains(name));
        for name in wanted {
            names.entry((*name).clone()).or_default();
        }
        for (name, found) in found {
            if let Some(state) = names.get_mut(&name) {
                state.absorb(found);
            }
        }
        // Answers may have changed since the caller used them.
        self.changed.notify_one();
    }

    /// Makes a lookup of every name due.
    pub(super) fn look_up_again(&self) {
        for state in self.names().values_mut() {
            state.next_lookup = None;
        }
    }

    /// When a lookup of the name is due; `None` if it is no longer wanted.
    pub(super) fn next_lookup(&self, name: &Name) -> Option<Instant> {
        let names = self.names();
        Some(names.get(name)?.next_lookup.unwrap_or_else(Instant::now))
    }

    pub(super) fn has(&self, name: &Name) -> bool {
        self.names().contains_key(name)
    }

    /// Takes over and logs the result of a lookup.
    pub(super) fn note(&self, name: &Name, found: Found, settings: &Resolver) {
        let now = Instant::now();
        if let Some(state) = self.names().get_mut(name) {
            if state.note(found, settings, now) {
                self.changed.notify_one();
            }
            state.log(name, now);
        }
    }

    /// What the names resolve to, without those that never did.
    #[must_use]
    pub fn answers(&self) -> Answers {
        let names = self.names();
        let known = names.iter().map(|(name, state)| (name, &state.answers));
        known
            .filter(|(_, answers)| !answers.is_empty())
            .map(|(name, answers)| (name.clone(), answers.to_vec()))
            .collect()
    }

    /// Waits until an answer has changed since this last returned. No change is lost if
    /// the future is dropped. For a single caller.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl Collector for Status {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let names = self.names();
        let named: Vec<_> = names
            .iter()
            .map(|(name, state)| (name.to_string(), state))
            .collect();
        let samples = |read: fn(&State) -> u64| -> Samples<'_> {
            let all = named.iter();
            all.map(|(name, state)| (vec![("name", name.as_str())], read(state)))
                .collect()
        };
        let lookups = named.iter().flat_map(|(name, state)| {
            let counts = Outcome::ALL.iter().zip(state.outcomes);
            counts.map(move |((_, result), count)| {
                (vec![("name", name.as_str()), ("result", *result)], count)
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
            "Times that the servers of a name have changed",
            samples(|state| state.changes),
        )?;
        gauge(
            to,
            "name_addresses",
            "Servers that names resolve to, including those that can't be used",
            samples(|state| state.answers.len() as u64),
        )?;
        gauge(
            to,
            "name_failing",
            "1 if the last lookup of the name failed, else 0; its last answer is kept",
            samples(|state| u64::from(state.failing.is_some())),
        )
    }
}

#[cfg(test)]
mod tests;
