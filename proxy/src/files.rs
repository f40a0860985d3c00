//! Opens the files, pipes and devices that an operator names, without waiting for another
//! process to open the other end of a named pipe.

use std::fs::{File, FileType, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::{Errno, ioctl_fionbio};

/// How long the writer of a pipe may be silent before reading fails.
const PATIENCE: Duration = Duration::from_secs(10);

/// Opens `path` to append to it, and creates it if it does not exist. Writes to a pipe or a
/// terminal wait for its reader.
///
/// # Errors
///
/// Those of the kernel; if it is a pipe without a reader; if it is not a file, a pipe or a
/// character device.
pub(crate) fn append_to(path: &Path) -> io::Result<File> {
    let (file, kind) = open(path, OpenOptions::new().create(true).append(true))?;
    if !kind.is_file() {
        ioctl_fionbio(&file, false)?;
    }
    Ok(file)
}

/// Reads the text in `path`, of `max` bytes at most.
///
/// # Errors
///
/// Those of the kernel; if it is longer or not UTF-8; if it is a pipe without a writer, or
/// whose writer stalls; if it is not a file, a pipe or a character device.
pub(crate) fn read(path: &Path, max: u64) -> io::Result<String> {
    let (file, kind) = open(path, OpenOptions::new().read(true))?;
    if kind.is_char_device() {
        // People type slowly.
        ioctl_fionbio(&file, false)?;
    }
    let mut bytes = Vec::new();
    let mut some = (&file).take(max + 1);
    loop {
        match some.read_to_end(&mut bytes) {
            Ok(_) => break,
            Err(error) if error.kind() == ErrorKind::WouldBlock => await_writer(&file)?,
            Err(error) => return Err(error),
        }
    }
    if bytes.len() as u64 > max {
        return Err(io::Error::other(format!("it has more than {max} bytes")));
    }
    if bytes.is_empty() && kind.is_fifo() {
        return Err(io::Error::other("it is a pipe to which nobody writes"));
    }
    String::from_utf8(bytes).map_err(|_| io::Error::other("it is not UTF-8 text"))
}

fn await_writer(pipe: &File) -> io::Result<()> {
    let patience = Timespec::try_from(PATIENCE).map_err(io::Error::other)?;
    let mut pipe = [PollFd::new(pipe, PollFlags::IN)];
    match poll(&mut pipe, Some(&patience)) {
        Ok(0) => Err(io::Error::other(format!(
            "it is a pipe to which nothing was written for {} s",
            PATIENCE.as_secs()
        ))),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Opens without waiting, in non-blocking mode.
fn open(path: &Path, options: &mut OpenOptions) -> io::Result<(File, FileType)> {
    let without_waiting = OFlags::NONBLOCK | OFlags::NOCTTY;
    let options = options.custom_flags(without_waiting.bits().cast_signed());
    let file = options.open(path).map_err(|error| reason(path, error))?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_fifo() || kind.is_char_device() {
        return Ok((file, kind));
    }
    let kind = if kind.is_dir() { "directory" } else { "device" };
    Err(io::Error::other(format!("it is a {kind}")))
}

/// The reason for "no such device or address".
fn reason(path: &Path, error: io::Error) -> io::Error {
    if Errno::from_io_error(&error) != Some(Errno::NXIO) {
        return error;
    }
    match path.metadata().map(|metadata| metadata.file_type()) {
        Ok(kind) if kind.is_fifo() => io::Error::other("it is a pipe that nobody reads"),
        Ok(kind) if kind.is_socket() => io::Error::other("it is a socket"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;

    use super::*;

    const MAX: u64 = 100;

    fn said<T: std::fmt::Debug>(result: io::Result<T>) -> String {
        result.unwrap_err().to_string()
    }

    /// A path that leads to this descriptor.
    fn path_of(file: &impl AsRawFd) -> PathBuf {
        format!("/proc/self/fd/{}", file.as_raw_fd()).into()
    }

    #[test]
    fn directories_and_sockets_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(said(read(folder.path(), MAX)), "it is a directory");
        assert!(said(append_to(folder.path())).contains("directory"));
        let socket = folder.path().join("socket");
        let _listening = UnixListener::bind(&socket).unwrap();
        assert_eq!(said(read(&socket, MAX)), "it is a socket");
        assert_eq!(said(append_to(&socket)), "it is a socket");
        // As standard output is, where systemd starts something.
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(said(append_to(&path_of(&ours))), "it is a socket");
    }

    #[test]
    fn a_named_pipe_without_the_other_end_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        assert_eq!(
            said(read(&pipe, MAX)),
            "it is a pipe to which nobody writes"
        );
        assert_eq!(said(append_to(&pipe)), "it is a pipe that nobody reads");
    }

    #[test]
    fn pipes_and_devices_are_read_and_written_like_files() {
        let (reader, mut writer) = io::pipe().unwrap();
        append_to(&path_of(&writer))
            .unwrap()
            .write_all(b"a = 1\n")
            .unwrap();
        writer.write_all(b"b = 2\n").unwrap();
        drop(writer);
        let text = read(&path_of(&reader), MAX).unwrap();
        assert_eq!(text, "a = 1\nb = 2\n");
        assert!(append_to(Path::new("/dev/null")).is_ok());
        let endless = read(Path::new("/dev/zero"), MAX);
        assert_eq!(said(endless), "it has more than 100 bytes");
    }

    #[test]
    fn a_pipe_is_read_until_its_writer_closes_it() {
        let (reader, mut writer) = io::pipe().unwrap();
        let path = path_of(&reader);
        let reading = std::thread::spawn(move || read(&path, MAX));
        writer.write_all(b"a = ").unwrap();
        // Most likely it has been read by now.
        std::thread::sleep(Duration::from_millis(50));
        writer.write_all(b"1").unwrap();
        drop(writer);
        assert_eq!(reading.join().unwrap().unwrap(), "a = 1");
    }
}
