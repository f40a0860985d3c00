//! The table; `tests/from_listener.rs` sends.

use super::*;

const LOCAL: &str = "127.0.0.1:9";

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn source(
    listeners: &Listeners<UdpSocket>,
    counters: &Counters,
    listener: SocketAddr,
) -> io::Result<Source<UdpSocket>> {
    listeners.source(None::<&UdpSocket>, addr(LOCAL), listener, counters, Ok)
}

/// The socket behind a source, which the test holds on to.
fn socket(source: io::Result<Source<UdpSocket>>) -> Arc<UdpSocket> {
    match source.unwrap() {
        Source::Bound(socket) => socket,
        Source::Own(ip) => panic!("{ip} is not the socket's own"),
    }
}

#[test]
fn the_longest_unused_makes_room() {
    let (listeners, counters) = (Listeners::new(), Counters::default());
    let evicted = || counters.snapshot(0, 0).listeners_evicted;
    let of = |number: usize| {
        let ip = [127, 0, 77, u8::try_from(number).unwrap()];
        socket(source(&listeners, &counters, SocketAddr::from((ip, 9000))))
    };
    let first: Vec<_> = (0..MAX_LISTENERS).map(of).collect();
    assert!(Arc::ptr_eq(&of(0), &first[0]));
    assert_eq!(evicted(), 0);

    of(MAX_LISTENERS);
    assert_eq!(evicted(), 1);
    assert!(Arc::ptr_eq(&of(0), &first[0]), "it was used lately");
    assert!(!Arc::ptr_eq(&of(1), &first[1]));
    assert_eq!(evicted(), 2);
    assert_eq!(listeners.0.lock().unwrap().len(), MAX_LISTENERS);
}

#[test]
fn what_no_host_can_send_from_is_refused() {
    let (listeners, counters) = (Listeners::new(), Counters::default());
    let mut all = vec!["0.0.0.0:9000", "224.0.0.1:9000", "[::]:9000", "127.0.0.1:0"];
    if cfg!(target_os = "linux") {
        // The broadcast address of a network of this host.
        all.push("127.255.255.255:9000");
    }
    for nobody in all {
        let error = source(&listeners, &counters, addr(nobody)).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let words = format!("can't send from listener {nobody}, which");
        assert!(error.to_string().starts_with(&words), "{error}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_sending_socket_takes_nothing_from_others() {
    use std::time::Duration;

    use socket2::{Domain, Socket, Type};

    let (listeners, counters) = (Listeners::new(), Counters::default());
    let open = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    open.set_reuse_address(true).unwrap();
    open.bind(&addr("0.0.0.0:0").into()).unwrap();
    let open = UdpSocket::from(open);
    open.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let listener = SocketAddr::from(([127, 0, 78, 1], open.local_addr().unwrap().port()));

    let sender = socket(source(&listeners, &counters, listener));
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    peer.send_to(b"for all addresses", listener).unwrap();
    let mut buffer = [0; 32];
    let len = open.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"for all addresses");
    let error = sender.recv(&mut buffer).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}

#[cfg(target_os = "linux")]
#[test]
fn a_port_in_use_is_a_clear_error() {
    let (listeners, counters) = (Listeners::new(), Counters::default());
    let other = UdpSocket::bind("127.0.79.1:0").unwrap();
    let listener = other.local_addr().unwrap();
    let error = source(&listeners, &counters, listener).err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    let words = error.to_string();
    assert!(words.contains(&listener.to_string()), "{words}");
    assert!(words.contains("another socket of this host"), "{words}");
    drop(other);
    assert!(source(&listeners, &counters, listener).is_ok());
}
