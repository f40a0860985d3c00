//! Sockets that another process has made: their descriptors come from there.

use std::os::fd::OwnedFd;

use super::*;

fn descriptor(socket: &Socket) -> OwnedFd {
    socket.as_fd().try_clone_to_owned().unwrap()
}

fn adopt(descriptor: OwnedFd, bound: SocketAddr) -> io::Result<Socket> {
    let checked = Adoptable::check(descriptor)?;
    let cookie = checked.cookie();
    let adopted = Socket::adopt(checked, bound)?;
    assert_eq!(adopted.cookie().unwrap(), cookie);
    Ok(adopted)
}

#[test]
fn an_adopted_socket_goes_on_as_the_one_it_was() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let before = connect(&server);
    let after = adopt(descriptor(&before), before.bound()).unwrap();
    assert_eq!(after.cookie().unwrap(), before.cookie().unwrap());
    assert_eq!(after.local().unwrap(), before.local().unwrap());
    assert_ne!(
        after.cookie().unwrap(),
        connect(&server).cookie().unwrap(),
        "another socket has another cookie"
    );

    // What arrived before is received after.
    server.send_to(b"early", before.local().unwrap()).unwrap();
    drop(before);
    let mut batch = Batch::default();
    receive(&after, &mut batch, 1);
    assert_eq!(batch.payload(0), b"early");
    assert_eq!(
        batch.received(0).unwrap().peer,
        server.local_addr().unwrap()
    );
}

#[test]
fn an_adopted_wildcard_reports_the_address_sent_to() {
    let before = listen("0.0.0.0:0");
    let after = adopt(descriptor(&before), before.bound()).unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = SocketAddr::from(([127, 0, 0, 3], after.bound().port()));
    client.send_to(b"here", to).unwrap();
    let mut batch = Batch::default();
    receive(&after, &mut batch, 1);
    assert_eq!(batch.received(0).unwrap().local, to);
}

#[test]
fn what_is_no_socket_of_ours_is_not_adopted() {
    let v4: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let v6: SocketAddr = "[::1]:1".parse().unwrap();
    let refused = |descriptor: OwnedFd, bound| {
        let error = adopt(descriptor, bound).unwrap_err();
        assert!(!error.to_string().is_empty());
        error.kind()
    };
    let udp = listen("127.0.0.1:0");
    let invalid = io::ErrorKind::InvalidInput;
    assert_eq!(refused(descriptor(&udp), v6), invalid);
    let blocking = UdpSocket::bind("127.0.0.1:0").unwrap();
    assert_eq!(refused(blocking.into(), v4), invalid);
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    assert_eq!(refused(tcp.into(), v4), invalid);
    let unix = std::os::unix::net::UnixDatagram::unbound().unwrap();
    assert_eq!(refused(unix.into(), v4), invalid);
    refused(std::fs::File::open("/dev/null").unwrap().into(), v4);
}
