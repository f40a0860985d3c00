//! How new sessions are spread over an upstream's servers: balancer, weights, and
//! which servers take none.

use std::ops::Range;
use std::time::Duration;

use super::check::Checker;
use super::file::{self, At};
use super::{ConfigError, Named, Server, nowhere};
use ppv2_engine::upstream::{Balance, HashOn, MAX_SERVERS, MAX_WEIGHT};

/// What one subscriber gets at the least (RFC 6177): a host can take any address
/// of its network, and with privacy extensions takes new ones every day.
const DEFAULT_HASH_IPV6_PREFIX: u8 = 64;

const BALANCES: [&str; 4] = ["maglev", "round_robin", "least_sessions", "random_two"];

impl Checker<'_> {
    pub(super) fn balance(
        &mut self,
        name: &str,
        upstream: &file::Upstream,
    ) -> Result<Balance, ConfigError> {
        let hash_on = self.hash_on(upstream)?;
        let balance = match &upstream.balance {
            None => Balance::Maglev(hash_on),
            Some(balance) => match balance.get_ref().as_str() {
                "maglev" => Balance::Maglev(hash_on),
                "round_robin" => Balance::RoundRobin,
                "least_sessions" => Balance::LeastSessions,
                "random_two" => Balance::RandomTwo,
                _ => return Err(self.unknown_value("balance", balance, &BALANCES)),
            },
        };
        let without_effect = match balance {
            Balance::Maglev(HashOn::ClientIp { .. }) => None,
            Balance::Maglev(HashOn::ClientAddr) => upstream
                .hash_ipv6_prefix
                .as_ref()
                .map(|_| "hash_ipv6_prefix changes nothing with hash_on = \"client_addr\""),
            Balance::RoundRobin | Balance::LeastSessions | Balance::RandomTwo => {
                let either = upstream.hash_on.is_some() || upstream.hash_ipv6_prefix.is_some();
                either.then_some(
                    "hash_on and hash_ipv6_prefix change nothing but with balance = \"maglev\"",
                )
            }
        };
        let warning = without_effect.map(|what| format!("upstream `{name}`: {what}"));
        self.warnings.extend(warning);
        Ok(balance)
    }

    fn hash_on(&self, upstream: &file::Upstream) -> Result<HashOn, ConfigError> {
        let ipv6_prefix = match &upstream.hash_ipv6_prefix {
            None => DEFAULT_HASH_IPV6_PREFIX,
            Some(len) => self.within("hash_ipv6_prefix", len, 128)?,
        };
        let by_ip = HashOn::ClientIp { ipv6_prefix };
        let Some(hash_on) = &upstream.hash_on else {
            return Ok(by_ip);
        };
        match hash_on.get_ref().as_str() {
            "client_ip" => Ok(by_ip),
            "client_addr" => Ok(HashOn::ClientAddr),
            _ => Err(self.unknown_value("hash_on", hash_on, &["client_ip", "client_addr"])),
        }
    }

    /// Whether sessions go back to a server that has come back.
    pub(super) fn returns(
        &self,
        on_return: Option<&At<String>>,
        balance: Balance,
    ) -> Result<bool, ConfigError> {
        let Some(on_return) = on_return else {
            return Ok(false);
        };
        match on_return.get_ref().as_str() {
            "stay" => Ok(false),
            "return" if matches!(balance, Balance::Maglev(_)) => Ok(true),
            "return" => Err(self
                .error(on_return.span(), "on_return \"return\" without balance \"maglev\"")
                .mend("use balance = \"maglev\": with others no session belongs to one server rather than another")),
            _ => Err(self.unknown_value("on_return", on_return, &["stay", "return"])),
        }
    }

    /// A time that belongs to an upstream, `default` if it says nothing; 0 is none.
    pub(super) fn upstream_time(
        &self,
        key: &str,
        value: Option<At<String>>,
        default: &str,
    ) -> Result<Duration, ConfigError> {
        let value = value.unwrap_or_else(|| nowhere(default.to_owned()));
        match humantime::parse_duration(value.get_ref()) {
            Ok(Duration::ZERO) => Ok(Duration::ZERO),
            _ => self.duration(key, &value),
        }
    }

    pub(super) fn weight(&self, weight: Option<&At<i64>>) -> Result<u16, ConfigError> {
        weight.map_or(Ok(1), |weight| self.within("weight", weight, MAX_WEIGHT))
    }

    /// A number from 1 to `max`.
    fn within<T>(&self, key: &str, value: &At<i64>, max: T) -> Result<T, ConfigError>
    where
        T: TryFrom<i64> + Into<i64> + Copy,
    {
        let (number, max) = (*value.get_ref(), max.into());
        let error = || {
            let mend = match key {
                "weight" if number == 0 => {
                    format!(
                        "give a number from 1 to {max}, or drain = true to send it no new sessions"
                    )
                }
                _ => format!(
                    "give a number from 1 to {max}; the nearest is {}",
                    number.clamp(1, max)
                ),
            };
            self.error(value.span(), format!("{key} is {number}"))
                .mend(mend)
        };
        let within = (1..=max).contains(&number).then_some(number);
        within
            .and_then(|number| T::try_from(number).ok())
            .ok_or_else(error)
    }

    /// Refuses an upstream without servers, and one of more servers than a plan holds.
    /// A name is meant to lead to one server at least.
    pub(super) fn require_number(
        &self,
        span: Range<usize>,
        name: &str,
        number: usize,
    ) -> Result<(), ConfigError> {
        if number == 0 {
            return Err(self
                .error(span, format!("upstream `{name}` has no servers"))
                .mend("give at least one, as in servers = [\"192.0.2.10:53\"]"));
        }
        if number > MAX_SERVERS {
            return Err(self
                .error(span, format!("upstream `{name}` has {number} servers"))
                .mend(format!("give at most {MAX_SERVERS}")));
        }
        Ok(())
    }

    /// Refuses an upstream none of whose servers would ever be meant to take
    /// sessions.
    pub(super) fn require_serving(
        &self,
        span: Range<usize>,
        name: &str,
        servers: &[Server],
        names: &[Named],
    ) -> Result<(), ConfigError> {
        let error = |what: String, mend: &str| Err(self.error(span, what).mend(mend));
        let all = |of_server: fn(&Server) -> bool, of_name: fn(&Named) -> bool| {
            servers.iter().all(of_server) && names.iter().all(of_name)
        };
        if all(|server| server.backup, |named| named.backup) {
            let what = format!("every server of upstream `{name}` is a backup");
            return error(
                what,
                "leave `backup` out where sessions go while all is well; a backup stands in for those servers",
            );
        }
        if all(|server| server.drain, |named| named.drain) {
            let what = format!("every server of upstream `{name}` is draining");
            return error(
                what,
                "leave `drain` out where new sessions are to go; to end the service, stop the proxy, which lets replies in flight out",
            );
        }
        Ok(())
    }
}

impl Server {
    /// What of its settings is unlike most servers', in words.
    #[must_use]
    pub fn remarks(&self) -> Vec<String> {
        let weight = (self.weight != 1).then(|| format!("weight {}", self.weight));
        let backup = self.backup.then(|| "backup".to_owned());
        let drain = self.drain.then(|| "drain".to_owned());
        [weight, backup, drain].into_iter().flatten().collect()
    }
}

#[cfg(test)]
mod tests;
