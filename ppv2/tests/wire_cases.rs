//! `wire-cases.json`: concrete datagrams and what each must decode to, in a
//! form that tests in other languages can read as well.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use common::invariants;
use ppv2::spp::{self, SppHeader};
use ppv2::{Decoder, Header, Origin, Ssl, TlvError, Transport};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "about")]
    _about: Vec<String>,
    cases: Vec<Case>,
    spp: Vec<SppCase>,
    v1: Vec<V1Case>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SppCase {
    name: String,
    #[serde(rename = "why")]
    _why: String,
    datagram: String,
    error: Option<Refused>,
    client: Option<SocketAddr>,
    proxy: Option<SocketAddr>,
    payload: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct V1Case {
    name: String,
    #[serde(rename = "why")]
    _why: String,
    datagram: String,
    v1: bool,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    #[serde(default, rename = "why")]
    _why: String,
    datagram: String,
    #[serde(default = "default_limit")]
    limit: usize,
    #[serde(flatten)]
    expected: Expected,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Expected {
    Refused { error: Refused },
    Accepted(Accepted),
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Refused {
    offset: usize,
    message: String,
}

#[derive(Debug, PartialEq, Deserialize)]
struct Accepted {
    command: String,
    origin: String,
    source: Option<String>,
    destination: Option<String>,
    client: Option<String>,
    tlvs: Vec<(String, String)>,
    skipped: String,
    payload: String,
    #[serde(default)]
    typed: BTreeMap<String, Value>,
}

fn default_limit() -> usize {
    ppv2::DEFAULT_MAX_HEADER_LEN
}

fn table() -> File {
    serde_json::from_str(include_str!("wire-cases.json")).expect("the table")
}

fn cases() -> Vec<Case> {
    table().cases
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits: String = hex.split_whitespace().collect();
    assert_eq!(digits.len() % 2, 0, "{hex}");
    let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).expect("hex digits");
    (0..digits.len()).step_by(2).map(byte).collect()
}

impl Case {
    fn datagram(&self) -> Vec<u8> {
        bytes(&self.datagram)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the decoder says, in the words of the table.
fn described(header: &Header<'_>, payload: &[u8], typed: &BTreeMap<String, Value>) -> Accepted {
    let over = |transport, datagram: &str, stream: &str| match transport {
        Transport::Datagram => datagram.to_owned(),
        Transport::Stream => stream.to_owned(),
    };
    let path = |bytes: &[u8]| {
        let text = String::from_utf8(bytes.to_vec()).expect("a path of the table");
        Some(text.trim_end_matches('\0').to_owned())
    };
    let (origin, source, destination) = match header.origin() {
        Origin::Local => ("local".to_owned(), None, None),
        Origin::Unspecified => ("unspec".to_owned(), None, None),
        Origin::Ip {
            transport,
            source,
            destination,
        } => (
            over(transport, "udp", "tcp"),
            Some(source.to_string()),
            Some(destination.to_string()),
        ),
        Origin::Unix {
            transport,
            source,
            destination,
        } => (
            over(transport, "unix-datagram", "unix-stream"),
            path(source),
            path(destination),
        ),
        other => panic!("{other:?} is new to the table"),
    };
    let command = if origin == "local" { "LOCAL" } else { "PROXY" };
    let tlvs = header.tlvs().iter();
    Accepted {
        command: command.to_owned(),
        origin,
        source,
        destination,
        client: header.client().map(|client| client.to_string()),
        tlvs: tlvs
            .map(|tlv| (hex(&[tlv.kind.0]), hex(tlv.value)))
            .collect(),
        skipped: hex(header.skipped()),
        payload: hex(payload),
        typed: typed
            .keys()
            .map(|getter| (getter.clone(), got(header, getter)))
            .collect(),
    }
}

/// What the getter of that name returns, in the words of the table.
fn got(header: &Header<'_>, getter: &str) -> Value {
    let tlvs = header.tlvs();
    match getter {
        "alpn" => tlvs.alpn().map(hex).into(),
        "reply_tag" => tlvs.reply_tag().map(|tag| hex(tag.value())).into(),
        "unique_id" => tlvs.unique_id().map(hex).into(),
        "authority" => outcome(tlvs.authority()),
        "crc32c" => outcome(tlvs.crc32c()),
        "netns" => outcome(tlvs.netns()),
        "aws_vpc_endpoint_id" => outcome(tlvs.aws_vpc_endpoint_id()),
        "azure_private_endpoint_link_id" => outcome(tlvs.azure_private_endpoint_link_id()),
        "gcp_psc_connection_id" => outcome(tlvs.gcp_psc_connection_id()),
        "ssl" => outcome(tlvs.ssl().map(|ssl| ssl.map(ssl_fields))),
        unknown => panic!("no getter {unknown}"),
    }
}

fn ssl_fields(ssl: Ssl<'_>) -> Value {
    let mut fields = json!({ "client": ssl.client(), "verify": ssl.verify() });
    for (name, value) in [
        ("version", ssl.version()),
        ("common_name", ssl.common_name()),
        ("cipher", ssl.cipher()),
        ("signature_algorithm", ssl.signature_algorithm()),
        ("key_algorithm", ssl.key_algorithm()),
        ("group", ssl.group()),
        ("signature_scheme", ssl.signature_scheme()),
    ] {
        if value.is_some() {
            fields[name] = outcome(value);
        }
    }
    if let Some(der) = ssl.client_certificate() {
        fields["client_certificate"] = hex(der).into();
    }
    fields
}

fn outcome<T: Into<Value>>(value: Option<Result<T, TlvError>>) -> Value {
    match value {
        None => Value::Null,
        Some(Ok(value)) => value.into(),
        Some(Err(error)) => json!({ "error": error.to_string() }),
    }
}

#[test]
fn each_case_decodes_to_what_the_table_says() {
    for case in cases() {
        let name = &case.name;
        let datagram = case.datagram();
        invariants::check(&datagram);
        let decoder = Decoder::new().max_header_len(case.limit);
        match (decoder.decode(&datagram), &case.expected) {
            (Ok((header, payload)), Expected::Accepted(expected)) => {
                let found = described(&header, payload, &expected.typed);
                assert_eq!(found, *expected, "{name}");
            }
            (Err(error), Expected::Refused { error: expected }) => {
                let found = Refused {
                    offset: error.offset(),
                    message: error.to_string(),
                };
                assert_eq!(found, *expected, "{name}");
            }
            (found, _) => panic!("{name}: {found:?}"),
        }
    }
}

#[test]
fn each_spp_case_decodes_to_what_the_table_says() {
    for case in table().spp {
        let name = &case.name;
        let datagram = bytes(&case.datagram);
        invariants::check(&datagram);
        match (case.client, case.proxy, case.payload, case.error) {
            (Some(client), Some(proxy), Some(payload), None) => {
                let header = SppHeader { client, proxy };
                let payload = bytes(&payload);
                assert_eq!(spp::decode(&datagram), Ok((header, &payload[..])), "{name}");
                let written = [&header.to_bytes()[..], &payload].concat();
                assert_eq!(written, datagram, "{name}");
            }
            (None, None, None, Some(expected)) => {
                let error = spp::decode(&datagram).expect_err(name);
                let found = Refused {
                    offset: error.offset(),
                    message: error.to_string(),
                };
                assert_eq!(found, expected, "{name}");
            }
            _ => panic!("{name} has either an error or all of the rest"),
        }
    }
}

#[test]
fn each_v1_case_is_recognised_or_not() {
    for case in table().v1 {
        let datagram = bytes(&case.datagram);
        invariants::check(&datagram);
        assert_eq!(ppv2::is_v1(&datagram), case.v1, "{}", case.name);
    }
}

#[test]
fn each_case_has_a_name_of_its_own_that_can_name_a_file() {
    let File { cases, spp, v1, .. } = table();
    let cases = cases.into_iter().map(|case| case.name);
    let spp = spp.into_iter().map(|case| format!("spp-{}", case.name));
    let v1 = v1.into_iter().map(|case| format!("v1-{}", case.name));
    let mut names = BTreeSet::new();
    for name in cases.chain(spp).chain(v1) {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        assert!(name.bytes().all(plain), "{name}");
        assert!(names.insert(name.clone()), "{name} twice");
    }
}

/// The valid datagrams of the table are what the fuzz target `decode` starts from. The
/// target `spp` starts from all of its own, and from the lines of version 1.
fn seeds() -> BTreeMap<PathBuf, Vec<u8>> {
    let corpus = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus"));
    let File { cases, spp, v1, .. } = table();
    let accepted = |case: &Case| matches!(case.expected, Expected::Accepted(_));
    let cases = cases.into_iter().filter(accepted);
    let cases = cases.map(|case| (format!("decode/{}", case.name), case.datagram()));
    let spp = spp
        .into_iter()
        .map(|case| (format!("spp/{}", case.name), bytes(&case.datagram)));
    let v1 = v1
        .into_iter()
        .map(|case| (format!("spp/v1-{}", case.name), bytes(&case.datagram)));
    cases
        .chain(spp)
        .chain(v1)
        .map(|(name, datagram)| (corpus.join(name), datagram))
        .collect()
}

#[test]
fn the_fuzz_corpora_hold_the_cases_of_the_table() {
    // The packaged crate comes without the folder.
    if !fs::exists(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz")).unwrap() {
        return;
    }
    let rewrite = std::env::var_os("PPV2_WRITE_SEEDS").is_some();
    for (path, datagram) in seeds() {
        if rewrite {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &datagram).unwrap();
        }
        let found = fs::read(&path).unwrap_or_else(|error| {
            panic!(
                "{}: {error}; `PPV2_WRITE_SEEDS=1 cargo test -p ppv2 --test wire_cases` writes it",
                path.display()
            )
        });
        assert_eq!(found, datagram, "{}", path.display());
    }
}
