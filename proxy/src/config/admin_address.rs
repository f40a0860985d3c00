//! Where the admin API is served: an IP address with a port, or a Unix socket. And the paths
//! of other Unix sockets.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::ConfigError;
use super::error::{is_hidden, refuse};
use super::values::read_from_text;

/// What the address of a Unix socket begins with.
const SCHEME: &str = "unix:";

/// The most bytes of a socket's path: `sun_path` of unix(7) has 108, with a zero at the end.
const MAX_PATH: usize = 107;

/// Where the admin API is served.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdminAddress {
    /// An IP address with a port.
    Ip(SocketAddr),
    /// The absolute path of a Unix socket.
    Unix(PathBuf),
}
read_from_text!(AdminAddress);

impl AdminAddress {
    /// The IP address with its port, if it is one.
    #[must_use]
    pub fn ip(&self) -> Option<SocketAddr> {
        match self {
            Self::Ip(address) => Some(*address),
            Self::Unix(_) => None,
        }
    }
}

impl FromStr for AdminAddress {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let Some(path) = text.strip_prefix(SCHEME) else {
            return text.parse().map(Self::Ip).or_else(|_| {
                refuse(
                    format!(
                        "`{text}` is neither an IP address with a port nor the path of a socket"
                    ),
                    "write it as 127.0.0.1:9901, [::1]:9901 or unix:/run/ppv2/admin.sock",
                )
            });
        };
        socket_path(path, "write it as unix:/run/ppv2/admin.sock").map(Self::Unix)
    }
}

/// The path of a Unix socket; `hint` is what to write instead of what can't be one.
fn socket_path(path: &str, hint: &str) -> Result<PathBuf, ConfigError> {
    let problem = if !path.starts_with('/') {
        "is not an absolute path"
    } else if path.ends_with('/') {
        "is a directory"
    } else if path.len() > MAX_PATH {
        "is longer than the 107 bytes that a socket's path may have"
    } else if path.chars().any(is_hidden) {
        "has characters that can't be seen"
    } else {
        return Ok(Path::new(path).to_owned());
    };
    refuse(format!("`{path}` {problem}"), hint)
}

/// The absolute path of a Unix socket of the proxy's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketPath(PathBuf);
read_from_text!(SocketPath);

impl SocketPath {
    /// The path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl FromStr for SocketPath {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        socket_path(text, "write it as /run/ppv2/upgrade.sock").map(Self)
    }
}

impl fmt::Display for SocketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "{SCHEME}{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown() {
        for text in [
            "127.0.0.1:9901",
            "[::1]:9901",
            "unix:/run/ppv2/admin.sock",
            "unix:/a",
        ] {
            let address: AdminAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
        }
        let long = format!("unix:/{}", "a".repeat(MAX_PATH - 1));
        assert!(long.parse::<AdminAddress>().is_ok());
        for text in [
            "",
            "127.0.0.1",
            "localhost:9901",
            "/run/ppv2/admin.sock",
            "unix:",
            "unix:@abstract",
            "unix:admin.sock",
            "unix:/run/",
            "unix:/run/\u{1}",
            &format!("{long}a"),
        ] {
            assert!(text.parse::<AdminAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn paths_of_sockets_are_absolute() {
        let path: SocketPath = "/run/ppv2/upgrade.sock".parse().unwrap();
        assert_eq!(path.path(), Path::new("/run/ppv2/upgrade.sock"));
        assert_eq!(path.to_string(), "/run/ppv2/upgrade.sock");
        for text in [
            "",
            "upgrade.sock",
            "unix:/run/upgrade.sock",
            "/run/",
            "@upgrade",
        ] {
            let error = text.parse::<SocketPath>().unwrap_err().to_string();
            assert!(
                error.contains("write it as /run/ppv2/upgrade.sock"),
                "{error}"
            );
        }
    }
}
