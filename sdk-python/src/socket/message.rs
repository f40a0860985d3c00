//! `recvmsg` and `sendmsg`: Python's own socket moves the ancillary data, whose
//! many kinds it knows, and the gate decides on what comes.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};
use rustix::event::PollFlags;
use rustix::io::Errno;

use super::buffers::Flags;
use super::core::{Drops, Received};
use super::descriptor::{self, Descriptor, Failure, Wait};
#[cfg(target_os = "linux")]
use super::packet_info;
use super::{Socket, address, errors};
use crate::arguments;

/// Room for the longest datagram.
const MAX_DATAGRAM: usize = 65_535;

/// A client's datagram as `recvmsg` returned it.
pub(crate) struct Message<'py> {
    datagram: Bound<'py, PyBytes>,
    received: Received,
    ancdata: Bound<'py, PyAny>,
    msg_flags: u32,
    address: Bound<'py, PyAny>,
}

impl<'py> Message<'py> {
    pub(crate) fn payload(&self) -> &[u8] {
        self.received.payload(self.datagram.as_bytes())
    }

    /// The tuple that `recvmsg` or `recvmsg_into` returns, `data` in front.
    pub(crate) fn result(
        &self,
        data: Bound<'py, PyAny>,
        truncated: bool,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let py = data.py();
        let mut msg_flags = self.msg_flags;
        if truncated {
            msg_flags |= py
                .import("socket")?
                .getattr("MSG_TRUNC")?
                .extract::<u32>()?;
        }
        (data, &self.ancdata, msg_flags, &self.address).into_pyobject(py)
    }
}

impl Socket {
    pub(super) fn receive_message<'py>(
        &self,
        py: Python<'py>,
        ancbufsize: usize,
        flags: Flags,
    ) -> PyResult<Message<'py>> {
        let descriptor = self.core.descriptor(py)?;
        self.core.check_not_joined(py)?;
        let wait = self.core.wait(flags.dontwait);
        let socket = self.python.bind(py);
        let arguments = (MAX_DATAGRAM, ancbufsize + room(&descriptor), flags.bits());
        let mut drops = Drops::default();
        loop {
            let receive = || socket.call_method1("recvmsg", arguments);
            let Some(result) = persist(py, &descriptor, wait, PollFlags::IN, receive)? else {
                continue;
            };
            let (datagram, ancdata, msg_flags, peer): (_, Bound<'py, PyAny>, _, Bound<'_, PyAny>) =
                result.extract()?;
            let datagram: Bound<'py, PyBytes> = datagram;
            let peer = address::from_python("peer", &peer)?;
            let (ancdata, local) = take_packet_info(&descriptor, ancdata, peer)?;
            if let Some(received) =
                self.core
                    .admit(Instant::now(), peer, local, datagram.as_bytes(), &mut drops)
            {
                let address = received.address(py, &self.core.ways)?;
                return Ok(Message {
                    datagram,
                    received,
                    ancdata,
                    msg_flags,
                    address,
                });
            }
            drops.log(py);
            wait.after_drops(drops.count)
                .map_err(|failure| errors::failure(py, failure))?;
            py.check_signals()?;
        }
    }

    pub(super) fn send_message(
        &self,
        data: &[u8],
        ancdata: &Bound<'_, PyAny>,
        flags: Flags,
        address: &Bound<'_, PyAny>,
    ) -> PyResult<usize> {
        let py = ancdata.py();
        let descriptor = self.core.descriptor(py)?;
        let way = self.core.way_to(address)?;
        if way.from.is_some() {
            return Err(arguments::value_error(
                "ancdata",
                "none with reply_from='listener'",
                ancdata,
            ));
        }
        let wait = self.core.wait(flags.dontwait);
        let ancdata = leave_from(way.local, ancdata)?;
        let parts = (PyBytes::new(py, data),);
        let arguments = (
            parts,
            ancdata,
            flags.bits(),
            address::to_python(py, way.to)?,
        );
        let arguments = arguments.into_pyobject(py)?;
        let socket = self.python.bind(py);
        let send = || socket.call_method1("sendmsg", &arguments);
        let sent = match persist(py, &descriptor, wait, PollFlags::OUT, send)? {
            Some(sent) => sent,
            // What failed was an earlier datagram, so send this one again.
            None => send()?,
        };
        self.core.replies_sent(1);
        sent.extract()
    }
}

/// Bytes for what the application didn't ask for.
fn room(descriptor: &Descriptor) -> usize {
    if descriptor.packet_info() { 128 } else { 0 }
}

/// Takes the address that a datagram was sent to from its ancillary data, and leaves
/// it there for the application if that asked for it.
fn take_packet_info<'py>(
    descriptor: &Descriptor,
    ancdata: Bound<'py, PyAny>,
    peer: SocketAddr,
) -> PyResult<(Bound<'py, PyAny>, Option<IpAddr>)> {
    #[cfg(target_os = "linux")]
    if descriptor.packet_info() {
        let py = ancdata.py();
        let (rest, mut local) = (PyList::empty(py), None);
        for item in ancdata.try_iter()? {
            let item = item?;
            let (level, kind, data): (i32, i32, Bound<'_, PyBytes>) = item.extract()?;
            let kind = (level, kind);
            local = packet_info::better_of_bytes(local, kind, data.as_bytes(), peer.ip());
            let ours = kind == packet_info::IPV4 || kind == packet_info::IPV6;
            if !ours || descriptor.packet_info_asked() {
                rest.append(item)?;
            }
        }
        return Ok((rest.into_any(), local));
    }
    let _ = (descriptor, peer);
    Ok((ancdata, None))
}

/// Ancillary data with the address that the datagram leaves from, unless the
/// application names one.
fn leave_from<'py>(
    local: Option<IpAddr>,
    ancdata: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    #[cfg(target_os = "linux")]
    if let Some(local) = local {
        let py = ancdata.py();
        let all = PyList::empty(py);
        let mut named = false;
        for item in ancdata.try_iter()? {
            let item = item?;
            let (level, kind, _): (i32, i32, Bound<'_, PyAny>) = item.extract()?;
            named |= [packet_info::IPV4, packet_info::IPV6].contains(&(level, kind));
            all.append(item)?;
        }
        if !named {
            let ((level, kind), data) = packet_info::to_send(local);
            all.append((level, kind, PyBytes::new(py, &data)))?;
        }
        return Ok(all.into_any());
    }
    let _ = local;
    Ok(ancdata.clone())
}

/// Calls a method of Python's socket, which itself never waits where `wait` has
/// an end, until it has a result. `None` for the echo of a datagram sent earlier.
fn persist<'py>(
    py: Python<'py>,
    descriptor: &Descriptor,
    wait: Wait,
    what: PollFlags,
    call: impl Fn() -> PyResult<Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    loop {
        let error = match call() {
            Ok(result) => return Ok(Some(result)),
            Err(error) => error,
        };
        match errors::number(py, &error) {
            Some(Errno::AGAIN) => {}
            Some(number) if descriptor::is_echo_of_earlier_send(number) => return Ok(None),
            _ => return Err(error),
        }
        match py.detach(|| descriptor.wait_out(Errno::AGAIN, wait, what)) {
            Ok(()) => {}
            Err(Failure::Interrupted) => py.check_signals()?,
            Err(failure) => return Err(errors::failure(py, failure)),
        }
    }
}
