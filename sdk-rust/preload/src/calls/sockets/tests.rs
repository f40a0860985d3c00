use std::collections::HashSet;
use std::net::SocketAddr;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use libc::epoll_event;
use ppv2_lab::{address, namespace, test_name};
use socket2::{Domain, Socket as Socket2, Type};

use super::*;
use crate::boundary::{errno, set_errno};
use crate::calls::{descriptors, receiving, sending, waiting};
use crate::table;
use crate::testing::{Fd, Proxy, addr, client, in_a_child, start, status};

fn set(fd: &Fd, level: c_int, option: c_int, value: c_int) {
    let len = size_of::<c_int>() as socklen_t;
    // SAFETY: the number can be read.
    let result = unsafe { setsockopt(fd.0, level, option, (&raw const value).cast(), len) };
    assert_eq!(result, 0);
}

fn get(fd: &Fd, level: c_int, option: c_int) -> c_int {
    let mut value = -1;
    let mut len = size_of::<c_int>() as socklen_t;
    // SAFETY: the number can be written.
    let result = unsafe { getsockopt(fd.0, level, option, (&raw mut value).cast(), &raw mut len) };
    assert_eq!((result, len), (0, 4));
    value
}

#[test]
fn udp_sockets_with_a_port_of_the_programs_choice_are_taken_over() {
    let (listener, local) = Fd::listener("127.0.0.1");
    assert_eq!(listener.socket().unwrap().family(), libc::AF_INET);
    let ephemeral = Fd::udp(libc::AF_INET);
    assert_eq!(ephemeral.bind(addr("127.0.0.1:0")), 0);
    assert!(!ephemeral.is_taken_over());
    // SAFETY: it takes no pointer.
    let tcp = Fd(unsafe { socket(libc::AF_INET, libc::SOCK_STREAM, 0) });
    assert_eq!(tcp.bind(local), 0);
    assert!(!tcp.is_taken_over());
    let second = Fd::udp(libc::AF_INET);
    assert_eq!((second.bind(local), errno()), (-1, libc::EADDRINUSE));
    assert!(!second.is_taken_over());
}

#[test]
fn options_from_before_the_bind_are_known() {
    start();
    let early = Fd::udp(libc::AF_INET);
    set(&early, libc::IPPROTO_IP, libc::IP_PKTINFO, 1);
    set(&early, libc::IPPROTO_UDP, libc::UDP_GRO, 1);
    set(&early, libc::IPPROTO_UDP, libc::UDP_SEGMENT, 1200);
    set(&early, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
    assert_eq!(early.bind(address("127.0.0.1")), 0);
    let socket = early.socket().unwrap();
    assert!(socket.is(Flag::WantsPktinfo) && socket.is(Flag::WantsGro));
    assert_eq!(socket.segment(), Some(1200));
    assert_eq!(
        options::get(early.0, libc::IPPROTO_UDP, libc::UDP_GRO),
        Some(0)
    );
    assert_eq!(get(&early, libc::IPPROTO_UDP, libc::UDP_GRO), 1);
}

#[test]
fn the_kernel_tells_the_local_address_whatever_the_program_asks() {
    for (ip, level, option) in [
        ("0.0.0.0", libc::IPPROTO_IP, libc::IP_PKTINFO),
        ("::", libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    ] {
        let (listener, _) = Fd::listener(ip);
        let told = || options::get(listener.0, level, option);
        assert_eq!((get(&listener, level, option), told()), (0, Some(1)));
        set(&listener, level, option, 1);
        assert_eq!((get(&listener, level, option), told()), (1, Some(1)));
        set(&listener, level, option, 0);
        assert_eq!((get(&listener, level, option), told()), (0, Some(1)));
    }
}

#[test]
fn a_socket_is_connected_to_a_client() {
    let (client, someone) = (client(), client());
    let (listener, local) = Fd::listener("127.0.0.1");
    let (proxy, other) = (Proxy::new(), Proxy::new());
    proxy.introduce(client, &listener, local);
    other.introduce(someone, &listener, local);
    assert_eq!(listener.connect(client), 0);
    assert_eq!(listener.peer(), Some(client));
    assert_eq!(listener.kernel_peer(), Some(proxy.addr()));
    other.forward(someone, b"no", local);
    proxy.forward(someone, b"neither", local);
    proxy.forward(client, b"yes", local);
    assert_eq!(listener.receive(), Some((b"yes".to_vec(), client)));
    assert_eq!(listener.receive(), None);
    assert_eq!(listener.send(b"reply", None), 5);
    assert_eq!(proxy.receive(), (b"reply".to_vec(), local));

    let none = sockaddr {
        sa_family: libc::AF_UNSPEC as u16,
        sa_data: [0; 14],
    };
    // SAFETY: the name can be read.
    let result = unsafe { connect(listener.0, &raw const none, 16) };
    assert_eq!(
        (result, listener.peer(), listener.kernel_peer()),
        (0, None, None)
    );
    other.forward(someone, b"again", local);
    assert_eq!(listener.receive(), Some((b"again".to_vec(), someone)));
}

#[test]
fn a_connected_socket_follows_its_client_to_another_port_of_the_proxy() {
    let client = client();
    let (listener, local) = Fd::listener("127.0.0.1");
    let (first, second, third) = (Proxy::new(), Proxy::new(), Proxy::new());
    first.introduce(client, &listener, local);
    let connected = Fd::udp(libc::AF_INET);
    assert_eq!(connected.connect(client), 0);
    second.introduce(client, &listener, local);
    assert_eq!(connected.send(b"reply", None), 5);
    assert_eq!(second.receive(), (b"reply".to_vec(), local));
    assert_eq!(connected.kernel_peer(), Some(second.addr()));
    second.forward(client, b"here", local);
    assert_eq!(connected.receive(), Some((b"here".to_vec(), client)));

    third.introduce(client, &listener, local);
    // SAFETY: zeros are a valid value; the part can be read.
    let sent = unsafe {
        let mut part = libc::iovec {
            iov_base: c"batch".as_ptr().cast_mut().cast(),
            iov_len: 5,
        };
        let mut messages: [libc::mmsghdr; 2] = std::mem::zeroed();
        for message in &mut messages {
            message.msg_hdr.msg_iov = &raw mut part;
            message.msg_hdr.msg_iovlen = 1;
        }
        sending::sendmmsg(connected.0, messages.as_mut_ptr(), 2, 0)
    };
    assert_eq!(sent, 2);
    assert_eq!(third.receive(), (b"batch".to_vec(), local));
    assert_eq!(connected.kernel_peer(), Some(third.addr()));
}

/// A listener, its address as a client of a proxy at the second address reaches it.
const FAMILIES: [(&str, &str); 4] = [
    ("127.0.0.1", "127.0.0.1"),
    ("0.0.0.0", "127.0.0.1"),
    ("::1", "::1"),
    ("::", "127.0.0.1"),
];

/// How a program comes to have a socket for one client.
#[derive(Clone, Copy, Debug)]
enum Made {
    /// It binds the socket beside the listener, as DTLS servers do.
    Beside,
    /// It connects a new socket.
    ByConnect,
    /// It sends to the client from a new socket.
    BySend,
}

fn socket_of(client: SocketAddr, listener: &Fd, local: SocketAddr, made: Made) -> Fd {
    let own = Fd::udp(listener.socket().unwrap().family());
    match made {
        Made::Beside => {
            set(listener, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
            set(&own, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
            assert_eq!(own.bind(local), 0);
            assert_eq!(own.connect(client), 0);
        }
        Made::ByConnect => assert_eq!(own.connect(client), 0),
        Made::BySend => assert_eq!(own.send(b"first reply", Some(client)), 11),
    }
    own
}

/// Every way to find that there is nothing for the program. The socket is in blocking mode.
fn nothing_is_there(fd: &Fd, way: usize) {
    let mut bytes = [0_u8; 100];
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: zeros are a valid value.
    let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
    message.msg_hdr.msg_iov = &raw mut part;
    message.msg_hdr.msg_iovlen = 1;
    let mut batch = [message; 2];
    let mut polled = libc::pollfd {
        fd: fd.0,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut length = -1;
    // SAFETY: the memory can be written.
    unsafe {
        match way {
            0 => assert_eq!(fd.receive(), None),
            1 => assert_eq!(fd.receive_with(libc::MSG_DONTWAIT | libc::MSG_PEEK), None),
            2 => assert_eq!(waiting::poll(&raw mut polled, 1, 0), 0),
            3 => {
                let length = (&raw mut length).expose_provenance() as libc::c_ulong;
                assert_eq!(descriptors::ioctl(fd.0, libc::FIONREAD, length), 0);
            }
            4 => {
                let (at, none) = (batch.as_mut_ptr(), ptr::null_mut());
                let received = receiving::recvmmsg(fd.0, at, 2, libc::MSG_DONTWAIT, none);
                assert_eq!((received, errno()), (-1, libc::EAGAIN));
            }
            _ => {
                let message = &raw mut batch[0].msg_hdr;
                let received = receiving::recvmsg(fd.0, message, libc::MSG_DONTWAIT);
                assert_eq!((received, errno()), (-1, libc::EAGAIN));
            }
        }
    }
    assert!(way != 3 || length == 0);
}

/// A port of the proxy that has passed to another client would otherwise reach the former
/// client's socket, which drops what comes, for as long as the program keeps it.
#[test]
fn a_client_with_the_proxys_port_of_another_reaches_the_listener() {
    for (way, (ip, proxy_ip)) in (0..6).flat_map(|way| FAMILIES.map(|family| (way, family))) {
        for made in [Made::Beside, Made::ByConnect, Made::BySend] {
            let (former, next) = (client(), client());
            let (listener, local) = Fd::listener(ip);
            let (proxy, other) = (Proxy::at(proxy_ip), Proxy::at(proxy_ip));
            let to = SocketAddr::new(proxy_ip.parse().unwrap(), local.port());
            proxy.introduce(former, &listener, to);
            let own = socket_of(former, &listener, local, made);
            let peer = own.peer();
            if matches!(made, Made::BySend) {
                assert_eq!(proxy.receive().0, b"first reply");
            }
            proxy.forward(former, b"mine", to);
            assert_eq!(own.receive(), Some((b"mine".to_vec(), former)));

            // The former client is at another port of the proxy by now. One datagram of the
            // next finds out.
            other.introduce(former, &listener, to);
            proxy.forward(next, b"lost", to);
            nothing_is_there(&own, way);
            for payload in [b"one", b"two"] {
                proxy.forward(next, payload, to);
                assert_eq!(
                    listener.receive(),
                    Some((payload.to_vec(), next)),
                    "{ip} {made:?} {way}"
                );
                assert_eq!(own.receive(), None);
            }
            assert_eq!(listener.send(b"reply", Some(next)), 5);
            assert_eq!(proxy.receive(), (b"reply".to_vec(), to));
            assert_eq!((own.peer(), own.kernel_peer().is_some()), (peer, true));

            other.forward(former, b"still here", to);
            assert_eq!(listener.receive(), Some((b"still here".to_vec(), former)));
            let name = matches!(made, Made::BySend).then_some(former);
            assert_eq!(own.send(b"again", name), 5);
            assert_eq!(other.receive(), (b"again".to_vec(), to));
            other.forward(former, b"here", to);
            assert_eq!(own.receive(), Some((b"here".to_vec(), former)));
            proxy.forward(next, b"still", to);
            assert_eq!(listener.receive(), Some((b"still".to_vec(), next)));
        }
    }
}

#[test]
fn what_a_client_sent_before_its_port_passed_to_another_is_received() {
    let (former, next) = (client(), client());
    let (listener, local) = Fd::listener("127.0.0.1");
    let (proxy, other) = (Proxy::new(), Proxy::new());
    proxy.introduce(former, &listener, local);
    let own = socket_of(former, &listener, local, Made::ByConnect);
    other.introduce(former, &listener, local);
    for (client, payload) in [(next, b"lost"), (former, b"late"), (next, b"same")] {
        proxy.forward(client, payload, local);
    }
    assert_eq!(own.receive(), Some((b"late".to_vec(), former)));
    assert_eq!(own.receive(), None);
    proxy.forward(next, b"next", local);
    assert_eq!(listener.receive(), Some((b"next".to_vec(), next)));
}

/// A proxy may have many clients at one port, whose replies leave by it for some seconds.
#[test]
fn a_socket_stays_connected_to_a_port_that_still_speaks_for_its_client() {
    let (one, other) = (client(), client());
    let (listener, local) = Fd::listener("127.0.0.1");
    let proxy = Proxy::new();
    proxy.introduce(one, &listener, local);
    let own = socket_of(one, &listener, local, Made::ByConnect);
    for payload in [b"one", b"two"] {
        proxy.forward(other, b"another", local);
        proxy.forward(one, payload, local);
        assert_eq!(own.receive(), Some((payload.to_vec(), one)));
        assert_eq!(own.receive(), None);
    }
}

/// Only the port that the kernel has connected the socket to can have passed to another.
#[test]
fn a_socket_stays_connected_when_datagrams_of_others_were_queued_before() {
    let (one, other) = (client(), client());
    let (listener, local) = Fd::listener("127.0.0.1");
    let (proxy, others) = (Proxy::new(), Proxy::new());
    proxy.introduce(one, &listener, local);
    others.forward(other, b"queued", local);
    assert_eq!(listener.connect(one), 0);
    assert_eq!(listener.receive(), None);
    assert_eq!(listener.kernel_peer(), Some(proxy.addr()));
    proxy.forward(one, b"mine", local);
    assert_eq!(listener.receive(), Some((b"mine".to_vec(), one)));
}

#[test]
fn a_process_learns_that_the_port_of_its_client_passed_to_one_of_another_process() {
    for ip in ["127.0.0.1", "::1"] {
        let (former, next) = (client(), client());
        let (listener, local) = Fd::listener(ip);
        let (proxy, other) = (Proxy::at(ip), Proxy::at(ip));
        proxy.introduce(former, &listener, local);
        let own = socket_of(former, &listener, local, Made::ByConnect);
        other.introduce(former, &listener, local);
        proxy.forward(next, b"lost", local);
        assert_eq!(in_a_child(|| own.receive().is_none()), 0);
        proxy.forward(next, b"next", local);
        assert_eq!(listener.receive(), Some((b"next".to_vec(), next)));
        assert_eq!(own.send(b"again", None), 5);
        assert_eq!(other.receive(), (b"again".to_vec(), local));
        other.forward(former, b"here", local);
        assert_eq!(own.receive(), Some((b"here".to_vec(), former)));
    }
}

/// What this process knows of the kernel is no longer so.
#[test]
fn a_reply_takes_the_clients_path_if_another_process_has_connected_the_socket_elsewhere() {
    let client = client();
    let (listener, local) = Fd::listener("127.0.0.1");
    let (first, second) = (Proxy::new(), Proxy::new());
    first.introduce(client, &listener, local);
    let own = socket_of(client, &listener, local, Made::ByConnect);
    second.introduce(client, &listener, local);
    assert_eq!(in_a_child(|| own.send(b"child", None) == 5), 0);
    assert_eq!(second.receive(), (b"child".to_vec(), local));
    first.forward(client, b"first", local);
    // What is only looked at is not taken for what came by this port a moment ago.
    assert!(listener.receive_with(libc::MSG_PEEK).is_some());
    assert_eq!(own.send(b"parent", None), 6);
    assert_eq!(first.receive(), (b"parent".to_vec(), local));
}

#[test]
fn a_connected_socket_has_the_address_that_the_proxy_writes_to() {
    let client = client();
    let (listener, local) = Fd::listener("0.0.0.0");
    let proxy = Proxy::new();
    let second = SocketAddr::new([127, 0, 0, 2].into(), local.port());
    proxy.introduce(client, &listener, second);
    let own = Fd::udp(libc::AF_INET);
    for (fd, payload) in [(&own, b"one"), (&listener, b"two")] {
        assert_eq!(fd.connect(client), 0);
        assert_eq!(options::local(fd.0), Some(second));
        assert_eq!(fd.send(payload, None), 3);
        assert_eq!(proxy.receive(), (payload.to_vec(), second));
        proxy.forward(client, payload, second);
        assert_eq!(fd.receive(), Some((payload.to_vec(), client)));
        assert_eq!(get(fd, libc::IPPROTO_IP, libc::IP_PKTINFO), 0);
    }
}

#[test]
fn strangers_cannot_be_connected_to_and_peers_can() {
    let (listener, local) = Fd::listener("0.0.0.0");
    assert_eq!(
        (listener.connect(addr("192.0.2.99:1")), errno()),
        (-1, libc::EHOSTUNREACH)
    );
    assert_eq!(listener.kernel_peer(), None);
    let peer = addr("127.0.0.9:5000");
    assert_eq!(listener.connect(peer), 0);
    assert!(listener.socket().unwrap().is(Flag::Direct));
    assert_eq!(
        (listener.peer(), listener.kernel_peer()),
        (Some(peer), Some(peer))
    );
    let direct = std::net::UdpSocket::bind(peer).unwrap();
    direct
        .send_to(b"bare", ("127.0.0.1", local.port()))
        .unwrap();
    assert_eq!(listener.receive_with(0), Some((b"bare".to_vec(), peer)));
    assert_eq!(listener.send(b"reply", None), 5);
    let mut reply = [0; 5];
    assert_eq!(direct.recv(&mut reply).unwrap(), 5);
}

#[test]
fn a_socket_of_its_own_gets_the_listeners_address_with_its_client() {
    let (client, someone) = (client(), client());
    let (listener, local) = Fd::listener("127.0.0.1");
    let proxy = Proxy::new();
    proxy.introduce(client, &listener, local);
    // SAFETY: it takes no pointer.
    let own = Fd(unsafe {
        socket(
            libc::AF_INET,
            libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            0,
        )
    });
    set(&own, libc::IPPROTO_IP, libc::IP_TOS, 0x20);
    let mut event = epoll_event {
        events: libc::EPOLLIN as u32,
        u64: 77,
    };
    // SAFETY: the event can be read.
    let epoll = unsafe {
        let epoll = Fd(libc::epoll_create1(0));
        assert_eq!(
            waiting::epoll_ctl(epoll.0, libc::EPOLL_CTL_ADD, own.0, &raw mut event),
            0
        );
        epoll
    };
    assert_eq!(own.connect(client), 0);
    assert_eq!(options::local(own.0), Some(local));
    assert_eq!(own.peer(), Some(client));
    assert_eq!(get(&own, libc::IPPROTO_IP, libc::IP_TOS), 0x20);
    // SAFETY: it takes no pointer.
    let (descriptor, status) = unsafe {
        (
            descriptors::fcntl(own.0, libc::F_GETFD, 0),
            descriptors::fcntl(own.0, libc::F_GETFL, 0),
        )
    };
    assert_eq!(descriptor, libc::FD_CLOEXEC);
    assert_ne!(status & libc::O_NONBLOCK, 0);
    assert!(own.socket().unwrap().is(Flag::NonBlocking));

    assert_eq!(own.send(b"reply", None), 5);
    assert_eq!(proxy.receive(), (b"reply".to_vec(), local));
    proxy.forward(client, b"more", local);
    let mut events = [epoll_event { events: 0, u64: 0 }; 4];
    // SAFETY: there is room for the events.
    let count = unsafe { waiting::epoll_wait(epoll.0, events.as_mut_ptr(), 4, 20_000) };
    assert_eq!((count, { events[0].u64 }), (1, 77));
    assert_eq!(own.receive(), Some((b"more".to_vec(), client)));

    let other = Proxy::new();
    other.introduce(someone, &listener, local);
    let reuse = |fd: &Fd| options::get(fd.0, libc::SOL_SOCKET, libc::SO_REUSEADDR);
    assert_eq!((reuse(&listener), reuse(&own)), (Some(0), Some(1)));
}

/// Set when it is dropped.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// With SO_REUSEADDR on both sockets, any user may share a port that needs no privileges.
#[test]
fn nobody_can_bind_to_the_port_while_sockets_of_clients_are_made() {
    for ip in ["127.0.0.1", "::1"] {
        let client = client();
        let (listener, local) = Fd::listener(ip);
        let proxy = Proxy::at(ip);
        proxy.introduce(client, &listener, local);
        let done = AtomicBool::new(false);
        let taken = thread::scope(|scope| {
            let thief = scope.spawn(|| {
                let mut taken = 0;
                while !done.load(Ordering::Relaxed) {
                    let domain = Domain::for_address(local);
                    let thief = Socket2::new(domain, Type::DGRAM, None).unwrap();
                    thief.set_reuse_address(true).unwrap();
                    taken += u32::from(thief.bind(&local.into()).is_ok());
                }
                taken
            });
            // Whether or not an assertion fails.
            let stop = Stop(&done);
            for _ in 0..3000 {
                let own = Fd::udp(listener.socket().unwrap().family());
                assert_eq!(own.connect(client), 0);
                assert_eq!(options::local(own.0), Some(local));
            }
            drop(stop);
            thief.join().unwrap()
        });
        assert_eq!(taken, 0);
        for option in [libc::SO_REUSEADDR, libc::SO_REUSEPORT] {
            assert_eq!(get(&listener, libc::SOL_SOCKET, option), 0);
        }
    }
}

#[test]
fn a_first_datagram_to_a_client_leaves_from_the_listeners_port() {
    let client = client();
    let (listener, local) = Fd::listener("::");
    let proxy = Proxy::new();
    proxy.introduce(client, &listener, local);
    let own = Fd::udp(libc::AF_INET);
    assert_eq!(own.bind(addr("127.0.0.1:0")), 0);
    assert_eq!(own.send(b"data", Some(client)), 4);
    let (payload, from) = proxy.receive();
    assert_eq!((&payload[..], from.port()), (&b"data"[..], local.port()));
    assert_eq!((own.peer(), errno()), (None, libc::ENOTCONN));
    assert_eq!((own.send(b"data", None), errno()), (-1, libc::EDESTADDRREQ));
    proxy.forward(client, b"ack", local);
    assert_eq!(own.receive(), Some((b"ack".to_vec(), client)));

    // What has nothing to do with clients passes.
    let stranger = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let other = Fd::udp(libc::AF_INET);
    for payload in [b"one", b"two"] {
        assert_eq!(other.send(payload, Some(stranger.local_addr().unwrap())), 3);
        assert!(!other.is_taken_over());
    }
}

/// Its address may have been forged, so that the program's next questions to it would leave
/// from the listener's port.
#[test]
fn a_server_that_claims_to_be_a_client_changes_no_other_socket() {
    let (listener, local) = Fd::listener("127.0.0.1");
    let proxy = Proxy::new();
    let resolver = addr("127.0.0.44:53");
    proxy.introduce(resolver, &listener, local);
    let own = Fd::udp(libc::AF_INET);
    own.send(b"question", Some(resolver));
    assert!(!own.is_taken_over());
    assert_eq!(own.connect(resolver), 0);
    assert!(!own.is_taken_over());
    assert_eq!(own.kernel_peer(), Some(resolver));
    assert_ne!(
        options::local(own.0).map(|local| local.port()),
        Some(local.port())
    );
}

#[test]
fn a_child_that_has_closed_the_listener_answers_from_its_port() {
    let client = client();
    let (listener, local) = Fd::listener("127.0.0.1");
    let proxy = Proxy::new();
    proxy.introduce(client, &listener, local);
    let answered = in_a_child(|| {
        // SAFETY: the number is this test's.
        unsafe { descriptors::close(listener.0) };
        let own = Fd::udp(libc::AF_INET);
        assert_eq!(own.bind(addr("127.0.0.1:0")), 0);
        set_errno(7);
        assert_eq!((own.connect(client), errno()), (0, 7));
        assert_eq!(own.send(b"reply", None), 5);
        registry::between(0, u32::MAX)
            .filter_map(registry::get)
            .all(|socket| !socket.is(Flag::Kept))
    });
    assert_eq!(answered, 0);
    assert_eq!(proxy.receive(), (b"reply".to_vec(), local));
    assert!(listener.is_taken_over());
}

/// Runs in a child whose parent has received by a listener, which nobody has open any more but
/// the child.
fn in_a_child_of_a_parent_without(ip: &str, work: impl FnOnce(Fd, SocketAddr) -> bool) -> c_int {
    let client = client();
    in_a_child(|| {
        let (listener, local) = Fd::listener(ip);
        Proxy::at(ip).introduce(client, &listener, local);
        let (mut closed, close) = std::io::pipe().unwrap();
        // SAFETY: the child calls functions of this library, and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            drop(close);
            // The other end is closed.
            std::io::Read::read(&mut closed, &mut [0]).unwrap();
            let done = work(listener, local);
            // SAFETY: it only ends the process.
            unsafe { libc::_exit(c_int::from(!done)) }
        }
        drop(listener);
        drop(close);
        status(child) == 0
    })
}

/// Binds, if need be after processes of other tests that were forked meanwhile have ended.
fn binds_at_last(local: SocketAddr) -> Fd {
    let started = Instant::now();
    loop {
        let new = Fd::udp(if local.is_ipv4() {
            libc::AF_INET
        } else {
            libc::AF_INET6
        });
        if new.bind(local) == 0 {
            return new;
        }
        assert!(started.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_child_that_has_closed_the_listener_can_bind_to_its_port_again() {
    for ip in ["127.0.0.1", "::1"] {
        let client = client();
        let done = in_a_child_of_a_parent_without(ip, |listener, local| {
            drop(listener);
            let again = binds_at_last(local);
            Proxy::at(ip).introduce(client, &again, local);
            true
        });
        assert_eq!(done, 0);
    }
}

#[test]
fn a_child_that_has_closed_the_listener_and_waits_leaves_the_port_to_others() {
    let waits: [fn(); 4] = [
        // SAFETY: there is nothing to be read or written.
        || unsafe {
            waiting::poll(ptr::null_mut(), 0, 1);
        },
        // SAFETY: as above.
        || unsafe {
            let time = libc::timespec {
                tv_sec: 0,
                tv_nsec: 1,
            };
            waiting::ppoll(ptr::null_mut(), 0, &raw const time, ptr::null());
        },
        // SAFETY: as above.
        || unsafe {
            let mut time = libc::timeval {
                tv_sec: 0,
                tv_usec: 1,
            };
            let none = ptr::null_mut();
            waiting::select(0, none, none, none, &raw mut time);
        },
        // SAFETY: the event can be written.
        || unsafe {
            let epoll = Fd(libc::epoll_create1(0));
            let mut event = epoll_event { events: 0, u64: 0 };
            waiting::epoll_wait(epoll.0, &raw mut event, 1, 1);
        },
    ];
    for wait in waits {
        let done = in_a_child_of_a_parent_without("127.0.0.1", |listener, local| {
            drop(listener);
            wait();
            // To others, the port is not the library's to give.
            let started = Instant::now();
            while std::net::UdpSocket::bind(local).is_err() {
                assert!(started.elapsed() < Duration::from_secs(20));
                thread::sleep(Duration::from_millis(10));
            }
            true
        });
        assert_eq!(done, 0);
    }
}

#[test]
fn an_ipv6_client_of_an_ipv4_proxy_can_be_connected_to() {
    let (listener, local) = Fd::listener("::");
    let proxy = Proxy::new();
    proxy.forward(addr("[2001:db8::7]:9900"), b"first", local);
    assert!(listener.receive_with(0).is_some());
    let own = Fd::udp(libc::AF_INET6);
    assert_eq!(own.connect(addr("[2001:db8::7]:9900")), 0);
    assert_eq!(own.peer(), Some(addr("[2001:db8::7]:9900")));
    assert_eq!(own.kernel_peer(), Some(proxy.addr()));
    assert_eq!(own.send(b"reply", None), 5);
    assert_eq!(proxy.receive().1.port(), local.port());
}

#[test]
fn bad_arguments_fail_as_in_the_kernel() {
    let client = client();
    let (listener, local) = Fd::listener("127.0.0.1");
    let proxy = Proxy::new();
    proxy.introduce(client, &listener, local);
    assert_eq!(listener.connect(client), 0);
    let mut short: socklen_t = 4;
    let mut name = [0xff_u8; 16];
    // SAFETY: what can be written is written.
    unsafe {
        let at = name.as_mut_ptr().cast();
        assert_eq!(getpeername(listener.0, at, &raw mut short), 0);
        assert_eq!((short, name[4]), (16, 0xff));
        assert_eq!(
            (getpeername(listener.0, at, ptr::null_mut()), errno()),
            (-1, libc::EFAULT)
        );
        let mut negative = socklen_t::MAX;
        assert_eq!(
            (getpeername(listener.0, at, &raw mut negative), errno()),
            (-1, libc::EINVAL)
        );
        let gro = (libc::IPPROTO_UDP, libc::UDP_GRO);
        let result = setsockopt(listener.0, gro.0, gro.1, ptr::null(), 4);
        assert_eq!((result, errno()), (-1, libc::EFAULT));
        let result = setsockopt(listener.0, gro.0, gro.1, name.as_ptr().cast(), 2);
        assert_eq!((result, errno()), (-1, libc::EINVAL));
        assert_eq!(
            (connect(listener.0, ptr::null(), 16), errno()),
            (-1, libc::EFAULT)
        );
    }
}

fn set_device(fd: &Fd, name: &std::ffi::CStr) {
    let len = name.to_bytes_with_nul().len() as socklen_t;
    let (level, option) = (libc::SOL_SOCKET, libc::SO_BINDTODEVICE);
    // SAFETY: the name can be read.
    let result = unsafe { setsockopt(fd.0, level, option, name.as_ptr().cast(), len) };
    assert_eq!(result, 0);
}

fn knows(fd: &Fd, client: SocketAddr) -> bool {
    let sent = fd.send(b"reply", Some(client));
    assert!(sent == 5 || errno() == libc::EHOSTUNREACH);
    sent == 5
}

/// There, the same addresses may be other hosts'.
#[test]
fn sockets_of_other_networks_and_devices_have_other_clients() {
    if !namespace::enter(test_name!(), "ip link add veth0 type veth peer name veth1") {
        return;
    }
    for (any, loopback) in [("0.0.0.0:9000", "127.0.0.1"), ("[::]:9000", "::1")] {
        let (client, any) = (client(), addr(any));
        let family = if any.is_ipv4() {
            libc::AF_INET
        } else {
            libc::AF_INET6
        };
        let [here, there] = [c"lo", c"veth0"].map(|device| {
            let listener = Fd::udp(family);
            set_device(&listener, device);
            assert_eq!(listener.bind(any), 0);
            listener
        });
        let proxy = Proxy::at(loopback);
        let to = SocketAddr::new(loopback.parse().unwrap(), any.port());
        proxy.introduce(client, &here, to);
        assert!(knows(&here, client) && !knows(&there, client));

        // A socket for a client is where its listener is.
        let own = Fd::udp(family);
        assert_eq!(own.connect(client), 0);
        assert_eq!(options::local(own.0), Some(to));
        assert_eq!(options::device(own.0), options::device(here.0));
        let other = Fd::udp(family);
        set_device(&other, c"veth0");
        other.connect(client);
        assert!(!other.is_taken_over());

        thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: it takes no pointer.
                assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
                let elsewhere = Fd::udp(family);
                assert_eq!(elsewhere.bind(any), 0);
                assert!(elsewhere.is_taken_over() && !knows(&elsewhere, client));
                let new = Fd::udp(family);
                new.connect(client);
                assert!(!new.is_taken_over());
                // This one is in the former network.
                let own = &own;
                assert!(knows(own, client) && knows(&here, client));
            });
        });

        // The program may say so after it has bound the socket.
        let late = Fd::udp(family);
        let to = SocketAddr::new(to.ip(), 9001);
        assert_eq!(late.bind(to), 0);
        proxy.introduce(client, &late, to);
        set_device(&late, c"veth0");
        assert!(!knows(&late, client));
        set_device(&late, c"");
        assert!(knows(&late, client));
    }
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn sockets_that_come_and_go_leave_nothing_behind() {
    // A process of its own, in which no other test opens anything.
    if !namespace::enter(test_name!(), "") {
        return;
    }
    let client = client();
    let (listener, local) = Fd::listener("127.0.0.1");
    let proxy = Proxy::new();
    proxy.introduce(client, &listener, local);
    let before = (open_descriptors(), table::endpoints());
    let mut known = HashSet::new();
    for round in 0..70_000 {
        if round % 1000 == 0 {
            // Otherwise it would be forgotten where this takes minutes.
            proxy.introduce(client, &listener, local);
        }
        let own = Fd::udp(libc::AF_INET);
        match round % 3 {
            0 => assert_eq!(own.connect(client), 0),
            1 => assert_eq!(own.send(b"x", Some(client)), 1),
            _ => {
                assert_eq!(own.bind(addr("127.0.0.1:0")), 0);
                assert_eq!(own.connect(client), 0);
            }
        }
        known.insert(ptr::from_ref(own.socket().unwrap()));
    }
    assert_eq!((open_descriptors(), table::endpoints()), before);
    assert!(known.len() <= 2, "{}", known.len());

    // Processes that answer one client each, as tftpd has them.
    for _ in 0..300 {
        let answered = in_a_child(|| {
            // SAFETY: the number is this test's.
            unsafe { descriptors::close(listener.0) };
            let own = Fd::udp(libc::AF_INET);
            own.connect(client) == 0 && open_descriptors() == before.0
        });
        assert_eq!(answered, 0);
    }
    assert_eq!((open_descriptors(), table::endpoints()), before);

    // Ports that the program chooses count once each.
    for port in (5000..5100).cycle().take(10_000) {
        let own = Fd::udp(libc::AF_INET);
        assert_eq!(own.bind(SocketAddr::new(local.ip(), port)), 0);
    }
    let after = (before.0, before.1 + 100);
    assert_eq!((open_descriptors(), table::endpoints()), after);
}
