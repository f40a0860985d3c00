//! `[access_log]`: where ended sessions are logged, and what a line has.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::error::refuse;
use super::options::{LogFormat, words};

/// Where ended sessions are logged, and how
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AccessLog {
    /// File to append to; "-" for standard output [default: none, with `target`]
    pub path: Option<PathBuf>,
    /// Where lines go instead of to a file [default: to `path`]
    pub target: Option<LogTarget>,
    /// The socket of the target
    /// [default: /dev/log of syslog, /run/systemd/journal/socket of journald]
    pub socket: Option<PathBuf>,
    /// The facility of lines for syslog
    pub(crate) facility: LogFacility,
    /// How lines are written
    pub format: LogFormat,
    /// What a line has, in this order
    /// [default: all of these but client_ip and client_port, in their order]
    pub fields: Option<Vec<LogField>>,
}

words! {
    /// Where lines of the access log go instead of to a file
    pub LogTarget {
        /// To the system's log daemon (RFC 3164)
        #[default]
        Syslog,
        /// To systemd's journal, with a field for each of the line's
        Journald,
    }

    /// Which kind of program lines are of, for syslog
    pub(crate) LogFacility {
        #[default]
        Daemon,
        User,
        Local0,
        Local1,
        Local2,
        Local3,
        Local4,
        Local5,
        Local6,
        Local7,
    }

    /// What a line of the access log can have
    pub LogField {
        /// When it ended
        #[default]
        Time,
        /// The listener's name
        Listener,
        /// The client's address and port
        Client,
        /// The client's address
        ClientIp,
        /// The client's port
        ClientPort,
        /// The address that it wrote to
        Local,
        /// The upstream's name
        Upstream,
        /// The server
        Server,
        /// Datagrams of the client
        Requests,
        /// Their bytes
        RequestBytes,
        /// Replies to the client
        Replies,
        /// Their bytes
        ReplyBytes,
        /// Time from the first datagram to the last
        Seconds,
        /// Why it ended
        Reason,
        /// The proxy in front, if there is one
        Proxy,
        /// The id of the session in its headers, if they carry one
        UniqueId,
    }
}

impl AccessLog {
    /// The file to append to; `None` for standard output, and where there is a target.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        self.path.as_deref().filter(|path| *path != Path::new("-"))
    }

    /// What a line has, in its order.
    #[must_use]
    pub fn line(&self) -> Vec<LogField> {
        let all = || LogField::USUAL.to_vec();
        self.fields.clone().unwrap_or_else(all)
    }

    /// The file or the socket, "-" for standard output.
    #[must_use]
    pub fn shown_path(&self) -> &Path {
        match &self.path {
            Some(path) => path,
            None => self.socket(),
        }
    }

    /// The socket of its target.
    #[must_use]
    pub fn socket(&self) -> &Path {
        let usual = match self.target {
            Some(LogTarget::Journald) => "/run/systemd/journal/socket",
            Some(LogTarget::Syslog) | None => "/dev/log",
        };
        self.socket.as_deref().unwrap_or(Path::new(usual))
    }

    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        match (&self.path, self.target) {
            (Some(path), None) if path.as_os_str().is_empty() => {
                let fix = "name a file, or \"-\" for standard output";
                return refuse("an access log without a path", fix);
            }
            (None, None) => {
                return refuse(
                    "an access log without `path` or `target`",
                    "add `path`, a file, or target = \"syslog\" or \"journald\"",
                );
            }
            (Some(_), Some(target)) => {
                let message = format!("`path` is for files, and target is \"{}\"", target.name());
                return refuse(message, "remove one of them");
            }
            (Some(_), None) if self.socket.is_some() => {
                return refuse("`socket` is for `target`", "remove it, or `path`");
            }
            _ => {}
        }
        if self.facility != LogFacility::default() && self.target != Some(LogTarget::Syslog) {
            return refuse(
                "`facility` is for syslog",
                "remove it, or set target = \"syslog\"",
            );
        }
        let fields = self.line();
        if fields.is_empty() {
            let fix = "name some, or remove `fields` for the usual ones";
            return refuse("`fields` is empty", fix);
        }
        let mut all = fields.iter().enumerate();
        if let Some((_, twice)) = all.find(|(place, field)| fields[..*place].contains(field)) {
            let message = format!("`fields` has \"{}\" twice", twice.name());
            return refuse(message, "remove one of them");
        }
        Ok(())
    }
}

impl LogTarget {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Syslog => "syslog",
            Self::Journald => "journald",
        }
    }
}

impl LogField {
    /// What a line has unless `fields` says so.
    pub const USUAL: [Self; 14] = [
        Self::Time,
        Self::Listener,
        Self::Client,
        Self::Local,
        Self::Upstream,
        Self::Server,
        Self::Requests,
        Self::RequestBytes,
        Self::Replies,
        Self::ReplyBytes,
        Self::Seconds,
        Self::Reason,
        Self::Proxy,
        Self::UniqueId,
    ];

    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::Listener => "listener",
            Self::Client => "client",
            Self::ClientIp => "client_ip",
            Self::ClientPort => "client_port",
            Self::Local => "local",
            Self::Upstream => "upstream",
            Self::Server => "server",
            Self::Requests => "requests",
            Self::RequestBytes => "request_bytes",
            Self::Replies => "replies",
            Self::ReplyBytes => "reply_bytes",
            Self::Seconds => "seconds",
            Self::Reason => "reason",
            Self::Proxy => "proxy",
            Self::UniqueId => "unique_id",
        }
    }
}

impl LogFacility {
    /// Its number (RFC 3164, section 4.1.1).
    #[must_use]
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::User => 1,
            Self::Daemon => 3,
            Self::Local0 => 16,
            Self::Local1 => 17,
            Self::Local2 => 18,
            Self::Local3 => 19,
            Self::Local4 => 20,
            Self::Local5 => 21,
            Self::Local6 => 22,
            Self::Local7 => 23,
        }
    }
}
