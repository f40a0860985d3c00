//! The log on standard error. A thread of its own writes the lines, so that a full disk, a
//! closed pipe or a reader that has stopped holds up nothing else. Lines that can't be written
//! are lost and counted.
//!
//! A terminal gets colour, and some text for people instead of lines.

use std::env;
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::thread;
use std::time::{Duration, Instant};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::{Directive, ParseError};
use tracing_subscriber::fmt::MakeWriter;

use crate::config::LogFormat;

/// Lines that may wait to be written: those of a burst at the most talkative level. The queue
/// takes 32 bytes for each at once, and their text as long as they wait.
const QUEUE: usize = 8192;

/// How long the end waits for room in the queue, and then for the last lines.
const ROOM: Duration = Duration::from_millis(100);
const LAST_LINES: Duration = Duration::from_secs(1);

/// The time between two warnings of lost lines.
const QUIET: Duration = Duration::from_secs(60);

/// Lines that were lost.
static LOST: AtomicU64 = AtomicU64::new(0);

/// The log of a terminal.
static TERMINAL: OnceLock<Terminal> = OnceLock::new();

/// The running log.
#[derive(Debug)]
pub struct Log {
    lines: Lines,
    done: Receiver<()>,
}

/// What the log's thread is told.
#[derive(Debug)]
enum Message {
    Line(Vec<u8>),
    End,
}

/// Queues lines.
#[derive(Clone, Debug)]
struct Lines(SyncSender<Message>);

/// A terminal that somebody looks at.
#[derive(Debug)]
pub struct Terminal {
    lines: Lines,
    has_colour: bool,
}

/// How a word is shown on a terminal with colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// Of what stands out.
    Bold,
    /// Of what matters less.
    Dim,
    /// Of what is well.
    Green,
    /// Of what is not.
    Red,
}

/// Lines that were lost, because they could not be written or too many waited.
#[must_use]
pub fn lost_lines() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// The terminal, if the log goes to one as text.
#[must_use]
pub fn terminal() -> Option<&'static Terminal> {
    TERMINAL
        .get()
        .filter(|_| tracing::enabled!(tracing::Level::INFO))
}

impl Log {
    /// Starts the log of this process, which must have none yet.
    ///
    /// # Errors
    ///
    /// [`LogError`].
    pub fn start(format: LogFormat, level: &str) -> Result<Self, LogError> {
        let mut filter = EnvFilter::try_new(level)?;
        if !level.contains("hickory") {
            for library in ["hickory_net", "hickory_proto"] {
                filter = filter.add_directive(quiet(library));
            }
        }
        let (sender, messages) = mpsc::sync_channel(QUEUE);
        let (end, done) = mpsc::channel();
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || {
                write_all(&messages, &mut io::stderr());
                let _ = end.send(());
            })?;
        let lines = Lines(sender);
        let is_terminal = io::stderr().is_terminal();
        let has_colour = is_terminal && wants_colour(|name| env::var(name).ok());
        let builder = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_target(false)
            .log_internal_errors(false)
            .with_writer(lines.clone());
        match format {
            LogFormat::Text => builder.with_ansi(has_colour).init(),
            LogFormat::Json => builder.json().flatten_event(true).init(),
        }
        if is_terminal && format == LogFormat::Text {
            let lines = lines.clone();
            let _ = TERMINAL.set(Terminal { lines, has_colour });
        }
        Ok(Self { lines, done })
    }

    /// Waits until all lines are written. Not for ever, since their reader may have stopped.
    pub fn finish(self) {
        let deadline = Instant::now() + ROOM;
        while let Err(TrySendError::Full(_)) = self.lines.0.try_send(Message::End) {
            if Instant::now() >= deadline {
                return;
            }
            thread::sleep(ROOM / 20);
        }
        let _ = self.done.recv_timeout(LAST_LINES);
    }
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The level can't be read.
    #[error(transparent)]
    Level(#[from] ParseError),
    /// There is no thread for it.
    #[error("starting the log")]
    Thread(#[from] io::Error),
}

/// Silences the warnings of a library: it has one for each invalid datagram, which any
/// host may send.
fn quiet(library: &str) -> Directive {
    let directive = format!("{library}=error");
    directive.parse().expect("a library's name and a level")
}

/// Whether a terminal is to have colour, by what `variable` says of the environment
/// (no-color.org, terminfo(5)).
fn wants_colour(variable: impl Fn(&str) -> Option<String>) -> bool {
    let is_dumb = variable("TERM").is_some_and(|terminal| terminal == "dumb");
    !is_dumb && variable("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn write_all(messages: &Receiver<Message>, output: &mut impl Write) {
    let mut told = 0;
    let mut warned: Option<Instant> = None;
    while let Ok(Message::Line(line)) = messages.recv() {
        if output.write_all(&line).is_err() {
            LOST.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let lost = LOST.load(Ordering::Relaxed);
        if lost > told && warned.is_none_or(|at| at.elapsed() >= QUIET) {
            warned = Some(Instant::now());
            tracing::warn!(
                lines = lost - told,
                "lines of this log are lost: standard error could not be written, or not fast enough"
            );
            told = lost;
        }
    }
}

impl Lines {
    fn send(&self, line: Vec<u8>) {
        if self.0.try_send(Message::Line(line)).is_err() {
            LOST.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.send(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Terminal {
    /// Shows `text` and a line break, in its turn among the lines.
    pub fn show(&self, text: &str) {
        self.lines.send(format!("{text}\n").into_bytes());
    }

    /// `word` in colour, if the terminal has any.
    pub fn paint(&self, colour: Colour, word: impl fmt::Display) -> String {
        let code = match colour {
            _ if !self.has_colour => return word.to_string(),
            Colour::Bold => 1,
            Colour::Dim => 2,
            Colour::Green => 32,
            Colour::Red => 31,
        };
        format!("\u{1b}[{code}m{word}\u{1b}[0m")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_have_colour_unless_the_environment_says_no() {
        let wants = |name: &'static str, value: &'static str| {
            wants_colour(|asked| (asked == name).then(|| value.to_owned()))
        };
        assert!(wants("TERM", "xterm-256color") && wants("NO_COLOR", ""));
        assert!(!wants("TERM", "dumb") && !wants("NO_COLOR", "1"));
    }

    /// A disk that is full for a while.
    struct Disk {
        full_for: usize,
        holds: Vec<u8>,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.full_for > 0 {
                self.full_for -= 1;
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.holds.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_that_can_not_be_written_are_counted_and_the_others_written() {
        let before = lost_lines();
        let (sender, messages) = mpsc::sync_channel(4);
        let lines = Lines(sender);
        for line in ["one\n", "two\n", "three\n", "four\n", "five\n"] {
            lines.send(line.into());
        }
        assert_eq!(lost_lines() - before, 1);
        drop(lines);
        let mut disk = Disk {
            full_for: 2,
            holds: Vec::new(),
        };
        write_all(&messages, &mut disk);
        assert_eq!(disk.holds, b"three\nfour\n");
        assert_eq!(lost_lines() - before, 3);
    }
}
