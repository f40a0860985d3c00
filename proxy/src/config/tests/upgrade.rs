//! Where another process takes over.

use super::*;

fn with(more: &str) -> String {
    format!("{GOOD}\n{more}")
}

#[test]
fn the_socket_of_an_upgrade_is_read() {
    assert_eq!(Config::from_toml("x", GOOD).unwrap().upgrade_socket(), None);
    let config = with("[upgrade]\nsocket = \"/run/ppv2/upgrade.sock\"");
    let config = Config::from_toml("x", &config).unwrap();
    let socket = config.upgrade_socket();
    assert_eq!(socket, Some(Path::new("/run/ppv2/upgrade.sock")));
}

#[test]
fn a_wrong_socket_of_an_upgrade_is_refused() {
    for (table, part) in [
        ("[upgrade]", "socket"),
        (
            "[upgrade]\nsocket = \"upgrade.sock\"",
            "upgrade.socket: `upgrade.sock` is not an absolute path",
        ),
        ("[upgrade]\nsocket = 7", "upgrade.socket"),
        (
            "[upgrade]\npath = \"/run/upgrade.sock\"",
            "unknown key `path`",
        ),
    ] {
        let error = error(&with(table));
        assert!(error.contains(part), "{table}: {error}");
    }
    let both = with("[upgrade]\nsocket = \"/run/ppv2.sock\"");
    let both = both.replace("127.0.0.1:9901", "unix:/run/ppv2.sock");
    let error = error(&both);
    assert!(
        error.contains("/run/ppv2.sock is the admin address, too"),
        "{error}"
    );
}

#[test]
fn a_takeover_is_from_the_named_socket_or_that_of_the_file() {
    let here = "[upgrade]\nsocket = \"/run/ppv2/upgrade.sock\"";
    let config = |more: &str| Config::from_toml("x", &with(more)).unwrap();
    let takeover = |arguments: &[&str], config: &Config| {
        let arguments = ["ppv2-proxy", "run", "--config", "x"]
            .iter()
            .chain(arguments);
        let Command::Run(run) = Arguments::parse_from(arguments).command else {
            panic!("it is `run`");
        };
        run.takeover
            .map(|named| crate::cli::takeover(named, config))
    };
    let named =
        |arguments: &[&str], more: &str| takeover(arguments, &config(more)).unwrap().unwrap();
    assert!(takeover(&[], &config(here)).is_none());
    assert_eq!(
        named(&["--takeover"], here),
        Path::new("/run/ppv2/upgrade.sock")
    );
    assert_eq!(
        named(&["--takeover", "/run/a.sock"], here),
        Path::new("/run/a.sock")
    );
    assert_eq!(named(&["--takeover", "a.sock"], ""), Path::new("a.sock"));
    let error = takeover(&["--takeover"], &config("")).unwrap().unwrap_err();
    assert!(
        error.to_string().contains("name the `upgrade.socket`"),
        "{error}"
    );
}
