//! Bounds on what clients may do, and the log of what they did.

use std::path::PathBuf;

use super::check::Checker;
use super::file::{self, At};
use super::{AccessLog, ConfigError, LogFormat, PerClient};
use ppv2_engine::session::Amplification;

/// What one subscriber, or host, is commonly given (RFC 6177, RFC 7421).
const DEFAULT_IPV6_PREFIX: u8 = 64;

/// More than any one client can send or have.
const MOST: usize = 100_000_000;

impl Checker<'_> {
    pub(super) fn per_client(
        &self,
        per_client: Option<At<file::PerClient>>,
    ) -> Result<PerClient, ConfigError> {
        let wanted = per_client.map(At::into_inner).unwrap_or_default();
        let number = |key: &str, value: Option<At<usize>>| {
            let number = self.count(key, value, MOST)?;
            Ok(number.map(|number| u32::try_from(number).unwrap_or(u32::MAX)))
        };
        let sessions = number("per_client.sessions", wanted.sessions)?;
        let per_second = number("per_client.rate", wanted.rate)?;
        let burst_span = wanted.burst.as_ref().map(At::span);
        let burst = number("per_client.burst", wanted.burst)?;
        let rate = match (per_second, burst) {
            (Some(per_second), burst) => Some((per_second, burst.unwrap_or(per_second))),
            (None, Some(_)) => {
                return Err(self
                    .error(
                        burst_span.unwrap_or_default(),
                        "`per_client.burst` without a rate",
                    )
                    .mend("add `rate`, the datagrams a second that each client may send"));
            }
            (None, None) => None,
        };
        let ipv6_prefix = match self.count("per_client.ipv6_prefix", wanted.ipv6_prefix, 128)? {
            Some(prefix) => u8::try_from(prefix).unwrap_or(128),
            None => DEFAULT_IPV6_PREFIX,
        };
        Ok(PerClient {
            sessions,
            rate,
            ipv6_prefix,
        })
    }

    pub(super) fn amplification(
        &self,
        wanted: Option<At<file::Amplification>>,
    ) -> Result<Option<Amplification>, ConfigError> {
        let Some(wanted) = wanted else {
            return Ok(None);
        };
        let wanted = wanted.into_inner();
        let limit = self.count("amplification.limit", Some(wanted.limit), MOST)?;
        let limit = limit.map_or(1, |limit| limit as u64);
        let enforce = match &wanted.action {
            None => false,
            Some(action) => match action.get_ref().as_str() {
                "off" => return Ok(None),
                "watch" => false,
                "enforce" => true,
                _ => {
                    let known = ["off", "watch", "enforce"];
                    return Err(self.unknown_value("amplification.action", action, &known));
                }
            },
        };
        Ok(Some(Amplification { limit, enforce }))
    }

    pub(super) fn access_log(
        &self,
        wanted: Option<file::AccessLog>,
    ) -> Result<Option<AccessLog>, ConfigError> {
        let Some(wanted) = wanted else {
            return Ok(None);
        };
        let format = match &wanted.format {
            None => LogFormat::default(),
            Some(format) => match format.get_ref().as_str() {
                "text" => LogFormat::Text,
                "json" => LogFormat::Json,
                _ => return Err(self.unknown_value("format", format, &["text", "json"])),
            },
        };
        let path = wanted.path.get_ref();
        if path.is_empty() {
            return Err(self
                .error(wanted.path.span(), "an access log without a path")
                .mend("name a file, or \"-\" for standard output"));
        }
        Ok(Some(AccessLog {
            path: (path != "-").then(|| PathBuf::from(path)),
            format,
        }))
    }
}
