//! The arguments that say which senders a socket trusts, and how much it remembers.

use std::net::IpAddr;
use std::time::Duration;

use ppv2_sdk::{Format, HeaderAlone, ReplyFrom, Trust, Untrusted};
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

/// How trusted senders say for which client they speak.
pub(crate) struct Headers {
    pub(crate) formats: Vec<Format>,
    /// For how long, and of how many senders, it is remembered what they said.
    pub(crate) remember: Option<(Duration, usize)>,
    pub(crate) header_alone: HeaderAlone,
}

/// The arguments of `wrap` as the Rust SDK has them.
pub(crate) fn trust(
    networks: Vec<String>,
    headers: Headers,
    untrusted: Untrusted,
    reply_from: ReplyFrom,
    limits: &Limits,
) -> PyResult<Trust> {
    let trust = Trust::networks(networks)
        .formats(headers.formats)
        .header_alone(headers.header_alone)
        .untrusted(untrusted)
        .reply_from(reply_from)
        .max_header_len(limits.max_header_len)
        .max_clients(limits.max_clients)
        .forget_after(limits.forget_after);
    let trust = match headers.remember {
        None => trust,
        Some((idle, max)) => trust.remember_senders(idle, max),
    };
    trust
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

/// Names of formats, each a header may have.
pub(crate) fn formats(value: &Bound<'_, PyAny>) -> PyResult<Vec<Format>> {
    const EXPECTED: &str = "an iterable of 'v2' and 'spp', such as [\"v2\"]";
    let wrong = || arguments::type_error("formats", EXPECTED, value);
    if value.is_instance_of::<PyString>() || value.is_instance_of::<PyBytes>() {
        return Err(wrong());
    }
    let choices = [("v2", Format::V2), ("spp", Format::Spp)];
    let mut formats = Vec::new();
    for (index, format) in value.try_iter().map_err(|_| wrong())?.enumerate() {
        let name = format!("formats[{index}]");
        formats.push(one_of(&name, "'v2' or 'spp'", choices, &format?)?);
    }
    Ok(formats)
}

pub(crate) fn header_alone(value: &Bound<'_, PyAny>) -> PyResult<HeaderAlone> {
    let choices = [
        ("announce", HeaderAlone::Announce),
        ("deliver", HeaderAlone::Deliver),
    ];
    one_of("header_alone", "'announce' or 'deliver'", choices, value)
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

/// The bound is one of memory, so that more is a slip.
const MOST: usize = u32::MAX as usize;

pub(crate) fn max_clients(value: &Bound<'_, PyAny>) -> PyResult<usize> {
    let expected = "a number of clients, at least 1";
    arguments::integer("max_clients", expected, 1..=MOST, value)
}

pub(crate) fn max_senders(value: &Bound<'_, PyAny>) -> PyResult<usize> {
    let expected = "a number of senders, at least 1";
    arguments::integer("max_senders", expected, 1..=MOST, value)
}

pub(crate) fn forget_after(value: &Bound<'_, PyAny>) -> PyResult<Duration> {
    seconds("forget_after", "a number of seconds above 0", value)
}

pub(crate) fn remember_senders(value: &Bound<'_, PyAny>) -> PyResult<Option<Duration>> {
    if value.is_none() {
        return Ok(None);
    }
    let expected = "None or a number of seconds above 0";
    seconds("remember_senders", expected, value).map(Some)
}

/// Seconds, which may have a fraction.
fn seconds(argument: &str, expected: &str, value: &Bound<'_, PyAny>) -> PyResult<Duration> {
    let seconds: f64 = value
        .extract()
        .map_err(|_| arguments::type_error(argument, expected, value))?;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| arguments::value_error(argument, expected, value))
}
