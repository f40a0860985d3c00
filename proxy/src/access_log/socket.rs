//! The access log in the system's log: a datagram for each line to a Unix socket.
//!
//! A receiver that is slow or stopped has lines lost, and never holds up more than the
//! log's own thread. Crates for these protocols have one socket for the whole process, wait
//! for the receiver without end, or write the time by a zone that a program with threads
//! can't ask for. So the two protocols, a few lines each, are here.

use std::io::{self, ErrorKind, Write};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::Duration;

use super::line::Line;
use super::losses::Losses;
use crate::config::{AccessLog, LogFormat, LogTarget};

/// The program's name in logs.
const PROGRAM: &str = "ppv2-proxy";

/// The severity of lines: informational.
const SEVERITY: u8 = 6;

/// How long the receiver may take before a line is lost. None of the next is waited for,
/// until one gets through.
const PATIENCE: Duration = Duration::from_millis(200);

/// The socket, and how lines are written for what receives at it.
pub(super) struct SocketLog {
    path: PathBuf,
    socket: UnixDatagram,
    is_connected: bool,
    protocol: Protocol,
    format: LogFormat,
    losses: Losses,
    /// Room for a message.
    message: Vec<u8>,
}

#[derive(Clone, Copy)]
enum Protocol {
    /// With the facility and severity.
    Syslog(u8),
    Journald,
}

impl SocketLog {
    /// Connects to what receives, or says that nothing does.
    pub(super) fn open(log: &AccessLog, target: LogTarget, losses: Losses) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let protocol = match target {
            LogTarget::Syslog => Protocol::Syslog(log.facility.code() << 3 | SEVERITY),
            LogTarget::Journald => Protocol::Journald,
        };
        let mut new = Self {
            path: log.socket().to_owned(),
            socket,
            is_connected: false,
            protocol,
            format: log.format,
            losses,
            message: Vec::new(),
        };
        if let Err(error) = new.connect() {
            new.losses.note(0, &error);
        }
        Ok(new)
    }

    fn connect(&mut self) -> io::Result<()> {
        self.is_connected = false;
        self.socket.connect(&self.path)?;
        self.is_connected = true;
        Ok(())
    }

    pub(super) fn write(&mut self, line: &Line<'_>) {
        self.message.clear();
        self.protocol
            .write(&mut self.message, line, self.format, std::process::id());
        match self.send() {
            Ok(()) if self.losses.are_going_on() => {
                self.losses.end();
                self.wait_for_receiver(true);
            }
            Ok(()) => {}
            Err(error) => {
                self.losses.note(1, &error);
                self.wait_for_receiver(false);
            }
        }
    }

    fn send(&mut self) -> io::Result<()> {
        if self.is_connected {
            match self.send_to_receiver() {
                // It was restarted, and has another socket at the same path.
                Err(error) if is_gone(&error) => {}
                sent => return sent,
            }
        }
        self.connect()?;
        self.send_to_receiver()
    }

    fn send_to_receiver(&self) -> io::Result<()> {
        loop {
            match self.socket.send(&self.message) {
                // With a timeout, the kernel does not go on by itself after a signal.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                sent => return sent.map(drop),
            }
        }
    }

    fn wait_for_receiver(&self, wait: bool) {
        // Where this fails, so does the next line, or it waits.
        let _ = self.socket.set_nonblocking(!wait);
    }

    /// Connects again: the path may lead to another socket.
    pub(super) fn reopen(&mut self) {
        // The next line tries again, and is lost if that fails.
        let _ = self.connect();
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionRefused
            | ErrorKind::ConnectionReset
            | ErrorKind::NotConnected
            | ErrorKind::BrokenPipe
    )
}

impl Protocol {
    fn write(self, message: &mut Vec<u8>, line: &Line<'_>, format: LogFormat, process: u32) {
        let text = line.text(format);
        // Writing to memory does not fail.
        let _ = match self {
            // RFC 3164, as programs of this host write it: without a host name. The receiver
            // adds the time, which is in the zone of its clock.
            Self::Syslog(priority) => {
                write!(message, "<{priority}>{PROGRAM}[{process}]: {text}")
            }
            // https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
            Self::Journald => {
                let _ = writeln!(message, "PRIORITY={SEVERITY}\nSYSLOG_IDENTIFIER={PROGRAM}");
                push_field(message, "MESSAGE", &text);
                for (field, value) in line.values() {
                    let name = format!("PPV2_{}", field.name().to_ascii_uppercase());
                    push_field(message, &name, &value.plain());
                }
                Ok(())
            }
        };
    }
}

/// Adds a field of a journal's entry. A value with line ends has its length in front.
fn push_field(message: &mut Vec<u8>, name: &str, value: &str) {
    message.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        message.push(b'\n');
        message.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        message.push(b'=');
    }
    message.extend_from_slice(value.as_bytes());
    message.push(b'\n');
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::super::line::tests::ended;
    use super::*;
    use crate::config::LogField;

    fn message(protocol: Protocol, format: LogFormat, fields: &[LogField]) -> String {
        let ended = ended();
        let line = Line::of(&ended, SystemTime::UNIX_EPOCH, fields);
        let mut message = Vec::new();
        protocol.write(&mut message, &line, format, 77);
        String::from_utf8(message).unwrap()
    }

    #[test]
    fn messages_are_as_each_protocol_has_them() {
        let fields = [LogField::Listener, LogField::ClientPort];
        let syslog = Protocol::Syslog(30);
        assert_eq!(
            message(syslog, LogFormat::Text, &fields),
            "<30>ppv2-proxy[77]: listener=\"dns\" client_port=5000"
        );
        assert_eq!(
            message(Protocol::Journald, LogFormat::Json, &fields),
            "PRIORITY=6\nSYSLOG_IDENTIFIER=ppv2-proxy\n\
             MESSAGE={\"listener\":\"dns\",\"client_port\":5000}\n\
             PPV2_LISTENER=dns\nPPV2_CLIENT_PORT=5000\n"
        );
    }

    #[test]
    fn a_journal_field_with_line_ends_has_its_length() {
        let mut message = Vec::new();
        push_field(&mut message, "A", "b\nc");
        assert_eq!(message, b"A\n\x03\0\0\0\0\0\0\0b\nc\n");
    }
}
