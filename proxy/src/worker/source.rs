//! What a worker receives from, as the key that its socket is watched under.

use super::shared::Number;
use crate::session::SessionId;

/// What has something to receive, as the number that it is registered under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// An entrance.
    Clients(usize),
    /// A session's own socket.
    Server(SessionId),
    /// A socket that sessions share.
    Servers(Number),
}

/// Of the keys that sessions leave, marks those of shared sockets.
const SHARED: u64 = 1 << 31;

impl Source {
    // Sessions' generations begin at 1, which leaves keys below 2³² to others.
    pub(super) fn of_key(key: u64) -> Self {
        let number = usize::try_from(key & (SHARED - 1)).unwrap_or(usize::MAX);
        if key >> 32 != 0 {
            Self::Server(SessionId::from_bits(key))
        } else if key & SHARED == 0 {
            Self::Clients(number)
        } else {
            Self::Servers(Number(number))
        }
    }

    /// # Panics
    ///
    /// At 2³¹ entrances or shared sockets, which no host has descriptors for.
    pub(super) fn key(self) -> u64 {
        let below = |number: usize| {
            let number = u64::try_from(number).ok().filter(|n| *n < SHARED);
            number.expect("a process has fewer than 2^31 descriptors")
        };
        match self {
            Self::Clients(entrance) => below(entrance),
            Self::Server(id) => id.to_bits(),
            Self::Servers(Number(number)) => below(number) | SHARED,
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
            Source::Servers(Number(0)),
            Source::Servers(Number(100_000)),
            Source::Server(SessionId::from_bits(1 << 32)),
            Source::Server(SessionId::from_bits(u64::MAX - 1)),
        ];
        for source in sources {
            assert_eq!(Source::of_key(source.key()), source);
        }
    }
}
