//! Whose host is checked or set up.

use clap::ValueEnum;

/// The host that is checked or set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// That of the proxy
    Proxy,
    /// That of a server
    Server,
}
