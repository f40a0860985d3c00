//! dlopen, without RTLD_DEEPBIND.
//!
//! A library that is loaded with this flag looks for functions in the libraries that it needs,
//! the C library among them, before it comes to this one. PHP loads its extensions so: their
//! sockets would not be taken over, and the program would take headers for data and believe
//! everybody.

use std::arch::naked_asm;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{RTLD_DEEPBIND, c_char, c_int, c_void};

/// Goes on in the real function with the caller's return address: from it, the C library knows
/// whose DT_RUNPATH to search.
#[cfg(target_arch = "x86_64")]
#[cfg_attr(not(test), unsafe(no_mangle))]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void {
    naked_asm!(
        "push rdi",
        "push rsi",
        "sub rsp, 8",
        "call {real}",
        "add rsp, 8",
        "pop rsi",
        "pop rdi",
        "and esi, {others}",
        "jmp rax",
        real = sym real,
        others = const !RTLD_DEEPBIND,
    )
}

/// As for x86-64.
#[cfg(target_arch = "aarch64")]
#[cfg_attr(not(test), unsafe(no_mangle))]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void {
    naked_asm!(
        "stp x29, x30, [sp, #-32]!",
        "stp x0, x1, [sp, #16]",
        "bl {real}",
        "mov x16, x0",
        "ldp x0, x1, [sp, #16]",
        "ldp x29, x30, [sp], #32",
        "and w1, w1, #{others}",
        "br x16",
        real = sym real,
        others = const !RTLD_DEEPBIND,
    )
}

/// The real dlopen. Before glibc 2.34 it is in libdl, which may be loaded later than this
/// library.
extern "C" fn real() -> *mut c_void {
    static FOUND: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
    let mut found = FOUND.load(Ordering::Relaxed);
    if found.is_null() {
        // SAFETY: the name ends with a zero.
        found = unsafe { libc::dlsym(libc::RTLD_NEXT, c"dlopen".as_ptr()) };
        if found.is_null() {
            return missing as *mut c_void;
        }
        FOUND.store(found, Ordering::Relaxed);
    }
    found
}

/// Nothing can be loaded.
extern "C" fn missing(_file: *const c_char, _flags: c_int) -> *mut c_void {
    ptr::null_mut()
}
