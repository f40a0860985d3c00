//! The C library's own functions, found once each by `dlsym(RTLD_NEXT)`: all of them when
//! the library starts, since dlsym(3) may not be called by signal handlers; and when it is
//! first called, one that the constructor of another library calls before.
//!
//! A C library that is older than a system call has no function for it: musl, and glibc
//! before 2.35. A program may call it all the same, since it finds this library's. Then the
//! system call is made by its number.

use std::ffi::CStr;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{
    Ioctl, c_int, c_long, c_uint, c_ulong, c_void, epoll_event, fd_set, iovec, mmsghdr, msghdr,
    nfds_t, off64_t, sigset_t, size_t, sockaddr, socklen_t, ssize_t, timespec, timeval,
};

/// Stands in for a function that this C library doesn't have, and that is no system call.
unsafe extern "C-unwind" fn missing() -> c_long {
    crate::boundary::fail(libc::ENOSYS)
}

/// Where a function is, once it has been found.
struct At {
    name: &'static CStr,
    found: AtomicPtr<c_void>,
    /// What is called if there is none.
    otherwise: fn() -> *mut c_void,
}

impl At {
    const fn new(name: &'static str, otherwise: fn() -> *mut c_void) -> Self {
        let Ok(name) = CStr::from_bytes_with_nul(name.as_bytes()) else {
            panic!("the name ends with a zero");
        };
        Self {
            name,
            found: AtomicPtr::new(ptr::null_mut()),
            otherwise,
        }
    }

    #[inline]
    fn get(&self) -> *mut c_void {
        let found = self.found.load(Ordering::Relaxed);
        if found.is_null() { self.find() } else { found }
    }

    #[cold]
    fn find(&self) -> *mut c_void {
        // SAFETY: the name ends with a zero.
        let mut found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        if found.is_null() {
            found = (self.otherwise)();
        }
        self.found.store(found, Ordering::Relaxed);
        found
    }
}

/// Each function is a cancellation point if the C library's is, so it is called by
/// functions without destructors, or within [`crate::boundary::guarded`] without waiting.
macro_rules! functions {
    (@otherwise) => { missing };
    (@otherwise $function:path) => { $function };
    ($(fn $name:ident($($argument:ident: $kind:ty),* $(,)?) -> $result:ty $(, or $otherwise:path)?;)*) => {
        #[expect(non_upper_case_globals, reason = "named like the functions")]
        mod at {
            use super::*;

            $(pub(super) static $name: At = At::new(
                concat!(stringify!($name), "\0"),
                || functions!(@otherwise $($otherwise)?) as *mut c_void,
            );)*
        }

        /// Finds all functions.
        pub(crate) fn find_all() {
            $(at::$name.find();)*
        }
    $(
        #[inline]
        pub(crate) unsafe fn $name($($argument: $kind),*) -> $result {
            let found = at::$name.get();
            // SAFETY: the function of this name has this signature, and so has what is called
            // otherwise, but for `missing`, which looks at no argument.
            let function = unsafe {
                mem::transmute::<*mut c_void, unsafe extern "C-unwind" fn($($kind),*) -> $result>(
                    found,
                )
            };
            // SAFETY: the caller keeps to the function's manual.
            unsafe { function($($argument),*) }
        }
    )*};
}

functions! {
    fn socket(family: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn socketpair(family: c_int, kind: c_int, protocol: c_int, pair: *mut c_int) -> c_int;
    fn accept(fd: c_int, name: *mut sockaddr, len: *mut socklen_t) -> c_int;
    fn accept4(fd: c_int, name: *mut sockaddr, len: *mut socklen_t, flags: c_int) -> c_int;
    fn bind(fd: c_int, name: *const sockaddr, len: socklen_t) -> c_int;
    fn connect(fd: c_int, name: *const sockaddr, len: socklen_t) -> c_int;
    fn getpeername(fd: c_int, name: *mut sockaddr, len: *mut socklen_t) -> c_int;
    fn getsockname(fd: c_int, name: *mut sockaddr, len: *mut socklen_t) -> c_int;
    fn setsockopt(fd: c_int, level: c_int, option: c_int, value: *const c_void, len: socklen_t) -> c_int;
    fn getsockopt(fd: c_int, level: c_int, option: c_int, value: *mut c_void, len: *mut socklen_t) -> c_int;
    fn recv(fd: c_int, buffer: *mut c_void, len: size_t, flags: c_int) -> ssize_t;
    fn recvfrom(fd: c_int, buffer: *mut c_void, len: size_t, flags: c_int, name: *mut sockaddr, name_len: *mut socklen_t) -> ssize_t;
    fn recvmsg(fd: c_int, message: *mut msghdr, flags: c_int) -> ssize_t;
    fn recvmmsg(fd: c_int, messages: *mut mmsghdr, count: c_uint, flags: c_int, timeout: *mut timespec) -> c_int;
    fn read(fd: c_int, buffer: *mut c_void, len: size_t) -> ssize_t;
    fn readv(fd: c_int, parts: *const iovec, count: c_int) -> ssize_t;
    fn send(fd: c_int, buffer: *const c_void, len: size_t, flags: c_int) -> ssize_t;
    fn sendto(fd: c_int, buffer: *const c_void, len: size_t, flags: c_int, name: *const sockaddr, name_len: socklen_t) -> ssize_t;
    fn sendmsg(fd: c_int, message: *const msghdr, flags: c_int) -> ssize_t;
    fn sendmmsg(fd: c_int, messages: *mut mmsghdr, count: c_uint, flags: c_int) -> c_int;
    fn write(fd: c_int, buffer: *const c_void, len: size_t) -> ssize_t;
    fn writev(fd: c_int, parts: *const iovec, count: c_int) -> ssize_t;
    fn preadv2(fd: c_int, parts: *const iovec, count: c_int, offset: off64_t, flags: c_int) -> ssize_t, or by_number::preadv2;
    fn pwritev2(fd: c_int, parts: *const iovec, count: c_int, offset: off64_t, flags: c_int) -> ssize_t, or by_number::pwritev2;
    fn __read_chk(fd: c_int, buffer: *mut c_void, len: size_t, size: size_t) -> ssize_t;
    fn __recv_chk(fd: c_int, buffer: *mut c_void, len: size_t, size: size_t, flags: c_int) -> ssize_t;
    fn __recvfrom_chk(fd: c_int, buffer: *mut c_void, len: size_t, size: size_t, flags: c_int, name: *mut sockaddr, name_len: *mut socklen_t) -> ssize_t;
    fn dup(fd: c_int) -> c_int;
    fn dup2(fd: c_int, to: c_int) -> c_int;
    fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int;
    fn fcntl(fd: c_int, command: c_int, argument: c_ulong) -> c_int;
    fn fcntl64(fd: c_int, command: c_int, argument: c_ulong) -> c_int;
    fn ioctl(fd: c_int, request: Ioctl, argument: c_ulong) -> c_int;
    fn close(fd: c_int) -> c_int;
    fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int, or by_number::close_range;
    fn closefrom(first: c_int) -> c_void_result, or by_number::closefrom;
    fn poll(fds: *mut libc::pollfd, count: nfds_t, timeout: c_int) -> c_int;
    fn ppoll(fds: *mut libc::pollfd, count: nfds_t, timeout: *const timespec, mask: *const sigset_t) -> c_int;
    fn __poll_chk(fds: *mut libc::pollfd, count: nfds_t, timeout: c_int, fds_len: size_t) -> c_int;
    fn __ppoll_chk(fds: *mut libc::pollfd, count: nfds_t, timeout: *const timespec, mask: *const sigset_t, fds_len: size_t) -> c_int;
    fn select(count: c_int, read: *mut fd_set, write: *mut fd_set, except: *mut fd_set, timeout: *mut timeval) -> c_int;
    fn pselect(count: c_int, read: *mut fd_set, write: *mut fd_set, except: *mut fd_set, timeout: *const timespec, mask: *const sigset_t) -> c_int;
    fn epoll_ctl(epoll: c_int, operation: c_int, fd: c_int, event: *mut epoll_event) -> c_int;
    fn epoll_wait(epoll: c_int, events: *mut epoll_event, count: c_int, timeout: c_int) -> c_int;
    fn epoll_pwait(epoll: c_int, events: *mut epoll_event, count: c_int, timeout: c_int, mask: *const sigset_t) -> c_int;
    fn epoll_pwait2(epoll: c_int, events: *mut epoll_event, count: c_int, timeout: *const timespec, mask: *const sigset_t) -> c_int, or by_number::epoll_pwait2;
    fn pthread_setcanceltype(kind: c_int, before: *mut c_int) -> c_int;
    fn syscall(number: c_long, a: c_long, b: c_long, c: c_long, d: c_long, e: c_long, f: c_long) -> c_long;
}

#[expect(
    non_camel_case_types,
    reason = "what the C library's closefrom returns"
)]
type c_void_result = ();

/// Functions that are system calls, for C libraries without them. None is a cancellation point.
mod by_number {
    use super::*;

    pub(super) unsafe extern "C-unwind" fn preadv2(
        fd: c_int,
        parts: *const iovec,
        count: c_int,
        offset: off64_t,
        flags: c_int,
    ) -> ssize_t {
        // SAFETY: as the caller says.
        unsafe { at_offset(libc::SYS_preadv2, fd, parts, count, offset, flags) }
    }

    pub(super) unsafe extern "C-unwind" fn pwritev2(
        fd: c_int,
        parts: *const iovec,
        count: c_int,
        offset: off64_t,
        flags: c_int,
    ) -> ssize_t {
        // SAFETY: as the caller says.
        unsafe { at_offset(libc::SYS_pwritev2, fd, parts, count, offset, flags) }
    }

    unsafe fn at_offset(
        number: c_long,
        fd: c_int,
        parts: *const iovec,
        count: c_int,
        offset: off64_t,
        flags: c_int,
    ) -> ssize_t {
        let (parts, high) = (parts.expose_provenance() as c_long, offset >> 32);
        // The kernel takes the offset's upper half alone where a register has no more, and
        // looks at the whole one otherwise.
        // SAFETY: as the caller says.
        let moved = unsafe {
            syscall(
                number,
                fd.into(),
                parts,
                count.into(),
                offset,
                high,
                flags.into(),
            )
        };
        moved as ssize_t
    }

    pub(super) unsafe extern "C-unwind" fn close_range(
        first: c_uint,
        last: c_uint,
        flags: c_int,
    ) -> c_int {
        let (first, last) = (c_long::from(first), c_long::from(last));
        // SAFETY: it takes no pointer.
        unsafe { syscall(libc::SYS_close_range, first, last, flags.into(), 0, 0, 0) as c_int }
    }

    /// As glibc's, which can't fail: before Linux 5.9, it closes what /proc lists.
    pub(super) unsafe extern "C-unwind" fn closefrom(first: c_int) {
        let first = first.max(0);
        // SAFETY: it takes no pointer.
        if unsafe { close_range(first.cast_unsigned(), c_uint::MAX, 0) } == 0 {
            return;
        }
        // Listed before the first is closed: the list itself has a descriptor.
        for fd in crate::lifecycle::open_descriptors() {
            if fd >= first {
                // SAFETY: the program has asked for it.
                unsafe { close(fd) };
            }
        }
    }

    pub(super) unsafe extern "C-unwind" fn epoll_pwait2(
        epoll: c_int,
        events: *mut epoll_event,
        count: c_int,
        timeout: *const timespec,
        mask: *const sigset_t,
    ) -> c_int {
        /// Bytes of a set of signals in the kernel, which is shorter than the C library's.
        const MASK: c_long = 8;
        let pointers = [
            events.expose_provenance() as c_long,
            timeout.expose_provenance() as c_long,
            mask.expose_provenance() as c_long,
        ];
        let [events, timeout, mask] = pointers;
        let number = libc::SYS_epoll_pwait2;
        // SAFETY: as the caller says.
        unsafe {
            syscall(
                number,
                epoll.into(),
                events,
                count.into(),
                timeout,
                mask,
                MASK,
            ) as c_int
        }
    }
}
