//! The one place that writes to standard output.

use std::io::{self, Write};

use anyhow::{Context, Result};

/// Prints a line at once, also into a pipe.
pub(crate) fn line(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")
        .and_then(|()| out.flush())
        .context("writing to standard output")
}

/// Tells of progress, on standard error; a closed one is no failure.
pub(crate) fn progress(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}
