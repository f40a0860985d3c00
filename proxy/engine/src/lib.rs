//! The data path of the proxy. It knows neither the configuration nor tokio.
//!
//! | module | |
//! |---|---|
//! | [`worker`] | receives datagrams, finds or begins their session, and sends them on |
//! | [`session`] | whose datagram is this, and when a session ends; no I/O, `now` is an argument |
//! | [`upstream`] | which server a new session gets |
//! | [`mode`] | the header in front of a datagram, and the source address |
//! | [`counters`] | what is counted, and every reason for a drop |
//! | [`address`] | client, listener and server addresses as types of their own |

pub mod address;
pub mod counters;
pub mod mode;
pub mod session;
pub mod upstream;
pub mod worker;
