//! Names that a log, a metric or a terminal could not show as they are.

use super::*;

#[test]
fn a_name_with_a_hidden_character_is_refused() {
    for (written, shown) in [
        ("\\u001b[31mdns", "\\u{1b}[31mdns"),
        ("dns\\n", "dns\\n"),
        ("\\u0085", "\\u{85}"),
        ("dns\\u202Esnd", "dns\\u{202e}snd"),
        ("dns\\u200B", "dns\\u{200b}"),
    ] {
        for message in [
            broken("name = \"dns\"", &format!("name = \"{written}\"")),
            error(
                &GOOD
                    .replace("resolvers", "R")
                    .replace("upstream = \"R\"", &format!("upstream = \"{written}\""))
                    .replace("[upstream.R]", &format!("[upstream.\"{written}\"]")),
            ),
        ] {
            assert!(message.contains(&format!("`{shown}`")), "{message}");
            assert!(message.contains("can't be shown"), "{message}");
            assert!(!message.replace('\n', "").contains(char::is_control));
        }
    }
    for plain in ["dns", "Namensauflösung 1", "名前解決", "a\u{301}"] {
        let content = GOOD.replace("\"dns\"", &format!("{plain:?}"));
        let config = Config::from_toml("x", &content.replace("\\u{301}", "\u{301}")).unwrap();
        assert_eq!(config.listeners[0].name, plain);
    }
}

#[test]
fn errors_show_no_control_character() {
    for value in [
        "dns:\\u001b]0;x\\u0007:53",
        "srv:_a._udp.\\u001b[2J",
        "host\\r\\nforged line:53",
        "\\u001b[31m",
        "dns:a:\\u202E53",
    ] {
        let message = broken("192.0.2.10:53", value);
        let body = message.replace("\n ", "");
        assert!(!body.contains(char::is_control), "{message:?}");
        assert!(!body.contains('\u{202e}'), "{message:?}");
        assert!(
            message.contains("\\u{") || message.contains("\\r\\n"),
            "{message}"
        );
    }
    let raw = ConfigError::new("a\tb\nc\u{7f}")
        .hint("d\u{1b}e")
        .to_string();
    assert_eq!(raw, "a\\tb\\nc\\u{7f}; d\\u{1b}e");
}
