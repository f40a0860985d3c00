//! `admin.token_file`: the token without which nothing can be changed over HTTP.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use subtle::ConstantTimeEq;

use super::ConfigError;
use super::error::refuse;
use super::secret::Secret;

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
        let text = Secret {
            what: "token file",
            file,
            max: MAX_FILE,
            // systemd's LoadCredential= gives the group the right to read.
            forbidden: 0o007,
            make: &make,
            leaked: "make another token: openssl rand -hex 32",
        };
        let text = text.read()?;
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
