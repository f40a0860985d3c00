//! What a worker hands over to another process, which goes on with its sockets and sessions:
//! plain data that can be written and read back. Sockets go beside it; each is named here by
//! its cookie (SO_COOKIE in socket(7)), which stays the same in another process.
//!
//! Another version of the proxy may read it. So a field that is added has a default, and none
//! is renamed or used for anything else.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use ppv2_udp::Adoptable;
use serde::{Deserialize, Serialize};

use crate::mode::Mode;
use crate::server::Server;
use crate::source_addresses::GivenBack;

/// All that one worker has.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerState {
    /// The number of the worker.
    pub worker: usize,
    /// Sockets that clients write to.
    pub listener_sockets: Vec<ListenerSocketState>,
    /// Sockets that sessions share.
    pub shared_sockets: Vec<SharedSocketState>,
    /// Source networks that sessions have addresses of, or had lately.
    pub networks: Vec<NetworkState>,
    /// Servers that were written to from source networks, of which late replies may come.
    pub network_servers: Vec<Address>,
    /// Servers that the rest names by their places here.
    pub servers: Vec<ServerState>,
    /// Proxies in front, which sessions name by their places here.
    pub senders: Vec<SenderState>,
    /// Sessions that go on, and those that ended and keep their port from being used again.
    pub sessions: Vec<SessionState>,
}

impl WorkerState {
    /// Has so much time have passed since it was written.
    pub fn pass(&mut self, time: Duration) {
        let later = |ago: &mut Duration| *ago = ago.saturating_add(time);
        let networks = self.networks.iter_mut();
        for (_, ended) in networks.flat_map(|network| &mut network.resting) {
            later(ended);
        }
        for said in self.senders.iter_mut().filter_map(|one| one.said.as_mut()) {
            later(&mut said.heard);
        }
        for session in &mut self.sessions {
            later(&mut session.age);
            later(&mut session.idle);
            if let Phase::Resting { passes, .. } = &mut session.phase {
                *passes = passes.saturating_sub(time);
            }
            if let Some(via) = &mut session.via {
                later(&mut via.heard);
            }
            if let Some(first) = &mut session.first {
                first.sent.iter_mut().for_each(later);
                first.unanswered.iter_mut().for_each(later);
            }
        }
    }
}

/// A socket that clients write to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListenerSocketState {
    /// Names the socket.
    pub cookie: u64,
    /// What it is bound to.
    pub bound: Address,
    /// The name of its listener.
    pub listener: String,
    /// The kernel's count of datagrams that its buffer had no room for, as far as it is told.
    pub overflows: u32,
    /// The service manager has it, too.
    #[serde(default)]
    pub is_kept: bool,
}

/// A socket that sessions share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SharedSocketState {
    /// Names the socket.
    pub cookie: u64,
    /// The name of the listener that counts what belongs to no session.
    pub listener: String,
    /// What it is for.
    pub kind: SharedKind,
    /// As it was made: datagrams aren't fragmented.
    pub dont_fragment: bool,
    /// As it was made: bursts are received in one piece.
    pub bursts: bool,
    /// As [`ListenerSocketState::overflows`].
    pub overflows: u32,
}

/// What a shared socket is for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum SharedKind {
    /// Each session has a source address of its own.
    Network {
        /// The family.
        v6: bool,
        /// The fixed port, or 0 for one of the kernel's choice.
        port: u16,
        /// What it is bound to.
        bound: Address,
    },
    /// Replies of one server carry tags.
    Tagged {
        /// The place of the server.
        server: u32,
        /// What tags are made with.
        key: TagKey,
        /// What they were made with before, and replies may carry.
        #[serde(default)]
        former: Option<TagKey>,
    },
}

/// A key of tags.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct TagKey(pub [u8; 16]);

/// Leaves out the key, whose holder can make a valid tag for any client.
impl fmt::Debug for TagKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TagKey").finish_non_exhaustive()
    }
}

/// A source network, and which of its addresses rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetworkState {
    /// Its address.
    pub address: IpAddr,
    /// The length of its prefix.
    pub prefix: u8,
    /// The fixed source port of worker 0, or 0.
    pub port: u16,
    /// Addresses whose session has ended, and how long ago.
    pub resting: Vec<(IpAddr, Duration)>,
}

/// A server.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ServerState {
    /// Its upstream.
    pub upstream: String,
    /// Where it listens.
    pub address: Address,
    /// Its name there.
    pub name: String,
    /// Its replies carry tags.
    pub returns_tags: bool,
}

/// A proxy in front.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SenderState {
    /// Where its datagrams come from.
    pub address: Address,
    /// Where it sends to.
    pub local: Address,
    /// The latest client that it has named, and the address that this wrote to.
    pub named: Option<(Address, Address)>,
    /// What it has said for datagrams without header.
    pub said: Option<SaidState>,
}

/// What a proxy in front has said in a header, for datagrams without one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SaidState {
    /// The name of the listener.
    pub listener: String,
    /// The client.
    pub client: Address,
    /// The address that the client wrote to.
    pub destination: Address,
    /// How long it is remembered.
    pub idle: Duration,
    /// How long ago the proxy's latest datagram came.
    pub heard: Duration,
}

/// A session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionState {
    /// Its client.
    pub client: Address,
    /// The address that it wrote to.
    pub local: Address,
    /// The place of the listener's socket that it writes to.
    pub listener_socket: u32,
    /// The place of its server.
    pub server: u32,
    /// How long ago it began.
    pub age: Duration,
    /// How long ago its latest datagram came, or its rest began.
    pub idle: Duration,
    /// Client datagrams.
    pub requests: u64,
    /// Their bytes.
    pub request_bytes: u64,
    /// Replies.
    pub replies: u64,
    /// The bytes of those that were passed on.
    pub reply_bytes: u64,
    /// Whether it goes on.
    pub phase: Phase,
    /// It goes on from another socket.
    pub needs_socket: bool,
    /// The proxy in front that it comes by.
    pub via: Option<ViaState>,
    /// The socket to its server.
    pub path: PathState,
    /// The mode that it began in.
    pub mode: Mode,
    /// Where the first datagrams alone carry the header.
    pub first: Option<FirstState>,
    /// Headers of it have carried a tag, so that replies may.
    pub is_tagged: bool,
    /// The id that its headers carry.
    pub unique_id: Option<[u8; 16]>,
}

/// Where a session is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// It takes and passes datagrams.
    Live,
    /// It has taken all that it may, and passes replies.
    Detached,
    /// It has ended, and its port rests.
    Resting {
        /// How far its port can be trusted to be silent.
        rest: Rest,
        /// For how long yet late replies pass.
        passes: Duration,
    },
}

/// How far a resting port can be trusted to be silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rest {
    /// Every request was answered, and nothing came since.
    Silent,
    /// An answer is owed, or more came than was asked for.
    Owing,
    /// No answer came at all.
    Unanswered,
    /// It has no port that another session could get.
    Passing,
}

/// How a session's replies go back by a proxy in front.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViaState {
    /// The place of the proxy.
    pub sender: u32,
    /// How long ago the latest of the client's datagrams came.
    pub heard: Duration,
    /// The proxy's port belongs to the session's client still.
    pub is_current: bool,
    /// What stands in front of replies.
    pub reply_header: ReplyHeaderState,
}

/// What stands in front of replies that go back by a proxy in front.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplyHeaderState {
    /// Nothing.
    None,
    /// A PROXY v2 header with this tag.
    Tagged {
        /// Its flags.
        flags: u8,
        /// It, as a number in network byte order.
        tag: u64,
    },
    /// A header of Simple Proxy Protocol.
    Spp,
}

/// The socket by which a session's datagrams leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathState {
    /// One of its own.
    Own {
        /// Names the socket.
        cookie: u64,
        /// It is connected to the server.
        is_connected: bool,
        /// It takes replies.
        takes_replies: bool,
        /// It writes from the client's address.
        is_clients: bool,
        /// It writes from the client's port.
        has_client_port: bool,
        /// The address that its port is of, if it was not the kernel's choice.
        pool: Option<IpAddr>,
        /// As [`ListenerSocketState::overflows`].
        overflows: u32,
    },
    /// One that sessions share, each from an address of its own.
    Network {
        /// The place of the socket.
        socket: u32,
        /// The session's address.
        source: IpAddr,
    },
    /// One that sessions share, whose replies carry tags.
    Tagged {
        /// The place of the socket.
        socket: u32,
    },
}

/// Whether the server of a session has its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirstState {
    /// How long ago it last went out, if the server has not forgotten it.
    pub sent: Option<Duration>,
    /// The server has answered since.
    pub is_known: bool,
    /// How long ago the first datagram went out that no reply has followed since.
    pub unanswered: Option<Duration>,
}

/// An address and port, with the number of its interface if it is link-local.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Address(IpAddr, u16, u32);

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        let scope = match address {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(v6) => v6.scope_id(),
        };
        Self(address.ip(), address.port(), scope)
    }
}

impl From<Address> for SocketAddr {
    fn from(Address(ip, port, scope): Address) -> Self {
        match ip {
            IpAddr::V4(_) => Self::new(ip, port),
            IpAddr::V6(v6) => SocketAddrV6::new(v6, port, 0, scope).into(),
        }
    }
}

/// Takes what a worker has, and its sockets with their cookies, in the worker's thread. From before
/// it is called, the worker neither receives nor sends until it is told to go on.
pub type HandOver = Box<dyn FnOnce(WorkerState, &[(u64, BorrowedFd<'_>)]) + Send>;

/// Takes duplicates of some of a worker's sockets, with the number to go on from if there may
/// be more.
pub type Preview = Box<dyn FnOnce(Vec<OwnedFd>, Option<usize>) + Send>;

/// What a worker takes over of others. It then neither receives nor sends until it is told to
/// go on.
pub struct TakeOver {
    /// What each of them had.
    pub states: Vec<Inherited>,
    /// The sockets of all, by their cookies. What no session has is closed once late replies to
    /// it have come.
    pub sockets: HashMap<u64, Adoptable>,
    /// Source networks of all workers.
    pub networks: Arc<[NetworkState]>,
    /// Addresses of source networks that sessions of any worker have, or had so long ago.
    pub network_addresses: Arc<[(IpAddr, Option<Duration>)]>,
    /// By which workers give each other's addresses back.
    pub given_back: Arc<GivenBack>,
    /// Is told what came of it.
    pub done: Box<dyn FnOnce(TakenOver) + Send>,
}

/// What another worker had.
pub struct Inherited {
    /// It.
    pub state: WorkerState,
    /// The servers that it names.
    pub servers: Vec<Arc<Server>>,
}

/// What a worker has taken over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TakenOver {
    /// Sessions that go on.
    pub sessions: usize,
    /// Sessions that don't, by the reason why.
    pub ended: HashMap<NotTaken, usize>,
    /// Listeners' addresses whose sockets can't be used. Then all is to be left as it was.
    pub failed: Vec<SocketAddr>,
}

/// Why a session does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NotTaken {
    /// The configuration has no listener at the address.
    #[error("no listener has their address")]
    NoListener,
    /// The listener refuses its client.
    #[error("the listener refuses their clients")]
    Denied,
    /// Its server is written to in another way.
    #[error("the mode of their server is another")]
    OtherMode,
    /// It can't have been there so.
    #[error("what was handed over of them contradicts itself")]
    Invalid,
    /// There is no room.
    #[error("max_sessions or the kernel's limits leave no room for them")]
    NoRoom,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_passes_for_all_that_has_an_age() {
        let second = Duration::from_secs(1);
        let address = Address::from(SocketAddr::from(([192, 0, 2, 1], 53)));
        let state = |ago: Duration, left: Duration| WorkerState {
            networks: vec![NetworkState {
                address: address.0,
                prefix: 32,
                port: 0,
                resting: vec![(address.0, ago)],
            }],
            senders: vec![SenderState {
                address,
                local: address,
                named: None,
                said: Some(SaidState {
                    listener: String::new(),
                    client: address,
                    destination: address,
                    idle: second,
                    heard: ago,
                }),
            }],
            sessions: vec![SessionState {
                client: address,
                local: address,
                listener_socket: 0,
                server: 0,
                age: ago,
                idle: ago,
                requests: 1,
                request_bytes: 1,
                replies: 1,
                reply_bytes: 1,
                phase: Phase::Resting {
                    rest: Rest::Silent,
                    passes: left,
                },
                needs_socket: false,
                via: Some(ViaState {
                    sender: 0,
                    heard: ago,
                    is_current: true,
                    reply_header: ReplyHeaderState::None,
                }),
                path: PathState::Tagged { socket: 0 },
                mode: Mode::Plain,
                first: Some(FirstState {
                    sent: Some(ago),
                    is_known: true,
                    unanswered: Some(ago),
                }),
                is_tagged: false,
                unique_id: None,
            }],
            ..WorkerState::default()
        };
        let mut passing = state(second, second * 5);
        passing.pass(second * 3);
        assert_eq!(passing, state(second * 4, second * 2));
        passing.pass(second * 3);
        assert_eq!(passing, state(second * 7, Duration::ZERO));
    }

    #[test]
    fn an_address_comes_back_with_its_interface() {
        for text in ["192.0.2.1:53", "[2001:db8::1]:53", "[fe80::1%7]:53"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(SocketAddr::from(Address::from(address)), address);
        }
    }
}
