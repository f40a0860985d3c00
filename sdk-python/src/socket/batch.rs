//! Many datagrams in one call, the interpreter's lock given back meanwhile.

use std::ops::Range;
use std::time::Instant;

use ppv2_sdk::Recipient;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

use super::bursts::Reply;
use super::core::{Core, Drops, Received};
use super::descriptor::{Descriptor, Failure, MOST_DROPS_IN_A_ROW, Wait};
use super::errors;
use super::slots::Slots;
use crate::arguments;

impl Core {
    /// Waits for one datagram, and takes what else is there, as many as the
    /// kernel puts into that many slots.
    pub(crate) fn receive_batch<'py>(
        &self,
        py: Python<'py>,
        count: usize,
    ) -> PyResult<Bound<'py, PyList>> {
        let descriptor = self.descriptor(py)?;
        let wait = self.wait(false);
        let mut slots = Slots::take(count);
        let mut received = Vec::with_capacity(count);
        let mut drops = Drops::default();
        loop {
            let result = py.detach(|| {
                self.receive_many(&descriptor, wait, &mut slots, &mut received, &mut drops)
            });
            drops.log(py);
            match result {
                Ok(()) if received.is_empty() => py.check_signals()?,
                Ok(()) => break,
                Err(Failure::Interrupted) => py.check_signals()?,
                Err(failure) => return Err(errors::failure(py, failure)),
            }
        }
        let addresses = Received::addresses(py, &received, &self.ways)?;
        let pairs: Vec<_> = received
            .iter()
            .zip(addresses)
            .map(|((at, one), address)| {
                let datagram = slots.bytes(at.clone());
                (PyBytes::new(py, one.payload(datagram)), address)
            })
            .collect();
        slots.give_back();
        PyList::new(py, pairs)
    }

    /// Receives until there is something for the application in the slots, or
    /// nothing but bad datagrams have come for long.
    fn receive_many(
        &self,
        descriptor: &Descriptor,
        wait: Wait,
        slots: &mut Slots,
        received: &mut Vec<(Range<usize>, Received)>,
        drops: &mut Drops,
    ) -> Result<(), Failure> {
        loop {
            slots.fill(descriptor, wait)?;
            let now = Instant::now();
            for ((peer, local), at) in slots.datagrams() {
                if let Some(one) = self.admit(now, peer, local, slots.bytes(at.clone()), drops) {
                    received.push((at, one));
                }
            }
            if !received.is_empty() {
                return Ok(());
            }
            wait.after_drops(drops.count)?;
            if drops.look_up() || drops.count >= MOST_DROPS_IN_A_ROW {
                return Ok(());
            }
        }
    }

    /// Sends to clients in turn, and returns how many datagrams are dealt with:
    /// sent, or counted as without a route.
    pub(crate) fn send_batch(&self, datagrams: &Bound<'_, PyAny>) -> PyResult<usize> {
        let py = datagrams.py();
        let descriptor = self.descriptor(py)?;
        let now = Instant::now();
        let mut owned = Vec::new();
        for (index, datagram) in datagrams.try_iter()?.enumerate() {
            let (data, address) = pair(index, &datagram?)?;
            let data = match data.cast_into::<PyBytes>() {
                Ok(bytes) => bytes,
                Err(other) => {
                    let name = format!("datagrams[{index}][0]");
                    arguments::bytes_like(&name, &other.into_inner())?
                }
            };
            owned.push((data, self.find_way_to(now, &address)?.ok()));
        }
        let bursts = descriptor.bursts()?;
        let wait = self.wait(false);
        let mut done = 0;
        // A run of datagrams that have a way, and those after it that have none.
        for run in owned.chunk_by(|(_, before), (_, after)| before.is_some() || after.is_none()) {
            let replies: Vec<Reply<'_>> = run
                .iter()
                .filter_map(|(data, way)| Some((data.as_bytes(), Recipient::Way((*way)?))))
                .collect();
            let mut sent = 0;
            while sent < replies.len() {
                match py.detach(|| bursts.send(&descriptor, &replies[sent..], wait)) {
                    Ok(more) => {
                        self.replies_sent(more);
                        sent += more;
                    }
                    Err(Failure::Interrupted) => py.check_signals()?,
                    // What fails now fails again at the next call, which can say so.
                    Err(_) if done + sent > 0 => return Ok(done + sent),
                    Err(failure) => return Err(errors::failure(py, failure)),
                }
            }
            self.replies_without_route(run.len() - sent);
            done += run.len();
        }
        Ok(done)
    }
}

fn pair<'py>(
    index: usize,
    datagram: &Bound<'py, PyAny>,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    let pair = datagram.cast::<PyTuple>().map_err(PyErr::from);
    pair.and_then(|pair| pair.extract()).map_err(|_: PyErr| {
        let name = format!("datagrams[{index}]");
        arguments::type_error(&name, "a pair (data, address)", datagram)
    })
}
