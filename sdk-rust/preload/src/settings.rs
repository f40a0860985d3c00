//! What the environment variables say.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// The settings of a process, read once.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) trust: ppv2_sdk::Trust,
    /// What IP_PKTINFO shows the program: the local address, or the header's destination.
    pub(crate) pktinfo: Pktinfo,
    pub(crate) stats: Option<PathBuf>,
    // only, peers, …
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pktinfo {
    Local,
    Destination,
}

impl Settings {
    /// Whether sockets that are bound to this address are taken over.
    pub(crate) fn takes_over(&self, _bound: SocketAddr) -> bool {
        todo!()
    }

    /// Whether this address is talked to directly (PPV2_PEERS).
    pub(crate) fn is_peer(&self, _ip: IpAddr) -> bool {
        todo!()
    }
}

/// The settings; `None` before [`crate::lifecycle::start`].
pub(crate) fn get() -> Option<&'static Settings> {
    todo!()
}
