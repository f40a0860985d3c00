use std::io;
use std::ptr;
use std::thread;
use std::time::Duration;

use super::*;
use crate::calls::{receiving, sockets};
use crate::socket::{Flag, Held};
use crate::testing::{Fd, Proxy, client, in_a_child, status};

fn is_taken_over(fd: c_int) -> bool {
    registry::get(fd).is_some()
}

/// Above the numbers that other tests get.
fn high(listener: &Fd, from: c_ulong) -> c_int {
    // SAFETY: it takes no pointer.
    let high = unsafe { fcntl(listener.0, libc::F_DUPFD_CLOEXEC, from) };
    assert!(high >= from as c_int);
    high
}

#[test]
fn duplicates_share_a_socket_until_the_last_is_closed() {
    let client = client();
    let (listener, _) = Fd::listener("127.0.0.1");
    let socket = listener.socket().unwrap();
    // SAFETY: these take no pointers; the numbers are free or this test's.
    unsafe {
        let first = dup(listener.0);
        let second = high(&listener, 300);
        assert_eq!(dup2(first, second), second);
        assert_eq!(dup2(second, second), second);
        assert_eq!(dup3(second, first, libc::O_CLOEXEC), first);
        for fd in [first, second] {
            assert!(registry::get(fd).is_some_and(|found| ptr::eq(found, socket)));
        }
        socket.set_peer(Some(client));
        drop(listener);
        assert_eq!(close(first), 0);
        assert!(!is_taken_over(first));
        assert_eq!(socket.peer(), Some(client));
        assert_eq!(close(second), 0);
        assert!(!is_taken_over(second));
    }
}

#[test]
fn a_descriptor_that_is_replaced_is_let_go() {
    let (listener, _) = Fd::listener("127.0.0.1");
    let other = Fd::udp(libc::AF_INET);
    // SAFETY: the numbers are this test's.
    unsafe {
        assert_eq!(dup2(other.0, listener.0), listener.0);
    }
    assert!(!listener.is_taken_over());
}

#[test]
fn numbers_that_were_closed_unseen_are_let_go() {
    let (listener, _) = Fd::listener("127.0.0.1");
    let number = high(&listener, 400);
    // Another thread may be given the number only below 400.
    // SAFETY: the numbers are this test's, the buffers can be read and written.
    unsafe {
        let mut pipe = [0; 2];
        assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
        assert_eq!(real::dup2(pipe[0], number), number);
        assert_eq!(real::write(pipe[1], c"x".as_ptr().cast(), 1), 1);
        let mut byte = 0_u8;
        assert!(is_taken_over(number));
        assert_eq!(receiving::read(number, (&raw mut byte).cast(), 1), 1);
        assert_eq!(byte, b'x');
        assert!(!is_taken_over(number));
        for fd in [pipe[0], pipe[1], number] {
            close(fd);
        }
    }
}

#[test]
fn a_number_that_a_new_socket_gets_is_let_go() {
    let number = in_a_child(|| {
        let (listener, _) = Fd::listener("127.0.0.1");
        // SAFETY: the number is this test's, in a process with one thread.
        unsafe {
            real::close(listener.0);
            let new = sockets::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
            new == listener.0 && !listener.is_taken_over()
        }
    });
    assert_eq!(number, 0);
}

#[test]
fn numbers_that_a_pair_of_sockets_gets_are_let_go() {
    let number = in_a_child(|| {
        let (listener, _) = Fd::listener("127.0.0.1");
        let mut pair = [0; 2];
        // SAFETY: the number is this test's, in a process with one thread.
        unsafe {
            real::close(listener.0);
            let kind = libc::SOCK_STREAM;
            let result = sockets::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr());
            result == 0 && pair.contains(&listener.0) && !listener.is_taken_over()
        }
    });
    assert_eq!(number, 0);
}

#[test]
fn close_range_lets_go_what_it_closes() {
    let (listener, _) = Fd::listener("127.0.0.1");
    let first = high(&listener, 500);
    let last = high(&listener, 510);
    let range = (first as c_uint, last as c_uint);
    // SAFETY: nobody else has numbers of this range.
    unsafe {
        assert_eq!(close_range(range.1, range.0, 0), -1);
        assert_eq!(close_range(range.0, range.1, 1 << 20), -1);
        assert_eq!(close_range(range.0, range.1, CLOEXEC), 0);
        assert!(is_taken_over(first) && is_taken_over(last));
        assert_eq!(close_range(range.0, range.1, 0), 0);
        assert!(!is_taken_over(first) && !is_taken_over(last));
    }
    assert!(listener.is_taken_over());
}

#[test]
fn closefrom_lets_go_what_it_closes() {
    let (listener, _) = Fd::listener("127.0.0.1");
    let closed = in_a_child(|| {
        let high = high(&listener, 600);
        // SAFETY: the child uses no descriptor afterwards.
        unsafe { closefrom(600) };
        listener.is_taken_over() && !is_taken_over(high)
    });
    assert_eq!(closed, 0);
}

#[test]
fn a_forked_child_has_a_registry_of_its_own() {
    let (listener, _) = Fd::listener("127.0.0.1");
    let closed = in_a_child(|| {
        // SAFETY: the number is this test's.
        let result = unsafe { close(listener.0) };
        result == 0 && !listener.is_taken_over()
    });
    assert_eq!(closed, 0);
    assert!(listener.is_taken_over());
    assert!(!listener.socket().unwrap().is(Flag::Inherited));
}

#[test]
fn a_child_of_raw_clone_has_a_registry_of_its_own() {
    let (listener, _) = Fd::listener("127.0.0.1");
    // SAFETY: as fork(2); the child calls functions of this library, and ends.
    let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    if child == 0 {
        // SAFETY: the number is this test's; the child ends.
        unsafe {
            close(listener.0);
            libc::_exit(c_int::from(listener.is_taken_over()));
        }
    }
    assert_eq!(status(child as c_int), 0);
    assert!(listener.is_taken_over());
}

#[test]
fn what_is_held_stays_with_the_parent() {
    let client = client();
    let (listener, _) = Fd::listener("127.0.0.1");
    let socket = listener.socket().unwrap();
    let held = Held {
        bytes: vec![1],
        peer: client,
        control: Vec::new(),
        flags: 0,
    };
    assert!(socket.held.put(Box::new(held)));
    assert_eq!(in_a_child(|| !socket.is_holding()), 0);
    assert!(socket.is_holding());
}

#[test]
fn locks_of_other_threads_are_free_in_a_child() {
    let (listener, _) = Fd::listener("127.0.0.1");
    let socket = listener.socket().unwrap();
    let epolls = socket.epolls.try_lock().unwrap();
    let free = in_a_child(|| socket.epolls.try_lock().is_ok());
    assert_eq!(free, 0);
    drop(epolls);
}

/// Between vfork and exec, a child has its own descriptors, and the parent's memory.
#[test]
fn a_vforked_child_changes_nothing() {
    extern "C" fn child(listener: *mut libc::c_void) -> c_int {
        let listener = listener.addr() as c_int;
        // SAFETY: the child has descriptors of its own.
        unsafe {
            let other = libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY);
            c_int::from(dup2(other, listener) != listener || close(listener) != 0)
        }
    }
    let (listener, _) = Fd::listener("127.0.0.1");
    let mut stack = vec![0_u128; 64 * 1024];
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let argument = ptr::without_provenance_mut(listener.0 as usize);
    // SAFETY: the stack is the child's until it ends, for which this thread waits.
    let child = unsafe { libc::clone(child, stack.as_mut_ptr_range().end.cast(), flags, argument) };
    assert_eq!(status(child), 0);
    assert!(listener.is_taken_over());
}

#[test]
fn a_socket_may_be_closed_while_another_thread_receives() {
    let client = client();
    let proxy = Proxy::new();
    for _ in 0..20 {
        let (listener, local) = Fd::listener("127.0.0.1");
        let number = high(&listener, 800);
        drop(listener);
        thread::scope(|scope| {
            let received = scope.spawn(move || {
                let mut bytes = [0_u8; 100];
                // SAFETY: the bytes can be written.
                unsafe { receiving::recv(number, bytes.as_mut_ptr().cast(), bytes.len(), 0) }
            });
            thread::sleep(Duration::from_millis(1));
            // SAFETY: the number is this test's.
            assert_eq!(unsafe { close(number) }, 0);
            assert!(!is_taken_over(number));
            // If the thread was in the call already, the datagram ends it.
            proxy.forward(client, b"late", local);
            let received = received.join().unwrap();
            assert!(received == 4 || received == -1, "{received}");
        });
    }
}

#[test]
fn whether_a_socket_waits_is_known() {
    let (listener, _) = Fd::listener("127.0.0.1");
    let socket = listener.socket().unwrap();
    let waits = || !socket.is(Flag::NonBlocking);
    assert!(waits());
    let mut on: c_int = 1;
    // SAFETY: the number can be read.
    unsafe {
        let flags = fcntl(listener.0, libc::F_GETFL, 0) as c_ulong;
        let nonblock = libc::O_NONBLOCK as c_ulong;
        assert_eq!(fcntl(listener.0, libc::F_SETFL, flags | nonblock), 0);
        assert!(!waits());
        assert_eq!(fcntl64(listener.0, libc::F_SETFL, flags), 0);
        assert!(waits());
        let request = libc::FIONBIO as c_ulong;
        assert_eq!(
            ioctl(
                listener.0,
                request,
                (&raw mut on).expose_provenance() as c_ulong
            ),
            0
        );
        assert!(!waits());
    }
}

#[test]
fn fionread_tells_the_length_of_the_next_payload() {
    let client = client();
    let (listener, local) = Fd::listener("127.0.0.1");
    let proxy = Proxy::new();
    let mut len: c_int = -1;
    let at = (&raw mut len).expose_provenance() as c_ulong;
    // SAFETY: the number can be written.
    let ask = || unsafe {
        assert_eq!(ioctl(listener.0, libc::FIONREAD as c_ulong, at), 0);
        (&raw const len).read_volatile()
    };
    assert_eq!(ask(), 0);
    proxy.send_bare(local);
    proxy.forward(client, b"payload", local);
    assert_eq!(ask(), 7);
    assert_eq!(listener.receive(), Some((b"payload".to_vec(), client)));
    assert_eq!(ask(), 0);
}

#[test]
fn errors_are_those_of_the_real_functions() {
    crate::testing::start();
    // SAFETY: no such descriptors are open.
    unsafe {
        for result in [
            close(-1),
            dup(-1),
            dup2(-1, 700),
            fcntl(-1, libc::F_DUPFD, 0),
        ] {
            assert_eq!(result, -1);
            assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EBADF));
        }
    }
}
