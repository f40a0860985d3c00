//! Counts lost lines, and logs when losses begin and end.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Unlogged;
use crate::config::AccessLog;

/// The time between two warnings of lost lines.
const QUIET: Duration = Duration::from_secs(60);

/// Lines that could not be written.
pub(super) struct Losses {
    path: PathBuf,
    unlogged: Unlogged,
    /// Lines lost since one was written.
    lost: u64,
    warned: Option<Instant>,
}

impl Losses {
    pub(super) fn new(log: &AccessLog, unlogged: Unlogged) -> Self {
        Self {
            path: log.shown_path().to_owned(),
            unlogged,
            lost: 0,
            warned: None,
        }
    }

    /// The file or socket, for logs.
    pub(super) fn path(&self) -> std::path::Display<'_> {
        match self.path == Path::new("-") {
            true => Path::new("standard output").display(),
            false => self.path.display(),
        }
    }

    /// Whether lines have been lost since one was written.
    pub(super) fn are_going_on(&self) -> bool {
        self.lost > 0
    }

    /// Counts so many lines, none if there was none to lose yet.
    pub(super) fn note(&mut self, lost: u64, error: &io::Error) {
        self.unlogged.fetch_add(lost, Ordering::Relaxed);
        let is_news = self.lost == 0;
        self.lost += lost;
        // A disk that is nearly full has room for a line now and then.
        if is_news && self.warned.is_none_or(|told| told.elapsed() >= QUIET) {
            self.warned = Some(Instant::now());
            tracing::warn!(
                path = %self.path(),
                %error,
                "the access log can't be written; its lines are lost, and counted as ppv2_sessions_unlogged_total, until it can"
            );
        }
    }

    /// Notes that a line was written.
    pub(super) fn end(&mut self) {
        let lost = std::mem::take(&mut self.lost);
        if lost > 0 {
            tracing::info!(path = %self.path(), lost, "the access log is written again");
        }
    }
}
