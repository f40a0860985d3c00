//! Sockets that the service manager has bound for this process: socket activation of systemd
//! and of others with its protocol (sd_listen_fds(3)).
//!
//! A socket belongs to the listener, or the admin address, that has the address to which it
//! is bound. Workers get duplicates, so that a listener that a reload takes out can come back:
//! the address is bound as long as the service manager has its own descriptor.
//!
//! One descriptor may be what the process before has left in the service manager's store.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use listenfd::ListenFd;
use socket2::SockRef;

use crate::admin::Listener;
use crate::config::{AdminAddress, Bind, Config};

/// The most sockets that are taken over. It bounds what a mistaken environment costs.
const MAX_SOCKETS: usize = 65_536;

/// The name of what a process leaves for the next one in the service manager's store.
pub(super) const STATE: &str = "ppv2-state";

/// The most datagrams of earlier times that are discarded when a listener comes back: more
/// than its buffer holds.
const MAX_STALE: usize = 65_536;

/// The sockets, by the address that they are bound to.
#[derive(Debug, Default)]
pub struct Inherited {
    udp: BTreeMap<SocketAddr, Vec<UdpSocket>>,
    streams: Vec<(AdminAddress, Stream)>,
    state: Option<OwnedFd>,
    /// What was closed, and why, in words.
    closed: Vec<String>,
}

/// A socket that may be the admin address's.
#[derive(Debug)]
enum Stream {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A descriptor by its number and the name that the service manager gave it.
struct Descriptor<'a>(usize, Option<&'a str>);

impl fmt::Display for Descriptor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "socket {} from the service manager", self.0)?;
        match self.1 {
            Some(name) => write!(f, " ({})", name.escape_default()),
            None => Ok(()),
        }
    }
}

impl Inherited {
    /// Those that the environment names. Must be called before the process opens anything and
    /// starts a thread.
    #[must_use]
    pub fn of_environment() -> Self {
        let mut inherited = Self::default();
        let count = env::var("LISTEN_FDS").ok();
        if count.is_some_and(|count| {
            count
                .parse()
                .map_or(true, |count: usize| count > MAX_SOCKETS)
        }) {
            let why =
                "sockets of the service manager are ignored: LISTEN_FDS is no number of sockets";
            inherited.closed.push(why.to_owned());
            return inherited;
        }
        let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
        let names: Vec<_> = names.split(':').collect();
        let mut all = ListenFd::from_env();
        for number in 0..all.len() {
            let name = names.get(number).copied().filter(|name| !name.is_empty());
            if name == Some(STATE)
                && let Ok(Some(socket)) = all.take_unix_listener(number)
            {
                inherited.state = Some(socket.into());
            } else if let Err(why) = inherited.take(&mut all, number) {
                let which = Descriptor(number, name);
                inherited.closed.push(format!("{which} is closed: {why}"));
            }
        }
        inherited
    }

    fn take(&mut self, all: &mut ListenFd, number: usize) -> Result<(), String> {
        let in_words = |error: io::Error| error.to_string();
        let listens = |socket: SockRef<'_>| match socket.is_listener() {
            Ok(true) => Ok(()),
            _ => Err("nobody listens on it".to_owned()),
        };
        if let Ok(Some(socket)) = all.take_udp_socket(number) {
            let address = socket.local_addr().map_err(in_words)?;
            self.udp.entry(address).or_default().push(socket);
        } else if let Ok(Some(socket)) = all.take_tcp_listener(number) {
            listens(SockRef::from(&socket))?;
            let address = AdminAddress::Ip(socket.local_addr().map_err(in_words)?);
            self.streams.push((address, Stream::Tcp(socket)));
        } else if let Ok(Some(socket)) = all.take_unix_listener(number) {
            listens(SockRef::from(&socket))?;
            let address = socket.local_addr().map_err(in_words)?;
            let path = address.as_pathname().ok_or("it has no path")?;
            let address = AdminAddress::Unix(path.to_owned());
            self.streams.push((address, Stream::Unix(socket)));
        } else {
            if let Ok(Some(descriptor)) = all.take_raw_fd(number) {
                // It fails if it is not open.
                let _ = nix::unistd::close(descriptor);
            }
            return Err("it is no socket for a listener (ListenDatagram=) or the admin address (ListenStream=)".to_owned());
        }
        Ok(())
    }

    /// Closes what no listener of `config` and no admin address has, and says so.
    pub(super) fn keep_those_of(&mut self, config: &Config) {
        let listeners: BTreeSet<_> = config.addresses().collect();
        self.udp.retain(|address, _| {
            let is_of_listener = listeners.contains(address);
            if !is_of_listener {
                self.closed.push(format!(
                    "the UDP socket {address} from the service manager is closed: no listener has this address; correct ListenDatagram= or `bind`"
                ));
            }
            is_of_listener
        });
        let is_extra = |one: &mut (AdminAddress, _)| config.admin() != Some(&one.0);
        for (address, _) in self.streams.extract_if(.., is_extra) {
            self.closed.push(format!(
                "the socket {address} from the service manager is closed: it is not the admin address; correct ListenStream= or `admin.listen`"
            ));
        }
        for why in self.closed.drain(..) {
            tracing::warn!("{why}");
        }
        if !self.udp.is_empty() || !self.streams.is_empty() {
            let sockets: usize = self.udp.values().map(Vec::len).sum();
            let admin = self.streams.first().map(|(address, _)| address);
            tracing::info!(
                sockets,
                addresses = ?Bind::merged(self.addresses()),
                admin = admin.map(tracing::field::display),
                "sockets of the service manager are in use"
            );
        }
    }

    /// Whether the admin address's socket is among them.
    pub(super) fn has_admin(&self) -> bool {
        !self.streams.is_empty()
    }

    /// Addresses that need not be bound.
    pub(super) fn addresses(&self) -> BTreeSet<SocketAddr> {
        self.udp.keys().copied().collect()
    }

    /// Whether `address` need not be bound, for a listener or the admin API.
    #[must_use]
    pub fn has(&self, address: SocketAddr) -> bool {
        let admin = AdminAddress::Ip(address);
        self.udp.contains_key(&address) || self.streams.iter().any(|(one, _)| *one == admin)
    }

    /// Whether the process before has left all that it had.
    #[must_use]
    pub fn has_state(&self) -> bool {
        self.state.is_some()
    }

    /// What the process before has left.
    pub(super) fn take_state(&mut self) -> Option<OwnedFd> {
        self.state.take()
    }

    /// Duplicates of the sockets at `address`. With `without_stale`, what has come until now
    /// is discarded: it came while nobody served the address.
    pub(super) fn sockets(
        &self,
        address: SocketAddr,
        without_stale: bool,
    ) -> io::Result<Vec<UdpSocket>> {
        let sockets = self.udp.get(&address).map_or(&[][..], Vec::as_slice);
        if without_stale {
            sockets.iter().for_each(discard);
        }
        sockets.iter().map(UdpSocket::try_clone).collect()
    }

    /// The socket of the admin address, once all others are closed.
    pub(super) fn take_admin(&mut self) -> io::Result<Option<Listener>> {
        let Some((_, stream)) = self.streams.pop() else {
            return Ok(None);
        };
        Ok(Some(match stream {
            Stream::Tcp(socket) => {
                socket.set_nonblocking(true)?;
                Listener::Tcp(socket.try_into()?)
            }
            Stream::Unix(socket) => {
                socket.set_nonblocking(true)?;
                Listener::Unix(socket.try_into()?)
            }
        }))
    }
}

/// Receives what waits, for nobody. The socket does not block: a worker has had it.
fn discard(socket: &UdpSocket) {
    let mut waiting = 0..MAX_STALE;
    while waiting.next().is_some() && socket.recv(&mut []).is_ok() {}
}
