//! The page of the configuration: every key, from the schema of the file.

use std::fmt::Write as _;

use ppv2_proxy::config::Config;
use serde_json::Value;

use super::pages::{NOTE, cell};

/// The tables in the order of the page: the heading, the path of keys, and what to read.
const TABLES: &[(&str, &str, &str)] = &[
    ("Top level", "", ""),
    (
        "`[limits]`",
        "limits",
        "[How many sessions there can be](../guides/sessions.md#how-many-sessions-there-can-be).",
    ),
    (
        "`[admin]`",
        "admin",
        "[Admin API](admin-api.md). Without this table there is none.",
    ),
    (
        "`[access_log]`",
        "access_log",
        "[Log each session](../guides/observability.md#log-each-session). Without this table there is no access log.",
    ),
    (
        "`[upgrade]`",
        "upgrade",
        "[Upgrade without losing a datagram](../guides/operating.md#upgrade-without-losing-a-datagram). Without this table, no process can take over.",
    ),
    (
        "`[resolver]`",
        "resolver",
        "[DNS names](../guides/dns-names.md).",
    ),
    (
        "`[[listener]]`",
        "listener",
        "[Modes](../guides/modes.md), [sessions](../guides/sessions.md), [performance](../guides/performance.md). Repeat the table for more listeners.",
    ),
    (
        "`[listener.per_client]`",
        "listener.per_client",
        "[Limit what one client may have](../guides/security.md#limit-what-one-client-may-have).",
    ),
    (
        "`[listener.amplification]`",
        "listener.amplification",
        "[Limit amplification](../guides/security.md#limit-amplification).",
    ),
    (
        "`[listener.accept]`",
        "listener.accept",
        "[Behind another proxy](../guides/behind-another-proxy.md). Without this table, every byte of every datagram is payload.",
    ),
    (
        "`[listener.accept.remember]`",
        "listener.accept.remember",
        "[Proxies that write the header once](../guides/behind-another-proxy.md#proxies-that-write-the-header-once). Without this table, a sender must put a header in front of each datagram.",
    ),
    (
        "`[upstream.NAME]`",
        "upstream",
        "[Balancing](../guides/balancing.md). The name is yours. Repeat the table for more upstreams.",
    ),
    (
        "`[upstream.NAME.header]`",
        "upstream.header",
        "[Servers that read headers](../guides/servers.md).",
    ),
    (
        "`[[upstream.NAME.header.tlvs]]`",
        "upstream.header.tlvs",
        "[Tell servers more than the client](../guides/servers.md#tell-servers-more-than-the-client). Of `value`, `hex` and `from`, one is given.",
    ),
    (
        "`[upstream.NAME.health]`",
        "upstream.health",
        "[Health checks](../guides/health-checks.md). Without this table all servers count as up.",
    ),
    (
        "`[upstream.NAME.health.probe]`",
        "upstream.health.probe",
        "[Choose a probe](../guides/health-checks.md#choose-a-probe).",
    ),
    (
        "`[upstream.NAME.health.passive]`",
        "upstream.health.passive",
        "[Judge servers by their traffic](../guides/health-checks.md#judge-servers-by-their-traffic).",
    ),
    (
        "`[[upstream.NAME.servers]]`",
        "upstream.servers",
        "[DNS names](../guides/dns-names.md), [balancing](../guides/balancing.md). An entry of `servers` is a table with these keys, or just its `address`.",
    ),
];

/// Every key, with what it means.
pub fn page() -> String {
    let example = include_str!("../../../docs/reference/ppv2-proxy.toml");
    let mut text = format!(
        "# Configuration

{NOTE}

`ppv2-proxy run --config FILE` reads this TOML file. Flags and a file don't mix. An unknown key is an
error that names the line and the nearest known key.

## Have an editor check it

```sh
ppv2-proxy check --schema > ppv2-proxy.schema.json
```

This is the JSON Schema of the file. Editors with Taplo (Even Better TOML in VS Code) then complete and
explain keys and underline mistakes, if the file begins with this line:

```toml schema
#:schema ./ppv2-proxy.schema.json
```

`check` finds more: it also resolves names and compares settings with each other.

## Everything in one file

The values shown are the defaults, except for names, addresses, `workers`, `max_sessions` and
`responses`.

```toml
{example}```

Durations are written as in `\"500us\"`, `\"250ms\"`, `\"30s\"`, `\"5m\"`; networks as in
`\"192.0.2.0/24\"`, `\"2001:db8::/32\"`, `\"192.0.2.1\"`.
"
    );
    let schema = Schema(Config::schema());
    let mut written = Vec::new();
    for (heading, path, more) in TABLES {
        let table = schema.table(path);
        let _ = write!(text, "\n## {heading}\n\n");
        if let (Some(about), false) = (table["description"].as_str(), path.is_empty()) {
            let _ = writeln!(text, "{}.\n", about.trim_end_matches('.'));
        }
        if !more.is_empty() {
            let _ = writeln!(text, "{more}\n");
        }
        text += "| key | value | default | meaning |\n|---|---|---|---|\n";
        for (key, property) in table["properties"].as_object().unwrap() {
            let whole = match *path {
                "" => key.clone(),
                path => format!("{path}.{key}"),
            };
            if TABLES.iter().any(|(_, other, _)| *other == whole) {
                written.push(whole);
                continue;
            }
            let row = schema.row(key, property, is_required(path, table, key));
            text += &row;
        }
    }
    assert_eq!(written.len() + 1, TABLES.len(), "a table has no place");
    text
}

/// Whether a key must be there, by the schema or by what `validate` asks for.
fn is_required(path: &str, table: &Value, key: &str) -> bool {
    let mut required = table["required"].as_array().into_iter().flatten();
    let by_check = matches!(
        (path, key),
        ("listener", "bind" | "upstream") | ("listener.accept", "from")
    );
    by_check || required.any(|one| one == key)
}

struct Schema(Value);

impl Schema {
    /// What `node` stands for, without `null` and references.
    fn resolved<'s>(&'s self, node: &'s Value) -> &'s Value {
        if let Some(reference) = node["$ref"].as_str() {
            let path = reference.trim_start_matches('#');
            return self.resolved(self.0.pointer(path).unwrap());
        }
        let any = || node["anyOf"].as_array().into_iter().flatten();
        let table = any().find(|form| form["properties"].is_object());
        match table.or_else(|| any().find(|form| form["type"] != "null")) {
            Some(node) => self.resolved(node),
            None => node,
        }
    }

    /// The table that a path of keys leads to.
    fn table(&self, path: &str) -> &Value {
        let mut node = &self.0;
        for key in path.split('.').filter(|key| !key.is_empty()) {
            node = self.resolved(&node["properties"][key]);
            for inner in ["items", "additionalProperties"] {
                if node[inner].is_object() {
                    node = self.resolved(&node[inner]);
                }
            }
        }
        assert!(node["properties"].is_object(), "{path} is no table: {node}");
        node
    }

    /// What a key means.
    fn row(&self, key: &str, property: &Value, is_required: bool) -> String {
        let kind = self.resolved(property);
        let items = self.resolved(&kind["items"]);
        let about = property["description"].as_str().unwrap_or_default();
        let about = about.replace('\n', " ");
        let (about, told) = match about.rsplit_once("[default: ") {
            Some((about, told)) => (about.trim(), Some(told.trim_end_matches(']'))),
            None => (about.as_str(), None),
        };
        let is_list = !choices(items).is_empty();
        let choices = choices(if is_list { items } else { kind });
        let default = match (told, &property["default"]) {
            _ if is_required => "required".to_owned(),
            (Some(told), _) if choices.iter().any(|(word, _)| *word == told) => {
                format!("`\"{told}\"`")
            }
            (Some(told), _) if told.starts_with(['/', 't', 'f']) && !told.contains(' ') => {
                format!("`{told}`")
            }
            (Some(told), _) => told.to_owned(),
            (None, Value::Null) => "none".to_owned(),
            (None, value) => format!("`{value}`"),
        };
        let mut meaning = format!("{}.", about.trim_end_matches('.'));
        for (word, says) in &choices {
            let _ = write!(meaning, "<br>`{word}`: {says}");
        }
        let value = match choices.is_empty() {
            false if is_list => "list of words".to_owned(),
            false => "a word".to_owned(),
            true => self.value(kind),
        };
        format!(
            "| `{key}` | {} | {} | {} |\n",
            cell(&value),
            cell(&default),
            cell(&meaning).replace("&lt;br>", "<br>")
        )
    }

    /// What can be written.
    fn value(&self, kind: &Value) -> String {
        let bounds = |from: &str, to: &str| Some((kind[from].clone(), kind[to].clone()));
        let plain = |value: Value| value.to_string().trim_matches('"').to_owned();
        let kinds = kind["type"].as_array();
        let named = kinds.and_then(|kinds| kinds.iter().find(|one| *one != "null"));
        match named.unwrap_or(&kind["type"]).as_str() {
            Some("boolean") => "true or false".to_owned(),
            Some("integer") => match bounds("minimum", "maximum") {
                Some((Value::Null, _)) | None => "number".to_owned(),
                Some((_, Value::Null)) => "number".to_owned(),
                Some((from, to)) => format!("{from} to {}", with_commas(&to)),
            },
            Some("string") => match bounds("x-from", "x-to") {
                Some((from, to)) if from.is_string() => {
                    format!("duration, {} to {}", plain(from), plain(to))
                }
                _ => "text".to_owned(),
            },
            Some("array") => format!("list of {}", self.value(self.resolved(&kind["items"]))),
            _ => panic!("{kind}"),
        }
    }
}

/// A number with a comma before each three digits.
fn with_commas(number: &Value) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The words that can be written, and what each means.
fn choices(kind: &Value) -> Vec<(&str, &str)> {
    let all = kind["oneOf"].as_array().into_iter().flatten();
    let word = |choice: &'_ Value| choice["const"].as_str().is_some();
    all.filter(|choice| word(choice))
        .map(|choice| {
            let says = choice["description"].as_str().unwrap_or_default();
            (choice["const"].as_str().unwrap(), says)
        })
        .collect()
}

#[test]
fn the_example_has_every_key_and_shows_defaults() {
    let example = include_str!("../../../docs/reference/ppv2-proxy.toml");
    let schema = Schema(Config::schema());
    // Such must be given, or are shown with a value that says more.
    let given = ["bind", "header", "name", "responses", "servers", "upstream"];
    let mut wrong = Vec::new();
    // Each kind of probe has keys of its own, which the guide shows.
    for (_, path, _) in TABLES
        .iter()
        .filter(|(_, path, _)| !path.ends_with("probe"))
    {
        for (key, property) in schema.table(path)["properties"].as_object().unwrap() {
            let written = ["{} =", "[{}", "{}."].map(|form| form.replace("{}", key));
            if !written.iter().any(|written| example.contains(written)) {
                wrong.push(format!("{path}.{key} is missing"));
            }
            let default = &property["default"];
            let active = example
                .lines()
                .find_map(|line| line.strip_prefix(&written[0]));
            if let (Some(value), false) =
                (active, default.is_null() || given.contains(&key.as_str()))
            {
                let value = value.split(" #").next().unwrap().trim();
                let (shown, default) = (
                    value.replace(", ", ",").replace("0us", "0s"),
                    default.to_string(),
                );
                if shown != default {
                    wrong.push(format!("{path}.{key} = {value}: the default is {default}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
