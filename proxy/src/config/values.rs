//! Single values: addresses, networks, durations, counts, and what can be wrong
//! with each.

use std::net::{IpAddr, SocketAddr, SocketAddrV6, ToSocketAddrs};
use std::ops::Range;
use std::time::Duration;

use ipnet::IpNet;

use super::ConfigError;
use super::check::Checker;
use super::error::{is_hidden, nearest};
use super::file::At;
use ppv2_engine::address::{ServerAddr, is_no_host};

/// The longest that a worker may look for datagrams, or let them gather.
const MAX_PAUSE: Duration = Duration::from_millis(10);

/// The shortest that a session may be idle for. Sessions end on a wheel of this
/// order, and a reply that takes longer than the time given is dropped.
const MIN_IDLE_TIMEOUT: Duration = Duration::from_millis(50);

impl Checker<'_> {
    /// A pause of a worker: 0 for none, and never so long that clients notice.
    pub(super) fn pause(&self, key: &str, value: &At<String>) -> Result<Duration, ConfigError> {
        let text = value.get_ref();
        match humantime::parse_duration(text) {
            Ok(pause) if pause <= MAX_PAUSE => Ok(pause),
            _ => Err(self
                .error(value.span(), format!("{key} is `{text}`"))
                .mend("give a duration from \"0us\" to \"10ms\", such as \"50us\"")),
        }
    }

    pub(super) fn unknown_value(
        &self,
        key: &str,
        value: &At<String>,
        known: &[&str],
    ) -> ConfigError {
        let message = format!("{key} `{}` is not known", value.get_ref());
        let known_ones = format!("this version knows {}", known.join(", "));
        let mend = match nearest(value.get_ref(), known.iter().copied()) {
            Some(near) => format!("did you mean `{near}`? {known_ones}"),
            None => known_ones,
        };
        self.error(value.span(), message).mend(mend)
    }

    pub(super) fn address(
        &self,
        what: &str,
        value: &At<String>,
    ) -> Result<SocketAddr, ConfigError> {
        let text = value.get_ref();
        let address: SocketAddr = text.parse().map_err(|_| {
            self.error(
                value.span(),
                format!("{what} `{text}` is not an IP address with a port"),
            )
            .mend("write it as 192.0.2.1:53, [2001:db8::1]:53, 0.0.0.0:53 or [::]:53")
        })?;
        if address.port() == 0 {
            return Err(self
                .error(value.span(), format!("{what} `{text}` has port 0"))
                .mend("name the port: clients could not know one that the kernel chose"));
        }
        let plain = canonical(address);
        if plain.is_ipv4() != address.is_ipv4() {
            return Err(self
                .error(
                    value.span(),
                    format!("{what} `{text}` is IPv4 written as IPv6"),
                )
                .mend(format!("write it as {plain}")));
        }
        if is_no_host(plain.ip()) && !plain.ip().is_unspecified() {
            return Err(self
                .error(value.span(), format!("can't listen on {plain}"))
                .mend("give an address of this host, or a wildcard: 0.0.0.0, [::]"));
        }
        self.require_scope(value.span(), &format!("{what} `{text}`"), plain)?;
        Ok(plain)
    }

    /// Refuses a name that could not be told from another in a log, or would do
    /// something to the terminal that shows it.
    pub(super) fn refuse_hidden(
        &self,
        what: &str,
        span: &Range<usize>,
        name: &str,
    ) -> Result<(), ConfigError> {
        let Some(hidden) = name.chars().find(|c| is_hidden(*c)) else {
            return Ok(());
        };
        let message = format!("the name of {what} `{name}` has a character that can't be shown");
        Err(self.error(span.clone(), message).mend(format!(
            "leave {} out: logs and metrics show the name",
            hidden.escape_default()
        )))
    }

    /// Refuses a link-local address that doesn't say of which interface.
    pub(super) fn require_scope(
        &self,
        span: Range<usize>,
        what: &str,
        address: SocketAddr,
    ) -> Result<(), ConfigError> {
        if !is_link_local(address.ip()) || scope(address) != 0 {
            return Ok(());
        }
        let mend = format!(
            "add the interface's number (ip link shows it), as in [{}%2]:{}",
            address.ip(),
            address.port()
        );
        Err(self
            .error(span, format!("{what} is link-local and names no interface"))
            .mend(mend))
    }

    pub(super) fn resolve(
        &self,
        span: Range<usize>,
        text: &str,
    ) -> Result<ServerAddr, ConfigError> {
        let mend = "write it as 192.0.2.10:53, [2001:db8::10]:53 or host.example:53";
        let error = |message: String| self.error(span.clone(), message);
        let port = text.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
        if !matches!(port, Some(Ok(_))) {
            return Err(error(format!("server `{text}` has no port")).mend(mend));
        }
        if let Some(Ok(0)) = port {
            return Err(error(format!("server `{text}` has port 0"))
                .mend("name the port that the server listens on"));
        }
        let addresses = text.to_socket_addrs().map_err(|cause| {
            error(format!("server `{text}` does not resolve: {cause}"))
                .mend(format!(
                    "check the name and this host's resolver, write the IP address, or dns:{text} to have it looked up while the proxy runs"
                ))
        })?;
        let address = steady(addresses.map(canonical))
            .ok_or_else(|| error(format!("server `{text}` resolves to nothing")).mend(mend))?;
        let ip = address.ip();
        if is_no_host(ip) {
            return Err(
                error(format!("server `{text}`: {ip} is the address of no server"))
                    .mend("write the address that the server itself has, such as 127.0.0.1"),
            );
        }
        self.require_scope(span.clone(), &format!("server `{text}`"), address)?;
        Ok(ServerAddr(address))
    }

    pub(super) fn networks(
        &self,
        key: &str,
        networks: Option<At<Vec<At<String>>>>,
    ) -> Result<Vec<IpNet>, ConfigError> {
        let Some(networks) = networks else {
            return Ok(vec![
                IpNet::new_assert(IpAddr::from([0; 4]), 0),
                IpNet::new_assert(IpAddr::from([0u16; 8]), 0),
            ]);
        };
        if networks.get_ref().is_empty() {
            return Err(self
                .error(
                    networks.span(),
                    format!("an empty `{key}` lets no client in"),
                )
                .mend("list networks, or leave the key out to allow everybody"));
        }
        let parse = |value: &At<String>| {
            let text = value.get_ref();
            let error = |message: String| self.error(value.span(), message);
            let single = || text.parse::<IpAddr>().map(IpNet::from);
            let net: IpNet = text.parse().or_else(|_| single()).map_err(|_| {
                error(format!("`{text}` is not a network"))
                    .mend("write it as 192.0.2.0/24 or 2001:db8::/32")
            })?;
            if let Some(v4) = mapped(net) {
                return Err(error(format!("`{text}` is IPv4 written as IPv6"))
                    .mend(format!("write it as {}", v4.trunc())));
            }
            if net != net.trunc() {
                let one = IpNet::from(net.addr());
                return Err(
                    error(format!("`{text}` is an address within a network")).mend(format!(
                        "the network is {}, that address alone {one}",
                        net.trunc()
                    )),
                );
            }
            Ok(net)
        };
        networks.get_ref().iter().map(parse).collect()
    }

    pub(super) fn duration(&self, key: &str, value: &At<String>) -> Result<Duration, ConfigError> {
        let text = value.get_ref();
        let error = |message: String| {
            self.error(value.span(), message)
                .mend("write it as \"30s\", \"500ms\" or \"2m\"")
        };
        let duration = humantime::parse_duration(text)
            .map_err(|cause| error(format!("{key} `{text}` is not a duration: {cause}")))?;
        if duration.is_zero() {
            return Err(error(format!("{key} must not be 0")));
        }
        if duration > Duration::from_secs(7 * 24 * 3600) {
            return Err(error(format!("{key} `{text}` is more than a week")));
        }
        Ok(duration)
    }

    pub(super) fn idle_timeout(&self, value: &At<String>) -> Result<Duration, ConfigError> {
        let duration = self.duration("idle_timeout", value)?;
        if duration < MIN_IDLE_TIMEOUT {
            let text = value.get_ref();
            return Err(self
                .error(value.span(), format!("idle_timeout `{text}` is too short"))
                .mend("give at least \"50ms\", and more than the servers take to answer"));
        }
        Ok(duration)
    }

    pub(super) fn count(
        &self,
        key: &str,
        value: Option<At<usize>>,
        max: usize,
    ) -> Result<Option<usize>, ConfigError> {
        let Some(value) = value else {
            return Ok(None);
        };
        let number = *value.get_ref();
        if (1..=max).contains(&number) {
            return Ok(Some(number));
        }
        Err(self
            .error(value.span(), format!("{key} is {number}"))
            .mend(format!("give a number from 1 to {max}, or leave it out")))
    }
}

/// Of the addresses that a name has, in whatever order they came this time, the one
/// that is used: of the family that came first, the lowest.
fn steady(addresses: impl Iterator<Item = SocketAddr>) -> Option<SocketAddr> {
    let addresses: Vec<_> = addresses.collect();
    let first = addresses.first()?.is_ipv4();
    let same = addresses
        .into_iter()
        .filter(|address| address.is_ipv4() == first);
    same.min()
}

/// The one way to write an address: IPv4 as such, and the number of an interface
/// only where it tells addresses apart.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    let scope = if is_link_local(address.ip()) {
        scope(address)
    } else {
        0
    };
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::from((ip, address.port())),
        IpAddr::V6(ip) => SocketAddrV6::new(ip, address.port(), 0, scope).into(),
    }
}

pub(super) fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// An IPv4 network in IPv6 clothes, undressed.
pub(super) fn mapped(net: IpNet) -> Option<IpNet> {
    let ip = net.addr();
    let len = net.prefix_len().checked_sub(128 - 32)?;
    match ip.to_canonical() {
        v4 if v4 != ip => IpNet::new(v4, len).ok(),
        _ => None,
    }
}

/// The number of the interface, 0 where the address needs none.
pub(super) fn scope(address: SocketAddr) -> u32 {
    match address {
        SocketAddr::V4(_) => 0,
        SocketAddr::V6(address) => address.scope_id(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_answers_decides_the_family_alone() {
        let used = |texts: &[&str]| {
            let addresses = texts.iter().map(|text| text.parse().unwrap());
            steady(addresses).map(|address| address.to_string())
        };
        let lowest = Some("192.0.2.9:53".to_owned());
        assert_eq!(used(&["192.0.2.9:53", "192.0.2.10:53"]), lowest);
        assert_eq!(
            used(&["192.0.2.10:53", "[2001:db8::1]:53", "192.0.2.9:53"]),
            lowest
        );
        let of_ipv6 = Some("[2001:db8::1]:53".to_owned());
        assert_eq!(used(&["[2001:db8::1]:53", "192.0.2.9:53"]), of_ipv6);
        assert_eq!(used(&[]), None);
    }
}
