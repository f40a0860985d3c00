//! `recvmsg` and `sendmsg`: Python's own socket moves the ancillary data, whose many
//! kinds it knows, and the demux decides on the datagrams.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::time::Instant;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};
use rustix::event::PollFlags;

use super::addresses::{Heard, from_python, to_python};
use super::buffers::Flags;
use super::core::{Core, MAX_DATAGRAM, Wait};
use super::errors::Failure;
use super::{Socket, errors};
use crate::arguments;

/// Datagrams that a call which may not wait drops before it returns, as in the Rust SDK:
/// a flood of bad datagrams would hold it up for ever.
const MOST_DROPS_IN_A_ROW: usize = 64;

/// Level and type of a control message with the address of this host that a datagram was
/// sent to, or leaves from (IP_PKTINFO in ip(7), IPV6_PKTINFO in ipv6(7)).
const IPV4_PACKET_INFO: (i32, i32) = (0, 8);
const IPV6_PACKET_INFO: (i32, i32) = (41, 50);

/// The options that ask for them.
pub(super) const PACKET_INFO_OPTIONS: [(i32, i32); 2] = [(0, 8), (41, 49)];

/// Level and type of the control message that has a datagram leave as a burst: bytes of
/// each, as a `u16` (udp(7)).
const UDP_SEGMENT: (i32, i32) = (17, 103);

/// Bytes for both control messages.
const PACKET_INFO_ROOM: usize = 128;

/// A client's datagram as `recvmsg` returned it.
pub(crate) struct Message<'py> {
    datagram: Bound<'py, PyBytes>,
    header_len: usize,
    ancdata: Bound<'py, PyAny>,
    msg_flags: u32,
    address: Bound<'py, PyAny>,
}

impl<'py> Message<'py> {
    pub(crate) fn payload(&self) -> &[u8] {
        self.datagram
            .as_bytes()
            .get(self.header_len..)
            .unwrap_or_default()
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
        if self.core.socket(py)?.is_gro_enabled() {
            let error = io::Error::new(
                io::ErrorKind::InvalidInput,
                "the socket has GRO enabled, so that its datagrams arrive in bursts; receive \
                 with recv_batch(), or leave GRO off",
            );
            return Err(Failure::Io(error).into_py(py));
        }
        let wait = self.core.wait(flags.dontwait);
        let socket = self.python.bind(py);
        let room = if self.core.packet_info {
            PACKET_INFO_ROOM
        } else {
            0
        };
        let arguments = (MAX_DATAGRAM, ancbufsize + room, flags.bits());
        let mut dropped = 0;
        loop {
            let receive = || socket.call_method1("recvmsg", arguments);
            let Some(result) = self
                .core
                .persist_in_python(py, wait, PollFlags::IN, receive)?
            else {
                continue;
            };
            let (datagram, ancdata, msg_flags, peer): (_, Bound<'py, PyAny>, _, Bound<'_, PyAny>) =
                result.extract()?;
            let datagram: Bound<'py, PyBytes> = datagram;
            let peer = from_python("peer", &peer)?;
            let (ancdata, local) = take_packet_info(&self.core, ancdata, peer)?;
            let now = Instant::now();
            let received = self
                .core
                .demux
                .receive(now, peer, local, datagram.as_bytes());
            if let Ok(received) = received {
                let header_len = received.header.len();
                let address = self.core.address(py, &Heard::new(&received, now))?;
                return Ok(Message {
                    datagram,
                    header_len,
                    ancdata,
                    msg_flags,
                    address,
                });
            }
            self.core.log_drops(py);
            dropped += 1;
            match wait {
                Wait::Never if dropped >= MOST_DROPS_IN_A_ROW => {
                    return Err(errors::os(py, rustix::io::Errno::AGAIN));
                }
                Wait::Until(deadline) if Instant::now() >= deadline => {
                    return Err(Failure::TimedOut.into_py(py));
                }
                Wait::Never | Wait::Until(_) | Wait::Forever => py.check_signals()?,
            }
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
        self.core.socket(py)?;
        let recipient = self.core.addresses.recipient(&self.core.demux, address)?;
        let path = self.core.demux.require_reply_path(recipient);
        let path = path.map_err(|error| Failure::Io(error).into_py(py))?;
        if path.from.is_some() {
            return Err(arguments::value_error(
                "ancdata",
                "none with reply_from='listener'",
                ancdata,
            ));
        }
        let wait = self.core.wait(flags.dontwait);
        let ancdata = leave_from(path.local, ancdata)?;
        let header = path.header();
        let (datagrams, ancdata) = with_headers(&header, data, &ancdata)?;
        let headers = datagrams.len() - data.len();
        let parts = (PyBytes::new(py, &datagrams),);
        let to = to_python(py, path.to, self.core.addresses.form)?;
        let arguments = (parts, ancdata, flags.bits(), to).into_pyobject(py)?;
        let socket = self.python.bind(py);
        let send = || socket.call_method1("sendmsg", &arguments);
        let sent = match self
            .core
            .persist_in_python(py, wait, PollFlags::OUT, send)?
        {
            Some(sent) => sent,
            // An earlier datagram failed, so this one is sent again.
            None => send()?,
        };
        self.core.demux.count_reply_sent();
        let sent: usize = sent.extract()?;
        Ok(sent.saturating_sub(headers))
    }
}

/// Takes the address that a datagram was sent to from its ancillary data, and leaves
/// it there if the application asked for it.
fn take_packet_info<'py>(
    core: &Core,
    ancdata: Bound<'py, PyAny>,
    peer: SocketAddr,
) -> PyResult<(Bound<'py, PyAny>, Option<IpAddr>)> {
    if !core.packet_info {
        return Ok((ancdata, None));
    }
    let (rest, mut local) = (PyList::empty(ancdata.py()), None);
    for item in ancdata.try_iter()? {
        let item = item?;
        let (level, kind, data): (i32, i32, Bound<'_, PyBytes>) = item.extract()?;
        let kind = (level, kind);
        local = better(local, kind, data.as_bytes(), peer.ip());
        let ours = kind == IPV4_PACKET_INFO || kind == IPV6_PACKET_INFO;
        if !ours || core.packet_info_asked.load(Ordering::Relaxed) {
            rest.append(item)?;
        }
    }
    Ok((rest.into_any(), local))
}

/// Ancillary data with the address that the datagram leaves from, unless the
/// application names one.
fn leave_from<'py>(
    local: Option<IpAddr>,
    ancdata: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let Some(local) = local else {
        return Ok(ancdata.clone());
    };
    let py = ancdata.py();
    let all = PyList::empty(py);
    let mut named = false;
    for item in ancdata.try_iter()? {
        let item = item?;
        let (level, kind, _): (i32, i32, Bound<'_, PyAny>) = item.extract()?;
        named |= [IPV4_PACKET_INFO, IPV6_PACKET_INFO].contains(&(level, kind));
        all.append(item)?;
    }
    if !named {
        let ((level, kind), data) = to_send(local);
        all.append((level, kind, PyBytes::new(py, &data)))?;
    }
    Ok(all.into_any())
}

/// Header and data of each datagram, of which there are several if the application asks
/// for a burst (UDP_SEGMENT in udp(7)); and its ancillary data, with the size of the
/// burst's datagrams as they are now.
fn with_headers<'py>(
    header: &[u8],
    data: &[u8],
    ancdata: &Bound<'py, PyAny>,
) -> PyResult<(Vec<u8>, Bound<'py, PyAny>)> {
    if header.is_empty() {
        return Ok((data.to_vec(), ancdata.clone()));
    }
    let py = ancdata.py();
    let (all, mut size) = (PyList::empty(py), None);
    for item in ancdata.try_iter()? {
        let item = item?;
        let (level, kind, value): (i32, i32, Bound<'_, PyAny>) = item.extract()?;
        let asked = (level, kind) == UDP_SEGMENT;
        let value = asked.then(|| arguments::bytes_like("ancdata", &value));
        match value.transpose()?.map(|bytes| bytes.as_bytes().try_into()) {
            // 0 is one datagram, as for the kernel.
            Some(Ok(bytes)) if bytes != [0, 0] => {
                let each = u16::from_ne_bytes(bytes);
                let longer = usize::from(each) + header.len();
                size = Some(usize::from(each));
                let longer = u16::try_from(longer).unwrap_or(u16::MAX);
                all.append((level, kind, PyBytes::new(py, &longer.to_ne_bytes())))?;
            }
            Some(_) | None => all.append(item)?,
        }
    }
    let size = size.unwrap_or(data.len());
    let mut datagrams = header.to_vec();
    for (number, datagram) in data.chunks(size.max(1)).enumerate() {
        if number > 0 {
            datagrams.extend_from_slice(header);
        }
        datagrams.extend_from_slice(datagram);
    }
    Ok((datagrams, all.into_any()))
}

/// The address that a reply leaves from: what `known` control messages said, or this
/// one, if a reply can leave from it. Of a broadcast, that is the address of the
/// interface.
fn better(known: Option<IpAddr>, kind: (i32, i32), data: &[u8], peer: IpAddr) -> Option<IpAddr> {
    if kind == IPV4_PACKET_INFO {
        // in_pktinfo: interface, ipi_spec_dst, ipi_addr.
        let ip = data.get(4..8).and_then(|ip| <[u8; 4]>::try_from(ip).ok());
        ip.and_then(|ip| usable(ip.into(), peer)).or(known)
    } else if kind == IPV6_PACKET_INFO {
        let ip = data.get(..16).and_then(|ip| <[u8; 16]>::try_from(ip).ok());
        known.or_else(|| ip.and_then(|ip| usable(ip.into(), peer)))
    } else {
        known
    }
}

/// The control message that has a datagram leave from `local`, as Python has it.
fn to_send(local: IpAddr) -> ((i32, i32), Vec<u8>) {
    match local {
        IpAddr::V4(ip) => {
            let parts = [[0; 4], ip.octets(), [0; 4]];
            (IPV4_PACKET_INFO, parts.concat())
        }
        IpAddr::V6(ip) => {
            let mut data = ip.octets().to_vec();
            data.extend([0; 4]);
            (IPV6_PACKET_INFO, data)
        }
    }
}

/// A link-local address needs the interface, which the peer's address then has.
fn usable(ip: IpAddr, peer: IpAddr) -> Option<IpAddr> {
    let link_local = |ip: IpAddr| matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    let ip = ip.to_canonical();
    let usable =
        !ip.is_unspecified() && !ip.is_multicast() && (!link_local(ip) || link_local(peer));
    usable.then_some(ip)
}
