//! Modes: how a server learns who the client is, by what stands in front of a
//! datagram or by its source address, and whether its replies come back.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ppv2::{ReplyTag, spp};
use serde::{Deserialize, Serialize};

use crate::address::{ClientAddr, ListenerAddr, ServerAddr};
use crate::handover::FirstState;
use crate::own_tlvs::{OwnTlvs, UNIQUE_ID_TLV_LEN, UniqueId, split_tlvs};

/// Bytes of TLVs that a datagram's own header can have, which go on with it: all that an IPv4
/// header of the longest kind has behind its addresses.
pub const MAX_PASSED_TLVS: usize = ppv2::DEFAULT_MAX_HEADER_LEN - ppv2::IPV4_HEADER_LEN;

/// Room for the longest header: 52 bytes for IPv6, 484 for TLVs that are passed on, 512 for
/// those of the configuration, 19 for the id of a session, 13 for a reply tag and 7 for a
/// checksum.
pub const MAX_HEADER: usize = ppv2::MAX_TAGGED_HEADER_LEN
    + MAX_PASSED_TLVS
    + OwnTlvs::MAX_LEN
    + UNIQUE_ID_TLV_LEN
    + ppv2::CRC32C_TLV_LEN;

/// How a server is told who the client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// By a PROXY v2 header in front of the datagram.
    Ppv2 {
        /// On which datagrams of a session.
        emit: Emit,
        /// With a checksum, 7 bytes more.
        crc32c: bool,
    },
    /// By a Simple Proxy Protocol header in front of each datagram, which the server puts in
    /// front of its replies as well.
    Spp,
    /// By the source address, which is the client's. Replies are routed to the
    /// proxy, which passes them on.
    Transparent {
        /// The source port.
        port: SourcePort,
    },
    /// By the source address, or by a header, with replies that never come to the
    /// proxy: direct server return.
    Dsr(RewriteOn),
    /// Not at all.
    Plain,
}

/// From which port a server is written to in the client's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourcePort {
    /// One that the kernel chooses.
    #[default]
    Any,
    /// The client's own.
    Client,
}

/// Who makes the reply of direct server return come from the listener's address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RewriteOn {
    /// The kernel of the proxy's host, which the server routes its replies to.
    #[default]
    Proxy,
    /// The kernel of the server's host, which sends them by itself.
    Server,
    /// The server, which reads the header and sends from the address that it
    /// names.
    Sdk {
        /// The header comes with a checksum, 7 bytes more.
        crc32c: bool,
    },
}

/// How long a server may leave datagrams unanswered before it is taken to have
/// forgotten a header that it had: it may have restarted without anybody being told.
const FORGETS: Duration = Duration::from_secs(3);

/// Which datagrams of a session carry the header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Emit {
    /// Every one, as the specification asks (receivers parse each datagram by
    /// itself).
    #[default]
    Every,
    /// The first ones, until the server has answered, for servers that remember it.
    /// The specification knows no such thing.
    First,
}

/// Said where a header doesn't fit.
const FITS: &str = "there is room for the longest header";

/// What the header of a datagram says, where the mode has one. Its TLVs come in the order of
/// these fields, and a checksum is the last.
#[derive(Clone, Copy, Debug)]
pub struct HeaderParts<'t> {
    /// Whose datagram it is.
    pub client: ClientAddr,
    /// Where the client sent it.
    pub local: ListenerAddr,
    /// TLVs of the header that the datagram came with, as they stand there: at most
    /// [`MAX_PASSED_TLVS`] bytes. Those of a type that the proxy writes itself are left out.
    pub passed: &'t [u8],
    /// Those of the configuration.
    pub own: Option<&'t OwnTlvs>,
    /// The id of the datagram's session.
    pub unique_id: Option<UniqueId>,
    /// The tag that replies are to carry.
    pub tag: Option<ReplyTag>,
}

impl<'t> HeaderParts<'t> {
    /// The client and the address that it sent to alone.
    #[must_use]
    pub fn new(client: ClientAddr, local: ListenerAddr) -> Self {
        Self {
            client,
            local,
            passed: &[],
            own: None,
            unique_id: None,
            tag: None,
        }
    }

    /// Writes what is more than addresses and a tag.
    fn write_tlvs(self, buffer: &mut [u8], crc32c: bool) -> Result<&[u8], ppv2::EncodeError> {
        let own = self.own.map_or(&[][..], OwnTlvs::encoded);
        let mut encoder = ppv2::Encoder::udp(buffer, self.client.0, self.local.0)?;
        // Servers read the first of a kind: none from outside may stand for one of the proxy's.
        let is_own = |kind| {
            kind == ppv2::TlvType::UNIQUE_ID && self.unique_id.is_some()
                || split_tlvs(own).any(|(own, _)| own == kind)
        };
        let passed = split_tlvs(self.passed).filter(|(kind, _)| !is_own(*kind));
        for (kind, value) in passed.chain(split_tlvs(own)) {
            encoder = encoder.tlv(kind, value)?;
        }
        if let Some(id) = self.unique_id {
            encoder = encoder.unique_id(&id.0)?;
        }
        if let Some(tag) = self.tag {
            encoder = encoder.reply_tag(tag)?;
        }
        if crc32c {
            encoder = encoder.crc32c()?;
        }
        Ok(encoder.finish())
    }
}

impl Mode {
    /// Writes the header of a datagram to `buffer`, and returns it; nothing if the mode has no
    /// header.
    #[must_use]
    pub fn write_header<'b>(
        self,
        parts: HeaderParts<'_>,
        buffer: &'b mut [u8; MAX_HEADER],
    ) -> &'b [u8] {
        let crc32c = match self {
            Self::Ppv2 { crc32c, .. } | Self::Dsr(RewriteOn::Sdk { crc32c }) => crc32c,
            Self::Spp => {
                let header = spp::encode(parts.client.0, parts.local.0, buffer);
                return header.expect(FITS);
            }
            Self::Transparent { .. } | Self::Dsr(_) | Self::Plain => return &[],
        };
        let (client, local) = (parts.client.0, parts.local.0);
        let is_short = !crc32c && parts.passed.is_empty() && parts.own.is_none();
        let written = match parts.tag {
            None if is_short => ppv2::encode_udp(client, local, buffer),
            Some(tag) if is_short => ppv2::encode_udp_tagged(client, local, tag, buffer),
            _ => parts.write_tlvs(buffer, crc32c),
        };
        written.expect(FITS)
    }

    /// Whether a header stands in front of datagrams.
    #[must_use]
    pub fn has_header(self) -> bool {
        match self {
            Self::Ppv2 { .. } | Self::Spp | Self::Dsr(RewriteOn::Sdk { .. }) => true,
            Self::Transparent { .. }
            | Self::Dsr(RewriteOn::Proxy | RewriteOn::Server)
            | Self::Plain => false,
        }
    }

    /// Bytes of the header of a client of IPv6, or of IPv4, without a tag and without TLVs that
    /// are passed on.
    #[must_use]
    pub fn header_len(self, v6: bool, own: Option<&OwnTlvs>) -> usize {
        let crc32c = match self {
            Self::Ppv2 { crc32c, .. } | Self::Dsr(RewriteOn::Sdk { crc32c }) => crc32c,
            Self::Spp => return spp::SPP_HEADER_LEN,
            Self::Transparent { .. } | Self::Dsr(_) | Self::Plain => return 0,
        };
        let addresses = if v6 {
            ppv2::IPV6_HEADER_LEN
        } else {
            ppv2::IPV4_HEADER_LEN
        };
        let checksum = if crc32c { ppv2::CRC32C_TLV_LEN } else { 0 };
        addresses + own.map_or(0, OwnTlvs::header_len) + checksum
    }

    /// Where the first datagrams of a session alone have the header: what is known of it
    /// when the session begins.
    #[must_use]
    pub fn first_header(self) -> Option<FirstHeader> {
        self.may_omit_header().then(FirstHeader::default)
    }

    /// The address that the datagrams of one session are sent from, if it is the
    /// client's: port 0 is one of the kernel's choice.
    #[must_use]
    pub fn source(self, client: ClientAddr) -> Option<SocketAddr> {
        match self {
            Self::Transparent {
                port: SourcePort::Any,
            } => Some(SocketAddr::new(client.0.ip(), 0)),
            Self::Transparent {
                port: SourcePort::Client,
            }
            | Self::Dsr(RewriteOn::Proxy | RewriteOn::Server) => Some(client.0),
            Self::Ppv2 { .. } | Self::Spp | Self::Dsr(RewriteOn::Sdk { .. }) | Self::Plain => None,
        }
    }

    /// Whether servers are written to from clients' addresses.
    #[must_use]
    pub fn spoofs(self) -> bool {
        match self {
            Self::Transparent { .. } | Self::Dsr(RewriteOn::Proxy | RewriteOn::Server) => true,
            Self::Ppv2 { .. } | Self::Spp | Self::Dsr(RewriteOn::Sdk { .. }) | Self::Plain => false,
        }
    }

    /// Whether this server can be written to for clients of IPv6, or of IPv4: one
    /// that sees a client as the source has those of its own family alone.
    #[must_use]
    pub fn reaches(self, server: ServerAddr, v6: bool) -> bool {
        !self.spoofs() || server.0.is_ipv6() == v6
    }

    /// Whether servers are written to from clients' own ports, too.
    #[must_use]
    pub fn spoofs_ports(self) -> bool {
        match self {
            Self::Transparent { port } => port == SourcePort::Client,
            Self::Dsr(_) => self.spoofs(),
            Self::Ppv2 { .. } | Self::Spp | Self::Plain => false,
        }
    }

    /// Whether datagrams go without a header to servers that have had it.
    #[must_use]
    pub fn may_omit_header(self) -> bool {
        let Self::Ppv2 { emit, .. } = self else {
            return false;
        };
        emit == Emit::First
    }

    /// Whether replies come to the proxy, which passes them on.
    #[must_use]
    pub fn takes_replies(self) -> bool {
        !matches!(self, Self::Dsr(_))
    }

    /// The mode's name in configuration and logs, or that of its header's format where that is
    /// not the usual one.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ppv2 { .. } => "ppv2",
            Self::Spp => "spp",
            Self::Transparent { .. } => "transparent",
            Self::Dsr(_) => "dsr",
            Self::Plain => "plain",
        }
    }
}

/// Whether the server of a session has its header, where only the first datagrams carry
/// it. Such a server looks for a header in datagrams that have none of ours: a client could
/// pass off one of its own there.
#[derive(Clone, Copy, Debug, Default)]
pub struct FirstHeader {
    arrival: Arrival,
    /// When it last went out.
    sent: Option<Instant>,
    /// How long after that it is sent again, though the server answers.
    repeat: Option<Duration>,
}

/// Whether the server has a header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Arrival {
    /// No datagram has gone out with it.
    #[default]
    Due,
    /// It has gone out, and no reply has come since.
    Sent,
    /// The server has answered since.
    Known {
        /// When the first datagram went out that no reply has followed.
        unanswered: Option<Instant>,
    },
}

impl FirstHeader {
    /// Whether the session's next datagrams, sent `now`, carry the header.
    #[must_use]
    pub fn is_due(&mut self, now: Instant) -> bool {
        if let Arrival::Known { unanswered } = self.arrival {
            let is_long_ago = |since: Option<Instant>, limit| {
                since.is_some_and(|since| now.saturating_duration_since(since) >= limit)
            };
            let is_to_repeat = self
                .repeat
                .is_some_and(|after| is_long_ago(self.sent, after));
            if !is_to_repeat && !is_long_ago(unanswered, FORGETS) {
                return false;
            }
            self.forgotten();
        }
        true
    }

    /// Notes that datagrams have gone out, `now`, with the header if it was due.
    pub fn went_out(&mut self, now: Instant) {
        match &mut self.arrival {
            Arrival::Known { unanswered } => _ = unanswered.get_or_insert(now),
            arrival @ (Arrival::Due | Arrival::Sent) => {
                *arrival = Arrival::Sent;
                self.sent = Some(now);
            }
        }
    }

    /// Has it sent again so long after it last went out, though the server answers.
    pub fn set_repeat(&mut self, repeat: Option<Duration>) {
        self.repeat = repeat;
    }

    /// Notes a reply of the server.
    pub fn answered(&mut self) {
        if self.arrival != Arrival::Due {
            self.arrival = Arrival::Known { unanswered: None };
        }
    }

    /// What another process is to know of it.
    pub(crate) fn state(&self, now: Instant) -> FirstState {
        let ago = |since: Instant| now.saturating_duration_since(since);
        let (is_known, unanswered) = match self.arrival {
            Arrival::Known { unanswered } => (true, unanswered.map(ago)),
            Arrival::Due | Arrival::Sent => (false, None),
        };
        FirstState {
            sent: self.sent.filter(|_| self.arrival != Arrival::Due).map(ago),
            is_known,
            unanswered,
        }
    }

    /// What another process knew of it.
    pub(crate) fn from_state(state: FirstState, now: Instant) -> Self {
        let before = |ago: Duration| now.checked_sub(ago);
        Self {
            arrival: match (state.is_known, state.sent) {
                (true, _) => Arrival::Known {
                    unanswered: state.unanswered.and_then(before),
                },
                (false, Some(_)) => Arrival::Sent,
                (false, None) => Arrival::Due,
            },
            sent: state.sent.and_then(before),
            repeat: None,
        }
    }

    /// Notes that the server may have forgotten the header, or has a new client: the
    /// session's next datagrams carry it again.
    pub fn forgotten(&mut self) {
        self.arrival = Arrival::Due;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ppv2::TlvType;

    const CLIENT: &str = "[2001:db8:c::11]:54321";
    const LOCAL: &str = "[2001:db8:a::10]:9000";

    fn header(mode: Mode, buffer: &mut [u8; MAX_HEADER]) -> &[u8] {
        let parts = HeaderParts {
            tag: Some(ReplyTag::new(0, [7; 8])),
            ..parts()
        };
        mode.write_header(parts, buffer)
    }

    fn parts<'t>() -> HeaderParts<'t> {
        HeaderParts::new(
            ClientAddr(CLIENT.parse().unwrap()),
            ListenerAddr(LOCAL.parse().unwrap()),
        )
    }

    fn types(header: &[u8]) -> Vec<TlvType> {
        let decoder = ppv2::Decoder::new().max_header_len(MAX_HEADER);
        let (header, rest) = decoder.decode(header).unwrap();
        assert!(rest.is_empty());
        header.tlvs().iter().map(|tlv| tlv.kind).collect()
    }

    #[test]
    fn the_longest_header_has_all_that_is_to_be_said_in_its_order() {
        let mode = Mode::Ppv2 {
            emit: Emit::Every,
            crc32c: true,
        };
        let mut own = OwnTlvs::new();
        let (first, second) = (TlvType(0xe1), TlvType(0xe2));
        own.push(second, &[2; OwnTlvs::MAX_LEN - 3]).unwrap();
        own.add_unique_id();
        let mut passed = vec![1; MAX_PASSED_TLVS];
        passed[..3].copy_from_slice(&[first.0, 1, 0xe1]);
        let parts = HeaderParts {
            passed: &passed,
            own: Some(&own),
            unique_id: Some(UniqueId([3; 16])),
            tag: Some(ReplyTag::new(0, [7; 8])),
            ..parts()
        };
        let mut buffer = [0; MAX_HEADER];
        let header = mode.write_header(parts, &mut buffer);
        assert_eq!(header.len(), MAX_HEADER);
        let of_tag_and_passed = ppv2::REPLY_TAG_TLV_LEN + MAX_PASSED_TLVS;
        let other = mode.header_len(true, Some(&own));
        assert_eq!(header.len(), other + of_tag_and_passed);
        let last = [TlvType::UNIQUE_ID, TlvType::REPLY_TAG, TlvType::CRC32C];
        assert_eq!(types(header), [[first, second].as_slice(), &last].concat());

        let mut id_alone = OwnTlvs::new();
        id_alone.add_unique_id();
        let parts = HeaderParts {
            own: Some(&id_alone),
            passed: &[],
            tag: None,
            ..parts
        };
        let mode = Mode::Dsr(RewriteOn::Sdk { crc32c: false });
        let header = mode.write_header(parts, &mut buffer);
        assert_eq!(types(header), [TlvType::UNIQUE_ID]);
        assert_eq!(header.len(), mode.header_len(true, parts.own));
        assert!(Mode::Plain.write_header(parts, &mut buffer).is_empty());
    }

    #[test]
    fn simple_proxy_protocol_has_its_own_header_for_both_families() {
        let v4 = HeaderParts::new(
            ClientAddr("192.0.2.1:5000".parse().unwrap()),
            ListenerAddr("198.51.100.10:53".parse().unwrap()),
        );
        for parts in [v4, parts()] {
            let mut buffer = [0; MAX_HEADER];
            let header = Mode::Spp.write_header(parts, &mut buffer);
            assert_eq!(header.len(), Mode::Spp.header_len(true, None));
            let (header, rest) = spp::decode(header).unwrap();
            assert_eq!(
                (header.client, header.proxy),
                (parts.client.0, parts.local.0)
            );
            assert!(rest.is_empty());
        }
        assert!(Mode::Spp.has_header() && Mode::Spp.first_header().is_none());
        assert!(Mode::Spp.takes_replies());
    }

    #[test]
    fn the_header_names_client_and_listener() {
        let mode = Mode::Ppv2 {
            emit: Emit::Every,
            crc32c: true,
        };
        assert!(mode.first_header().is_none());
        let mut buffer = [0; MAX_HEADER];
        let (header, rest) = ppv2::decode(header(mode, &mut buffer)).unwrap();
        assert_eq!(header.client(), Some(CLIENT.parse().unwrap()));
        assert_eq!(header.destination(), Some(LOCAL.parse().unwrap()));
        assert!(header.tlvs().crc32c().is_some());
        assert!(header.tlvs().reply_tag().is_some());
        assert!(rest.is_empty());
    }

    fn first() -> FirstHeader {
        let mode = Mode::Ppv2 {
            emit: Emit::First,
            crc32c: false,
        };
        mode.first_header().unwrap()
    }

    #[test]
    fn the_first_datagrams_carry_it_until_the_server_answers() {
        let (mut header, now) = (first(), Instant::now());
        for _ in 0..3 {
            assert!(header.is_due(now));
            header.went_out(now);
        }
        header.answered();
        for second in 0..100 {
            let now = now + Duration::from_secs(second);
            assert!(!header.is_due(now), "{second}");
            header.went_out(now);
            header.answered();
        }
    }

    #[test]
    fn a_server_that_may_have_forgotten_it_gets_it_again() {
        let (mut header, now) = (first(), Instant::now());
        let has_it = |header: &mut FirstHeader, now| {
            let has_it = header.is_due(now);
            header.went_out(now);
            has_it
        };
        assert!(has_it(&mut header, now));
        header.answered();
        header.forgotten();
        // What it answered before says nothing.
        header.answered();
        assert!(has_it(&mut header, now));
        header.answered();

        // However long the client was silent.
        let now = now + Duration::from_secs(3600);
        assert!(!has_it(&mut header, now));
        assert!(!has_it(&mut header, now + FORGETS / 2));
        assert!(has_it(&mut header, now + FORGETS));
        assert!(has_it(&mut header, now + FORGETS * 2));
        header.answered();
        assert!(!has_it(&mut header, now + FORGETS * 2));
    }

    #[test]
    fn it_is_repeated_though_the_server_answers() {
        let (mut header, start) = (first(), Instant::now());
        header.set_repeat(Some(Duration::from_secs(10)));
        let mut had_it = Vec::new();
        for second in 0..40 {
            let now = start + Duration::from_secs(second);
            if header.is_due(now) {
                had_it.push(second);
            }
            header.went_out(now);
            // The first that is sent again is lost, and so is its reply.
            if second != 10 {
                header.answered();
            }
        }
        assert_eq!(had_it, [0, 10, 11, 21, 31]);

        // A reload changes it at once.
        let now = start + Duration::from_secs(39);
        header.set_repeat(Some(Duration::from_secs(5)));
        assert!(header.is_due(now));
        header.went_out(now);
        header.answered();
        header.set_repeat(None);
        assert!(!header.is_due(now + Duration::from_secs(3600)));
    }

    #[test]
    fn only_servers_that_read_a_header_get_one() {
        let transparent = |port| Mode::Transparent { port };
        let without = [
            Mode::Plain,
            transparent(SourcePort::Any),
            transparent(SourcePort::Client),
            Mode::Dsr(RewriteOn::Proxy),
            Mode::Dsr(RewriteOn::Server),
        ];
        for mode in without {
            assert!(header(mode, &mut [0; MAX_HEADER]).is_empty(), "{mode:?}");
            assert!(!mode.has_header() && mode.header_len(true, None) == 0);
        }
        let sdk = Mode::Dsr(RewriteOn::Sdk { crc32c: true });
        let len = header(sdk, &mut [0; MAX_HEADER]).len();
        assert_eq!(len, ppv2::IPV6_TAGGED_HEADER_LEN + 7);
    }

    #[test]
    fn a_server_that_reads_no_header_sees_the_client_as_the_source() {
        let client: SocketAddr = CLIENT.parse().unwrap();
        let source = |mode: Mode| mode.source(ClientAddr(client));
        let any = Mode::Transparent {
            port: SourcePort::Any,
        };
        assert_eq!(source(any), Some(SocketAddr::new(client.ip(), 0)));
        let own = Mode::Transparent {
            port: SourcePort::Client,
        };
        for mode in [
            own,
            Mode::Dsr(RewriteOn::Proxy),
            Mode::Dsr(RewriteOn::Server),
        ] {
            assert_eq!(source(mode), Some(client));
            assert!(mode.spoofs() && mode.spoofs_ports());
        }
        assert!(any.spoofs() && !any.spoofs_ports());
        let by_header = Mode::Dsr(RewriteOn::Sdk { crc32c: false });
        for mode in [Mode::Plain, Mode::Spp, by_header] {
            assert_eq!(source(mode), None);
            assert!(!mode.spoofs() && !mode.spoofs_ports());
        }
        assert!(any.takes_replies() && Mode::Plain.takes_replies());
        assert!(!Mode::Dsr(RewriteOn::Proxy).takes_replies());
    }
}
