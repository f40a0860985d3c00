use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::accept::{Direct, Formats};

const LISTENER: u64 = 7;
const LOCAL: &str = "192.0.2.1:53";
const DESTINATION: &str = "198.51.100.10:53";

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn sender(port: u16) -> (SocketAddr, SocketAddr) {
    (SocketAddr::new(at("192.0.2.9:1").ip(), port), at(LOCAL))
}

fn client(number: u16) -> SocketAddr {
    SocketAddr::new(at("203.0.113.11:1").ip(), number)
}

fn accept() -> Accept {
    Accept {
        from: vec!["192.0.2.0/24".parse().unwrap()],
        formats: Formats {
            v2: true,
            spp: false,
        },
        direct: Direct::Drop,
        local: LocalHeaders::Forward,
        passes_tlvs: false,
        remember: None,
    }
}

fn remembering(max: usize) -> Accept {
    Accept {
        remember: Some(Remember {
            idle: Duration::from_secs(30),
            max,
            forwards_empty: false,
        }),
        ..accept()
    }
}

fn v2(client: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
    let header = ppv2::encode_udp(client, at(DESTINATION), &mut buffer).unwrap();
    [header, payload].concat()
}

/// Senders, and the time.
struct Bench {
    senders: Senders,
    accept: Accept,
    now: Instant,
}

impl Bench {
    fn new(accept: Accept) -> Self {
        Self {
            senders: Senders::default(),
            accept,
            now: Instant::now(),
        }
    }

    fn read(&mut self, from: u16, datagram: &[u8]) -> Result<Arrival, DropReason> {
        let ends = sender(from);
        self.senders
            .read(&self.accept, LISTENER, ends, datagram, self.now)
    }

    fn client_of(&mut self, from: u16, datagram: &[u8]) -> Result<SocketAddr, DropReason> {
        Ok(self.read(from, datagram)?.key.client.0)
    }

    fn wait(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
    }
}

#[test]
fn the_header_says_client_and_destination() {
    let mut bench = Bench::new(accept());
    let datagram = v2(client(1), b"hello");
    let arrival = bench.read(1, &datagram).unwrap();
    assert_eq!(arrival.key.client.0, client(1));
    assert_eq!(arrival.key.local.0, at(DESTINATION));
    assert_eq!(&datagram[arrival.header..], b"hello");
    let sender_of = bench.senders.get(arrival.key.sender).unwrap();
    assert_eq!((sender_of.address, sender_of.local), sender(1));
}

#[test]
fn mapped_addresses_are_those_of_ipv4() {
    let mut bench = Bench::new(accept());
    let mapped = at("[::ffff:203.0.113.11]:5000");
    let mut buffer = [0; 128];
    let written = ppv2::Encoder::udp(&mut buffer, mapped, at("[2001:db8::1]:53"));
    let datagram = written.unwrap().finish().to_vec();
    let key = bench.read(1, &datagram).unwrap().key;
    assert_eq!(key.client.0, at("203.0.113.11:5000"));
    assert_eq!(key.local.0, at("[2001:db8::1]:53"));
}

#[test]
fn a_client_has_a_key_for_each_sender() {
    let mut bench = Bench::new(accept());
    let datagram = v2(client(1), b"");
    let one = bench.read(1, &datagram).unwrap().key;
    let other = bench.read(2, &datagram).unwrap().key;
    assert_ne!(one, other);
    assert_eq!(bench.read(1, &datagram).unwrap().key, one);
    let ends = (sender(1).0, at("192.0.2.2:53"));
    let elsewhere = bench
        .senders
        .read(&bench.accept, LISTENER, ends, &datagram, bench.now);
    assert_ne!(elsewhere.unwrap().key, one);
}

#[test]
fn each_mistake_has_its_reason() {
    let signature = &ppv2::SIGNATURE[..];
    let header = |rest: &[u8]| [signature, rest].concat();
    let mut buffer = [0; 600];
    let tcp = ppv2::Encoder::tcp(&mut buffer, client(1), at(DESTINATION));
    let tcp = tcp.unwrap().finish().to_vec();
    let mut long = header(b"\x21\x11\x02\x00");
    long.resize(1000, 0);
    let mut unix = header(b"\x21\x32\x00\xd8");
    unix.resize(232, 0);
    let checksum = ppv2::Encoder::udp(&mut buffer, client(1), at(DESTINATION));
    let mut checksum = checksum.unwrap().crc32c().unwrap().finish().to_vec();
    *checksum.last_mut().unwrap() ^= 1;
    for (datagram, reason) in [
        (b"bare".to_vec(), DropReason::NoHeader),
        (Vec::new(), DropReason::NoHeader),
        (signature[..11].to_vec(), DropReason::NoHeader),
        (
            b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\nx".to_vec(),
            DropReason::V1Header,
        ),
        (b"\x56\xec".repeat(30), DropReason::NoHeader),
        (signature.to_vec(), DropReason::BadHeader),
        (header(b"\x21\x12\x00\x0c\x01"), DropReason::BadHeader),
        (checksum, DropReason::BadHeader),
        (long, DropReason::HeaderTooLong),
        (header(b"\x21\x00\x00\x00"), DropReason::Unspecified),
        (tcp, DropReason::Tcp),
        (unix, DropReason::Unix),
        (v2(client(0), b""), DropReason::ClientAddress),
        (v2(at("224.0.0.1:5"), b""), DropReason::ClientAddress),
        (v2(at("0.0.0.0:5"), b""), DropReason::ClientAddress),
    ] {
        let mut bench = Bench::new(accept());
        assert_eq!(bench.read(1, &datagram), Err(reason), "{datagram:x?}");
        bench.accept = remembering(10);
        assert_eq!(bench.read(1, &datagram), Err(reason), "{datagram:x?}");
        assert!(bench.senders.remembered.is_empty());
    }
}

#[test]
fn a_sender_speaks_for_itself_as_configured() {
    let mut bench = Bench::new(accept());
    // Its addresses are no client's.
    let mut datagram = v2(client(1), b"probe");
    datagram[12] = 0x20;
    let arrival = bench.read(1, &datagram).unwrap();
    assert_eq!(arrival.key.client.0, sender(1).0);
    assert_eq!(&datagram[arrival.header..], b"probe");
    bench.accept.local = LocalHeaders::Drop;
    assert_eq!(bench.read(1, &datagram), Err(DropReason::LocalHeader));
}

#[test]
fn simple_proxy_protocol_is_read_where_it_is_accepted() {
    let mut bench = Bench::new(accept());
    bench.accept.formats.spp = true;
    let mut buffer = [0; spp::SPP_HEADER_LEN];
    let header = spp::encode(client(1), at(DESTINATION), &mut buffer).unwrap();
    let datagram = [header, b"hello"].concat();
    let arrival = bench.read(1, &datagram).unwrap();
    assert_eq!(arrival.key.client.0, client(1));
    assert_eq!(arrival.key.local.0, at(DESTINATION));
    assert_eq!(arrival.reply_header, ReplyHeader::Spp);
    assert_eq!(&datagram[arrival.header..], b"hello");
    assert_eq!(bench.read(1, &datagram[..37]), Err(DropReason::BadHeader));
    assert_eq!(bench.client_of(1, &v2(client(2), b"")), Ok(client(2)));
    bench.accept.formats.v2 = false;
    assert_eq!(
        bench.read(1, &v2(client(2), b"")),
        Err(DropReason::NoHeader)
    );
}

#[test]
fn a_tag_goes_back_with_replies() {
    let mut bench = Bench::new(accept());
    let (tag, mut buffer) = (ppv2::ReplyTag::new(1, [7; 8]), [0; 128]);
    let datagram = ppv2::encode_udp_tagged(client(1), at(DESTINATION), tag, &mut buffer).unwrap();
    let arrival = bench.read(1, datagram).unwrap();
    assert_eq!(arrival.reply_header, ReplyHeader::Tagged(tag));
    let tlvs = &datagram[arrival.tlvs];
    assert_eq!(ppv2::Tlvs::parse(tlvs).unwrap().reply_tag(), Some(tag));
}

#[test]
fn a_sender_of_tags_is_not_remembered() {
    let mut bench = Bench::new(remembering(10));
    bench.read(1, &v2(client(1), b"x")).unwrap();
    let (tag, mut buffer) = (ppv2::ReplyTag::new(1, [7; 8]), [0; 128]);
    let tagged = ppv2::encode_udp_tagged(client(2), at(DESTINATION), tag, &mut buffer).unwrap();
    let arrival = bench.read(1, tagged).unwrap();
    assert!(!arrival.is_announcement && !arrival.is_unremembered);
    assert_eq!(bench.read(1, b"bare"), Err(DropReason::NoHeader));
}

#[test]
fn a_sender_that_is_not_remembered_says_it_each_time() {
    let mut bench = Bench::new(accept());
    bench.read(1, &v2(client(1), b"first")).unwrap();
    assert_eq!(bench.read(1, b"second"), Err(DropReason::NoHeader));
}

#[test]
fn a_remembered_sender_says_it_once() {
    let mut bench = Bench::new(remembering(10));
    let first = bench.read(1, &v2(client(1), b"first")).unwrap();
    let second = bench.read(1, b"second").unwrap();
    assert_eq!((second.key, second.header), (first.key, 0));
    // By its port.
    assert_eq!(bench.read(2, b"second"), Err(DropReason::NoHeader));
    // Since its latest datagram.
    for _ in 0..3 {
        bench.wait(29);
        assert_eq!(bench.client_of(1, b"more"), Ok(client(1)));
    }
    bench.wait(30);
    assert_eq!(bench.read(1, b"late"), Err(DropReason::NoHeader));
    assert!(bench.senders.remembered.is_empty());
}

#[test]
fn another_header_takes_the_port_over() {
    let mut bench = Bench::new(remembering(10));
    let key = bench.read(1, &v2(client(1), b"")).unwrap().key;
    let changes = |bench: &Bench| bench.senders.get(key.sender).unwrap().changes();
    let before = changes(&bench);
    bench.read(1, &v2(client(1), b"again")).unwrap();
    bench.read(1, b"bare").unwrap();
    assert_eq!(changes(&bench), before);
    bench.read(1, &v2(client(2), b"")).unwrap();
    assert_eq!(bench.client_of(1, b"bare"), Ok(client(2)));
    assert_eq!(changes(&bench), before + 1);
}

#[test]
fn a_header_that_names_no_client_ends_what_was_said() {
    let local = {
        let mut local = v2(client(3), b"");
        local[12] = 0x20;
        local
    };
    for (datagram, is_read) in [
        (local, true),
        (v2(client(0), b""), false),
        (v2(client(2), b"")[..20].to_vec(), false),
        (b"PROXY UNKNOWN\r\n".to_vec(), false),
    ] {
        let mut bench = Bench::new(remembering(10));
        let key = bench.read(1, &v2(client(1), b"x")).unwrap().key;
        assert_eq!(bench.read(1, &datagram).is_ok(), is_read);
        assert_eq!(bench.read(1, b"bare"), Err(DropReason::NoHeader));
        assert!(bench.senders.remembered.is_empty());
        // The port is no longer the client's.
        let changes = |bench: &Bench| bench.senders.get(key.sender).unwrap().changes();
        assert_eq!(changes(&bench), 1);
        bench.read(1, &v2(client(2), b"x")).unwrap();
        assert_eq!(changes(&bench), 1 + u64::from(is_read));
    }
}

#[test]
fn a_header_alone_says_the_client() {
    let mut bench = Bench::new(remembering(10));
    let arrival = bench.read(1, &v2(client(1), b"")).unwrap();
    assert!(arrival.is_announcement);
    let empty = bench.read(1, b"").unwrap();
    assert!(!empty.is_announcement);
    assert_eq!(empty.key.client.0, client(1));
    bench.accept.remember.as_mut().unwrap().forwards_empty = true;
    assert!(!bench.read(1, &v2(client(1), b"")).unwrap().is_announcement);
    bench.accept.remember = None;
    assert!(!bench.read(1, &v2(client(1), b"")).unwrap().is_announcement);
}

#[test]
fn no_more_senders_are_remembered_than_configured() {
    let mut bench = Bench::new(remembering(3));
    for port in 1..=3 {
        assert!(
            !bench
                .read(port, &v2(client(port), b"x"))
                .unwrap()
                .is_unremembered
        );
    }
    // The newest is refused, and served with its header alone.
    let fourth = bench.read(4, &v2(client(4), b"x")).unwrap();
    assert!(fourth.is_unremembered);
    assert_eq!(bench.read(4, b"bare"), Err(DropReason::NoHeader));
    for port in 1..=3 {
        assert_eq!(bench.client_of(port, b"bare"), Ok(client(port)));
        assert!(
            !bench
                .read(port, &v2(client(9), b"x"))
                .unwrap()
                .is_unremembered
        );
    }
    // Once one is silent there is room.
    bench.wait(29);
    bench.read(1, b"bare").unwrap();
    bench.read(2, b"bare").unwrap();
    bench.wait(1);
    assert!(!bench.read(4, &v2(client(4), b"x")).unwrap().is_unremembered);
    assert_eq!(bench.client_of(4, b"bare"), Ok(client(4)));
    assert_eq!(bench.read(3, b"bare"), Err(DropReason::NoHeader));
}

#[test]
fn what_was_said_to_a_listener_is_no_others() {
    let mut bench = Bench::new(remembering(1));
    bench.read(1, &v2(client(1), b"x")).unwrap();
    // The address has another listener now, which remembers another sender.
    let mut read = |port, datagram: &[u8]| {
        let ends = sender(port);
        bench
            .senders
            .read(&bench.accept, LISTENER + 1, ends, datagram, bench.now)
    };
    read(2, &v2(client(2), b"x")).unwrap();
    assert!(read(1, &v2(client(3), b"x")).unwrap().is_unremembered);
    assert_eq!(read(1, b"bare"), Err(DropReason::NoHeader));
    assert_eq!(read(2, b"bare").unwrap().key.client.0, client(2));
    assert_eq!(
        bench.senders.remembered,
        [(LISTENER + 1, 1)].into_iter().collect()
    );
}

#[test]
fn what_was_said_is_forgotten_with_the_setting() {
    let mut bench = Bench::new(remembering(10));
    bench.read(1, &v2(client(1), b"x")).unwrap();
    bench.senders.forget_said(LISTENER + 1);
    assert_eq!(bench.client_of(1, b"bare"), Ok(client(1)));
    bench.senders.forget_said(LISTENER);
    assert_eq!(bench.read(1, b"bare"), Err(DropReason::NoHeader));
    assert!(bench.senders.remembered.is_empty());
}

#[test]
fn a_bare_datagram_of_a_sender_that_is_not_remembered_changes_nothing() {
    let mut bench = Bench::new(accept());
    let key = bench.read(1, &v2(client(1), b"x")).unwrap().key;
    bench.read(1, b"bare").unwrap_err();
    bench.read(1, &v2(client(1), b"x")).unwrap();
    assert_eq!(bench.senders.get(key.sender).unwrap().changes(), 0);
}

#[test]
fn senders_without_session_are_forgotten() {
    let mut bench = Bench::new(accept());
    let kept: Vec<_> = (1..=100)
        .map(|port| {
            let key = bench.read(port, &v2(client(port), b"")).unwrap().key;
            Arc::clone(bench.senders.get(key.sender).unwrap())
        })
        .collect();
    for port in 1000..=60_000 {
        bench.read(port, &v2(client(port), b"")).unwrap();
        assert!(bench.senders.len() <= 300, "{port}");
    }
    for sender in &kept {
        assert_eq!(bench.senders.get(sender.id).unwrap().id, sender.id);
    }
    assert_eq!(bench.senders.by_address.len(), bench.senders.len());
}

#[test]
fn an_id_is_never_anothers() {
    let mut bench = Bench::new(accept());
    let old = bench.read(1, &v2(client(1), b"")).unwrap().key.sender;
    for port in 2..=1000 {
        bench.read(port, &v2(client(1), b"")).unwrap();
    }
    assert!(bench.senders.get(old).is_none());
    assert!(bench.senders.get(SenderId::NONE).is_none());
}

/// A sender's port, a wait, and what it sends: a header with a client, or none.
fn steps() -> impl Strategy<Value = Vec<(u16, u64, Option<u16>)>> {
    prop::collection::vec((1..6_u16, 0..20_u64, prop::option::of(1..4_u16)), 0..200)
}

proptest! {
    #[test]
    fn a_datagram_without_header_is_of_the_latest_client_of_its_port(steps in steps()) {
        let mut bench = Bench::new(remembering(4));
        let mut model: HashMap<u16, (u16, Instant)> = HashMap::new();
        for (port, wait, named) in steps {
            bench.wait(wait);
            let now = bench.now;
            model.retain(|_, (_, heard)| now - *heard < Duration::from_secs(30));
            match named {
                Some(named) => {
                    let arrival = bench.read(port, &v2(client(named), b"x")).unwrap();
                    prop_assert_eq!(arrival.key.client.0, client(named));
                    let is_full = model.len() >= 4 && !model.contains_key(&port);
                    prop_assert_eq!(arrival.is_unremembered, is_full);
                    if !is_full {
                        model.insert(port, (named, now));
                    }
                }
                None => {
                    let expected = model.get_mut(&port).map(|(named, heard)| {
                        *heard = now;
                        client(*named)
                    });
                    let expected = expected.ok_or(DropReason::NoHeader);
                    prop_assert_eq!(bench.client_of(port, b"bare"), expected);
                }
            }
        }
    }

    #[test]
    fn no_bytes_make_a_client_that_could_not_be_one(
        from: u16,
        datagram in prop::collection::vec(any::<u8>(), 0..100),
        is_signed: bool,
    ) {
        let mut bench = Bench::new(remembering(4));
        bench.accept.formats.spp = true;
        let prefix = if is_signed { &ppv2::SIGNATURE[..] } else { &[] };
        let datagram = [prefix, &datagram[..]].concat();
        if let Ok(arrival) = bench.read(from, &datagram) {
            let client = arrival.key.client.0;
            let is_itself = client == sender(from).0;
            prop_assert!(is_itself || client.port() != 0 && !is_no_host(client.ip()));
            prop_assert!(!matches!(client.ip(), IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some()));
            prop_assert!(arrival.header <= datagram.len());
            prop_assert!(ppv2::Tlvs::parse(&datagram[arrival.tlvs]).is_ok());
        }
    }
}

#[test]
fn another_process_goes_on_with_what_senders_have_said() {
    let mut old = Bench::new(remembering(2));
    let ends = [sender(1), sender(2)];
    for (number, ends) in ends.into_iter().enumerate() {
        let named = client(u16::try_from(number).unwrap() + 1);
        let datagram = v2(named, b"first");
        old.senders
            .read(&old.accept, LISTENER, ends, &datagram, old.now)
            .unwrap();
    }
    old.now += Duration::from_secs(20);
    let name_of = |id: u64| (id == LISTENER).then(|| "l".to_owned());
    let (states, places) = old.senders.states(name_of, old.now);
    assert_eq!((states.len(), places.len()), (2, 2));

    let mut new = Bench::new(remembering(2));
    new.now = old.now;
    let listener_of = |name: &str| (name == "l").then_some((LISTENER, 2));
    for state in &states {
        let sender = new.senders.restore(state, listener_of, new.now);
        assert!(
            new.senders
                .get(sender.id)
                .is_some_and(|one| Arc::ptr_eq(one, &sender))
        );
    }
    let mut read = |ends, after| {
        let now = old.now + Duration::from_secs(after);
        let read = new.senders.read(&new.accept, LISTENER, ends, b"bare", now);
        read.map(|arrival| (arrival.key.client.0, arrival.key.local.0))
    };
    assert_eq!(read(ends[0], 9), Ok((client(1), at(DESTINATION))));
    // Nothing came of this one for 30 s in both processes together.
    assert_eq!(read(ends[1], 11), Err(DropReason::NoHeader));

    // Of two workers that knew one, what the later says holds, and its port changes hands.
    let sender = new.senders.restore(&states[0], listener_of, new.now);
    let before = sender.changes();
    let mut other = states[0].clone();
    other.named = Some((client(9).into(), at(DESTINATION).into()));
    new.senders.restore(&other, listener_of, new.now);
    assert!(sender.changes() > before);

    // A configuration that remembers fewer remembers fewer.
    let mut fewer = Senders::default();
    for state in &states {
        fewer.restore(state, |_| Some((LISTENER, 1)), new.now);
    }
    let said = fewer.entries.iter().filter(|(_, one)| one.said.is_some());
    assert_eq!(said.count(), 1);
}
