//! YAML, by Debian's Python.

use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::Value;

const TO_JSON: &str = "
import json, sys, yaml
json.dump(list(yaml.safe_load_all(sys.stdin)), sys.stdout)
";

/// The documents of a file.
pub fn documents(text: &str) -> Vec<Value> {
    let mut python = Command::new("/usr/bin/python3")
        .args(["-c", TO_JSON])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = python.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    let output = python.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "the Debian package python3-yaml can't read\n{text}"
    );
    serde_json::from_slice(&output.stdout).unwrap()
}
