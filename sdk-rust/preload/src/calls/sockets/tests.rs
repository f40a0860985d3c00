use std::net::SocketAddr;
use std::ptr;

use libc::epoll_event;

use super::*;
use crate::boundary::errno;
use crate::calls::{descriptors, sending, waiting};
use crate::options;
use crate::testing::{Fd, Proxy, addr, client, in_a_child, start};

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
    let (listener, local) = Fd::listener("127.0.0.1");
    drop(listener);
    assert_eq!(early.bind(local), 0);
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
        assert_eq!((own.connect(client), errno()), (0, 0));
        assert_eq!(own.send(b"reply", None), 5);
        registry::between(0, u32::MAX)
            .filter_map(registry::get)
            .all(|socket| !socket.is(Flag::Kept))
    });
    assert_eq!(answered, 0);
    assert_eq!(proxy.receive(), (b"reply".to_vec(), local));
    assert!(listener.is_taken_over());
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
