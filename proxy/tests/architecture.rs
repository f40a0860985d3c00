//! The data path imports downward only and never the control path; one module
//! holds the unsafe code and libc. What `lib.rs` draws is what the code does.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What each module of the data path may import of this crate.
const DATA_PATH: [(&str, &[&str]); 7] = [
    (
        "worker",
        &["address", "counters", "mode", "net", "session", "upstream"],
    ),
    ("upstream", &["address", "mode"]),
    ("mode", &["address", "net"]),
    ("session", &["address"]),
    ("counters", &[]),
    ("net", &[]),
    ("address", &[]),
];

fn sources() -> BTreeMap<PathBuf, String> {
    fn visit(folder: &Path, found: &mut BTreeMap<PathBuf, String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                visit(&path, found);
            } else {
                found.insert(path.clone(), fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    visit(
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")),
        &mut found,
    );
    found
}

/// The top module that a file belongs to.
fn module(path: &Path) -> String {
    let inside = path.strip_prefix(concat!(env!("CARGO_MANIFEST_DIR"), "/src"));
    let first = inside.unwrap().components().next().unwrap();
    let name = first.as_os_str().to_str().unwrap();
    name.trim_end_matches(".rs").to_owned()
}

fn imports(source: &str) -> Vec<String> {
    source
        .split("crate::")
        .skip(1)
        .map(|rest| {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
            rest[..end.unwrap_or(rest.len())].to_owned()
        })
        .collect()
}

#[test]
fn the_data_path_imports_downward_only() {
    let sources = sources();
    for (name, allowed) in DATA_PATH {
        let files: Vec<_> = sources
            .iter()
            .filter(|(path, _)| module(path) == name)
            .collect();
        assert!(!files.is_empty(), "no module {name}");
        for (path, source) in files {
            for import in imports(source) {
                assert!(
                    import == name || allowed.contains(&import.as_str()),
                    "{} imports {import}, {name} may import {allowed:?}",
                    path.display()
                );
            }
        }
    }
}

#[test]
fn one_file_holds_unsafe_code_and_libc() {
    for (path, source) in sources() {
        let name = path.file_name().unwrap().to_str().unwrap();
        let code = source
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        for line in code {
            let fenced = path.to_str().unwrap().contains("/src/net/linux");
            assert!(fenced || !line.contains("unsafe "), "{name}: {line}");
            let names = path.ends_with("net/tests.rs") || path.ends_with("net/fallback.rs");
            assert!(
                fenced || names || !line.contains("libc::"),
                "{name}: {line}"
            );
        }
    }
}

#[test]
fn no_file_is_a_maze() {
    for (path, source) in sources() {
        let lines = source.lines().count();
        assert!(lines <= 600, "{} has {lines} lines; cut it", path.display());
        let opening = source.lines().next().unwrap_or_default();
        assert!(
            opening.starts_with("//!"),
            "{} says not what it is for",
            path.display()
        );
    }
}
