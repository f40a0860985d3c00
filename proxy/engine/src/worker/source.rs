//! What a worker receives from, as the key that its socket is watched under.

use crate::session::SessionId;

/// What has something to receive, as the number that it is registered under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// An entrance.
    Clients(usize),
    /// A session's own socket.
    Server(SessionId),
}

impl Source {
    // Sessions' generations begin at 1, which leaves keys below 2³² to others.
    pub(super) fn of_key(key: u64) -> Self {
        if key >> 32 != 0 {
            Self::Server(SessionId::from_bits(key))
        } else {
            Self::Clients(usize::try_from(key).unwrap_or(usize::MAX))
        }
    }

    /// # Panics
    ///
    /// At 2³² entrances, which no host has descriptors for.
    pub(super) fn key(self) -> u64 {
        match self {
            Self::Clients(entrance) => u32::try_from(entrance)
                .expect("a process has fewer than 2^32 descriptors")
                .into(),
            Self::Server(id) => id.to_bits(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_what_it_was_made_for() {
        let sources = [
            Source::Clients(0),
            Source::Clients(2),
            Source::Server(SessionId::from_bits(1 << 32)),
            Source::Server(SessionId::from_bits(u64::MAX - 1)),
        ];
        for source in sources {
            assert_eq!(Source::of_key(source.key()), source);
        }
    }
}
