//! A UDP proxy that passes each client's real address to your servers.
//!
//! `docs/design/architecture.md` follows a datagram through the crates.
//!
//! # Where things live
//!
//! | crate | |
//! |---|---|
//! | `ppv2-udp` | batches, sockets, every system call of the data path; all unsafe code |
//! | `ppv2-engine` | the data path, with a drawing of it; it knows neither the configuration nor tokio |
//! | `ppv2-hosts` | `doctor` and `host-setup` |
//! | this one | the command line, the configuration, and all that runs beside the data path |
//!
//! | module | |
//! |---|---|
//! | [`config`] | TOML or flags, turned once into a valid [`config::Config`] |
//! | [`runtime`] | binds sockets, starts workers, sends them snapshots, drains them at a stop |
//! | [`privilege`] | drops root and capabilities |
//! | [`registry`] | the shared objects of listeners and servers, also after a reload |
//! | [`capacity`] | how many sessions this host allows |
//! | [`port_owner`] | which processes own an address that can't be bound |
//! | [`topology`] | the part of a configuration that [`ppv2_hosts`] needs, for `doctor` and `host-setup` |
//! | [`discovery`] | looks up servers that are names, and keeps their last answers |
//! | [`health`] | finds out which servers serve |
//! | [`admin`], [`metrics`], [`log`], [`drop_log`], [`access_log`] | what operators see |
//! | [`admin_client`] | asks the admin API, for commands |
//! | [`commands`] | every command but `run`, which is [`runtime`], `doctor` and `host-setup` |

pub mod access_log;
pub mod admin;
pub mod admin_client;
pub mod capacity;
pub mod cli;
pub mod commands;
pub mod config;
pub mod discovery;
pub mod drop_log;
mod files;
pub mod health;
pub mod log;
pub mod memory;
pub mod metrics;
pub mod port_owner;
pub mod privilege;
pub mod registry;
pub mod runtime;
pub mod topology;
