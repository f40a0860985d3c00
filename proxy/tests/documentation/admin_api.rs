//! The page of the admin API names what the API has.

use std::collections::BTreeSet;
use std::fs;

use ppv2_lab::{http_get, receive, socket};
use serde_json::Value;

use super::root;
use super::running::Running;

/// The keys of a JSON object's or array's first entry.
fn keys(value: &Value) -> BTreeSet<String> {
    let entry = value.get(0).unwrap_or(value).as_object();
    entry.unwrap().keys().cloned().collect()
}

/// The first column of the table under `heading`.
fn fields(page: &str, heading: &str) -> BTreeSet<String> {
    let (_, section) = page.split_once(&format!("\n{heading}\n")).expect(heading);
    let section = section.split("\n#").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| row.split('`').next().unwrap().to_owned())
        .collect()
}

#[test]
fn the_page_has_every_endpoint_and_every_field() {
    let page = fs::read_to_string(root().join("docs/reference/admin-api.md")).unwrap();
    let proxy = Running::start();
    let get = |path| http_get(proxy.admin, path).1;

    let index = get("/");
    let words = index
        .split_whitespace()
        .filter(|word| word.starts_with('/'));
    let there: BTreeSet<_> = words
        .map(|word| word.split('?').next().unwrap().to_owned())
        .collect();
    let written: BTreeSet<_> = fields(&page, "## Endpoints")
        .into_iter()
        .map(|call| call.split([' ', '?']).nth(1).unwrap().to_owned())
        .collect();
    assert_eq!(written, there);

    let client = socket("127.0.0.1");
    client.send_to(b"hello", proxy.listener).unwrap();
    receive(&proxy.server);
    let sessions: Value = serde_json::from_str(&get("/sessions")).unwrap();
    assert_eq!(
        fields(&page, "### Fields of a session"),
        keys(&sessions["sessions"])
    );
    let upstreams: Value = serde_json::from_str(&get("/upstreams")).unwrap();
    assert_eq!(
        fields(&page, "### Fields of a server"),
        keys(&upstreams[0]["servers"])
    );
}
