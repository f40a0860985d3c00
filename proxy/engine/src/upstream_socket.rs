//! The socket by which a session's datagrams leave to its server: its own, connected, so
//! that a reply can only come from the server that was asked, or one that sessions of the
//! worker share. A socket of its own is new, or that of a session that ended and whose port
//! has rested.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use ppv2_udp::{Cause, Options, Socket};

use crate::address::{ClientAddr, ServerAddr};
use crate::client_ports::{ClientPort, ClientPorts};
use crate::counters::DropReason;
use crate::mode::{FirstHeader, Mode};
use crate::own_tlvs::OwnTlvs;
use crate::server::{Replies, Server, Target};
use crate::session::{AfterEnd, Key};
use crate::tag::TagKeys;

/// Ports of the kernel's choice that are tried of a client's address, since each could
/// be one that the client itself had a moment ago.
const CHOICES: usize = 4;

/// What a worker keeps with a session.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) path: Path,
    /// Number of the listener's socket that the client writes to.
    pub(crate) listener_socket: u32,
    /// The mode that it began in.
    pub(crate) mode: Mode,
    /// A new session would be given another kind of socket, or one that is connected to
    /// another port.
    pub(crate) is_outdated: bool,
    /// Which snapshot lets it stay with its server.
    pub(crate) checked: u32,
    /// Where the first datagrams alone carry the header.
    pub(crate) first: Option<Box<First>>,
    /// What tags are made with that its headers carry, if they carry any.
    pub(crate) tags: Option<Arc<TagKeys>>,
    /// While its server doesn't return tags, it has a socket or an address of its own.
    pub(crate) tags_are_optional: bool,
    /// What stands in front of its replies.
    pub(crate) reply_header: ServerReplyHeader,
    /// What its headers carry besides.
    pub(crate) tlvs: Option<Arc<OwnTlvs>>,
}

/// What a server puts in front of its replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ServerReplyHeader {
    /// Nothing.
    None,
    /// A header with a tag, perhaps: headers of the session have carried one.
    Tagged,
    /// The Simple Proxy Protocol header of the request.
    Spp,
}

impl ServerReplyHeader {
    /// Of a server that has seen no tag yet.
    pub(crate) fn of(mode: Mode) -> Self {
        match mode {
            Mode::Spp => Self::Spp,
            Mode::Ppv2 { .. } | Mode::Transparent { .. } | Mode::Dsr(_) | Mode::Plain => Self::None,
        }
    }
}

/// Where the first datagrams alone carry the header: whether the server still has it.
#[derive(Debug)]
pub(crate) struct First {
    pub(crate) header: FirstHeader,
    /// How often the server had gone down or come back when it was last written to.
    pub(crate) transitions: u32,
}

/// The socket by which a session's datagrams leave, and its replies come.
#[derive(Debug)]
pub(crate) enum Path {
    /// One of its own.
    Own(Box<UpstreamSocket>),
    /// One that sessions of the worker share, by which each sends from an address of its
    /// own.
    Network {
        /// Its number.
        socket: u32,
        /// The session's source address.
        source: IpAddr,
    },
    /// One that sessions of the worker to this server share: tags tell whose replies are.
    Tagged {
        /// Its number.
        socket: u32,
    },
}

impl Path {
    /// The number of the socket that sessions share.
    pub(crate) fn shared_socket(&self) -> Option<u32> {
        match self {
            Self::Own(_) => None,
            Self::Network { socket, .. } | Self::Tagged { socket } => Some(*socket),
        }
    }
}

impl Connection {
    /// Whether replies of `target` to this client are to come by the socket that sessions to
    /// it share.
    pub(crate) fn shares_tagged_socket(target: &Target, key: &Key) -> bool {
        let returns_tags = match &target.replies {
            Replies::Session => false,
            Replies::Auto(_) => target.server.returns_tags(),
            Replies::Tagged(_) => true,
        };
        returns_tags && key.fits_header()
    }

    /// Whether a session of this client to `target` has no socket of its own.
    pub(crate) fn shares_socket(target: &Target, key: &Key) -> bool {
        target.sources.network().is_some() || Self::shares_tagged_socket(target, key)
    }

    /// The session's own socket, if it has one.
    pub(crate) fn own_socket(&self) -> Option<&UpstreamSocket> {
        match &self.path {
            Path::Own(socket) => Some(socket),
            Path::Network { .. } | Path::Tagged { .. } => None,
        }
    }

    /// Whether its datagrams leave by this shared socket from this address.
    pub(crate) fn sends_from(&self, number: u32, from: IpAddr) -> bool {
        match &self.path {
            Path::Network { socket, source } => (*socket, *source) == (number, from),
            Path::Own(_) | Path::Tagged { .. } => false,
        }
    }

    /// The address of this host's that its datagrams are sent from, if routes decide which
    /// it is.
    pub(crate) fn own_source(&self) -> Option<IpAddr> {
        self.own_socket().and_then(UpstreamSocket::own_source)
    }

    /// Has headers of a session of this client carry what `target` says.
    pub(crate) fn set_header(&mut self, target: &Target, key: &Key) {
        let keys = target.replies.tag_keys().filter(|_| key.fits_header());
        self.tags = keys.cloned();
        // A session that is about to leave mode spp has replies of before on their way.
        if self.tags.is_some() && self.mode != Mode::Spp {
            self.reply_header = ServerReplyHeader::Tagged;
        }
        self.tags_are_optional = matches!(target.replies, Replies::Auto(_));
        self.tlvs.clone_from(&target.tlvs);
        if let Some(first) = &mut self.first {
            first.header.set_repeat(target.repeat);
        }
    }

    /// Whether headers of the session carry an id of it.
    pub(crate) fn has_unique_id(&self) -> bool {
        self.tlvs.as_ref().is_some_and(|tlvs| tlvs.has_unique_id())
    }

    /// Whether another socket is to be used since the server has begun to return tags, or
    /// no longer does.
    pub(crate) fn is_to_follow_tags(&self, server: &Server) -> bool {
        let has_shared = matches!(self.path, Path::Tagged { .. });
        match &self.tags {
            None => has_shared,
            Some(_) if self.tags_are_optional => server.returns_tags() != has_shared,
            Some(_) => !has_shared,
        }
    }

    /// Has the header sent again, where the first datagrams alone carry it.
    pub(crate) fn forget_header(&mut self) {
        if let Some(first) = &mut self.first {
            first.header.forgotten();
        }
    }

    /// The session's source address, if it has one of its own.
    pub(crate) fn source(&self) -> Option<IpAddr> {
        match &self.path {
            Path::Network { source, .. } => Some(*source),
            Path::Own(_) | Path::Tagged { .. } => None,
        }
    }

    /// What becomes of the session's socket and port when it ends.
    pub(crate) fn after_end(&self) -> AfterEnd {
        let socket = match &self.path {
            Path::Own(socket) => socket,
            Path::Network { .. } => return AfterEnd::Pass,
            Path::Tagged { .. } => return AfterEnd::Forget,
        };
        if !socket.takes_replies {
            // On a port of this host's, another session could get it.
            if socket.is_connected {
                AfterEnd::RestUnheard
            } else {
                AfterEnd::Close
            }
        } else if socket.client_port.is_some() {
            AfterEnd::CloseOnceRead
        } else if self.is_outdated || self.mode.spoofs() {
            AfterEnd::Rest
        } else {
            AfterEnd::RestForReuse
        }
    }
}

/// A session's own socket towards its server.
#[derive(Debug)]
pub(crate) struct UpstreamSocket {
    pub(crate) socket: Socket,
    /// Otherwise each datagram names the server.
    pub(crate) is_connected: bool,
    pub(crate) takes_replies: bool,
    /// It writes from the client's address.
    pub(crate) is_clients: bool,
    /// The client's own port, if it is the socket's.
    pub(crate) client_port: Option<ClientPort>,
    pub(crate) pool: PortPool,
    /// The kernel's latest count of replies lost because its buffer was full.
    pub(crate) overflows: u32,
    /// Number of the interface that its latest reply came in by, 0 if that is not asked
    /// for.
    pub(crate) interface: u32,
    pub(crate) receive_batch: ReceiveBatch,
}

impl UpstreamSocket {
    /// Connects a socket to a server that sees it, from the address `source` of this host
    /// or one of the kernel's choice.
    pub(crate) fn connect(
        key: &Key,
        target: &Target,
        source: Option<IpAddr>,
        options: Options,
    ) -> Result<Self, DropReason> {
        let address = target.server.address_for(key.local);
        let socket = Socket::connect(address.0, source, options)
            .map_err(|error| why_unopened(Cause::of(&error)))?;
        let takes_replies = target.mode.takes_replies();
        if !takes_replies {
            socket.ignore_replies();
        }
        let pool = PortPool::of_host(source, address);
        Ok(Self {
            takes_replies,
            ..Self::new(socket, pool)
        })
    }

    /// Opens the socket of a session whose server sees the client as the source: one that
    /// sends, and takes replies if they come back.
    pub(crate) fn in_name_of_client(
        (now, key): (Instant, &Key),
        target: &Target,
        client_ports: &Arc<ClientPorts>,
        options: Options,
    ) -> Result<Self, DropReason> {
        let (client, to) = (key.client, target.server.address_for(key.local));
        let source = target.mode.source(client).unwrap_or(client.0);
        let takes_replies = target.mode.takes_replies();
        let open = || {
            let socket = Socket::in_name_of(source, to.0, takes_replies, options)
                .map_err(|error| why_not_in_its_name(Cause::of(&error)))?;
            Ok(Self {
                is_connected: takes_replies,
                takes_replies,
                is_clients: true,
                ..Self::new(socket, PortPool::of_client(client))
            })
        };
        if !takes_replies {
            let opened = open()?;
            opened.socket.ignore_replies();
            return Ok(opened);
        }
        if source.port() != 0 {
            let client_port = client_ports.take(now, key, to);
            let client_port = Some(client_port.ok_or(DropReason::ClientPortInUse)?);
            let opened = open()?;
            return Ok(Self {
                client_port,
                ..opened
            });
        }
        for _ in 0..CHOICES {
            let opened = open()?;
            let is_taken = |source| client_ports.is_taken(now, source, to);
            if !opened.socket.local().is_ok_and(is_taken) {
                return Ok(opened);
            }
        }
        Err(DropReason::ClientPortInUse)
    }

    pub(crate) fn new(socket: Socket, pool: PortPool) -> Self {
        Self {
            socket,
            is_connected: true,
            takes_replies: true,
            is_clients: false,
            client_port: None,
            pool,
            overflows: 0,
            interface: 0,
            receive_batch: ReceiveBatch::default(),
        }
    }

    /// The address of this host's that datagrams are sent from; `None` if it is the
    /// client's, to which changes of the network mean nothing.
    pub(crate) fn own_source(&self) -> Option<IpAddr> {
        if self.is_clients || !self.is_connected {
            return None;
        }
        self.socket.local().ok().map(|local| local.ip())
    }
}

/// The local ports that the kernel chooses a socket's port from: each address has its
/// own, and where the kernel chooses the address as well, each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PortPool {
    address: Option<IpAddr>,
    v6: bool,
}

impl PortPool {
    /// Those of the address `source` of this host, or of all, towards `server`.
    pub(crate) fn of_host(source: Option<IpAddr>, server: ServerAddr) -> Self {
        Self {
            address: source,
            v6: server.0.is_ipv6(),
        }
    }

    /// The address that they are of; `None` where the kernel chooses it.
    pub(crate) fn address(self) -> Option<IpAddr> {
        self.address
    }

    /// Those that sockets to a server have, by its sources.
    pub(crate) fn of_target(target: &Target) -> impl Iterator<Item = Self> {
        let sources = target.sources.addresses().iter().copied().map(Some);
        let any = target.sources.addresses().is_empty().then_some(None);
        sources
            .chain(any)
            .map(|source| Self::of_host(source, target.server.address))
    }

    /// Those of a client's address.
    pub(crate) fn of_client(client: ClientAddr) -> Self {
        Self {
            address: Some(client.0.ip()),
            v6: client.0.is_ipv6(),
        }
    }
}

/// How many replies to ask a session's socket for, between 1 and [`MAX`](Self::MAX): about
/// as many as its server answered with of late. Most answer with one, and to ask for
/// another costs half as much as the reply itself, to learn that there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReceiveBatch {
    most: u8,
    /// How often one was asked for, and came, since more were asked for. One that was asked
    /// for says nothing of others.
    ones: u8,
}

impl Default for ReceiveBatch {
    fn default() -> Self {
        Self { most: 1, ones: 0 }
    }
}

impl ReceiveBatch {
    /// The most to take from one session before others have their turn.
    const MAX: u8 = 8;

    /// How often one is asked for until two are, to see whether there are more: then that is
    /// an eighth of what it would be to ask for two each time.
    const ONES: u8 = 8;

    /// For a session of which so many requests are not answered yet, or never will be.
    pub(crate) fn get(self, unanswered: u64) -> usize {
        let are_more_likely = self.ones >= Self::ONES || self.ones > 0 && unanswered > 1;
        let is_try = self.most == 1 && are_more_likely;
        if is_try { 2 } else { self.most.into() }
    }

    /// Learns from how many there were of those `asked` for.
    pub(crate) fn learn(&mut self, asked: usize, received: usize) {
        if asked == 1 {
            self.ones = self.ones.saturating_add(1);
            return;
        }
        self.ones = 0;
        if received >= asked {
            self.most = u8::try_from(asked * 2).map_or(Self::MAX, |most| most.min(Self::MAX));
        } else if received <= asked / 2 {
            self.most = u8::try_from(asked / 2).unwrap_or(Self::MAX).max(1);
        }
    }
}

/// Whether a session that has ended could give what is lacking towards a server. A
/// client's own port is no other session's to give.
pub(crate) fn is_shortage(reason: DropReason, target: &Target) -> bool {
    use DropReason::{ClientPortInUse, NoDescriptors, NoMemory, NoPorts};
    [NoDescriptors, NoMemory, NoPorts].contains(&reason)
        || reason == ClientPortInUse && !target.mode.spoofs_ports()
}

fn why_not_in_its_name(cause: Cause) -> DropReason {
    match cause {
        Cause::NoPorts | Cause::WouldBlock => DropReason::ClientPortInUse,
        Cause::NotPermitted => DropReason::NoPrivilege,
        Cause::NoDescriptors
        | Cause::NoMemory
        | Cause::Unreachable
        | Cause::Oversize
        | Cause::Other => why_unopened(cause),
    }
}

fn why_unopened(cause: Cause) -> DropReason {
    match cause {
        Cause::NoDescriptors => DropReason::NoDescriptors,
        // Binding to a port of the kernel's choice would block, it says.
        Cause::NoPorts | Cause::WouldBlock => DropReason::NoPorts,
        Cause::NoMemory => DropReason::NoMemory,
        Cause::Unreachable | Cause::Oversize | Cause::NotPermitted | Cause::Other => {
            DropReason::Unreachable
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_replies_are_asked_for_as_there_were() {
        let mut batch = ReceiveBatch::default();
        // Several requests wait for their replies.
        for expected in [1, 2, 4, 8, 8] {
            assert_eq!(batch.get(8), expected);
            batch.learn(expected, expected);
        }
        batch.learn(8, 5);
        assert_eq!(batch.get(8), 8);
        for (asked, expected) in [(8, 4), (4, 2), (2, 1)] {
            batch.learn(asked, 1);
            assert_eq!(batch.get(8), expected);
        }
    }

    #[test]
    fn two_replies_are_seldom_asked_for_where_one_comes() {
        let mut batch = ReceiveBatch::default();
        let mut asked_for_two = 0;
        for _ in 0..90 {
            let asked = batch.get(1);
            asked_for_two += usize::from(asked == 2);
            batch.learn(asked, 1);
        }
        assert_eq!(asked_for_two, 10);
        // A server that sends without being asked is found out.
        while batch.get(0) == 1 {
            batch.learn(1, 1);
        }
        batch.learn(2, 2);
        assert_eq!(batch.get(0), 4);
    }
}
