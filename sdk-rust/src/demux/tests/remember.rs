//! Senders that say a header once.

use super::*;
use crate::HeaderAlone;

const IDLE: Duration = Duration::from_secs(30);

fn remembering(max: usize) -> TrustBuilder {
    trust().remember_senders(IDLE, max)
}

fn demux_of(trust: TrustBuilder) -> Demux {
    Demux::new(trust.build().unwrap())
}

/// Client and payload of a datagram from a proxy.
#[track_caller]
fn heard(demux: &Demux, now: Instant, proxy: &str, datagram: &[u8]) -> (SocketAddr, Vec<u8>) {
    let received = demux.receive(now, addr(proxy), None, datagram).unwrap();
    assert_eq!(received.proxy, Some(addr(proxy)));
    assert_eq!(received.reply_path.to, addr(proxy));
    (received.client, received.payload.to_vec())
}

#[track_caller]
fn refused(demux: &Demux, now: Instant, proxy: &str, datagram: &[u8], reason: DropReason) {
    let received = demux.receive(now, addr(proxy), None, datagram);
    assert_eq!(received.map(|received| received.client), Err(reason));
}

#[test]
fn a_bare_datagram_is_the_client_s_that_its_sender_named() {
    let demux = demux_of(remembering(10));
    let now = Instant::now();
    heard(&demux, now, PROXY, &from_client(CLIENT, b"1"));
    for payload in [
        &b"2"[..],
        b"",
        b"\r\n\r\n\0\r\nQUI",
        b"PROXY of the crown",
        b"\x56\xec",
    ] {
        let received = demux.receive(now, addr(PROXY), None, payload).unwrap();
        assert_eq!((received.client, received.payload), (addr(CLIENT), payload));
        assert_eq!(received.destination, Some(addr(LISTENER)));
        assert_eq!(received.proxy, Some(addr(PROXY)));
        assert!(received.header.is_empty() && received.tlvs.is_empty());
        assert_eq!(
            demux.reply_path(now, addr(CLIENT)),
            Some(received.reply_path)
        );
        assert!(received.reply_path.header().is_empty());
    }
    refused(&demux, now, OTHER_PROXY, b"x", DropReason::NoHeader);
    refused(&demux, now, "192.0.2.10:40001", b"x", DropReason::NoHeader);
    refused(&demux, now, STRANGER, b"x", DropReason::Untrusted);
    assert_eq!(demux.stats().delivered, 6);
}

#[test]
fn off_by_default() {
    let demux = demux();
    let now = Instant::now();
    heard(&demux, now, PROXY, &from_client(CLIENT, b"1"));
    refused(&demux, now, PROXY, b"2", DropReason::NoHeader);
    assert_eq!(heard(&demux, now, PROXY, &from_client(CLIENT, b"")).1, b"");
}

#[test]
fn idle_counts_from_the_latest_datagram_of_the_sender() {
    let demux = demux_of(remembering(10));
    let mut now = Instant::now();
    heard(&demux, now, PROXY, &from_client(CLIENT, b"1"));
    for _ in 0..5 {
        now += IDLE - SECOND;
        assert_eq!(heard(&demux, now, PROXY, b"2").0, addr(CLIENT));
    }
    now += IDLE;
    refused(&demux, now, PROXY, b"3", DropReason::NoHeader);
    refused(&demux, now - SECOND, PROXY, b"3", DropReason::NoHeader);
}

#[test]
fn a_new_header_replaces_the_client() {
    let demux = demux_of(remembering(10));
    let now = Instant::now();
    for client in [CLIENT, OTHER_CLIENT, CLIENT] {
        heard(&demux, now, PROXY, &from_client(client, b"1"));
        assert_eq!(heard(&demux, now, PROXY, b"2").0, addr(client));
    }
}

/// The port of a session is another's by now, so nothing may reach the former client.
#[test]
fn replies_of_a_former_client_end_as_with_headers() {
    let demux = demux_of(remembering(10));
    let start = Instant::now();
    heard(&demux, start, PROXY, &from_client(CLIENT, b"1"));
    let (later, grace) = (start + SECOND, crate::FORMER_CLIENT_GRACE);
    let path = demux.reply_path(start, addr(CLIENT)).unwrap();
    heard(&demux, later, PROXY, b"2");
    refused(
        &demux,
        later,
        PROXY,
        &from_client(OTHER_CLIENT, b""),
        DropReason::HeaderAlone,
    );
    assert!(demux.reply_path(later, addr(OTHER_CLIENT)).is_some());
    assert!(demux.reply_path(start + grace, addr(CLIENT)).is_some());
    assert_eq!(demux.reply_path(later + grace, addr(CLIENT)), None);
    assert_eq!(demux.reply_path(later + grace, path), None);
}

#[test]
fn a_header_alone_announces_its_client() {
    let demux = demux_of(remembering(10));
    let now = Instant::now();
    let alone = from_client(CLIENT, b"");
    for _ in 0..2 {
        refused(&demux, now, PROXY, &alone, DropReason::HeaderAlone);
        assert_eq!(
            heard(&demux, now, PROXY, b"x"),
            (addr(CLIENT), b"x".to_vec())
        );
    }
    // It is no fault of anybody's.
    assert!(demux.take_warnings().is_empty());
    let stats = demux.stats();
    assert_eq!((stats.delivered, stats.dropped_total()), (2, 2));

    let demux = demux_of(remembering(10).header_alone(HeaderAlone::Deliver));
    assert_eq!(
        heard(&demux, now, PROXY, &alone),
        (addr(CLIENT), Vec::new())
    );
    assert_eq!(heard(&demux, now, PROXY, b"x").0, addr(CLIENT));
}

/// What follows may be the sender's own, too.
#[test]
fn a_local_header_ends_what_is_remembered() {
    for payload in [&b"ping"[..], b""] {
        let demux = demux_of(remembering(10));
        let now = Instant::now();
        heard(&demux, now, PROXY, &from_client(CLIENT, b"1"));
        heard(&demux, now, OTHER_PROXY, &from_client(CLIENT, b"1"));
        let local = with_header(|b| Encoder::local(b), payload);
        let own = (addr(PROXY), payload.to_vec());
        assert_eq!(heard(&demux, now, PROXY, &local), own);
        refused(&demux, now, PROXY, b"2", DropReason::NoHeader);
        heard(&demux, now, OTHER_PROXY, b"2");
    }
}

/// The header may have been another client's, whose datagrams come next.
#[test]
fn a_header_that_is_dropped_ends_what_is_remembered() {
    let valid = from_client(OTHER_CLIENT, b"");
    let long = with_header(
        |b| Encoder::udp(b, addr(OTHER_CLIENT), addr(LISTENER))?.noop(500),
        b"x",
    );
    let stream = with_header(
        |b| Encoder::tcp(b, addr(OTHER_CLIENT), addr(LISTENER)),
        b"x",
    );
    let port_0 = from_client("203.0.113.12:0", b"x");
    for (datagram, reason) in [
        (&valid[..20], DropReason::BadHeader),
        (&valid[..12], DropReason::NoHeader),
        (&long, DropReason::HeaderTooLong),
        (&stream, DropReason::Tcp),
        (&port_0, DropReason::ClientAddress),
        (
            b"PROXY TCP4 203.0.113.12 198.51.100.10 1 2\r\nx",
            DropReason::V1Header,
        ),
    ] {
        let demux = demux_of(remembering(10));
        let now = Instant::now();
        heard(&demux, now, PROXY, &from_client(CLIENT, b"1"));
        heard(&demux, now, OTHER_PROXY, &from_client(CLIENT, b"1"));
        refused(&demux, now, PROXY, datagram, reason);
        refused(&demux, now, PROXY, b"2", DropReason::NoHeader);
        heard(&demux, now, OTHER_PROXY, b"2");
    }
}

#[test]
fn an_address_with_reply_tags_stands_for_many_clients() {
    let demux = demux_of(remembering(10));
    let now = Instant::now();
    heard(&demux, now, PROXY, &from_client(CLIENT, b"1"));
    // An empty datagram: the sender says its header each time.
    assert_eq!(
        heard(&demux, now, PROXY, &tagged(OTHER_CLIENT, 1, b"")).1,
        b""
    );
    refused(&demux, now, PROXY, b"2", DropReason::NoHeader);
}

#[test]
fn at_the_most_senders_the_newest_are_refused_and_counted() {
    let demux = demux_of(remembering(1));
    let start = Instant::now();
    heard(&demux, start, PROXY, &from_client(CLIENT, b"1"));
    heard(&demux, start, OTHER_PROXY, &from_client(OTHER_CLIENT, b"1"));
    refused(&demux, start, OTHER_PROXY, b"2", DropReason::NoHeader);
    heard(&demux, start, PROXY, &from_client(CLIENT, b"1"));
    assert_eq!(heard(&demux, start, PROXY, b"2").0, addr(CLIENT));
    assert_eq!(demux.stats().senders_not_remembered, 1);

    let later = start + IDLE;
    heard(&demux, later, OTHER_PROXY, &from_client(OTHER_CLIENT, b"1"));
    assert_eq!(
        heard(&demux, later, OTHER_PROXY, b"2").0,
        addr(OTHER_CLIENT)
    );
    refused(&demux, later, PROXY, b"2", DropReason::NoHeader);
    assert_eq!(demux.stats().senders_not_remembered, 1);
}

#[test]
fn a_sender_is_remembered_for_the_address_that_it_sends_to() {
    let demux = demux_of(remembering(10));
    let now = Instant::now();
    let [one, other] = ["10.0.0.1", "10.0.0.2"].map(|ip| Some(ip.parse().unwrap()));
    let first = from_client(CLIENT, b"1");
    demux.receive(now, addr(PROXY), one, &first).unwrap();
    let received = demux.receive(now, addr(PROXY), one, b"2").unwrap();
    assert_eq!(
        (received.client, received.reply_path.local),
        (addr(CLIENT), one)
    );
    let received = demux.receive(now, addr(PROXY), other, b"2");
    assert_eq!(received, Err(DropReason::NoHeader));
}

#[test]
fn dsr_answers_the_client_of_a_bare_datagram() {
    let demux = demux_of(remembering(10).reply_from(ReplyFrom::Listener));
    let now = Instant::now();
    let first = from_client(CLIENT, b"1");
    let first = demux.receive(now, addr(PROXY), None, &first).unwrap();
    let second = demux.receive(now, addr(PROXY), None, b"2").unwrap();
    assert_eq!(first.reply_path, second.reply_path);
    assert_eq!(second.reply_path.from, Some(addr(LISTENER)));
}

/// What the shortcut for bursts must not overlook.
#[test]
fn a_batch_looks_at_each_datagram_that_may_change_the_client() {
    let demux = demux_of(remembering(10));
    let now = Instant::now();
    let [first, other] = [CLIENT, OTHER_CLIENT].map(|client| from_client(client, b"x"));
    let [alone, other_alone] = [CLIENT, OTHER_CLIENT].map(|client| from_client(client, b""));
    let (is, is_other) = (Ok(addr(CLIENT)), Ok(addr(OTHER_CLIENT)));
    let announced = Err(DropReason::HeaderAlone);
    let none = Err(DropReason::NoHeader);
    let steps: &[(&str, &[u8], Result<SocketAddr, DropReason>)] = &[
        (PROXY, b"bare", none),
        (PROXY, &first, is),
        (PROXY, &first, is),
        (PROXY, b"bare", is),
        (PROXY, b"", is),
        (PROXY, b"bare", is),
        (PROXY, &other, is_other),
        (PROXY, b"bare", is_other),
        (PROXY, &first, is),
        (PROXY, &other_alone, announced),
        (PROXY, &first, is),
        (PROXY, b"bare", is),
        (PROXY, &alone, announced),
        (PROXY, &other_alone, announced),
        (PROXY, b"bare", is_other),
        (PROXY, &first[..20], Err(DropReason::BadHeader)),
        (PROXY, b"bare", none),
        (PROXY, &first, is),
        (OTHER_PROXY, b"bare", none),
        (PROXY, b"bare", is),
        (PROXY, b"PROXY UNKNOWN\r\n", Err(DropReason::V1Header)),
        (PROXY, b"bare", none),
    ];
    let mut locked = demux.lock(now.into());
    for (number, (proxy, datagram, expected)) in steps.iter().enumerate() {
        let parts = locked.receive(addr(proxy), None, datagram);
        let client = parts.map(|parts| parts.of(datagram).client);
        assert_eq!(client, *expected, "{number}");
    }
}
