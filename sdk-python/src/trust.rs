//! The arguments that say which senders a socket trusts, and how much it remembers.

use std::net::IpAddr;
use std::time::Duration;

use ppv2_sdk::{ReplyFrom, Trust, Untrusted};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use crate::arguments;

// The signature of `wrap` spells the number out, for `help()` to show it.
const _: () = assert!(ppv2::DEFAULT_MAX_HEADER_LEN == 512);

/// How much a socket takes and remembers.
pub(crate) struct Limits {
    /// Bytes of the longest header.
    pub(crate) max_header_len: usize,
    pub(crate) max_clients: usize,
    pub(crate) forget_after: Duration,
}

/// The arguments of `wrap` as the Rust SDK has them.
pub(crate) fn trust(
    networks: Vec<String>,
    untrusted: Untrusted,
    reply_from: ReplyFrom,
    limits: &Limits,
) -> PyResult<Trust> {
    Trust::networks(networks)
        .untrusted(untrusted)
        .reply_from(reply_from)
        .max_header_len(limits.max_header_len)
        .max_clients(limits.max_clients)
        .forget_after(limits.forget_after)
        .build()
        .map_err(|error| PyValueError::new_err(error.to_string()))
}

/// Of which families the trusted networks are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Families {
    pub(crate) v4: bool,
    pub(crate) v6: bool,
}

/// Of networks as text; what is none has no family.
pub(crate) fn families(networks: &[String]) -> Families {
    let ips = || {
        networks.iter().filter_map(|network| {
            let (ip, _) = network.split_once('/').unwrap_or((network, ""));
            Some(ip.parse::<IpAddr>().ok()?.to_canonical())
        })
    };
    Families {
        v4: ips().any(|ip| ip.is_ipv4()),
        v6: ips().any(|ip| ip.is_ipv6()),
    }
}

/// Networks as text, or whatever spells one when printed, such as an
/// `ipaddress.IPv4Network`.
pub(crate) fn networks(trusted: &Bound<'_, PyAny>) -> PyResult<Vec<String>> {
    const EXPECTED: &str = "an iterable of networks, such as [\"192.0.2.10\"]";
    let wrong = || arguments::type_error("trusted", EXPECTED, trusted);
    // Text is iterable too, letter by letter.
    if trusted.is_instance_of::<PyString>() || trusted.is_instance_of::<PyBytes>() {
        return Err(wrong());
    }
    let mut networks = Vec::new();
    for network in trusted.try_iter().map_err(|_| wrong())? {
        networks.push(network?.str()?.to_cow()?.into_owned());
    }
    Ok(networks)
}

pub(crate) fn untrusted(value: &Bound<'_, PyAny>) -> PyResult<Untrusted> {
    let choices = [("drop", Untrusted::Drop), ("accept", Untrusted::Accept)];
    one_of("untrusted", "'drop' or 'accept'", choices, value)
}

pub(crate) fn reply_from(value: &Bound<'_, PyAny>) -> PyResult<ReplyFrom> {
    let choices = [
        ("proxy", ReplyFrom::Proxy),
        ("listener", ReplyFrom::Listener),
    ];
    one_of("reply_from", "'proxy' or 'listener'", choices, value)
}

fn one_of<T>(
    argument: &str,
    expected: &str,
    choices: [(&str, T); 2],
    value: &Bound<'_, PyAny>,
) -> PyResult<T> {
    let name = value
        .cast::<PyString>()
        .map_err(|_| arguments::type_error(argument, expected, value))?;
    let name = name.to_cow()?;
    choices
        .into_iter()
        .find_map(|(choice, meant)| (choice == name).then_some(meant))
        .ok_or_else(|| arguments::value_error(argument, expected, value))
}

pub(crate) fn max_clients(value: &Bound<'_, PyAny>) -> PyResult<usize> {
    // The bound is one of memory, so that more is a slip.
    const MOST: usize = u32::MAX as usize;
    arguments::integer(
        "max_clients",
        "a number of clients, at least 1",
        1..=MOST,
        value,
    )
}

/// Seconds, which may have a fraction.
pub(crate) fn forget_after(value: &Bound<'_, PyAny>) -> PyResult<Duration> {
    const EXPECTED: &str = "a number of seconds above 0";
    let seconds: f64 = value
        .extract()
        .map_err(|_| arguments::type_error("forget_after", EXPECTED, value))?;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| arguments::value_error("forget_after", EXPECTED, value))
}
