//! What operators asked of servers that are gone, until they are back.

use ppv2_engine::address::ServerAddr;

/// Servers that are gone whose drain is remembered. It bounds what a name costs that
/// leads elsewhere all the time; the one that left first is forgotten.
const MAX_GONE: usize = 1024;

/// A server that is gone, of which an operator asked what the configuration does not
/// say.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) upstream: String,
    pub(super) name: String,
    pub(super) address: ServerAddr,
    pub(super) drain: bool,
}

/// Whether who writes `server` means the one of this name and address.
pub(super) fn is_meant(server: &str, name: &str, address: ServerAddr) -> bool {
    server == name || server.parse() == Ok(address.0)
}

/// All such servers, in the order in which they left.
#[derive(Debug, Default)]
pub(super) struct Drains(Vec<Asked>);

impl Drains {
    /// Remembers what was asked of servers that have left.
    pub(super) fn keep(&mut self, left: impl IntoIterator<Item = Asked>) {
        self.0.extend(left);
        let excess = self.0.len().saturating_sub(MAX_GONE);
        for Asked {
            upstream,
            name,
            drain,
            ..
        } in self.0.drain(..excess)
        {
            tracing::warn!(
                upstream,
                server = name,
                drain,
                "what an operator asked of this server is forgotten: it left, and so did \
                 {MAX_GONE} others since"
            );
        }
    }

    /// What was asked of a server that is back, unless the configuration, which says
    /// `configured`, now says the same.
    pub(super) fn take(
        &mut self,
        upstream: &str,
        address: ServerAddr,
        configured: bool,
    ) -> Option<bool> {
        let is = |asked: &Asked| asked.address == address && asked.upstream == upstream;
        let at = self.0.iter().position(is)?;
        let drain = self.0.remove(at).drain;
        (drain != configured).then_some(drain)
    }

    /// Asks for it anew, by name or by address. False if there is no such server.
    pub(super) fn ask(&mut self, upstream: &str, server: &str, drain: bool) -> bool {
        let before = self.0.len();
        let is = |asked: &Asked| {
            asked.upstream == upstream && is_meant(server, &asked.name, asked.address)
        };
        let is_known = self.0.iter().any(is);
        // What it goes back to is what the configuration says.
        self.0.retain(|asked| !is(asked) || asked.drain == drain);
        if self.0.len() < before {
            tracing::info!(upstream, server, drain, "an operator asked for it");
        }
        is_known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(n: u16, drain: bool) -> Asked {
        Asked {
            upstream: "u".to_owned(),
            name: format!("server{n}"),
            address: address(n),
            drain,
        }
    }

    fn address(n: u16) -> ServerAddr {
        ServerAddr(([192, 0, 2, 1], n).into())
    }

    #[test]
    fn a_server_that_is_back_is_what_was_asked_until_the_file_says_so_too() {
        let mut drains = Drains::default();
        drains.keep([asked(1, true), asked(2, true), asked(3, false)]);
        assert_eq!(drains.take("v", address(1), false), None);
        assert_eq!(drains.take("u", address(1), false), Some(true));
        assert_eq!(drains.take("u", address(1), false), None);
        assert_eq!(drains.take("u", address(2), true), None);
        assert_eq!(drains.take("u", address(3), true), Some(false));
        // Asked for anew while it is gone.
        drains.keep([asked(4, true), asked(5, true)]);
        assert!(!drains.ask("u", "server6", false));
        assert!(drains.ask("u", "server4", true) && drains.ask("u", "server5", false));
        assert!(drains.ask("u", "192.0.2.1:4", true));
        assert_eq!(drains.take("u", address(4), false), Some(true));
        assert_eq!(drains.take("u", address(5), false), None);
    }

    #[test]
    fn those_that_left_first_are_forgotten_first() {
        let mut drains = Drains::default();
        for n in 0..=1024 {
            drains.keep([asked(n, true)]);
        }
        assert_eq!(drains.take("u", address(0), false), None);
        for n in 1..=1024 {
            assert_eq!(drains.take("u", address(n), false), Some(true));
        }
    }
}
