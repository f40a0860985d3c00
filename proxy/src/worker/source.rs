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

impl Source {
    // Sessions' generations begin at 1, which leaves the low keys to entrances
    // and, above these, to shared sockets.
    pub(super) fn of_key(key: u64, entrances: usize) -> Self {
        match usize::try_from(key) {
            Ok(entrance) if entrance < entrances => Self::Clients(entrance),
            Ok(shared) if key >> 32 == 0 => Self::Servers(Number(shared - entrances)),
            _ => Self::Server(SessionId::from_bits(key)),
        }
    }

    pub(super) fn key(self, entrances: usize) -> u64 {
        match self {
            Self::Clients(entrance) => entrance as u64,
            Self::Server(id) => id.to_bits(),
            Self::Servers(Number(number)) => (entrances + number) as u64,
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
            assert_eq!(Source::of_key(source.key(3), 3), source);
        }
    }
}
