//! Handing over sockets and sessions to another process of the proxy.

#![cfg_attr(
    not(test),
    allow(dead_code, reason = "the takeover is about to use the channel")
)]

mod channel;
