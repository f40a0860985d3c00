//! Limits that lose datagrams without stopping the proxy: the receive buffer and MTUs.

use std::io;

use socket2::{Domain, Protocol, Socket, Type};

use super::Finding;
use crate::kernel;
use crate::topology::{Server, Topology};

pub(super) fn examine(topology: &Topology) -> Vec<Finding> {
    let mut findings = vec![receive_buffer(
        "receive buffer of listeners",
        topology.receive_buffer,
    )];
    let with_header = topology
        .servers
        .iter()
        .filter(|server| server.header_len > 0);
    findings.extend(with_header.filter_map(mtu));
    findings
}

/// Asks the kernel by a socket, since a network namespace may have no `rmem_max` to read.
pub(super) fn receive_buffer(what: &str, wanted: usize) -> Finding {
    match granted(wanted) {
        Ok(granted) if granted < wanted => Finding::advice(
            what,
            format!("{granted} bytes instead of {wanted}; longer bursts are lost"),
            format!("sysctl -w net.core.rmem_max={wanted}"),
        ),
        Ok(granted) => Finding::ok(what, format!("{granted} bytes")),
        Err(error) => Finding::ok(what, format!("unknown: {error}")),
    }
}

fn granted(wanted: usize) -> io::Result<usize> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_recv_buffer_size(wanted)?;
    // The kernel doubles what was asked for (socket(7), SO_RCVBUF).
    Ok(socket.recv_buffer_size()? / 2)
}

/// The longest datagram of a client that reaches the server unfragmented.
fn mtu(server: &Server) -> Option<Finding> {
    let (address, header) = (server.address, server.header_len + server.tag_len);
    let mtu = kernel::interface_mtu(address.ip())?;
    let room = kernel::payload_of(mtu, address.ip()).saturating_sub(header);
    let longer = match server.dont_fragment {
        true => "dropped (df)",
        false => "fragmented",
    };
    let beyond = match address.is_ipv4() && !server.dont_fragment {
        true => "fragments longer packets",
        false => "drops longer packets: set the interface's MTU to that of the hop",
    };
    Some(Finding::ok(
        format!("MTU of the interface towards server {address}"),
        format!(
            "{mtu}; the header takes {header} bytes, and datagrams above {room} are {longer}; \
             a later hop with a smaller MTU {beyond}"
        ),
    ))
}
