//! `recvmsg` and `sendmsg`: Python's own socket moves the ancillary data, whose
//! many kinds it knows, and the gate decides on what comes.

use std::time::Instant;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};
use rustix::event::PollFlags;
use rustix::io::Errno;

use super::buffers::Flags;
use super::core::{Drops, Received};
use super::descriptor::{self, Descriptor, Failure, Wait};
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
        let arguments = (MAX_DATAGRAM, ancbufsize, flags.bits());
        let mut drops = Drops::default();
        loop {
            let receive = || socket.call_method1("recvmsg", arguments);
            let Some(result) = persist(py, &descriptor, wait, PollFlags::IN, receive)? else {
                continue;
            };
            let (datagram, ancdata, msg_flags, peer): (_, _, _, Bound<'_, PyAny>) =
                result.extract()?;
            let datagram: Bound<'py, PyBytes> = datagram;
            let peer = address::from_python("peer", &peer)?;
            if let Some(received) =
                self.core
                    .admit(Instant::now(), peer, datagram.as_bytes(), &mut drops)
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
