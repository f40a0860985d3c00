//! The data path of the proxy. It knows neither the configuration nor tokio.
//!
//! # The path of a datagram
//!
//! ```text
//!            client                                            server
//!              │ datagram                                         ▲
//!              ▼                                                  │ [header][datagram]
//!   listener's socket: one per worker            upstream_socket: one per session
//!              │ recvmmsg                                         ▲ sendmmsg
//!  ┌───────────▼──────────────────── worker ──────────────────────┴────────┐
//!  │ client_to_server: session::Table ─ known ──────────▶ mode::Prefix     │
//!  │                     │ new                                 ▲           │
//!  │                     ▼                                     │           │
//!  │                   new_session ─▶ upstream ─▶ session_socket           │
//!  │                                                                       │
//!  │ reconfigure: compares all sessions with a new snapshot                │
//!  │                                                                       │
//!  │ server_to_client: session::Table                                      │
//!  └───────────┬────────────────────────────────────────────────▲──────────┘
//!              │ from the address the client wrote to           │ reply
//!              ▼                                                │
//!            client                                           server
//! ```
//!
//! What is refused or can't be sent counts under a `counters::DropReason`. The kernel
//! spreads clients over the workers' sockets (SO_REUSEPORT), always the same client to the
//! same worker. The header is never copied: it and the datagram are handed to the kernel as
//! two pieces of one message.
//!
//! # Modules
//!
//! | module | |
//! |---|---|
//! | [`worker`] | receives datagrams, finds or begins their session, and sends them on |
//! | [`session`] | which client's datagram or reply is this, and when a session ends; no I/O, `now` is an argument |
//! | [`snapshot`] | all that the control path tells workers, as it is at one time |
//! | [`listener`], [`server`] | what workers, sessions and the control path share of each |
//! | [`upstream`] | which server a new session gets |
//! | [`accept`] | headers in front of what other proxies pass on |
//! | [`mode`] | the header in front of a datagram, and the source address |
//! | [`own_tlvs`] | what the proxy adds to headers by itself |
//! | `upstream_socket` | the socket by which a session's datagrams leave |
//! | [`capacity`], [`client_limits`], [`client_ports`] | what all workers together may hold, what each client may take, and clients' own ports in use |
//! | [`busiest`] | which clients send and get the most, in bounded memory |
//! | [`source_addresses`] | which address of a source network a new session gets |
//! | [`handover`] | what a worker hands over to another process |
//! | [`tag`] | what a header carries so that the reply says for which client it is |
//! | [`counters`] | what is counted, and every reason for a drop |
//! | [`address`] | client, listener and server addresses as types of their own |

pub mod accept;
pub mod address;
pub mod busiest;
pub mod capacity;
pub mod client_limits;
pub mod client_ports;
pub mod counters;
pub mod handover;
pub mod listener;
pub mod mode;
pub mod own_tlvs;
pub mod server;
pub mod session;
pub mod snapshot;
pub mod source_addresses;
pub mod tag;
pub mod upstream;
mod upstream_socket;
pub mod worker;
