//! The examples, spoken to as a proxy does and as clients do through the real one.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod answers;
mod http3;
mod quic_bulk;
mod running;
mod through_proxy;
