//! Upstreams: named groups of servers, and which of them a new session gets.
//!
//! A [`Plan`] says which servers take new sessions and how these are spread; the control
//! path makes it, by [`Balance`] and the [`State`] of each server. Each worker has a
//! [`Balancer`] of its own.

mod affinity;
mod balance;
mod maglev;
mod plan;
mod turns;

pub use affinity::HashOn;
pub use balance::Balancer;
pub use maglev::MAX_SERVERS;
pub use plan::{Balance, Member, Plan, State};
pub use turns::MAX_WEIGHT;

/// One thing for IPv4 clients and another for IPv6 clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ByFamily<T>([T; 2]);

impl<T> ByFamily<T> {
    /// Has `make` make both, told whether it is for IPv6.
    pub fn new(make: impl FnMut(bool) -> T) -> Self {
        Self([false, true].map(make))
    }

    /// The one for IPv6 clients, or for IPv4 ones.
    #[must_use]
    pub fn get(&self, v6: bool) -> &T {
        &self.0[usize::from(v6)]
    }

    /// Both.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter()
    }
}
