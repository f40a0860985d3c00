//! The access log: a line for each session that has ended. Workers queue the sessions and
//! never wait; a thread of its own writes the lines. Lines that don't fit into the queue,
//! or can't be written, are lost and counted.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crate::config::{AccessLog, LogField};
use ppv2_engine::session::Ended;

use file::FileLog;
use line::Line;
use losses::Losses;
use socket::SocketLog;

mod file;
mod line;
mod losses;
mod socket;

/// Ended sessions whose lines could not be written.
pub type Unlogged = Arc<AtomicU64>;

/// Ended sessions in the queue: those of a fraction of a second on a busy proxy. It bounds
/// the queue's memory to about two megabytes.
const QUEUE: usize = 16_384;

/// How long lines may wait in the buffer.
const FLUSH: Duration = Duration::from_millis(500);

/// How long the process waits for the last lines before it ends.
const LAST_LINES: Duration = Duration::from_secs(2);

/// The running log.
#[derive(Debug)]
pub struct Writer {
    reopen: Arc<AtomicBool>,
    done: Receiver<()>,
}

impl Writer {
    /// Opens the log and starts the thread that writes it. Workers get the sender; lost
    /// lines are added to `unlogged`. If it `may_be_missing`, it is opened once it can be.
    ///
    /// # Errors
    ///
    /// Those of opening the file, pipe or character device, and of starting a thread. That
    /// nothing receives at a socket is none: what does may start later.
    pub fn start(
        log: &AccessLog,
        unlogged: Unlogged,
        may_be_missing: bool,
    ) -> io::Result<(Self, SyncSender<Ended>)> {
        let mut output = Output::open(log, unlogged, may_be_missing)?;
        let fields = log.line();
        let (sender, ended) = mpsc::sync_channel(QUEUE);
        let (end, done) = mpsc::channel();
        let reopen = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&reopen);
        thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || {
                write_all(&ended, &fields, &mut output, &asked);
                let _ = end.send(());
            })?;
        Ok((Self { reopen, done }, sender))
    }

    /// Reopens the file, for log rotation.
    pub fn reopen(&self) {
        self.reopen.store(true, Ordering::Relaxed);
    }

    /// Waits until all lines are written, after the workers have ended. Not for ever, since
    /// the reader of the log, or the disk, may have stalled.
    pub fn finish(self) {
        let _ = self.done.recv_timeout(LAST_LINES);
    }
}

fn write_all(all: &Receiver<Ended>, fields: &[LogField], output: &mut Output, reopen: &AtomicBool) {
    let mut flushed = Instant::now();
    loop {
        match all.recv_timeout(FLUSH) {
            Ok(ended) => output.write(&Line::of(&ended, SystemTime::now(), fields)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return output.flush(),
        }
        if flushed.elapsed() >= FLUSH {
            output.flush();
            flushed = Instant::now();
        }
        if reopen.swap(false, Ordering::Relaxed) {
            output.reopen();
        }
    }
}

/// Where lines go.
enum Output {
    File(FileLog),
    Socket(SocketLog),
}

impl Output {
    fn open(log: &AccessLog, unlogged: Unlogged, may_be_missing: bool) -> io::Result<Self> {
        let losses = Losses::new(log, unlogged);
        Ok(match log.target {
            Some(target) => Self::Socket(SocketLog::open(log, target, losses)?),
            None => Self::File(FileLog::open(log, losses, may_be_missing)?),
        })
    }

    fn write(&mut self, line: &Line<'_>) {
        match self {
            Self::File(file) => file.write(line),
            Self::Socket(socket) => socket.write(line),
        }
    }

    fn flush(&mut self) {
        match self {
            Self::File(file) => file.flush(),
            // Each line leaves at once.
            Self::Socket(_) => {}
        }
    }

    fn reopen(&mut self) {
        match self {
            Self::File(file) => file.reopen(),
            Self::Socket(socket) => socket.reopen(),
        }
    }
}
