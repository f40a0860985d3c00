//! Stands between the two processes of a takeover, and holds up what the new one says.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::*;

/// The most descriptors that come at once.
const BATCH: usize = 253;

pub(super) struct Relay {
    /// Where the new process asks.
    pub(super) socket: PathBuf,
    held: Receiver<()>,
    go: Sender<()>,
}

impl Relay {
    /// Passes on what the old process at `to` and one new process say, until the new one says
    /// `word`. That and what follows waits for [`go_on`](Self::go_on).
    pub(super) fn start(to: &Path, word: &'static str) -> Self {
        let socket = to.with_file_name(format!("{word}-{}.sock", fastrand::u32(..)));
        let listener = UnixListener::bind(&socket).unwrap();
        // The proxy is another user, if started as root.
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
        let old = UnixStream::connect(to).unwrap();
        let (tell, held) = channel();
        let (go, told) = channel();
        thread::spawn(move || {
            let (new, _) = listener.accept().unwrap();
            let (from_old, to_new) = (old.try_clone().unwrap(), new.try_clone().unwrap());
            let back = thread::spawn(move || pass_on(&from_old, &to_new, |_| {}));
            pass_on(&new, &old, |said| {
                if said.windows(word.len()).any(|one| one == word.as_bytes()) {
                    let _ = tell.send(());
                    let _ = told.recv();
                }
            });
            back.join().unwrap();
        });
        Self { socket, held, go }
    }

    /// Waits until the new process has said the word.
    #[track_caller]
    pub(super) fn wait(&self) {
        self.held
            .recv_timeout(TIMEOUT)
            .expect("the new process never says it");
    }

    pub(super) fn go_on(&self) {
        self.go.send(()).unwrap();
    }
}

/// Passes on all that comes, until one of them has closed the connection.
fn pass_on(from: &UnixStream, to: &UnixStream, look: impl Fn(&[u8])) {
    let mut bytes = vec![0; 100_000];
    while let Ok((len @ 1.., descriptors)) = receive_some(from, &mut bytes) {
        look(&bytes[..len]);
        if send_all(to, &bytes[..len], &descriptors).is_err() {
            break;
        }
    }
    // The other one may have been first.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

fn receive_some(from: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(BATCH))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut pieces = [IoSliceMut::new(bytes)];
    let came = recvmsg(from, &mut pieces, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(batch) = message {
            descriptors.extend(batch);
        }
    }
    Ok((came.bytes, descriptors))
}

/// Descriptors go with the last byte that came with them: a receiver that wants none reads up
/// to there.
fn send_all(to: &UnixStream, bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
    let (last, rest) = bytes.split_last().unwrap();
    io::Write::write_all(&mut &*to, rest)?;
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(BATCH))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    let last = [*last];
    sendmsg(
        to,
        &[IoSlice::new(&last)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}
