//! `admin.token_file`: the token without which nothing can be changed over HTTP.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use subtle::ConstantTimeEq;

use super::ConfigError;
use super::error::refuse;
use crate::files;

/// The fewest characters of a token, which nobody guesses, and the most.
const LEN: std::ops::RangeInclusive<usize> = 16..=1024;

/// The most bytes of a token's file: a token, with space around it.
const MAX_FILE: u64 = 4096;

/// How to make one.
const MAKE: &str = "openssl rand -hex 32 >FILE; chmod 600 FILE";

/// What a request must carry.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Token(Arc<str>);

/// Leaves out the token.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").finish_non_exhaustive()
    }
}

impl Token {
    /// Reads a token. Errors never show what is in the file.
    pub(super) fn read(file: &Path) -> Result<Self, ConfigError> {
        let name = file.display();
        let make = MAKE.replace("FILE", &name.to_string());
        let bad = |what: String, hint: String| refuse(format!("token file {name} {what}"), hint);
        let mode = match std::fs::metadata(file) {
            Ok(metadata) => metadata.mode(),
            Err(error) => {
                return bad(
                    format!("can't be read: {error}"),
                    format!("make it: {make}"),
                );
            }
        };
        if mode & 0o007 != 0 {
            let mode = mode & 0o777;
            return bad(
                format!("can be used by everybody (mode {mode:03o})"),
                format!("chmod 600 {name}, and make another token: openssl rand -hex 32"),
            );
        }
        let text = match files::read(file, MAX_FILE) {
            Ok(text) => text,
            Err(error) => {
                return bad(
                    format!("can't be read: {error}"),
                    format!("let the proxy's user own it (chown), or make it: {make}"),
                );
            }
        };
        let token = text.trim();
        // RFC 6750, section 2.1, has fewer characters still.
        if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return bad(
                "has more than one word, or characters that a header can't have".to_owned(),
                format!("make it: {make}"),
            );
        }
        if !LEN.contains(&token.len()) {
            let len = token.len();
            return bad(
                format!("has a token of {len} characters"),
                format!("a token has {} to {}: {make}", LEN.start(), LEN.end()),
            );
        }
        Ok(Self(token.into()))
    }

    /// Whether this is the token. The time that it takes shows its length alone.
    pub(crate) fn is(&self, other: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(other).into()
    }
}
