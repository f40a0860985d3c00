//! The access log in a file, a pipe or a character device, with a buffer.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::line::Line;
use super::losses::Losses;
use crate::config::{AccessLog, LogFormat};
use crate::files;

/// Bytes in the buffer from which on it is written at once.
const BUFFER: usize = 8192;

/// The time between two attempts to open a file that could not be opened at the start.
const RETRY: Duration = Duration::from_secs(1);

/// The file, with a buffer.
pub(super) struct FileLog {
    /// `None` for standard output.
    path: Option<PathBuf>,
    format: LogFormat,
    /// `None` until it can be opened.
    file: Option<File>,
    /// When that was tried last.
    tried: Instant,
    /// Lines that wait to be written.
    buffer: Vec<u8>,
    waiting: u64,
    /// Whether the file ends in the middle of a line, since the rest could not be written.
    is_torn: bool,
    losses: Losses,
}

impl FileLog {
    /// Opens the file, or once it can be if it `may_be_missing`.
    pub(super) fn open(log: &AccessLog, losses: Losses, may_be_missing: bool) -> io::Result<Self> {
        let mut new = Self {
            path: log.file().map(ToOwned::to_owned),
            format: log.format,
            file: None,
            tried: Instant::now(),
            buffer: Vec::new(),
            waiting: 0,
            is_torn: false,
            losses,
        };
        match new.try_to_open() {
            Err(error) if may_be_missing => new.losses.note(0, &error),
            result => result?,
        }
        Ok(new)
    }

    /// What was open stays if it fails.
    fn try_to_open(&mut self) -> io::Result<()> {
        self.tried = Instant::now();
        self.file = Some(match &self.path {
            Some(path) => files::append_to(path)?,
            None => io::stdout().as_fd().try_clone_to_owned()?.into(),
        });
        self.is_torn = false;
        Ok(())
    }

    pub(super) fn write(&mut self, line: &Line<'_>) {
        if self.is_torn && self.buffer.is_empty() {
            self.buffer.push(b'\n');
        }
        self.buffer
            .extend_from_slice(line.text(self.format).as_bytes());
        self.buffer.push(b'\n');
        self.waiting += 1;
        if self.buffer.len() >= BUFFER {
            self.flush();
        }
    }

    pub(super) fn flush(&mut self) {
        if self.buffer.is_empty() {
            return;
        }
        let (written, result) = self.write_buffer();
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
            self.losses.end();
        }
        if let Err(error) = result {
            self.losses.note(lost, &error);
        }
    }

    /// Writes as much as possible of what waits, and returns how much.
    fn write_buffer(&mut self) -> (usize, io::Result<()>) {
        if self.file.is_none()
            && self.tried.elapsed() >= RETRY
            && let Err(error) = self.try_to_open()
        {
            return (0, Err(error));
        }
        match &mut self.file {
            Some(file) => write_to(file, &self.buffer),
            None => (0, Err(ErrorKind::NotFound.into())),
        }
    }

    /// Reopens the file. The old one stays in use if that fails.
    pub(super) fn reopen(&mut self) {
        self.flush();
        if self.path.is_none() {
            return;
        }
        if let Err(error) = self.try_to_open()
            && self.file.is_some()
        {
            tracing::warn!(
                path = %self.losses.path(),
                %error,
                "the access log can't be reopened; lines still go to the file that was open"
            );
        }
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
