//! `wire-cases.json`: concrete datagrams and what each must decode to, in a
//! form that tests in other languages can read as well.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use common::invariants;
use ppv2::{Decoder, Header, Origin, Ssl, TlvError, Transport};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "about")]
    _about: Vec<String>,
    cases: Vec<Case>,
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

fn cases() -> Vec<Case> {
    let file: File = serde_json::from_str(include_str!("wire-cases.json")).expect("the table");
    file.cases
}

impl Case {
    fn datagram(&self) -> Vec<u8> {
        let digits: String = self.datagram.split_whitespace().collect();
        assert_eq!(digits.len() % 2, 0, "{}", self.name);
        let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).expect("hex digits");
        (0..digits.len()).step_by(2).map(byte).collect()
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
fn each_case_has_a_name_of_its_own_that_can_name_a_file() {
    let mut names = BTreeSet::new();
    for case in cases() {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        assert!(case.name.bytes().all(plain), "{}", case.name);
        assert!(names.insert(case.name.clone()), "{} twice", case.name);
    }
}

/// The valid datagrams of the table are what the fuzz target `decode` starts from.
fn seeds() -> BTreeMap<PathBuf, Vec<u8>> {
    let corpus = PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../fuzz/corpus/decode"
    ));
    let accepted = |case: &Case| matches!(case.expected, Expected::Accepted(_));
    cases()
        .into_iter()
        .filter(accepted)
        .map(|case| (corpus.join(&case.name), case.datagram()))
        .collect()
}

#[test]
fn the_fuzz_corpus_holds_each_valid_case() {
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
