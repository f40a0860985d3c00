//! For unit tests: the library as it is in a program, whose calls are functions here.

use std::net::{SocketAddr, UdpSocket};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use libc::{c_int, sockaddr, sockaddr_storage, socklen_t};

use crate::calls::sockets;
use crate::settings::{self, Settings};
use crate::socket::Socket;
use crate::{lifecycle, names, real, registry, table};

pub(crate) fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A client that no other test has: tests share the table. A child process would get one that
/// its parent gives to another test.
pub(crate) fn client() -> SocketAddr {
    static LAST: AtomicU16 = AtomicU16::new(1024);
    let port = LAST.fetch_add(1, Ordering::Relaxed);
    SocketAddr::new([203, 0, 113, 7].into(), port)
}

/// Trusts proxies at 127.0.0.1 and ::1, and takes over all sockets with a port.
pub(crate) fn start() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        real::find_all();
        let variables = [
            ("PPV2_TRUSTED", "127.0.0.1,::1"),
            ("PPV2_PEERS", "127.0.0.9"),
            ("PPV2_NEW_SOCKETS", "answer"),
        ];
        let settings = settings::set(Settings::of(&variables).unwrap());
        table::start(settings, None).unwrap();
        lifecycle::own();
    });
}

/// A descriptor of the program's, which is closed when it is dropped.
pub(crate) struct Fd(pub(crate) c_int);

impl Fd {
    pub(crate) fn udp(family: c_int) -> Self {
        start();
        // SAFETY: it takes no pointer.
        let fd = unsafe { sockets::socket(family, libc::SOCK_DGRAM, 0) };
        assert_ne!(fd, -1);
        Self(fd)
    }

    /// Bound to an address with a port that nobody has, and taken over.
    pub(crate) fn listener(ip: &str) -> (Self, SocketAddr) {
        let local = ppv2_lab::address(ip);
        let listener = Self::udp(family_of(local));
        assert_eq!(listener.bind(local), 0);
        assert!(listener.is_taken_over());
        (listener, local)
    }

    pub(crate) fn bind(&self, address: SocketAddr) -> c_int {
        let family = family_of(address);
        let (name, len) = names::written(address, family).unwrap();
        // SAFETY: the name can be read.
        unsafe { sockets::bind(self.0, ptr::from_ref(&name).cast(), len) }
    }

    pub(crate) fn connect(&self, to: SocketAddr) -> c_int {
        let family = family_of(to);
        let (name, len) = names::written(to, family).unwrap();
        // SAFETY: the name can be read.
        unsafe { sockets::connect(self.0, ptr::from_ref(&name).cast(), len) }
    }

    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        name_of(|name, len| {
            // SAFETY: the name can be written.
            unsafe { sockets::getpeername(self.0, name, len) }
        })
    }

    /// What the kernel says.
    pub(crate) fn kernel_peer(&self) -> Option<SocketAddr> {
        name_of(|name, len| {
            // SAFETY: the name can be written.
            unsafe { real::getpeername(self.0, name, len) }
        })
    }

    pub(crate) fn is_taken_over(&self) -> bool {
        self.socket().is_some()
    }

    pub(crate) fn socket(&self) -> Option<&'static Socket> {
        registry::get(self.0)
    }

    /// The program's payload and the client, without waiting.
    pub(crate) fn receive(&self) -> Option<(Vec<u8>, SocketAddr)> {
        self.receive_with(libc::MSG_DONTWAIT)
    }

    pub(crate) fn receive_with(&self, flags: c_int) -> Option<(Vec<u8>, SocketAddr)> {
        let mut bytes = vec![0; 100];
        let mut received = -1;
        let client = name_of(|name, len| {
            let (at, room) = (bytes.as_mut_ptr().cast(), bytes.len());
            // SAFETY: bytes and name can be written.
            received =
                unsafe { crate::calls::receiving::recvfrom(self.0, at, room, flags, name, len) };
            c_int::from(received >= 0) - 1
        })?;
        bytes.truncate(received as usize);
        Some((bytes, client))
    }

    /// `None` as the address: send(2).
    pub(crate) fn send(&self, payload: &[u8], to: Option<SocketAddr>) -> isize {
        let name = to.map(|to| names::written(to, family_of(to)).unwrap());
        let (name, len) = name.as_ref().map_or((ptr::null(), 0), |(name, len)| {
            (ptr::from_ref(name).cast(), *len)
        });
        let at = payload.as_ptr().cast();
        // SAFETY: payload and name can be read.
        unsafe { crate::calls::sending::sendto(self.0, at, payload.len(), 0, name, len) }
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: it is the test's own.
        unsafe { crate::calls::descriptors::close(self.0) };
    }
}

fn family_of(address: SocketAddr) -> c_int {
    if address.is_ipv6() {
        libc::AF_INET6
    } else {
        libc::AF_INET
    }
}

fn name_of(ask: impl FnOnce(*mut sockaddr, *mut socklen_t) -> c_int) -> Option<SocketAddr> {
    // SAFETY: zeros are a valid value.
    let mut name: sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut len = size_of::<sockaddr_storage>() as socklen_t;
    if ask((&raw mut name).cast(), &raw mut len) != 0 {
        return None;
    }
    // SAFETY: the name has been written.
    unsafe { names::read(ptr::from_ref(&name).cast(), len) }
}

/// A proxy, with a port for one client or more.
pub(crate) struct Proxy(pub(crate) UdpSocket);

impl Proxy {
    pub(crate) fn new() -> Self {
        Self::at("127.0.0.1")
    }

    pub(crate) fn at(ip: &str) -> Self {
        let socket = UdpSocket::bind((ip, 0)).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Self(socket)
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    pub(crate) fn forward(&self, client: SocketAddr, payload: &[u8], to: SocketAddr) {
        let to = reachable(to);
        let mut header = [0; ppv2::MAX_UDP_HEADER_LEN];
        let header = ppv2::encode_udp(client, to, &mut header).unwrap();
        self.0.send_to(&[header, payload].concat(), to).unwrap();
    }

    /// What must be dropped.
    pub(crate) fn send_bare(&self, to: SocketAddr) {
        self.0.send_to(b"bare", reachable(to)).unwrap();
    }

    pub(crate) fn receive(&self) -> (Vec<u8>, SocketAddr) {
        let mut bytes = vec![0; 1000];
        let (len, from) = self.0.recv_from(&mut bytes).unwrap();
        bytes.truncate(len);
        (bytes, from)
    }

    /// Has the listener know a client.
    pub(crate) fn introduce(&self, client: SocketAddr, listener: &Fd, to: SocketAddr) {
        self.forward(client, b"first", to);
        let (payload, from) = listener.receive_with(0).unwrap();
        assert_eq!((&payload[..], from), (&b"first"[..], client));
    }
}

/// An address of a listener that is bound to all.
fn reachable(to: SocketAddr) -> SocketAddr {
    match to.ip() {
        ip if ip.is_unspecified() => SocketAddr::new([127, 0, 0, 1].into(), to.port()),
        _ => to,
    }
}

/// The status that a forked process ends with: 0 if `work` returns true there.
pub(crate) fn in_a_child(work: impl FnOnce() -> bool) -> c_int {
    // Another thread that is at it would never be done with it in the child.
    start();
    // SAFETY: the child calls functions of this library, and ends.
    match unsafe { libc::fork() } {
        0 => {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            // SAFETY: it only ends the process.
            unsafe { libc::_exit(c_int::from(!done.unwrap_or(false))) }
        }
        child => status(child),
    }
}

pub(crate) fn status(child: c_int) -> c_int {
    assert!(child > 0);
    let mut status = 0;
    // SAFETY: the status can be written to.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    status
}
