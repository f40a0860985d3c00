//! What is known of a socket that is taken over. Descriptors that `dup` made share it;
//! after a fork, each process has its own.

use std::hint;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use libc::{c_int, epoll_event};

use crate::table::Endpoint;
use crate::try_lock::TryLock;

/// All fields can be read and written at any time: a thread may still be in a call on a
/// descriptor that another has closed, as careless programs do.
#[derive(Debug)]
pub(crate) struct Socket {
    /// The descriptors of this process that refer to it.
    descriptors: AtomicU32,
    family: AtomicI32,
    endpoint: AtomicU32,
    flags: AtomicU32,
    /// The program's UDP_SEGMENT, in bytes; 0: none.
    segment: AtomicU32,
    peer: AtomicAddr,
    /// What the kernel has connected it to for the sake of `peer`: the proxy's port that
    /// speaks for the client.
    kernel_peer: AtomicAddr,
    /// Datagrams that were received while those that must be dropped were discarded. The next
    /// calls that receive return them.
    pub(crate) held: HeldDatagrams,
    /// Where the program waits for this socket.
    pub(crate) epolls: TryLock<Vec<Registration>>,
}

/// A datagram as the kernel delivered it, with its header.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) bytes: Vec<u8>,
    pub(crate) peer: SocketAddr,
    /// All control data, as recvmsg(2) returned it.
    pub(crate) control: Vec<u8>,
    pub(crate) flags: c_int,
}

/// A few datagrams. Putting in and taking out needs no lock, so that neither another thread,
/// nor a signal handler that leaves by longjmp(3), can be in the way.
///
/// At most as many are there as threads receive in place of dropped datagrams at a time, and
/// have not called again: what has no place is dropped.
#[derive(Debug)]
pub(crate) struct HeldDatagrams {
    places: [AtomicPtr<Held>; 16],
    /// How many places are taken, or one more for a moment. It is one cache line to look at.
    taken: AtomicU32,
}

impl HeldDatagrams {
    const fn new() -> Self {
        Self {
            places: [const { AtomicPtr::new(ptr::null_mut()) }; 16],
            taken: AtomicU32::new(0),
        }
    }

    /// Whether there may be one.
    #[inline]
    pub(crate) fn is_any(&self) -> bool {
        self.taken.load(Ordering::Relaxed) != 0
    }

    /// `false` if it has no place.
    pub(crate) fn put(&self, held: Box<Held>) -> bool {
        let held = Box::into_raw(held);
        let null = ptr::null_mut();
        let (stored, seen) = (Ordering::Release, Ordering::Relaxed);
        let is_free =
            |place: &AtomicPtr<Held>| place.compare_exchange(null, held, stored, seen).is_ok();
        if self.places.iter().any(is_free) {
            self.taken.fetch_add(1, Ordering::Relaxed);
            true
        } else {
            // SAFETY: it was made above, and has found no other owner.
            drop(unsafe { Box::from_raw(held) });
            false
        }
    }

    pub(crate) fn take(&self) -> Option<Box<Held>> {
        let taken = self.places.iter().find_map(|place| {
            let held = place.swap(ptr::null_mut(), Ordering::Acquire);
            // SAFETY: `put` has made it, and nobody else has taken it.
            (!held.is_null()).then(|| unsafe { Box::from_raw(held) })
        });
        if taken.is_some() {
            self.taken.fetch_sub(1, Ordering::Relaxed);
        }
        taken
    }

    fn is_empty(&self) -> bool {
        let mut places = self.places.iter();
        places.all(|place| place.load(Ordering::Relaxed).is_null())
    }

    /// In a new process: what the parent holds, the parent returns.
    fn forked(&self) {
        for place in &self.places {
            place.store(ptr::null_mut(), Ordering::Relaxed);
        }
        self.taken.store(0, Ordering::Relaxed);
    }
}

/// What the program said to epoll_ctl(2) of this socket.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Registration {
    pub(crate) epoll: c_int,
    pub(crate) fd: c_int,
    pub(crate) event: epoll_event,
}

/// What is true of a socket, or what its program asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Flag {
    /// Bound to all addresses of its family: the kernel tells the local address of each
    /// datagram (IP_PKTINFO or IPV6_RECVPKTINFO is on in the kernel).
    Wildcard = 1,
    /// The program asked for IP_PKTINFO.
    WantsPktinfo = 1 << 1,
    /// The program asked for IPV6_RECVPKTINFO.
    WantsPktinfo6 = 1 << 2,
    /// The program asked for UDP_GRO, which the kernel was not told.
    WantsGro = 1 << 3,
    /// The program made it non-blocking, as far as was seen. A hint: the flag is that of
    /// the kernel's description, which other processes may share.
    NonBlocking = 1 << 4,
    /// The program connected it to an address that is talked to directly: it has no
    /// headers, and nothing is changed.
    Direct = 1 << 5,
    /// Connected in the kernel only: the program has sent to a client from a socket of its
    /// own, which got the listener's address, and has not called connect(2).
    KernelOnly = 1 << 6,
    /// A datagram of a client has been given to the program.
    Received = 1 << 7,
    /// The parent had given its program such a datagram when this process was forked.
    Inherited = 1 << 8,
    /// The program has closed it; a descriptor that the program doesn't know of keeps it
    /// open, see [`crate::connect::keep`].
    Kept = 1 << 9,
    /// The program has set UDP_CORK.
    Cork = 1 << 10,
    /// The kernel puts a datagram together (UDP_CORK, MSG_MORE) that has its header already.
    Begun = 1 << 11,
    /// The kernel has connected it for a client, and this program was executed since: the
    /// client's name comes with the first datagram.
    Unnamed = 1 << 12,
}

impl Socket {
    /// A socket of `family` (AF_INET or AF_INET6) that is bound to `endpoint`, with no
    /// descriptor yet.
    pub(crate) fn new(family: c_int, endpoint: Endpoint) -> &'static Self {
        let socket = recycled().unwrap_or_else(|| {
            Box::leak(Box::new(Self {
                descriptors: AtomicU32::new(0),
                family: AtomicI32::new(0),
                endpoint: AtomicU32::new(0),
                flags: AtomicU32::new(0),
                segment: AtomicU32::new(0),
                peer: AtomicAddr::new(),
                kernel_peer: AtomicAddr::new(),
                held: HeldDatagrams::new(),
                epolls: TryLock::new(Vec::new()),
            }))
        });
        socket.family.store(family, Ordering::Relaxed);
        socket.set_endpoint(endpoint);
        BLOCKING.fetch_add(1, Ordering::Relaxed);
        socket
    }

    /// AF_INET or AF_INET6.
    #[inline]
    pub(crate) fn family(&self) -> c_int {
        self.family.load(Ordering::Relaxed)
    }

    #[inline]
    pub(crate) fn endpoint(&self) -> Endpoint {
        Endpoint(self.endpoint.load(Ordering::Relaxed))
    }

    pub(crate) fn set_endpoint(&self, endpoint: Endpoint) {
        self.endpoint.store(endpoint.0, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn is(&self, flag: Flag) -> bool {
        self.flags.load(Ordering::Relaxed) & flag as u32 != 0
    }

    #[inline]
    pub(crate) fn is_any(&self, flags: &[Flag]) -> bool {
        let mask = flags.iter().fold(0, |mask, flag| mask | *flag as u32);
        self.flags.load(Ordering::Relaxed) & mask != 0
    }

    pub(crate) fn set(&self, flag: Flag, on: bool) {
        let before = if on {
            self.flags.fetch_or(flag as u32, Ordering::Relaxed)
        } else {
            self.flags.fetch_and(!(flag as u32), Ordering::Relaxed)
        };
        if flag == Flag::NonBlocking && (before & flag as u32 != 0) != on {
            if on {
                BLOCKING.fetch_sub(1, Ordering::Relaxed);
            } else {
                BLOCKING.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// The client that the program has connected it to.
    #[inline]
    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        self.peer.get()
    }

    pub(crate) fn set_peer(&self, client: Option<SocketAddr>) {
        self.peer.set(client);
    }

    /// What the kernel has connected it to.
    #[inline]
    pub(crate) fn kernel_peer(&self) -> Option<SocketAddr> {
        self.kernel_peer.get()
    }

    pub(crate) fn set_kernel_peer(&self, proxy: Option<SocketAddr>) {
        self.kernel_peer.set(proxy);
    }

    /// Whether a datagram is held that poll(2) doesn't know of.
    pub(crate) fn is_holding(&self) -> bool {
        self.held.is_any() && !self.held.is_empty()
    }

    /// The length by which the kernel cuts what the program sends, if it set one.
    pub(crate) fn segment(&self) -> Option<u16> {
        u16::try_from(self.segment.load(Ordering::Relaxed))
            .ok()
            .filter(|len| *len > 0)
    }

    pub(crate) fn set_segment(&self, len: u16) {
        self.segment.store(len.into(), Ordering::Relaxed);
    }

    /// What the program asked of the socket in whose place this one comes.
    pub(crate) fn copy_wishes(&self, former: &Self) {
        for wish in [
            Flag::WantsPktinfo,
            Flag::WantsPktinfo6,
            Flag::WantsGro,
            Flag::NonBlocking,
        ] {
            self.set(wish, former.is(wish));
        }
        self.set_segment(former.segment().unwrap_or(0));
    }

    /// Whether no other descriptor of this process refers to it.
    pub(crate) fn is_at_its_last(&self) -> bool {
        self.descriptors.load(Ordering::Relaxed) == 1
    }

    pub(crate) fn hold(&self) {
        self.descriptors.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn let_go(&'static self) {
        if self.descriptors.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.recycle();
        }
    }

    /// For another socket later on. It is never freed, since a thread may be in a call.
    fn recycle(&'static self) {
        if !self.is(Flag::NonBlocking) {
            BLOCKING.fetch_sub(1, Ordering::Relaxed);
        }
        self.flags.store(0, Ordering::Relaxed);
        self.segment.store(0, Ordering::Relaxed);
        self.peer.set(None);
        self.kernel_peer.set(None);
        while self.held.take().is_some() {}
        if let Ok(mut epolls) = self.epolls.try_lock() {
            epolls.clear();
        }
        // A handler that interrupts this very function leaves a socket unused.
        if let Ok(mut unused) = UNUSED.try_lock() {
            unused.push(self);
        }
    }
}

static UNUSED: TryLock<Vec<&'static Socket>> = TryLock::new(Vec::new());

/// Sockets in use that are in blocking mode.
static BLOCKING: AtomicU32 = AtomicU32::new(0);

fn recycled() -> Option<&'static Socket> {
    UNUSED.try_lock().ok()?.pop()
}

/// Whether a socket in blocking mode is taken over.
#[inline]
pub(crate) fn any_blocking() -> bool {
    BLOCKING.load(Ordering::Relaxed) != 0
}

impl Socket {
    /// In a new process, for each descriptor: locks of threads that are not here are free.
    pub(crate) fn forked(&self) {
        self.held.forked();
        self.epolls.unlock();
        self.peer.unlock();
        self.kernel_peer.unlock();
        self.set(Flag::Inherited, self.is(Flag::Received));
        self.set(Flag::Received, false);
    }
}

/// In a new process, before [`Socket::forked`].
pub(crate) fn forked() {
    UNUSED.renew();
}

/// An address that is written rarely and read without a lock.
#[derive(Debug)]
struct AtomicAddr {
    /// Odd while it is being written.
    version: AtomicU32,
    /// 0: none; 4 or 6, and the port.
    kind: AtomicU32,
    /// The interface of a link-local address.
    scope: AtomicU32,
    high: AtomicU64,
    low: AtomicU64,
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "halves, an address and a port are cut out of wider numbers"
)]
impl AtomicAddr {
    const fn new() -> Self {
        Self {
            version: AtomicU32::new(0),
            kind: AtomicU32::new(0),
            scope: AtomicU32::new(0),
            high: AtomicU64::new(0),
            low: AtomicU64::new(0),
        }
    }

    fn set(&self, address: Option<SocketAddr>) {
        let (kind, bits, scope) = match address {
            None => (0, 0, 0),
            Some(SocketAddr::V4(v4)) => (4 << 16, u128::from(v4.ip().to_bits()), 0),
            Some(SocketAddr::V6(v6)) => (6 << 16, v6.ip().to_bits(), v6.scope_id()),
        };
        let port = address.map_or(0, |address| u32::from(address.port()));
        let (high, low) = ((bits >> 64) as u64, bits as u64);
        self.version.fetch_add(1, Ordering::AcqRel);
        self.kind.store(kind | port, Ordering::Release);
        self.scope.store(scope, Ordering::Release);
        self.high.store(high, Ordering::Release);
        self.low.store(low, Ordering::Release);
        self.version.fetch_add(1, Ordering::AcqRel);
    }

    /// In a new process: the thread that was writing is not here.
    fn unlock(&self) {
        if !self.version.load(Ordering::Relaxed).is_multiple_of(2) {
            self.version.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// `None` too where a handler interrupts the thread that is writing.
    #[inline]
    fn get(&self) -> Option<SocketAddr> {
        for _ in 0..1000 {
            let version = self.version.load(Ordering::Acquire);
            let kind = self.kind.load(Ordering::Acquire);
            let scope = self.scope.load(Ordering::Acquire);
            let high = self.high.load(Ordering::Acquire);
            let low = self.low.load(Ordering::Acquire);
            if version.is_multiple_of(2) && self.version.load(Ordering::Acquire) == version {
                let bits = u128::from(high) << 64 | u128::from(low);
                let port = (kind & 0xffff) as u16;
                return match kind >> 16 {
                    4 => Some(SocketAddr::from((Ipv4Addr::from_bits(bits as u32), port))),
                    6 => Some(SocketAddrV6::new(Ipv6Addr::from_bits(bits), port, 0, scope).into()),
                    _ => None,
                };
            }
            hint::spin_loop();
        }
        None
    }
}
