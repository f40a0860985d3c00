//! `libppv2_preload.so`: shows an unmodified UDP server its clients.
//!
//! Loaded by `LD_PRELOAD`, it takes the place of the C library's socket functions. On
//! the UDP sockets that it takes over, it removes the PROXY protocol header of each
//! datagram, reports the client's address to the program, and sends replies the way that
//! the client's latest datagram came. All other descriptors pass untouched.
//!
//! | module | what it does |
//! |---|---|
//! | `calls` | the functions that the program calls instead of the C library's |
//! | `receive`, `send`, `control`, `names`, `buffers` | the way of a datagram |
//! | `lifecycle`, `passed`, `connect`, `wait` | sockets that begin, end, connect and are waited for |
//! | `registry`, `socket`, `try_lock` | which descriptors are taken over, per process |
//! | `table`, `arena`, `this_thread` | clients and their reply paths, shared by forked processes |
//! | `settings`, `stats` | the environment variables, the statistics file |
//! | `real`, `options`, `boundary`, `signals` | the C library's own functions; what may not cross into C |

#![expect(
    unsafe_code,
    reason = "the functions of the C library have no safe form"
)]
#![allow(
    clippy::cast_possible_truncation,
    reason = "what the C library counts as int or socklen_t is short"
)]
#![allow(
    clippy::unnecessary_cast,
    reason = "the lengths of messages have another type in each C library"
)]
#![cfg_attr(
    test,
    allow(
        dead_code,
        reason = "the functions that the program calls are not exported in tests"
    )
)]

mod arena;
mod boundary;
mod buffers;
mod calls;
mod connect;
mod control;
mod lifecycle;
mod names;
mod options;
mod passed;
mod real;
mod receive;
mod recent;
mod registry;
mod send;
mod settings;
mod signals;
mod socket;
mod stats;
mod table;
#[cfg(test)]
mod testing;
mod this_thread;
mod try_lock;
mod wait;

/// Runs before the program's `main`. Not in this crate's own unit tests.
#[cfg(not(test))]
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = {
    extern "C" fn start() {
        lifecycle::start();
    }
    start
};
