//! The socket that the admin API is served on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};

use crate::config::AdminAddress;

/// The permissions of a Unix socket: the proxy's user and group may ask and change.
const MODE: u32 = 0o660;

/// Connections that wait in the kernel. More of them wait to connect.
const BACKLOG: i32 = 128;

/// The socket that the admin API is served on.
#[derive(Debug)]
#[non_exhaustive]
pub enum Listener {
    /// Of an IP address.
    Tcp(TcpListener),
    /// Of a path.
    Unix(UnixListener),
}

/// A connection of either kind.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Listener {
    /// Waits for a connection.
    pub(super) async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(listener) => Box::new(listener.accept().await?.0),
            Self::Unix(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

/// The file of a Unix socket. It is removed when this is dropped, unless another process
/// has put its own socket there.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Its device and inode.
    identity: (u64, u64),
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

/// Goes on with the socket of another process that served the API at `address`.
///
/// # Errors
///
/// Those of the kernel.
pub fn adopt(address: &AdminAddress, socket: OwnedFd) -> io::Result<Listener> {
    let socket = Socket::from(socket);
    socket.set_nonblocking(true)?;
    Ok(match address {
        AdminAddress::Ip(_) => Listener::Tcp(TcpListener::from_std(socket.into())?),
        AdminAddress::Unix(_) => Listener::Unix(UnixListener::from_std(socket.into())?),
    })
}

impl SocketFile {
    /// That of a socket that is bound to `path`.
    ///
    /// # Errors
    ///
    /// Those of `lstat`.
    pub fn of(path: &Path) -> io::Result<Self> {
        Ok(Self {
            identity: identity(path)?,
            path: path.to_owned(),
        })
    }

    /// Leaves the file to a process that goes on with the socket.
    pub fn leave(mut self) {
        self.path = PathBuf::new();
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            // Otherwise the next start replaces it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let file = std::fs::symlink_metadata(path)?;
    Ok((file.dev(), file.ino()))
}

/// Binds a Unix socket, and replaces one that a process has left behind.
///
/// # Errors
///
/// Those of the kernel; [`io::ErrorKind::AddrInUse`] if a process listens there, and
/// [`io::ErrorKind::AlreadyExists`] if something else than a socket has the path.
pub fn bind_unix(path: &Path) -> io::Result<(Listener, SocketFile)> {
    let (socket, file) = bind_unix_socket(path)?;
    socket.set_nonblocking(true)?;
    Ok((Listener::Unix(UnixListener::from_std(socket)?), file))
}

/// As [`bind_unix`], for a thread that waits for connections.
///
/// # Errors
///
/// As those of [`bind_unix`].
pub fn bind_unix_socket(path: &Path) -> io::Result<(StdUnixListener, SocketFile)> {
    remove_stale(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    let file = SocketFile::of(path)?;
    // Nobody can connect yet, whatever the umask says.
    set_mode(path)?;
    socket.listen(BACKLOG)?;
    Ok((socket.into(), file))
}

/// Sets the permissions of the socket at `path`. Whoever may write to its directory can put a link
/// to another file in its place meanwhile, which is left as it is.
fn set_mode(path: &Path) -> io::Result<()> {
    let file = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())?;
    let opened = format!("/proc/self/fd/{}", file.as_raw_fd());
    if !std::fs::metadata(&opened)?.file_type().is_socket() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    std::fs::set_permissions(opened, std::fs::Permissions::from_mode(MODE))
}

/// Removes a socket that no process listens on.
fn remove_stale(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(file) if file.file_type().is_socket() => {}
        Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A full queue has a listener, too.
    probe.set_nonblocking(true)?;
    match probe.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Err(io::ErrorKind::AddrInUse.into()),
    }
}
