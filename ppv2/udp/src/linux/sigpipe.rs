//! What the process was started with for SIGPIPE, which Rust's runtime ignores before `main`:
//! for a program that runs another one in its place.

use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

static WAS_IGNORED: AtomicBool = AtomicBool::new(false);

// SAFETY: the section holds addresses of functions that the C library calls once each, before
// `main`, with arguments that such a function may ignore.
#[unsafe(link_section = ".init_array")]
#[used]
static BEFORE_MAIN: extern "C" fn() = note;

/// Has no need of Rust's runtime, which starts later.
extern "C" fn note() {
    // SAFETY: all zeros are a valid sigaction, of which the kernel writes all that is read.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: it changes nothing, and writes to one sigaction.
    let result = unsafe { libc::sigaction(libc::SIGPIPE, ptr::null(), &raw mut action) };
    let is_ignored = result == 0 && action.sa_sigaction == libc::SIG_IGN;
    WAS_IGNORED.store(is_ignored, Ordering::Relaxed);
}

/// Handles SIGPIPE as the process that started this one said: a program that is executed next
/// inherits it.
pub fn restore_sigpipe() {
    if WAS_IGNORED.load(Ordering::Relaxed) {
        return;
    }
    // SAFETY: the default needs no handler; a thread that writes to a closed pipe from now on
    // ends the process, as the caller asked for.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}
