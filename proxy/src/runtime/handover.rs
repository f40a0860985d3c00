//! Handing over sockets and sessions to another process of the proxy, so that an upgrade loses
//! neither a datagram nor a session.

mod channel;
mod giving;
mod message;
mod taking;

use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::process::geteuid;

use channel::peer_uid;

pub(super) use giving::{Ask, Giver, IS_ENDING, Offering};
pub(crate) use message::ServerStanding;
pub(super) use message::{Offer, Running};
pub use taking::{TakeError, hands_over};
pub(super) use taking::{Taking, summary};

const ROOT: u32 = 0;

/// How long the first words may take.
const HELLO: Duration = Duration::from_secs(5);

/// How long each step may take while nobody looks at the sockets.
const FROZEN: Duration = Duration::from_secs(10);

/// Whether the process at the other end is of this one's user, or of root. Otherwise why not.
fn is_trusted(stream: &UnixStream) -> Result<(), String> {
    let peer = peer_uid(stream)
        .map_err(|error| format!("the user of the other process can't be found out: {error}"))?;
    let own = geteuid().as_raw();
    if peer == own || peer == ROOT {
        return Ok(());
    }
    Err(format!(
        "the other process is of user {peer}, and this one of user {own}; run both as the same user"
    ))
}
