//! The access log: a line for each session that has ended. Workers queue the sessions and
//! never wait; a thread of its own writes the lines. Lines that don't fit into the queue,
//! or can't be written, are lost and counted.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use crate::config::{AccessLog, LogFormat};
use crate::files;
use ppv2_engine::session::Ended;

/// Ended sessions whose lines could not be written.
pub type Unlogged = Arc<AtomicU64>;

/// Ended sessions in the queue: those of a fraction of a second on a busy proxy. It bounds
/// the queue's memory to about two megabytes.
const QUEUE: usize = 16_384;

/// How long lines may wait in the buffer.
const FLUSH: Duration = Duration::from_millis(500);

/// Bytes in the buffer from which on it is written at once.
const BUFFER: usize = 8192;

/// The time between two warnings of lost lines.
const QUIET: Duration = Duration::from_secs(60);

/// How long the process waits for the last lines before it ends.
const LAST_LINES: Duration = Duration::from_secs(2);

/// The running log.
#[derive(Debug)]
pub struct Writer {
    reopen: Arc<AtomicBool>,
    done: Receiver<()>,
}

/// A line of the log.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    listener: &'a str,
    client: String,
    local: String,
    upstream: &'a str,
    server: &'a str,
    requests: u64,
    request_bytes: u64,
    replies: u64,
    reply_bytes: u64,
    /// From the first datagram to the last.
    seconds: f64,
    reason: &'static str,
    /// The proxy in front that the latest datagram came through.
    #[serde(skip_serializing_if = "Option::is_none")]
    proxy: Option<String>,
    /// The id of the session in its headers, if they carry one.
    #[serde(skip_serializing_if = "Option::is_none")]
    unique_id: Option<String>,
}

impl Writer {
    /// Opens the log and starts the thread that writes it. Workers get the sender; lost
    /// lines are added to `unlogged`.
    ///
    /// # Errors
    ///
    /// Those of opening the file, pipe or character device, and of starting a thread.
    pub fn start(log: &AccessLog, unlogged: Unlogged) -> io::Result<(Self, SyncSender<Ended>)> {
        let mut output = Output::open(log.file(), unlogged)?;
        let format = log.format;
        let (sender, ended) = mpsc::sync_channel(QUEUE);
        let (end, done) = mpsc::channel();
        let reopen = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&reopen);
        thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || {
                write_all(&ended, format, &mut output, &asked);
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

fn write_all(all: &Receiver<Ended>, format: LogFormat, output: &mut Output, reopen: &AtomicBool) {
    let mut flushed = Instant::now();
    loop {
        match all.recv_timeout(FLUSH) {
            Ok(ended) => {
                let line = Line::of(&ended, SystemTime::now());
                output.write(&line.text(format));
            }
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

impl<'e> Line<'e> {
    fn of(ended: &'e Ended, time: SystemTime) -> Self {
        Self {
            time: humantime::format_rfc3339_millis(time).to_string(),
            listener: &ended.listener.name,
            client: ended.key.client.to_string(),
            local: ended.key.local.to_string(),
            upstream: &ended.server.upstream,
            server: &ended.server.name,
            requests: ended.requests.datagrams,
            request_bytes: ended.requests.bytes,
            replies: ended.replies.datagrams,
            reply_bytes: ended.replies.bytes,
            seconds: (ended.lasted.as_secs_f64() * 1e3).round() / 1e3,
            reason: ended.reason.label(),
            proxy: ended.proxy.map(|proxy| proxy.to_string()),
            unique_id: ended.unique_id.map(|id| id.to_string()),
        }
    }

    fn text(&self, format: LogFormat) -> String {
        match format {
            LogFormat::Json => serde_json::to_string(self).unwrap_or_default(),
            LogFormat::Text => {
                let mut text = format!(
                    "{} listener={:?} client={} local={} upstream={:?} server={:?} requests={} \
                     request_bytes={} replies={} reply_bytes={} seconds={} reason={}",
                    self.time,
                    self.listener,
                    self.client,
                    self.local,
                    self.upstream,
                    self.server,
                    self.requests,
                    self.request_bytes,
                    self.replies,
                    self.reply_bytes,
                    self.seconds,
                    self.reason
                );
                for (field, value) in [("proxy", &self.proxy), ("unique_id", &self.unique_id)] {
                    if let Some(value) = value {
                        let _ = write!(text, " {field}={value}");
                    }
                }
                text
            }
        }
    }
}

/// The file, with a buffer. Logs when losses begin and end.
struct Output {
    path: Option<PathBuf>,
    file: File,
    /// Lines that wait to be written.
    buffer: Vec<u8>,
    waiting: u64,
    /// Whether the file ends in the middle of a line, since the rest could not be written.
    is_torn: bool,
    unlogged: Unlogged,
    /// Lines lost since one was written.
    lost: u64,
    warned: Option<Instant>,
}

impl Output {
    fn open(path: Option<PathBuf>, unlogged: Unlogged) -> io::Result<Self> {
        let file = match &path {
            Some(path) => files::append_to(path)?,
            None => io::stdout().as_fd().try_clone_to_owned()?.into(),
        };
        Ok(Self {
            path,
            file,
            buffer: Vec::new(),
            waiting: 0,
            is_torn: false,
            unlogged,
            lost: 0,
            warned: None,
        })
    }

    fn write(&mut self, line: &str) {
        if self.is_torn && self.buffer.is_empty() {
            self.buffer.push(b'\n');
        }
        self.buffer.extend_from_slice(line.as_bytes());
        self.buffer.push(b'\n');
        self.waiting += 1;
        if self.buffer.len() >= BUFFER {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if self.buffer.is_empty() {
            return;
        }
        let (written, result) = write_to(&mut self.file, &self.buffer);
        let (written, rest) = self.buffer.split_at(written);
        let lost = match result {
            Ok(()) => 0,
            Err(_) => count_lines(rest).min(self.waiting),
        };
        if let Some(last) = written.last() {
            self.is_torn = *last != b'\n';
        }
        let is_any_written = lost < self.waiting;
        self.buffer.clear();
        self.waiting = 0;
        if is_any_written {
            self.log_end_of_loss();
        }
        if let Err(error) = result {
            self.log_loss(lost, &error);
        }
    }

    fn log_loss(&mut self, lost: u64, error: &io::Error) {
        self.unlogged.fetch_add(lost, Ordering::Relaxed);
        let is_news = self.lost == 0;
        self.lost += lost;
        // A disk that is nearly full has room for a line now and then.
        if is_news && self.warned.is_none_or(|told| told.elapsed() >= QUIET) {
            self.warned = Some(Instant::now());
            tracing::warn!(
                path = %self.name(),
                %error,
                "the access log can't be written; its lines are lost, and counted as ppv2_sessions_unlogged_total, until it can"
            );
        }
    }

    fn log_end_of_loss(&mut self) {
        let lost = std::mem::take(&mut self.lost);
        if lost > 0 {
            tracing::info!(path = %self.name(), lost, "the access log is written again");
        }
    }

    /// Reopens the file. The old one stays in use if that fails.
    fn reopen(&mut self) {
        self.flush();
        let Some(path) = &self.path else {
            return;
        };
        match files::append_to(path) {
            Ok(file) => {
                self.file = file;
                self.is_torn = false;
            }
            Err(error) => tracing::warn!(
                path = %self.name(),
                %error,
                "the access log can't be reopened; lines still go to the file that was open"
            ),
        }
    }

    fn name(&self) -> std::path::Display<'_> {
        let path = self.path.as_deref();
        path.unwrap_or(Path::new("standard output")).display()
    }
}

/// Writes all of `bytes`, or as many as possible, and returns how many.
fn write_to(file: &mut impl Write, bytes: &[u8]) -> (usize, io::Result<()>) {
    let mut written = 0;
    while written < bytes.len() {
        match file.write(&bytes[written..]) {
            Ok(0) => return (written, Err(ErrorKind::WriteZero.into())),
            Ok(some) => written += some,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return (written, Err(error)),
        }
    }
    (written, Ok(()))
}

fn count_lines(text: &[u8]) -> u64 {
    text.iter().filter(|byte| **byte == b'\n').count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use ppv2_engine::address::{ClientAddr, ListenerAddr, ServerAddr};
    use ppv2_engine::counters::EndReason;
    use ppv2_engine::listener::Listener;
    use ppv2_engine::own_tlvs::UniqueId;
    use ppv2_engine::server::Server;
    use ppv2_engine::session::{Amount, Key};

    #[test]
    fn a_line_has_all_fields_of_a_session() {
        let server = ServerAddr("192.0.2.10:53".parse().unwrap());
        let mut ended = Ended {
            proxy: Some("192.0.2.7:6000".parse().unwrap()),
            unique_id: Some(UniqueId([0xab; 16])),
            listener: Listener::new("dns", 1),
            server: Server::new("resolvers", "192.0.2.10:53", server, 1),
            key: Key::direct(
                ClientAddr("[2001:db8::1]:5000".parse().unwrap()),
                ListenerAddr("[2001:db8::2]:53".parse().unwrap()),
            ),
            requests: Amount {
                datagrams: 2,
                bytes: 60,
            },
            replies: Amount {
                datagrams: 1,
                bytes: 400,
            },
            lasted: Duration::from_micros(1_234_567),
            reason: EndReason::Idle,
        };
        let line = Line::of(&ended, SystemTime::UNIX_EPOCH);
        assert_eq!(
            line.text(LogFormat::Text),
            "1970-01-01T00:00:00.000Z listener=\"dns\" client=[2001:db8::1]:5000 \
             local=[2001:db8::2]:53 upstream=\"resolvers\" server=\"192.0.2.10:53\" requests=2 \
             request_bytes=60 replies=1 reply_bytes=400 seconds=1.235 reason=idle \
             proxy=192.0.2.7:6000 unique_id=abababababababababababababababab"
        );
        let json: serde_json::Value = serde_json::from_str(&line.text(LogFormat::Json)).unwrap();
        assert_eq!(json["client"], "[2001:db8::1]:5000");
        assert_eq!(json["reply_bytes"], 400);
        assert_eq!(json["seconds"], 1.235);
        assert_eq!(json["proxy"], "192.0.2.7:6000");
        assert_eq!(json["unique_id"], "ab".repeat(16));

        (ended.proxy, ended.unique_id) = (None, None);
        let line = Line::of(&ended, SystemTime::UNIX_EPOCH);
        for format in [LogFormat::Text, LogFormat::Json] {
            let text = line.text(format);
            assert!(!text.contains("proxy") && !text.contains("unique_id"));
        }
    }

    /// A disk with room for so many bytes.
    struct Disk {
        holds: Vec<u8>,
        room: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let fits = bytes.len().min(self.room);
            if fits == 0 {
                return Err(ErrorKind::StorageFull.into());
            }
            self.holds.extend_from_slice(&bytes[..fits]);
            self.room -= fits;
            Ok(fits)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_that_fit_are_written_and_the_others_counted() {
        let mut disk = Disk {
            holds: Vec::new(),
            room: 9,
        };
        let (written, result) = write_to(&mut disk, b"first\nsecond\nthird\n");
        assert_eq!((written, disk.holds.as_slice()), (9, &b"first\nsec"[..]));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::StorageFull);
        assert_eq!(count_lines(b"ond\nthird\n"), 2);
    }
}
