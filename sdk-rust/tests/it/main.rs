//! The sockets of the SDK against real ones on this host.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

#[cfg(target_os = "linux")]
mod batches;
#[cfg(target_os = "linux")]
mod from_listener;
#[cfg(all(feature = "quinn", target_os = "linux"))]
mod quinn_from_listener;
#[cfg(feature = "quinn")]
mod quinn_tagged;
mod remember;
mod std_socket;
mod tagged;
#[cfg(feature = "tokio")]
mod tokio_socket;
#[cfg(target_os = "linux")]
mod wildcard;
