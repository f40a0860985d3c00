//! What a worker receives from, as the key that its socket is watched under.

use crate::session::SessionId;

/// What has something to receive, as the number that it is registered under.
#[derive(Clone, Copy)]
pub(super) enum Source {
    Clients(usize),
    Server(SessionId),
}

impl Source {
    // Sessions' generations begin at 1, which leaves the low keys to entrances.
    pub(super) fn of_key(key: u64, entrances: usize) -> Self {
        match usize::try_from(key) {
            Ok(entrance) if entrance < entrances => Self::Clients(entrance),
            _ => Self::Server(SessionId::from_bits(key)),
        }
    }

    pub(super) fn key(self) -> u64 {
        match self {
            Self::Clients(entrance) => entrance as u64,
            Self::Server(id) => id.to_bits(),
        }
    }
}
