//! Which clients' own ports are in use towards which servers, by all workers
//! together. The kernel lets several sockets have one address and port; of two
//! that were also connected to the same server, it would give all replies to one.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::address::{ClientAddr, ServerAddr};

/// Client and server of each session that writes from the client's own port.
/// There are as many as such sessions. Looked at when one begins or ends.
#[derive(Debug, Default)]
pub struct Claims(Mutex<HashSet<(SocketAddr, SocketAddr), ahash::RandomState>>);

/// The right to write to a server from a client's own port, given back when
/// dropped.
#[derive(Debug)]
pub(super) struct Claim {
    pair: (SocketAddr, SocketAddr),
    of: Arc<Claims>,
}

impl Claims {
    /// Takes the right; `None` if another session has it.
    pub(super) fn claim(self: &Arc<Self>, client: ClientAddr, server: ServerAddr) -> Option<Claim> {
        let pair = (client.0, server.0);
        let is_new = self.locked(|pairs| pairs.insert(pair));
        is_new.then(|| Claim {
            pair,
            of: Arc::clone(self),
        })
    }

    fn locked<T>(
        &self,
        change: impl FnOnce(&mut HashSet<(SocketAddr, SocketAddr), ahash::RandomState>) -> T,
    ) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.of.locked(|pairs| pairs.remove(&self.pair));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_session_at_a_time_writes_to_a_server_from_a_clients_port() {
        let claims = Arc::new(Claims::default());
        let client = |port| ClientAddr(([203, 0, 113, 11], port).into());
        let server = |port| ServerAddr(([192, 0, 2, 1], port).into());
        let first = claims.claim(client(1), server(1)).unwrap();
        assert!(claims.claim(client(1), server(1)).is_none());
        assert!(claims.claim(client(2), server(1)).is_some());
        assert!(claims.claim(client(1), server(2)).is_some());
        drop(first);
        assert!(claims.claim(client(1), server(1)).is_some());
    }
}
