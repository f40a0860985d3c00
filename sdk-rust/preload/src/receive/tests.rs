//! What programs see of each call is compared with plain sockets by `tests/conformance.rs`;
//! here is what no program can bring about at will.

use std::mem;
use std::net::UdpSocket;
use std::ptr;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use libc::{c_uint, iovec, mmsghdr, timeval};

use super::*;
use crate::buffers;
use crate::calls::{receiving, sockets};
use crate::stats::Cell;
use crate::testing::{Fd, Proxy, client, in_a_child};

#[test]
fn payloads_of_all_lengths_pass_both_ways() {
    let (listener, to) = Fd::listener("127.0.0.1");
    let (proxy, client) = (Proxy::new(), client());
    // With a header of 28 bytes, on both sides of what the stack has room for.
    for len in [0, 1, 99, 2019, 2020, 2021, 9000, 65_000] {
        let payload: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
        proxy.send_bare(to);
        proxy.forward(client, &payload, to);
        let mut buffer = vec![0; 65_536];
        // SAFETY: the buffer has this length.
        let received = unsafe {
            let (at, room) = (buffer.as_mut_ptr().cast(), buffer.len());
            receiving::recv(listener.0, at, room, 0)
        };
        assert_eq!(received, len as ssize_t);
        buffer.truncate(len);
        assert_eq!(buffer, payload);

        assert_eq!(listener.send(&payload, Some(client)), len as ssize_t);
        let mut buffer = vec![0; 65_536];
        assert_eq!(proxy.0.recv(&mut buffer).unwrap(), len);
        buffer.truncate(len);
        assert_eq!(buffer, payload);
    }
}

#[test]
fn a_look_at_the_queue_discards_what_must_be_dropped() {
    let (listener, to) = Fd::listener("127.0.0.1");
    let (proxy, client) = (Proxy::new(), client());
    let (fd, socket) = (listener.0, listener.socket().unwrap());
    assert!(!discard_dropped(fd, socket));
    proxy.send_bare(to);
    assert!(!discard_dropped(fd, socket));
    proxy.send_bare(to);
    proxy.forward(client, b"hello", to);
    assert!(discard_dropped(fd, socket));
    assert_eq!(next_len(fd, socket), Some(5));
    let expected = Some((b"hello".to_vec(), client));
    assert_eq!(listener.receive_with(MSG_PEEK), expected);
    assert_eq!(listener.receive(), expected);
    assert_eq!(next_len(fd, socket), Some(0));
}

#[test]
fn a_datagram_that_came_in_place_of_a_dropped_one_is_kept() {
    let (listener, to) = Fd::listener("127.0.0.1");
    let (proxy, client) = (Proxy::new(), client());
    let (fd, socket) = (listener.0, listener.socket().unwrap());
    proxy.forward(client, b"first", to);
    proxy.forward(client, b"second", to);
    // As if a bad one had been peeked at, which another thread has received since.
    discard(fd, socket);
    assert!(socket.is_holding());
    assert_eq!(next_len(fd, socket), Some(5));
    let expected = |payload: &[u8]| Some((payload.to_vec(), client));
    assert_eq!(listener.receive_with(MSG_PEEK), expected(b"first"));
    assert_eq!(listener.receive(), expected(b"first"));
    assert_eq!(listener.receive(), expected(b"second"));
    assert_eq!(listener.receive(), None);
}

#[test]
fn many_drops_end_a_call_that_must_not_wait() {
    let (listener, to) = Fd::listener("127.0.0.1");
    let (proxy, client) = (Proxy::new(), client());
    // The first attempt may be made without counting.
    for _ in 0..MAX_DROPS {
        proxy.send_bare(to);
    }
    for _ in 0..4 {
        proxy.forward(client, b"hello", to);
    }
    assert_eq!(listener.receive_with(MSG_DONTWAIT | MSG_PEEK), None);
    assert_eq!(errno(), EAGAIN);
    assert_eq!(listener.receive(), Some((b"hello".to_vec(), client)));
}

#[test]
fn drops_do_not_prolong_a_timeout() {
    let (listener, to) = Fd::listener("127.0.0.1");
    let proxy = Proxy::new();
    let timeout = timeval {
        tv_sec: 0,
        tv_usec: 50_000,
    };
    // SAFETY: the value can be read.
    let result = unsafe {
        let (level, option) = (libc::SOL_SOCKET, libc::SO_RCVTIMEO);
        let len = size_of_val(&timeout) as libc::socklen_t;
        sockets::setsockopt(listener.0, level, option, (&raw const timeout).cast(), len)
    };
    assert_eq!(result, 0);
    let (stop, stopped) = mpsc::channel::<()>();
    let flood = thread::spawn(move || {
        while stopped.recv_timeout(Duration::from_millis(2)).is_err() {
            proxy.send_bare(to);
        }
    });
    // It ends, although something comes all the time.
    assert_eq!(listener.receive_with(0), None);
    assert_eq!(errno(), EAGAIN);
    stop.send(()).unwrap();
    flood.join().unwrap();
}

/// As the kernel would have found it.
#[test]
fn what_is_in_the_queue_is_found_though_the_time_is_over() {
    let (listener, to) = Fd::listener("127.0.0.1");
    let (proxy, client) = (Proxy::new(), client());
    let timeout = timeval {
        tv_sec: 0,
        tv_usec: 1,
    };
    // SAFETY: the value can be read.
    let result = unsafe {
        let (level, option) = (libc::SOL_SOCKET, libc::SO_RCVTIMEO);
        let len = size_of_val(&timeout) as libc::socklen_t;
        sockets::setsockopt(listener.0, level, option, (&raw const timeout).cast(), len)
    };
    assert_eq!(result, 0);
    for _ in 0..MAX_DROPS / 2 {
        proxy.send_bare(to);
    }
    proxy.forward(client, b"hello", to);
    assert_eq!(listener.receive_with(0), Some((b"hello".to_vec(), client)));
}

#[test]
fn batches_have_no_gaps() {
    let (listener, to) = Fd::listener("127.0.0.1");
    let (proxy, client) = (Proxy::new(), client());
    let texts: Vec<Vec<u8>> = (0..80_u8).map(|n| vec![n; n.into()]).collect();
    for text in &texts {
        proxy.send_bare(to);
        proxy.forward(client, text, to);
    }
    let mut buffers = vec![[0xee_u8; 100]; 90];
    let mut parts: Vec<iovec> = buffers
        .iter_mut()
        .map(|buffer| iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        })
        .collect();
    let mut messages: Vec<mmsghdr> = parts
        .iter_mut()
        .map(|part| {
            // SAFETY: zeroes are a valid value.
            let mut message: mmsghdr = unsafe { mem::zeroed() };
            message.msg_hdr.msg_iov = part;
            message.msg_hdr.msg_iovlen = 1;
            message
        })
        .collect();
    let mut received = 0;
    while received < texts.len() {
        let left = &mut messages[received..];
        // SAFETY: the messages are sound.
        let more = unsafe {
            let (at, count) = (left.as_mut_ptr(), left.len() as c_uint);
            receiving::recvmmsg(listener.0, at, count, MSG_DONTWAIT, ptr::null_mut())
        };
        assert!(more > 0, "after {received}: {}", errno());
        received += more as usize;
    }
    for ((text, message), buffer) in texts.iter().zip(&messages).zip(&buffers) {
        assert_eq!(message.msg_len as usize, text.len());
        assert_eq!(&buffer[..text.len()], text);
        assert!(buffer[text.len()..].iter().all(|byte| *byte == 0xee));
    }
}

#[test]
fn what_has_no_place_among_kept_datagrams_is_counted() {
    let (listener, to) = Fd::listener("127.0.0.1");
    let (proxy, client) = (Proxy::new(), client());
    let before = table::counted(Cell::DroppedNoMemory);
    for n in 0..20_u8 {
        proxy.forward(client, &[n], to);
        discard(listener.0, listener.socket().unwrap());
    }
    // Other tests may drop some, too.
    assert!(table::counted(Cell::DroppedNoMemory) >= before + 4);
    let kept: Vec<u8> = std::iter::from_fn(|| listener.receive())
        .map(|(payload, _)| payload[0])
        .collect();
    assert_eq!(kept, Vec::from_iter(0..16));
}

#[test]
fn a_long_datagram_without_memory_is_counted() {
    let (listener, to) = Fd::listener("127.0.0.1");
    let (proxy, client) = (Proxy::new(), client());
    let before = table::counted(Cell::DroppedNoMemory);
    let done = in_a_child(|| {
        let none = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the limit can be read.
        let result = unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const none) };
        assert_eq!(result, 0);
        let mut buffer = [0; 9000];
        let mut receive = |flags| {
            let (at, room) = (buffer.as_mut_ptr().cast(), buffer.len());
            // SAFETY: the buffer has this length.
            unsafe { receiving::recv(listener.0, at, room, flags | MSG_DONTWAIT) }
        };
        // Of each way to receive.
        [0, MSG_PEEK].into_iter().all(|flags| {
            proxy.forward(client, &[7; 5000], to);
            proxy.forward(client, b"short", to);
            receive(flags) == 5 && (flags == 0 || receive(0) == 5)
        })
    });
    assert_eq!(done, 0);
    assert!(table::counted(Cell::DroppedNoMemory) >= before + 2);
}

#[test]
fn what_a_handler_has_overwritten_is_not_judged() {
    let (listener, to) = Fd::listener("127.0.0.1");
    let (proxy, client) = (Proxy::new(), client());
    let receive = |payload: &[u8], between: fn()| {
        proxy.forward(client, payload, to);
        let mut arrival = Arrival::new();
        // SAFETY: the message has been filled in.
        let len = unsafe { real::recvmsg(listener.0, arrival.prepare(), 0) };
        between();
        // SAFETY: that is what was received.
        let arrived = unsafe { arrival.arrived(len as usize) };
        arrived.map(|(arrived, _taken)| arrived.bytes.ends_with(payload))
    };
    let long = [7; 5000];
    assert_eq!(receive(&long, || ()), Ok(true));
    assert_eq!(
        receive(&long, buffers::count_far_use),
        Err(Counter::Interrupted)
    );
    assert_eq!(receive(b"short", buffers::count_far_use), Ok(true));
}

#[test]
fn a_datagram_that_could_not_be_handed_over_is_counted() {
    let (listener, to) = Fd::listener("127.0.0.1");
    let (proxy, client) = (Proxy::new(), client());
    let before = table::counted(Cell::DroppedBadPointer);
    let mut buffer = [0; 100];
    for flags in [0, MSG_DONTWAIT] {
        proxy.forward(client, b"lost", to);
        // SAFETY: nothing is written there.
        let received = unsafe { receiving::recv(listener.0, ptr::null_mut(), 4, flags) };
        assert_eq!((received, errno()), (-1, libc::EFAULT));
        proxy.forward(client, b"lost", to);
        // SAFETY: the buffer has this length.
        let received = unsafe {
            let at = buffer.as_mut_ptr();
            let (name, len) = (at.add(50).cast(), ptr::null_mut());
            receiving::recvfrom(listener.0, at.cast(), 50, flags, name, len)
        };
        assert_eq!((received, errno()), (-1, libc::EFAULT));
    }
    assert!(table::counted(Cell::DroppedBadPointer) >= before + 4);
    assert_eq!(listener.receive(), None);
}

#[test]
fn datagrams_of_peers_are_counted_as_delivered_and_as_direct() {
    let (listener, to) = Fd::listener("127.0.0.1");
    let peer = UdpSocket::bind("127.0.0.9:0").unwrap();
    let before = table::counted(Cell::Direct);
    for flags in [0, MSG_DONTWAIT] {
        peer.send_to(b"direct", to).unwrap();
        let expected = Some((b"direct".to_vec(), peer.local_addr().unwrap()));
        assert_eq!(listener.receive_with(flags), expected);
    }
    assert!(table::counted(Cell::Direct) >= before + 2);
}

#[test]
fn a_signal_ends_a_call_in_a_flood() {
    extern "C" fn handle(_: c_int) {}
    // SAFETY: zeroes are a valid value, and the action can be read.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = handle as extern "C" fn(c_int) as usize;
        libc::sigaction(libc::SIGUSR2, &raw const action, ptr::null_mut());
    }
    let (listener, _) = Fd::listener("127.0.0.1");
    let (fd, socket) = (listener.0, listener.socket().unwrap());
    let mut patience = Patience::new(socket, 0);
    for n in 0..=MAX_DROPS {
        assert_eq!(patience.outlasts(1, fd, socket, 0), Ok(()), "{n}");
    }
    // A signal would not end a call that sleeps with signals held back.
    assert_eq!(patience.flags(0), MSG_DONTWAIT);
    // SAFETY: this thread gets the signal.
    unsafe { libc::raise(libc::SIGUSR2) };
    let ended = (0..MAX_DROPS).find_map(|_| patience.outlasts(1, fd, socket, 0).err());
    assert_eq!(ended, Some(EINTR));
    assert_eq!(patience.flags(0), 0);
    patience.end();
}

/// When the queue is empty, the call waits as the kernel does.
#[test]
fn a_call_waits_with_all_signals_after_a_flood() {
    let (listener, to) = Fd::listener("127.0.0.1");
    let (proxy, client) = (Proxy::new(), client());
    for _ in 0..MAX_DROPS + 1 {
        proxy.send_bare(to);
    }
    let (id, thread_id) = mpsc::channel();
    let waiting = thread::spawn(move || {
        // SAFETY: it only tells.
        id.send(unsafe { libc::gettid() }).unwrap();
        let received = listener.receive_with(0);
        let mut mask = mem::MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: the set can be written to, and is.
        let is_blocked = unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), mask.as_mut_ptr());
            libc::sigismember(mask.as_ptr(), libc::SIGTERM)
        };
        (received, is_blocked)
    });
    let status = format!("/proc/self/task/{}/status", thread_id.recv().unwrap());
    let waits = || {
        let status = std::fs::read_to_string(&status).unwrap();
        let line = |start: &str| status.lines().find(|line| line.starts_with(start));
        line("State:").is_some_and(|line| line.contains('S'))
            && line("SigBlk:").is_some_and(|line| line.ends_with("0000000000000000"))
    };
    let until = Instant::now() + Duration::from_secs(20);
    while !waits() {
        assert!(
            Instant::now() < until,
            "no call that waits for every signal"
        );
        thread::yield_now();
    }
    proxy.forward(client, b"hello", to);
    let (received, is_blocked) = waiting.join().unwrap();
    assert_eq!(received, Some((b"hello".to_vec(), client)));
    assert_eq!(is_blocked, 0);
}

#[test]
fn what_came_before_a_socket_was_connected_directly_is_judged() {
    let (listener, to) = Fd::listener("127.0.0.1");
    let proxy = Proxy::new();
    let peer = UdpSocket::bind("127.0.0.9:0").unwrap();
    let address = peer.local_addr().unwrap();
    proxy.send_bare(to);
    peer.send_to(b"before", to).unwrap();
    proxy.send_bare(to);
    assert_eq!(listener.connect(address), 0);
    peer.send_to(b"after", to).unwrap();
    let expected = |payload: &[u8]| Some((payload.to_vec(), address));
    assert_eq!(listener.receive(), expected(b"before"));
    assert_eq!(listener.receive(), expected(b"after"));
    assert_eq!(listener.receive(), None);
}

#[test]
fn a_socket_that_is_connected_directly_tells_no_more_than_was_asked_for() {
    let (listener, _) = Fd::listener("0.0.0.0");
    let told = || crate::options::get(listener.0, libc::IPPROTO_IP, libc::IP_PKTINFO);
    assert_eq!(told(), Some(1));
    assert_eq!(listener.connect("127.0.0.9:9".parse().unwrap()), 0);
    assert_eq!(told(), Some(0));
    let nobody = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as libc::sa_family_t,
        sa_data: [0; 14],
    };
    let len = size_of_val(&nobody) as libc::socklen_t;
    // SAFETY: the name can be read.
    let result = unsafe { sockets::connect(listener.0, &raw const nobody, len) };
    assert_eq!((result, told()), (0, Some(1)));
}
