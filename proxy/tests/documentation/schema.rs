//! The JSON Schema of the configuration, as an editor uses it: every configuration that is
//! shown passes, and mistakes do not.

use std::fs;

use jsonschema::Validator;
use ppv2_lab::output;
use serde_json::Value;

use super::{all_pages, assert_none, root, whole_configurations};

fn validator() -> Validator {
    let (code, schema, error) = output(&["check", "--schema"]);
    assert_eq!(code, Some(0), "{error}");
    let schema: Value = serde_json::from_str(&schema).unwrap();
    // Also that the schema itself is one.
    jsonschema::meta::validate(&schema).unwrap();
    jsonschema::validator_for(&schema).unwrap()
}

/// What an editor would underline: the place, and why.
fn mistakes(validator: &Validator, config: &str) -> Vec<String> {
    let value: Value = toml::from_str(config).unwrap();
    let errors = validator.iter_errors(&value);
    errors
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect()
}

#[test]
fn every_configuration_passes_the_schema() {
    let validator = validator();
    let mut configurations = whole_configurations(&all_pages());
    let reference = "docs/reference/ppv2-proxy.toml";
    let text = fs::read_to_string(root().join(reference)).unwrap();
    let mut wrong = Vec::new();
    configurations.push((reference.to_owned(), text));
    assert!(configurations.len() > 20, "{}", configurations.len());
    for (place, config) in configurations {
        let mistakes = mistakes(&validator, &config);
        wrong.extend(mistakes.iter().map(|mistake| format!("{place}: {mistake}")));
    }
    assert_none(&wrong);
}

#[test]
fn mistakes_do_not_pass_the_schema() {
    let validator = validator();
    let right = "workers = 2\n[limits]\nmax_sessions = 100\n[admin]\nlisten = \"127.0.0.1:9901\"\n\
        [[listener]]\nname = \"dns\"\nbind = [\"127.0.0.1:53\"]\nupstream = \"u\"\nmode = \"ppv2\"\n\
        idle_timeout = \"30s\"\nallow = [\"10.0.0.0/8\"]\naccept = { from = [\"192.0.2.1\"] }\n\
        [upstream.u]\nbalance = \"maglev\"\nheader = { emit = \"every\" }\n\
        servers = [{ address = \"192.0.2.10:53\", weight = 2 }]\n\
        health = { probe = { kind = \"dns\", name = \"example.org\" } }\n";
    assert_eq!(mistakes(&validator, right), Vec::<String>::new());
    let mut missed = Vec::new();
    for (from, to, place) in [
        // Keys that are misspelt, unknown, or in another table.
        ("workers", "worker", ""),
        ("max_sessions", "sessions_max", "/limits"),
        ("idle_timeout", "idle_timout", "/listener/0"),
        ("listen =", "bind =", "/admin"),
        ("balance", "balancer", "/upstream/u"),
        ("emit", "emits", "/upstream/u/header"),
        ("weight", "wieght", "/upstream/u/servers/0"),
        ("from =", "form =", "/listener/0/accept"),
        // Words that don't exist.
        ("\"ppv2\"", "\"proxy\"", "/listener/0/mode"),
        ("\"maglev\"", "\"roundrobin\"", "/upstream/u/balance"),
        ("\"every\"", "\"always\"", "/upstream/u/header/emit"),
        (
            "\"dns\", name",
            "\"ping\", name",
            "/upstream/u/health/probe",
        ),
        // Another type, or out of range.
        ("workers = 2", "workers = \"2\"", "/workers"),
        ("workers = 2", "workers = 0", "/workers"),
        (
            "weight = 2",
            "weight = 100000",
            "/upstream/u/servers/0/weight",
        ),
        ("[\"127.0.0.1:53\"]", "\"127.0.0.1:53\"", "/listener/0/bind"),
        ("\"30s\"", "30", "/listener/0/idle_timeout"),
        ("\"30s\"", "\"soon\"", "/listener/0/idle_timeout"),
        ("[[listener]]", "[listener]", "/listener"),
    ] {
        assert!(right.contains(from), "{from}");
        let found = mistakes(&validator, &right.replacen(from, to, 1));
        // A server is one of two forms: an editor then shows the place of the whole.
        let is_there = |mistake: &String| {
            let at = mistake.split(": ").next().unwrap();
            at == place || (place.starts_with(at) && at.starts_with("/upstream/u/"))
        };
        if !found.iter().any(is_there) {
            missed.push(format!("{from} -> {to}: {found:?}"));
        }
    }
    assert_none(&missed);
}
