//! Where datagrams are received: one buffer for each thread, with room for the
//! longest, so that a header never costs the application's buffer any bytes.

use std::cell::RefCell;

#[cfg(feature = "tokio")]
use bytes::BufMut;
use ppv2_udp::MAX_DATAGRAM;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Runs `receive` with this thread's buffer. It must not call `with` again.
pub(crate) fn with<T>(receive: impl FnOnce(&mut [u8]) -> T) -> T {
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(MAX_DATAGRAM, 0);
        receive(buffer)
    })
}

/// Copies what fits of `payload` to the front of `to`, and returns how much
/// that was. The rest is lost, as with any datagram socket.
pub(crate) fn copy(payload: &[u8], to: &mut [u8]) -> usize {
    let len = payload.len().min(to.len());
    to[..len].copy_from_slice(&payload[..len]);
    len
}

/// As `copy`, to the end of what grows.
#[cfg(feature = "tokio")]
pub(crate) fn append(payload: &[u8], to: &mut impl BufMut) -> usize {
    let len = payload.len().min(to.remaining_mut());
    to.put_slice(&payload[..len]);
    len
}
