//! Types of single values: each knows its range and its default, and refuses what is
//! outside with the way out.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::ops::Deref;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::ConfigError;
use super::error::is_hidden;

/// Has a type read from a string, by its `FromStr`.
macro_rules! read_from_text {
    ($($name:ident),+) => {$(
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::config::values::from_text(deserializer)
            }
        }

        impl schemars::JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
                String::json_schema(generator)
            }
        }
    )+};
}
pub(super) use read_from_text;

pub(super) fn from_text<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = ConfigError>,
{
    struct Text<T>(PhantomData<T>);

    impl<T: FromStr<Err = ConfigError>> Visitor<'_> for Text<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string")
        }

        // The place of an error is known only within the visitor.
        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            text.parse().map_err(ConfigError::into_serde)
        }
    }

    deserializer.deserialize_str(Text(PhantomData))
}

/// A whole number from `MIN` to `MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Number<T, const MIN: u32, const MAX: u32, const DEFAULT: u32 = MIN>(T);

impl<T: TryFrom<i64>, const MIN: u32, const MAX: u32, const DEFAULT: u32>
    Number<T, MIN, MAX, DEFAULT>
{
    fn new(number: i64) -> Result<Self, ConfigError> {
        let within = (i64::from(MIN)..=MAX.into()).contains(&number);
        let inner = within.then(|| T::try_from(number).ok()).flatten();
        inner.map(Self).ok_or_else(|| {
            ConfigError::new(format!("{number} is out of range"))
                .hint(format!("give a number from {MIN} to {MAX}"))
        })
    }
}

impl<T: TryFrom<i64>, const MIN: u32, const MAX: u32, const DEFAULT: u32> Default
    for Number<T, MIN, MAX, DEFAULT>
{
    fn default() -> Self {
        Self::new(DEFAULT.into()).expect("the default is in range")
    }
}

impl<T: TryFrom<i64>, const MIN: u32, const MAX: u32, const DEFAULT: u32> FromStr
    for Number<T, MIN, MAX, DEFAULT>
{
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let number = text.parse().map_err(|_| {
            ConfigError::new(format!("`{text}` is not a whole number"))
                .hint(format!("give a number from {MIN} to {MAX}"))
        });
        Self::new(number?)
    }
}

impl<'de, T: TryFrom<i64>, const MIN: u32, const MAX: u32, const DEFAULT: u32> Deserialize<'de>
    for Number<T, MIN, MAX, DEFAULT>
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(i64::deserialize(deserializer)?).map_err(ConfigError::into_serde)
    }
}

impl<T, const MIN: u32, const MAX: u32, const DEFAULT: u32> Deref for Number<T, MIN, MAX, DEFAULT> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: fmt::Display, const MIN: u32, const MAX: u32, const DEFAULT: u32> fmt::Display
    for Number<T, MIN, MAX, DEFAULT>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T, const MIN: u32, const MAX: u32, const DEFAULT: u32> JsonSchema
    for Number<T, MIN, MAX, DEFAULT>
{
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("Number{MIN}to{MAX}").into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "integer", "minimum": MIN, "maximum": MAX })
    }
}

/// A duration from `MIN` to `MAX` microseconds, written as in "30s".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time<const MIN: u64, const MAX: u64, const DEFAULT: u64 = MIN>(Duration);

/// Milliseconds, seconds and weeks as the bounds of [`Time`].
pub(super) const MS: u64 = 1000;
pub(super) const S: u64 = 1000 * MS;
pub(super) const MINUTE: u64 = 60 * S;
pub(super) const DAY: u64 = 24 * 60 * MINUTE;
pub(super) const WEEK: u64 = 7 * DAY;

impl<const MIN: u64, const MAX: u64, const DEFAULT: u64> Default for Time<MIN, MAX, DEFAULT> {
    fn default() -> Self {
        Self(Duration::from_micros(DEFAULT))
    }
}

impl<const MIN: u64, const MAX: u64, const DEFAULT: u64> FromStr for Time<MIN, MAX, DEFAULT> {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let time = humantime::parse_duration(text).map_err(|error| {
            ConfigError::new(format!("`{text}` is not a duration: {error}"))
                .hint("write it as \"30s\", \"500ms\" or \"2m\"")
        })?;
        let [min, max] = [MIN, MAX].map(Duration::from_micros);
        if (min..=max).contains(&time) {
            return Ok(Self(time));
        }
        let what = if time < min { "short" } else { "long" };
        let [min, max] = [min, max].map(humantime::format_duration);
        Err(ConfigError::new(format!("`{text}` is too {what}"))
            .hint(format!("give a time from \"{min}\" to \"{max}\"")))
    }
}

impl<'de, const MIN: u64, const MAX: u64, const DEFAULT: u64> Deserialize<'de>
    for Time<MIN, MAX, DEFAULT>
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text(deserializer)
    }
}

impl<const MIN: u64, const MAX: u64, const DEFAULT: u64> Serialize for Time<MIN, MAX, DEFAULT> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<const MIN: u64, const MAX: u64, const DEFAULT: u64> Deref for Time<MIN, MAX, DEFAULT> {
    type Target = Duration;

    fn deref(&self) -> &Duration {
        &self.0
    }
}

impl<const MIN: u64, const MAX: u64, const DEFAULT: u64> fmt::Display for Time<MIN, MAX, DEFAULT> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl<const MIN: u64, const MAX: u64, const DEFAULT: u64> JsonSchema for Time<MIN, MAX, DEFAULT> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("Time{MIN}to{MAX}").into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let [min, max] = [MIN, MAX].map(|time| Self(Duration::from_micros(time)).to_string());
        // Numbers with units, as in "1h 30m".
        let pattern = "^\\s*([0-9][0-9. ]*[A-Za-zµ]+\\s*)+$";
        json_schema!({ "type": "string", "pattern": pattern, "x-from": min, "x-to": max })
    }
}

/// A switch that is on unless the configuration turns it off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline)]
pub struct OnByDefault(pub bool);

impl Default for OnByDefault {
    fn default() -> Self {
        Self(true)
    }
}

/// A network, or a single address as the network that has no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network(pub IpNet);
read_from_text!(Network);

impl FromStr for Network {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let single = || text.parse::<IpAddr>().map(IpNet::from);
        let net: IpNet = text.parse().or_else(|_| single()).map_err(|_| {
            ConfigError::new(format!("`{text}` is not a network"))
                .hint("write it as 192.0.2.0/24, 2001:db8::/32 or 192.0.2.1")
        })?;
        if let Some(v4) = mapped(net) {
            return Err(
                ConfigError::new(format!("`{text}` is IPv4 written as IPv6"))
                    .hint(format!("write it as {}", v4.trunc())),
            );
        }
        if net != net.trunc() {
            return Err(
                ConfigError::new(format!("`{text}` is an address within a network")).hint(format!(
                    "the network is {}, that address alone {}",
                    net.trunc(),
                    IpNet::from(net.addr())
                )),
            );
        }
        Ok(Self(net))
    }
}

impl Serialize for Network {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Every network: all clients.
pub(super) fn everybody() -> Vec<Network> {
    let [v4, v6] = [IpAddr::from([0; 4]), IpAddr::from([0u16; 8])];
    [v4, v6].map(|ip| Network(IpNet::new_assert(ip, 0))).into()
}

/// An IPv4 network that is written as an IPv6 one.
fn mapped(net: IpNet) -> Option<IpNet> {
    let ip = net.addr();
    let len = net.prefix_len().checked_sub(128 - 32)?;
    match ip.to_canonical() {
        v4 if v4 != ip => IpNet::new(v4, len).ok(),
        _ => None,
    }
}

/// Bytes, written as hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hex(pub(super) Vec<u8>);
read_from_text!(Hex);

impl FromStr for Hex {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let digits = text.chars().filter(|c| !c.is_whitespace());
        let digits: Option<Vec<_>> = digits.map(|c| c.to_digit(16)).collect();
        let digits = digits.filter(|digits| digits.len().is_multiple_of(2));
        let bytes = digits.as_deref().unwrap_or_default().chunks(2);
        let bytes = bytes.filter_map(|pair| u8::try_from(pair[0] << 4 | pair[1]).ok());
        digits
            .as_ref()
            .map(|_| Self(bytes.collect()))
            .ok_or_else(|| {
                ConfigError::new("it is not hexadecimal")
                    .hint("write two digits for each byte, as in \"00ff 0d0a\"")
            })
    }
}

/// A listener's name, which logs and metrics can show.
pub(super) fn label<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = String::deserialize(deserializer)?;
    refuse_hidden("listener", &name).map_err(ConfigError::into_serde::<D::Error>)?;
    if name.trim().is_empty() {
        let error = ConfigError::new(format!("a listener's name is \"{name}\""));
        return Err(error
            .hint("give it one that logs and metrics can show, or leave `name` out")
            .into_serde());
    }
    Ok(name)
}

/// Refuses a name that looks like another in a log, or that controls the terminal.
pub(super) fn refuse_hidden(what: &str, name: &str) -> Result<(), ConfigError> {
    let Some(hidden) = name.chars().find(|c| is_hidden(*c)) else {
        return Ok(());
    };
    let message = format!("the name of {what} `{name}` has a character that can't be shown");
    Err(ConfigError::new(message).hint(format!(
        "leave {} out: logs and metrics show the name",
        hidden.escape_default()
    )))
}

/// The one form of an address: IPv4 as such, and the number of an interface only for
/// link-local addresses.
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

/// The number of the interface; 0 if the address has none.
pub(super) fn scope(address: SocketAddr) -> u32 {
    match address {
        SocketAddr::V4(_) => 0,
        SocketAddr::V6(address) => address.scope_id(),
    }
}
