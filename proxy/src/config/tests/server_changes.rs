//! Options for servers that are added, removed or come back.

use super::super::*;

fn load(of_upstream: &str) -> Result<Config, String> {
    let content = format!(
        "[[listener]]\nbind = [\"127.0.0.1:5353\"]\nupstream = \"u\"\n\
         [upstream.u]\n{of_upstream}\nservers = [\"192.0.2.1:53\"]\n"
    );
    Config::from_toml("x", &content).map_err(|error| error.to_string())
}

#[test]
fn slow_start_and_return_are_off_by_default() {
    let config = load("").unwrap();
    let server = &config.servers[0];
    assert!(!config.listeners[0].returns && !server.leaving);
    assert_eq!(server.slow_start, Duration::ZERO);
    assert_eq!(server.lame_duck, Duration::from_secs(30));

    let asked = "slow_start = \"1m\"\nlame_duck = \"0s\"\non_return = \"return\"";
    let config = load(asked).unwrap();
    let server = &config.servers[0];
    assert!(config.listeners[0].returns);
    assert_eq!(server.slow_start, Duration::from_secs(60));
    assert_eq!(server.lame_duck, Duration::ZERO);
    assert!(load("on_return = \"stay\"\nbalance = \"round_robin\"").is_ok());
}

#[test]
fn errors_name_the_fix() {
    for (of_upstream, message, fix) in [
        ("slow_start = \"soon\"", "slow_start: `soon`", "30s"),
        (
            "lame_duck = \"8days\"",
            "lame_duck: `8days` is too long",
            "x:5",
        ),
        (
            "on_return = \"go\"",
            "on_return: `go` is not known",
            "return",
        ),
        (
            "on_return = \"return\"\nbalance = \"random_two\"",
            "on_return \"return\" without balance \"maglev\"",
            "use balance = \"maglev\"",
        ),
    ] {
        let error = load(of_upstream).unwrap_err();
        assert!(error.contains(message) && error.contains(fix), "{error}");
    }
}
