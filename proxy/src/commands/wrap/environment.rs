//! The variables of the environment by which the library is loaded and learns its options.

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{self, Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use ppv2_preload_settings::{STATS_OPENED, VARIABLES};

use super::{Fork, Format, NewSockets, Options, PacketInfo, Untrusted, WrapError};
use crate::config::Network;

/// The dynamic linker's own.
const LD_PRELOAD: &str = "LD_PRELOAD";

/// The variables, in the order in which they are printed.
#[derive(Debug)]
pub struct Environment(Vec<(&'static str, OsString)>);

impl Environment {
    /// What a program needs for these options. Only what differs from the library's defaults is
    /// set.
    pub(super) fn new(options: &Options, library: &Path, stats: Option<PathBuf>) -> Self {
        let others = env::var_os(LD_PRELOAD);
        let mut variables = vec![(LD_PRELOAD, preload(library, others.as_deref()))];
        let mut set = |name, value: String| variables.push((name, value.into()));
        set("PPV2_TRUSTED", list(options.trusted.iter().map(network)));
        if !options.only.is_empty() {
            set("PPV2_ONLY", list(&options.only));
        }
        if options.untrusted != Untrusted::default() {
            set("PPV2_UNTRUSTED", name(options.untrusted));
        }
        if !options.peer.is_empty() {
            set("PPV2_PEERS", list(options.peer.iter().map(network)));
        }
        if options.format != [Format::V2] {
            let formats = options.format.iter().copied();
            set("PPV2_FORMATS", list(formats.map(name)));
        }
        if let Some(idle) = options.remember {
            set("PPV2_REMEMBER", duration(*idle));
        }
        if options.forget_after != Default::default() {
            set("PPV2_FORGET_AFTER", duration(*options.forget_after));
        }
        if options.max_clients != Default::default() {
            set("PPV2_MAX_CLIENTS", options.max_clients.to_string());
        }
        if options.pktinfo != PacketInfo::default() {
            set("PPV2_PKTINFO", name(options.pktinfo));
        }
        if options.new_sockets != NewSockets::default() {
            set("PPV2_NEW_SOCKETS", name(options.new_sockets));
        }
        if options.fork != Fork::default() {
            set("PPV2_FORK", name(options.fork));
        }
        variables.extend(stats.map(|path| ("PPV2_STATS", path.into_os_string())));
        Self(variables)
    }

    /// The environment of this process with these variables, and no others of the library: one
    /// such as `PPV2_UNTRUSTED=accept` would weaken what the options ask for.
    pub(super) fn merged(&self) -> Vec<(OsString, OsString)> {
        let is_ours = |name: &OsStr| {
            let others = [LD_PRELOAD, STATS_OPENED];
            let mut ours = VARIABLES.iter().chain(&others);
            ours.any(|variable| name == *variable)
        };
        let mut all: Vec<_> = env::vars_os().filter(|(name, _)| !is_ours(name)).collect();
        all.extend(
            self.0
                .iter()
                .map(|(name, value)| (name.into(), value.clone())),
        );
        all
    }

    /// A line for each, which units of systemd, container engines and shells read alike.
    pub(super) fn lines(&self) -> Vec<u8> {
        let mut text = Vec::new();
        for (name, value) in &self.0 {
            text.extend_from_slice(name.as_bytes());
            text.push(b'=');
            text.extend_from_slice(&quoted(value));
            text.push(b'\n');
        }
        text
    }
}

/// The list of libraries with this one in front, once. The separators are those of ld.so(8).
fn preload(library: &Path, others: Option<&OsStr>) -> OsString {
    let mut list = library.as_os_str().as_bytes().to_vec();
    let others = others.map(OsStr::as_bytes).unwrap_or_default();
    let others = others.split(|byte| matches!(byte, b':' | b' '));
    for other in others.filter(|other| !other.is_empty()) {
        if other != library.as_os_str().as_bytes() {
            list.push(b':');
            list.extend_from_slice(other);
        }
    }
    OsString::from_vec(list)
}

/// A path that does not depend on the folder in which the program starts.
pub(super) fn absolute(flag: &'static str, path: &Path) -> Result<PathBuf, WrapError> {
    let wrong = |problem| WrapError::option(flag, format_args!("{path:?}"), problem);
    if path.as_os_str().as_bytes().iter().any(u8::is_ascii_control) {
        return Err(wrong("it has control characters; name a path without"));
    }
    path::absolute(path).map_err(|_| wrong("it is empty; name a file"))
}

fn list(values: impl IntoIterator<Item: ToString>) -> String {
    let values = values.into_iter().map(|value| value.to_string());
    values.collect::<Vec<_>>().join(",")
}

/// A network of one address as the address.
fn network(network: &Network) -> String {
    match network.0.prefix_len() == network.0.max_prefix_len() {
        true => network.0.addr().to_string(),
        false => network.to_string(),
    }
}

/// The name of a value on the command line.
fn name(value: impl ValueEnum) -> String {
    let value = value.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_owned())
}

/// In one unit, which is the same for all who read durations.
fn duration(time: Duration) -> String {
    match time.subsec_nanos() {
        0 => format!("{}s", time.as_secs()),
        _ => format!("{}ms", time.as_millis()),
    }
}

/// A value as it is, or in double quotes if it has something that a shell or systemd would
/// take for its own.
fn quoted(value: &OsStr) -> Vec<u8> {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/.,:[]-_+@%=".contains(byte);
    let bytes = value.as_bytes();
    if bytes.iter().all(is_plain) {
        return bytes.to_vec();
    }
    let mut text = vec![b'"'];
    for byte in bytes {
        if b"\"\\$`".contains(byte) {
            text.push(b'\\');
        }
        text.push(*byte);
    }
    text.push(b'"');
    text
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Arguments {
        #[command(flatten)]
        options: Options,
    }

    fn environment(arguments: &[&str]) -> Vec<(&'static str, String)> {
        let fixed = ["wrap", "--trusted", "192.0.2.1", "--print-env"];
        let arguments = Arguments::parse_from([&fixed, arguments].concat());
        let library = Path::new("/usr/lib/ppv2/libppv2_preload.so");
        let stats = arguments.options.stats.clone();
        let Environment(variables) = Environment::new(&arguments.options, library, stats);
        let text = |value: OsString| value.into_string().unwrap();
        let pairs = variables
            .into_iter()
            .map(|(name, value)| (name, text(value)));
        pairs.filter(|(name, _)| *name != LD_PRELOAD).collect()
    }

    #[test]
    fn defaults_are_left_out() {
        assert_eq!(environment(&[]), [("PPV2_TRUSTED", "192.0.2.1".to_owned())]);
        let as_by_default = [
            ["--untrusted", "drop"],
            ["--format", "v2"],
            ["--forget-after", "2m"],
            ["--max-clients", "65536"],
            ["--pktinfo", "local"],
            ["--new-sockets", "pass"],
        ];
        assert_eq!(environment(as_by_default.as_flattened()).len(), 1);
    }

    #[test]
    fn every_option_has_a_variable() {
        let options = [
            ["--trusted", "2001:db8::/64"],
            ["--only", "53"],
            ["--only", "[::]:5060"],
            ["--untrusted", "accept"],
            ["--peer", "192.0.2.7"],
            ["--peer", "2001:db8:1::/48"],
            ["--format", "v2"],
            ["--format", "spp"],
            ["--remember", "1m 30s"],
            ["--forget-after", "1500ms"],
            ["--max-clients", "1000"],
            ["--pktinfo", "destination"],
            ["--new-sockets", "answer"],
            ["--fork", "separate"],
            ["--stats", "/run/nsd.prom"],
        ];
        let expected = [
            ("PPV2_TRUSTED", "192.0.2.1,2001:db8::/64"),
            ("PPV2_ONLY", "53,[::]:5060"),
            ("PPV2_UNTRUSTED", "accept"),
            ("PPV2_PEERS", "192.0.2.7,2001:db8:1::/48"),
            ("PPV2_FORMATS", "v2,spp"),
            ("PPV2_REMEMBER", "90s"),
            ("PPV2_FORGET_AFTER", "1500ms"),
            ("PPV2_MAX_CLIENTS", "1000"),
            ("PPV2_PKTINFO", "destination"),
            ("PPV2_NEW_SOCKETS", "answer"),
            ("PPV2_FORK", "separate"),
            ("PPV2_STATS", "/run/nsd.prom"),
        ];
        let found = environment(options.as_flattened());
        let found: Vec<_> = found.iter().map(|(name, text)| (*name, &**text)).collect();
        assert_eq!(found, expected);
        let names: Vec<_> = found.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, VARIABLES);
    }

    #[test]
    fn the_library_is_in_front_of_others_and_there_once() {
        let library = Path::new("/l.so");
        for (others, list) in [
            (None, "/l.so"),
            (Some(""), "/l.so"),
            (Some("/jemalloc.so"), "/l.so:/jemalloc.so"),
            (Some("a.so b.so:/l.so"), "/l.so:a.so:b.so"),
            (Some("/l.so:/l.so"), "/l.so"),
        ] {
            assert_eq!(preload(library, others.map(OsStr::new)), list, "{others:?}");
        }
    }

    #[test]
    fn values_are_quoted_where_it_matters() {
        for (value, text) in [
            ("192.0.2.1,2001:db8::/64", "192.0.2.1,2001:db8::/64"),
            ("[::]:5060", "[::]:5060"),
            ("/run/my file", "\"/run/my file\""),
            ("/$a`b\"c\\d'e", "\"/\\$a\\`b\\\"c\\\\d'e\""),
        ] {
            assert_eq!(quoted(OsStr::new(value)), text.as_bytes());
        }
    }
}
