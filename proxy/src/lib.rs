//! A UDP reverse proxy that tells servers who their clients are.
//!
//! # A datagram's way
//!
//! ```text
//!            client                                            server
//!              │  datagram                                       ▲
//!              ▼                                                 │ [header][datagram]
//!  net::Socket::listen            one per worker      net::Socket::connect
//!  (the listener's address)       and address         (one per session)
//!              │                                                 ▲
//!              │ net::Batch                                      │ net::Socket::send
//!              ▼                                                 │
//!  ┌──────────────────────────── worker ─────────────────────────┴─┐
//!  │ take_from_clients: session::Table ────────────▶ mode::Prefix  │
//!  │                    whose is it?                 what in front?│
//!  │                      │ a new client's            ▲            │
//!  │                      ▼                           │            │
//!  │                    worker::open ─▶ upstream ─────┘            │
//!  │                    may it?         which server?              │
//!  │                                                               │
//!  │ what is refused or can't go: counters::DropReason             │
//!  │                                                               │
//!  │ take_from_server:  session::Table                             │
//!  │                    whose reply is it?                         │
//!  └───────────┬─────────────────────────────────────────▲─────────┘
//!              │ from the address the client wrote to    │ reply
//!              ▼                                         │
//!            client                                    server
//! ```
//!
//! The kernel spreads clients over the workers' sockets (SO_REUSEPORT), always
//! the same client to the same worker. The header is never copied: it and the
//! datagram are handed to the kernel as two pieces of one message.
//!
//! # Where things live
//!
//! The control path knows the configuration and the operating system. The data
//! path knows neither, and imports downward only; `tests/architecture.rs` holds
//! it to that.
//!
//! | control path | |
//! |---|---|
//! | [`config`] | TOML or flags, turned once into a valid [`config::Config`] |
//! | [`runtime`] | binds sockets, starts workers, has them go by other configurations, drains them at a stop |
//! | [`privilege`] | an ordinary user with the capabilities that are needed |
//! | [`roster`] | the numbers that listeners and servers go by, also after a reload |
//! | [`limits`] | how many sessions this host can bear |
//! | [`holder`] | who holds an address that can't be bound |
//! | [`doctor`] | what this host lacks for a configuration |
//! | [`returns`], [`host`] | how replies return in each mode, and what this host says of its routes |
//! | [`names`] | looks up servers that are names, again and again |
//! | [`health`] | finds out which servers serve, and steers workers accordingly |
//! | [`admin`], [`metrics`], [`watch`], [`access_log`] | what operators see |
//! | [`commands`] | `check`, `decode`, `demo`, `doctor`, `host-setup`, `whoami`; `run` is [`runtime`] |
//!
//! | data path | imports |
//! |---|---|
//! | [`worker`]: the story of a datagram | all below |
//! | … `open`, `link`: a new session and its socket; `network`: another socket for one; `onward`: to the server; `replies`: to clients | |
//! | [`session`]: whose datagram is this, and when a session ends; no I/O, `now` is an argument | `address` |
//! | [`upstream`]: which server | `address`, `mode` |
//! | [`mode`]: what is put in front | `address`, `net` (for the length of a header) |
//! | [`counters`]: what is counted, and every reason for a drop | |
//! | [`net`]: batches, sockets, every system call; all unsafe code | |
//! | [`address`]: client, listener, server, as types of their own | |

// The data path stands alone where the control path is not asked for.
#[cfg(feature = "control")]
pub mod access_log;
pub mod address;
#[cfg(feature = "control")]
pub mod admin;
#[cfg(feature = "control")]
pub mod cli;
#[cfg(feature = "control")]
pub mod commands;
#[cfg(feature = "control")]
pub mod config;
pub mod counters;
#[cfg(feature = "control")]
pub mod doctor;
#[cfg(feature = "control")]
mod files;
#[cfg(feature = "control")]
pub mod health;
#[cfg(feature = "control")]
pub mod holder;
#[cfg(feature = "control")]
pub mod host;
#[cfg(feature = "control")]
pub mod limits;
#[cfg(feature = "control")]
pub mod memory;
#[cfg(feature = "control")]
pub mod metrics;
pub mod mode;
#[cfg(feature = "control")]
pub mod names;
pub mod net;
#[cfg(feature = "control")]
pub mod privilege;
#[cfg(feature = "control")]
pub mod returns;
#[cfg(feature = "control")]
pub mod roster;
#[cfg(feature = "control")]
pub mod runtime;
pub mod session;
pub mod upstream;
#[cfg(feature = "control")]
pub mod watch;
pub mod worker;
