use std::thread;
use std::time::{Duration, Instant};

use ppv2_lab::address;

use super::*;
use crate::boundary::errno;
use crate::calls::descriptors;
use crate::testing::{Fd, Proxy, client};

/// A call that waits this long has the time to find out that there is nothing.
const SHORT: c_int = 30;
const LONG: c_int = 20_000;

fn poll_one(fd: &Fd, events: i16, timeout: c_int) -> (c_int, i16) {
    let mut polled = pollfd {
        fd: fd.0,
        events,
        revents: -1,
    };
    // SAFETY: there is one element.
    (unsafe { poll(&raw mut polled, 1, timeout) }, polled.revents)
}

fn ppoll_one(fd: &Fd, millis: i64) -> c_int {
    let mut polled = pollfd {
        fd: fd.0,
        events: libc::POLLIN,
        revents: -1,
    };
    let timeout = timespec {
        tv_sec: millis / 1000,
        tv_nsec: millis % 1000 * 1_000_000,
    };
    // SAFETY: there is one element.
    unsafe { ppoll(&raw mut polled, 1, &raw const timeout, ptr::null()) }
}

fn select_read(fd: c_int, millis: i64) -> (c_int, bool, timeval) {
    let mut words = vec![0 as c_ulong; fd as usize / 64 + 1];
    words[fd as usize / 64] = 1 << (fd % 64);
    let mut timeout = timeval {
        tv_sec: millis / 1000,
        tv_usec: millis % 1000 * 1000,
    };
    let (none, read) = (ptr::null_mut(), words.as_mut_ptr().cast());
    // SAFETY: the set is as long as it must be.
    let ready = unsafe { select(fd + 1, read, none, none, &raw mut timeout) };
    (ready, words[fd as usize / 64] != 0, timeout)
}

struct Epoll(Fd);

impl Epoll {
    fn with(fd: &Fd, events: c_int, data: u64) -> Self {
        // SAFETY: it takes no pointer.
        let epoll = Self(Fd(unsafe { libc::epoll_create1(0) }));
        epoll.control(libc::EPOLL_CTL_ADD, fd, events, data);
        epoll
    }

    fn control(&self, operation: c_int, fd: &Fd, events: c_int, data: u64) {
        let mut event = epoll_event {
            events: events as u32,
            u64: data,
        };
        // SAFETY: the event can be read.
        let result = unsafe { epoll_ctl(self.0.0, operation, fd.0, &raw mut event) };
        assert_eq!(result, 0);
    }

    fn wait(&self, timeout: c_int) -> Vec<u64> {
        let mut events = [epoll_event { events: 0, u64: 0 }; 4];
        // SAFETY: there is room for the events.
        let count = unsafe { epoll_wait(self.0.0, events.as_mut_ptr(), 4, timeout) };
        events[..usize::try_from(count).unwrap()]
            .iter()
            .map(|event| event.u64)
            .collect()
    }
}

#[test]
fn what_must_be_dropped_makes_no_socket_readable() {
    let client = client();
    let (listener, local) = Fd::listener("127.0.0.1");
    let proxy = Proxy::new();
    let epoll = Epoll::with(&listener, libc::EPOLLIN, 5);
    let bare = || {
        for _ in 0..3 {
            proxy.send_bare(local);
        }
    };
    bare();
    assert_eq!(poll_one(&listener, libc::POLLIN, SHORT), (0, 0));
    bare();
    assert_eq!(poll_one(&listener, libc::POLLIN, 0), (0, 0));
    bare();
    assert_eq!(
        poll_one(&listener, libc::POLLIN | libc::POLLOUT, LONG),
        (1, libc::POLLOUT)
    );
    bare();
    assert_eq!(ppoll_one(&listener, SHORT.into()), 0);
    bare();
    let (ready, is_in, left) = select_read(listener.0, SHORT.into());
    assert_eq!((ready, is_in, left.tv_sec, left.tv_usec), (0, false, 0, 0));
    bare();
    assert!(epoll.wait(SHORT).is_empty());
    bare();
    assert!(epoll.wait(0).is_empty());
    bare();
    proxy.forward(client, b"x", local);
    assert_eq!(poll_one(&listener, libc::POLLIN, LONG), (1, libc::POLLIN));
    assert_eq!(ppoll_one(&listener, LONG.into()), 1);
    assert_eq!(epoll.wait(LONG), [5]);
    let (ready, is_in, left) = select_read(listener.0, LONG.into());
    assert_eq!((ready, is_in), (1, true));
    assert!(left.tv_sec > 0 || left.tv_usec > 0);
    assert_eq!(listener.receive(), Some((b"x".to_vec(), client)));
}

#[test]
fn calls_wait_on_after_drops() {
    let client = client();
    let (listener, local) = Fd::listener("127.0.0.1");
    let epoll = Epoll::with(&listener, libc::EPOLLIN, 5);
    let number = listener.0;
    let waits: [&dyn Fn() -> bool; 4] = [
        &|| poll_one(&listener, libc::POLLIN, -1) == (1, libc::POLLIN),
        &|| ppoll_one(&listener, LONG.into()) == 1,
        &|| select_read(number, LONG.into()).0 == 1,
        &|| epoll.wait(-1) == [5],
    ];
    for wait in waits {
        thread::scope(|scope| {
            scope.spawn(|| {
                let proxy = Proxy::new();
                for _ in 0..5 {
                    thread::sleep(Duration::from_millis(2));
                    proxy.send_bare(local);
                }
                proxy.forward(client, b"x", local);
            });
            assert!(wait());
        });
        assert_eq!(listener.receive(), Some((b"x".to_vec(), client)));
    }
}

#[test]
fn timeouts_are_not_cut_short_by_drops() {
    let (listener, local) = Fd::listener("127.0.0.1");
    let proxy = Proxy::new();
    proxy.send_bare(local);
    let begin = Instant::now();
    assert_eq!(poll_one(&listener, libc::POLLIN, SHORT).0, 0);
    assert!(begin.elapsed() >= Duration::from_millis(SHORT as u64));
}

#[test]
fn sockets_that_do_not_wait_are_reported_as_the_kernel_says() {
    let (listener, local) = Fd::listener("127.0.0.1");
    // SAFETY: it takes no pointer.
    unsafe { descriptors::fcntl(listener.0, libc::F_SETFL, libc::O_NONBLOCK as c_ulong) };
    Proxy::new().send_bare(local);
    assert_eq!(poll_one(&listener, libc::POLLIN, LONG), (1, libc::POLLIN));
    assert_eq!((listener.receive(), errno()), (None, libc::EAGAIN));
    assert_eq!(poll_one(&listener, libc::POLLIN, 0), (0, 0));
}

#[test]
fn sets_may_be_larger_than_usual() {
    let client = client();
    let (listener, local) = Fd::listener("127.0.0.1");
    let proxy = Proxy::new();
    let (mut old, mut new) = (
        libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        },
        0,
    );
    // SAFETY: the limits can be written and read; the number is this test's.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut old);
        if old.rlim_cur < 4096 {
            let more = libc::rlimit {
                rlim_cur: old.rlim_max.min(4096),
                ..old
            };
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const more);
        }
        new = new.max(descriptors::fcntl(listener.0, libc::F_DUPFD, 2000));
    }
    assert!(new >= 2000);
    let high = Fd(new);
    proxy.send_bare(local);
    assert_eq!(select_read(high.0, SHORT.into()).0, 0);
    proxy.forward(client, b"x", local);
    let (ready, is_in, _) = select_read(high.0, LONG.into());
    assert_eq!((ready, is_in), (1, true));
}

#[test]
fn other_sets_are_as_the_program_passed_them() {
    let client = client();
    let (listener, local) = Fd::listener("127.0.0.1");
    let proxy = Proxy::new();
    let mut pipe = [0; 2];
    // SAFETY: there is room for two numbers.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    let (quiet, _write_end) = (Fd(pipe[0]), Fd(pipe[1]));
    proxy.send_bare(local);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(10));
            proxy.forward(client, b"x", local);
        });
        let count = listener.0.max(quiet.0) + 1;
        // SAFETY: zeros are an empty set; the sets are the test's.
        unsafe {
            let mut read: fd_set = std::mem::zeroed();
            let mut except: fd_set = std::mem::zeroed();
            libc::FD_SET(listener.0, &raw mut read);
            libc::FD_SET(quiet.0, &raw mut read);
            libc::FD_SET(quiet.0, &raw mut except);
            let (none, never) = (ptr::null_mut(), ptr::null());
            let ready = pselect(
                count,
                &raw mut read,
                none,
                &raw mut except,
                never,
                ptr::null(),
            );
            assert_eq!(ready, 1);
            assert!(libc::FD_ISSET(listener.0, &raw const read));
            assert!(!libc::FD_ISSET(quiet.0, &raw const read));
        }
    });
}

#[test]
fn a_registration_for_once_outlives_a_drop() {
    let client = client();
    let (listener, local) = Fd::listener("127.0.0.1");
    let proxy = Proxy::new();
    let epoll = Epoll::with(&listener, libc::EPOLLIN | libc::EPOLLONESHOT, 6);
    proxy.send_bare(local);
    assert!(epoll.wait(SHORT).is_empty());
    proxy.forward(client, b"x", local);
    assert_eq!(epoll.wait(LONG), [6]);
    assert!(epoll.wait(0).is_empty());
}

#[test]
fn an_edge_is_reported_again_after_many_drops() {
    let client = client();
    let (listener, local) = Fd::listener("127.0.0.1");
    // SAFETY: it takes no pointer.
    unsafe { descriptors::fcntl(listener.0, libc::F_SETFL, libc::O_NONBLOCK as c_ulong) };
    let proxy = Proxy::new();
    let epoll = Epoll::with(&listener, libc::EPOLLIN | libc::EPOLLET, 7);
    for _ in 0..150 {
        proxy.send_bare(local);
    }
    proxy.forward(client, b"x", local);
    let mut edges = 0;
    let received = loop {
        assert_eq!(epoll.wait(LONG), [7]);
        edges += 1;
        if let Some(received) = listener.receive() {
            break received;
        }
    };
    assert_eq!(received, (b"x".to_vec(), client));
    assert!(edges > 1);
}

#[test]
fn events_of_others_with_the_same_data_are_reported() {
    let (listener, _) = Fd::listener("127.0.0.1");
    let mut pipe = [0; 2];
    // SAFETY: there is room for two numbers.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    let (end, write_end) = (Fd(pipe[0]), Fd(pipe[1]));
    let epoll = Epoll::with(&listener, libc::EPOLLIN, 8);
    epoll.control(libc::EPOLL_CTL_ADD, &end, libc::EPOLLIN, 8);
    // SAFETY: one byte can be read.
    let written = unsafe { real::write(write_end.0, c"x".as_ptr().cast(), 1) };
    assert_eq!(written, 1);
    assert_eq!(epoll.wait(LONG), [8]);
}

#[test]
fn a_closed_epoll_instance_is_forgotten() {
    let (listener, _) = Fd::listener("127.0.0.1");
    let socket = listener.socket().unwrap();
    let epoll = Epoll::with(&listener, libc::EPOLLIN, 9);
    assert_eq!(socket.epolls.try_lock().unwrap().len(), 1);
    epoll.control(libc::EPOLL_CTL_MOD, &listener, libc::EPOLLIN, 10);
    let data = socket.epolls.try_lock().unwrap()[0].event.u64;
    assert_eq!(data, 10);
    drop(epoll);
    assert_eq!(socket.epolls.try_lock().unwrap().len(), 0);
}

#[test]
fn a_registration_from_before_the_bind_is_known() {
    let early = Fd::udp(libc::AF_INET);
    let epoll = Epoll::with(&early, libc::EPOLLIN, 11);
    let local = address("127.0.0.1");
    assert_eq!(early.bind(local), 0);
    Proxy::new().send_bare(local);
    assert!(epoll.wait(SHORT).is_empty());
}

#[test]
fn bad_arguments_fail_as_in_the_kernel() {
    let (listener, _) = Fd::listener("127.0.0.1");
    let mut polled = pollfd {
        fd: listener.0,
        events: libc::POLLIN,
        revents: 0,
    };
    let bad = timespec {
        tv_sec: 0,
        tv_nsec: 2_000_000_000,
    };
    // SAFETY: there is one element.
    let result = unsafe { ppoll(&raw mut polled, 1, &raw const bad, ptr::null()) };
    assert_eq!((result, errno()), (-1, libc::EINVAL));
    // SAFETY: there are no elements.
    let result = unsafe { poll(ptr::null_mut(), 1, 0) };
    assert_eq!((result, errno()), (-1, libc::EFAULT));
    let (ready, _, _) = select_read(listener.0, -1000);
    assert_eq!((ready, errno()), (-1, libc::EINVAL));
}
