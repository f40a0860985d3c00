//! The access log: a line for each session that has ended. Workers hand over what
//! is to be told and never wait; a thread of its own writes, and what it has no
//! time for is lost and counted.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use crate::config::{AccessLog, LogFormat};
use crate::upstream::ServerName;
use crate::worker::Ended;

/// Ended sessions that may wait to be written: what a busy proxy ends within a
/// fraction of a second, and about two megabytes.
const QUEUE: usize = 16_384;

/// How long lines may wait before they are in the file.
const FLUSH: Duration = Duration::from_millis(500);

/// How long the last lines may hold up the end of the process.
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
}

impl Writer {
    /// Opens the log and starts the thread that writes it. Workers get the sender.
    ///
    /// # Errors
    ///
    /// Those of opening the file and of starting a thread.
    pub fn start(log: &AccessLog) -> io::Result<(Self, SyncSender<Ended>)> {
        let mut output = Output::open(log.path.clone())?;
        let format = log.format;
        let (sender, ended) = mpsc::sync_channel(QUEUE);
        let (tell, done) = mpsc::channel();
        let reopen = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&reopen);
        thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || {
                write_all(&ended, format, &mut output, &asked);
                let _ = tell.send(());
            })?;
        Ok((Self { reopen, done }, sender))
    }

    /// Has the file opened anew, for whoever has moved it away.
    pub fn reopen(&self) {
        self.reopen.store(true, Ordering::Relaxed);
    }

    /// Waits until all is written, once no worker is left to tell of more. Not for
    /// ever: whoever reads the log, or the disk, may have stalled.
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
        let summary = &ended.summary;
        let ServerName { upstream, server } = &*ended.server;
        Self {
            time: humantime::format_rfc3339_millis(time).to_string(),
            listener: &ended.listener,
            client: summary.key.client.to_string(),
            local: summary.key.local.to_string(),
            upstream,
            server,
            requests: summary.requests.datagrams,
            request_bytes: summary.requests.bytes,
            replies: summary.replies.datagrams,
            reply_bytes: summary.replies.bytes,
            seconds: (summary.lasted.as_secs_f64() * 1e3).round() / 1e3,
            reason: summary.reason.label(),
        }
    }

    fn text(&self, format: LogFormat) -> String {
        match format {
            LogFormat::Json => serde_json::to_string(self).unwrap_or_default(),
            LogFormat::Text => format!(
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
            ),
        }
    }
}

/// Where lines go. What can't be written is told once, until something can.
struct Output {
    path: Option<PathBuf>,
    file: Box<dyn Write + Send>,
    failed: bool,
}

impl Output {
    fn open(path: Option<PathBuf>) -> io::Result<Self> {
        let file: Box<dyn Write + Send> = match &path {
            Some(path) => Box::new(BufWriter::new(append_to(path)?)),
            None => Box::new(BufWriter::new(io::stdout())),
        };
        Ok(Self {
            path,
            file,
            failed: false,
        })
    }

    fn write(&mut self, line: &str) {
        let result = writeln!(self.file, "{line}");
        self.note(result);
    }

    fn flush(&mut self) {
        let result = self.file.flush();
        self.note(result);
    }

    fn reopen(&mut self) {
        self.flush();
        if let Some(path) = &self.path {
            // Better the old file than none.
            let result = append_to(path).map(|file| self.file = Box::new(BufWriter::new(file)));
            self.note(result);
        }
    }

    fn note(&mut self, result: io::Result<()>) {
        match result {
            Ok(()) => self.failed = false,
            Err(error) => {
                if !std::mem::replace(&mut self.failed, true) {
                    let path = self.path.as_deref().unwrap_or(Path::new("standard output"));
                    tracing::warn!(
                        path = %path.display(),
                        %error,
                        "the access log can't be written; its lines are lost until it can"
                    );
                }
            }
        }
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{ClientAddr, ListenerAddr};
    use crate::session::{Amount, EndReason, Key, Summary};

    #[test]
    fn a_line_tells_all_of_a_session() {
        let summary = Summary {
            key: Key {
                client: ClientAddr("[2001:db8::1]:5000".parse().unwrap()),
                local: ListenerAddr("[2001:db8::2]:53".parse().unwrap()),
            },
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
        let ended = Ended {
            summary,
            listener: "dns".into(),
            server: Arc::new(ServerName {
                upstream: "resolvers".to_owned(),
                server: "192.0.2.10:53".to_owned(),
            }),
        };
        let line = Line::of(&ended, SystemTime::UNIX_EPOCH);
        assert_eq!(
            line.text(LogFormat::Text),
            "1970-01-01T00:00:00.000Z listener=\"dns\" client=[2001:db8::1]:5000 \
             local=[2001:db8::2]:53 upstream=\"resolvers\" server=\"192.0.2.10:53\" requests=2 \
             request_bytes=60 replies=1 reply_bytes=400 seconds=1.235 reason=idle"
        );
        let json: serde_json::Value = serde_json::from_str(&line.text(LogFormat::Json)).unwrap();
        assert_eq!(json["client"], "[2001:db8::1]:5000");
        assert_eq!(json["reply_bytes"], 400);
        assert_eq!(json["seconds"], 1.235);
    }
}
