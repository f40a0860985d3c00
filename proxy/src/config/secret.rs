//! Files with secrets: keys and tokens.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::ConfigError;
use super::error::refuse;
use crate::files;

/// A file with a secret.
pub(super) struct Secret<'s> {
    /// What errors call it.
    pub(super) what: &'s str,
    pub(super) file: &'s Path,
    /// The most bytes that it may have.
    pub(super) max: u64,
    /// Permissions that it may not have: those by which it may have been read.
    pub(super) forbidden: u32,
    /// How to make it.
    pub(super) make: &'s str,
    /// What to do if others may have read it.
    pub(super) leaked: &'s str,
}

impl Secret<'_> {
    /// The text of the file. Errors never show what is in it.
    pub(super) fn read(&self) -> Result<String, ConfigError> {
        let (name, make) = (self.file.display(), self.make);
        let bad = |why: String, hint: String| refuse(format!("{} {name} {why}", self.what), hint);
        let mode = match std::fs::metadata(self.file) {
            Ok(metadata) => metadata.mode() & 0o777,
            Err(error) => {
                return bad(
                    format!("can't be read: {error}"),
                    format!("make it: {make}"),
                );
            }
        };
        if mode & self.forbidden != 0 {
            let others = match self.forbidden {
                0o007 => "everybody",
                _ => "others than its owner",
            };
            return bad(
                format!("can be used by {others} (mode {mode:03o})"),
                format!("chmod 600 {name}; {}", self.leaked),
            );
        }
        files::read(self.file, self.max).or_else(|error| {
            bad(
                format!("can't be read: {error}"),
                format!("let the proxy's user own it (chown), or make it: {make}"),
            )
        })
    }
}
