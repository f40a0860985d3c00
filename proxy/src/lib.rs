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
//! | crate | |
//! |---|---|
//! | `ppv2-udp` | batches, sockets, every system call of the data path; all unsafe code |
//! | `ppv2-engine` | the data path; it knows neither the configuration nor tokio |
//! | `ppv2-hosts` | `doctor` and `host-setup` |
//! | this one | the command line, the configuration, and all that runs beside the data path |
//!
//! | module | |
//! |---|---|
//! | [`config`] | TOML or flags, turned once into a valid [`config::Config`] |
//! | [`runtime`] | binds sockets, starts workers, has them go by other configurations, drains them at a stop |
//! | [`privilege`] | drops root and capabilities |
//! | [`registry`] | the shared objects of listeners and servers, also after a reload |
//! | [`limits`] | how many sessions this host can bear |
//! | [`port_owner`] | which processes own an address that can't be bound |
//! | [`topology`] | the part of a configuration that [`ppv2_hosts`] needs, for `doctor` and `host-setup` |
//! | [`discovery`] | looks up servers that are names, and keeps their last answers |
//! | [`health`] | finds out which servers serve, and steers workers accordingly |
//! | [`admin`], [`metrics`], [`watch`], [`access_log`] | what operators see |
//! | [`commands`] | `check`, `decode`, `demo`, `whoami`; `run` is [`runtime`] |

pub mod access_log;
pub mod admin;
pub mod cli;
pub mod commands;
pub mod config;
pub mod discovery;
mod files;
pub mod health;
pub mod limits;
pub mod memory;
pub mod metrics;
pub mod port_owner;
pub mod privilege;
pub mod registry;
pub mod runtime;
pub mod topology;
pub mod watch;
