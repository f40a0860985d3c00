//! The stream sockets by which operators and other processes ask: the admin API, and the socket
//! on which an upgrade is asked for. A process that takes over goes on with those of the one
//! before, so that nobody finds them closed.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use super::handover::{Offer, Offering, Running, Taking};
use super::inherited::Inherited;
use super::{RunError, bind};
use crate::admin::{self, SocketFile};
use crate::config::Config;

/// The sockets, until they are served.
pub(super) struct Doors {
    /// Of the admin API.
    pub(super) admin: Option<admin::Listener>,
    /// On which upgrades are asked for.
    pub(super) upgrade: Option<UnixListener>,
    /// Which of them another process had before.
    pub(super) kept: Running,
    /// Where each is, with a descriptor for another process.
    admin_socket: Option<(String, OwnedFd)>,
    upgrade_socket: Option<(String, OwnedFd)>,
    admin_file: Option<SocketFile>,
    upgrade_file: Option<SocketFile>,
    /// The other process would have removed the file of its admin socket.
    has_admin_file: bool,
}

/// What the address of a Unix socket begins with.
const UNIX: &str = "unix:";

/// Whether there is a socket, which may have been removed: nobody would find it then.
fn is_there(path: &str) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket())
}

impl Doors {
    /// Opens those of the configuration, or takes those of another process.
    pub(super) async fn open(
        config: &Config,
        inherited: &mut Inherited,
        mut other: Option<&mut Taking>,
    ) -> Result<Self, RunError> {
        let mut doors = Self {
            admin: None,
            upgrade: None,
            kept: Running::default(),
            admin_socket: None,
            upgrade_socket: None,
            admin_file: None,
            upgrade_file: None,
            has_admin_file: false,
        };
        if let Some(address) = config.admin() {
            let shown = address.to_string();
            let file = shown.strip_prefix(UNIX);
            // The service manager's own is served as before, and no other.
            let is_given = inherited.has_admin();
            let same = other.as_mut().and_then(|other| {
                let is_same = other.offer().admin.as_ref() == Some(&shown);
                doors.has_admin_file = other.offer().has_admin_file;
                doors.kept.keeps_admin = is_same && is_given;
                let socket = other.admin.take().filter(|_| is_same && !is_given);
                socket.filter(|_| file.is_none_or(is_there))
            });
            let (listener, file) = match same {
                Some(socket) => {
                    doors.kept.keeps_admin = true;
                    (admin::adopt(address, socket)?, None)
                }
                None => bind::admin(address, inherited).await?,
            };
            doors.admin_socket = Some((shown, listener.as_fd().try_clone_to_owned()?));
            (doors.admin, doors.admin_file) = (Some(listener), file);
        }
        if let Some(path) = config.upgrade_socket() {
            let shown = path.display().to_string();
            let same = other.as_mut().and_then(|other| {
                let is_same = other.offer().upgrade.as_ref() == Some(&shown);
                other.upgrade.take().filter(|_| is_same && is_there(&shown))
            });
            let (listener, file) = match same {
                Some(socket) => {
                    doors.kept.keeps_upgrade = true;
                    (UnixListener::from(socket), None)
                }
                None => {
                    let (listener, file) = bind::upgrade(path)?;
                    (listener, Some(file))
                }
            };
            doors.upgrade_socket = Some((shown, listener.as_fd().try_clone_to_owned()?));
            (doors.upgrade, doors.upgrade_file) = (Some(listener), file);
        }
        Ok(doors)
    }

    /// Sees to the files of sockets that another process had, now that it has let go of them.
    pub(super) fn own(&mut self) {
        let file = |door: &Option<(String, OwnedFd)>, scheme| {
            let (name, _) = door.as_ref()?;
            SocketFile::of(Path::new(name.strip_prefix(scheme)?)).ok()
        };
        if self.kept.keeps_admin && self.has_admin_file {
            self.admin_file = file(&self.admin_socket, UNIX);
        }
        if self.kept.keeps_upgrade {
            self.upgrade_file = file(&self.upgrade_socket, "");
        }
    }

    /// What another process may go on with.
    pub(super) fn offer(&self, offer: Offer, reloads: u64) -> Offering {
        let copy = |door: &Option<(String, OwnedFd)>| {
            let (name, socket) = door.as_ref()?;
            Some((name.clone(), socket.try_clone().ok()?))
        };
        let (admin, upgrade) = (copy(&self.admin_socket), copy(&self.upgrade_socket));
        Offering {
            offer: Offer {
                admin: admin.as_ref().map(|(name, _)| name.clone()),
                has_admin_file: self.admin_file.is_some(),
                upgrade: upgrade.as_ref().map(|(name, _)| name.clone()),
                ..offer
            },
            sockets: admin
                .into_iter()
                .chain(upgrade)
                .map(|(_, socket)| socket)
                .collect(),
            reloads,
        }
    }

    /// Leaves those in the file system that another process goes on with.
    pub(super) fn leave(&mut self, kept: &Running) {
        if kept.keeps_admin
            && let Some(file) = self.admin_file.take()
        {
            file.leave();
        }
        if kept.keeps_upgrade
            && let Some(file) = self.upgrade_file.take()
        {
            file.leave();
        }
    }
}
