//! `top` on a real terminal, which tmux is, with a real proxy and real datagrams.

use std::fs;
use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::thread;

use ppv2_lab::*;
use ppv2_proxy::commands::top::Screen;

/// A terminal with a shell in it, which ends with the value.
struct Tmux {
    folder: tempfile::TempDir,
}

impl Tmux {
    /// A terminal of this size.
    fn start(width: u16, height: u16) -> Self {
        let tmux = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let size = ["-x", &width.to_string(), "-y", &height.to_string()].map(str::to_owned);
        let [x, width, y, height] = &size;
        // A shell without a file of its own: its prompt is known.
        tmux.ask(&[
            "new-session",
            "-d",
            x,
            width,
            y,
            height,
            "env PS1='PROMPT ' ENV= sh",
        ]);
        tmux.shows("PROMPT");
        tmux
    }

    fn ask(&self, arguments: &[&str]) -> String {
        let output = Command::new("tmux")
            .arg("-S")
            .arg(self.folder.path().join("socket"))
            .args(["-f", "/dev/null", "-u"])
            .args(arguments)
            .env_remove("TMUX")
            .env_remove("NO_COLOR")
            .env("TERM", "xterm-256color")
            .stdin(Stdio::null())
            .output()
            .expect("the Debian package tmux has to be installed");
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Types a line into the shell.
    fn run(&self, line: &str) {
        self.ask(&["send-keys", "-l", line]);
        self.press("Enter");
    }

    fn press(&self, key: &str) {
        self.ask(&["send-keys", key]);
    }

    fn screen(&self) -> String {
        self.ask(&["capture-pane", "-p"])
    }

    /// As [`Tmux::screen`], with colours.
    fn coloured(&self) -> String {
        self.ask(&["capture-pane", "-p", "-e"])
    }

    #[track_caller]
    fn shows(&self, part: &str) {
        self.becomes(part, |screen| screen.contains(part));
    }

    /// Waits until the screen is as `is_done` wants.
    #[track_caller]
    fn becomes(&self, what: &str, is_done: impl Fn(&str) -> bool) {
        let mut screen = String::new();
        let seen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually(what, || {
                screen = self.screen();
                is_done(&screen)
            });
        }));
        assert!(seen.is_ok(), "{what}: not on\n{screen}");
    }

    /// The terminal is as it was: echo, lines, first screen, cursor.
    #[track_caller]
    fn is_restored(&self) {
        let state = "#{alternate_on}#{cursor_flag} #{pane_current_command}";
        let state = || self.ask(&["display-message", "-p", state]);
        // A process that still ends could read what is typed.
        eventually("first screen, cursor and shell", || {
            state().trim() == "01 sh"
        });
        self.run("clear; stty -a | tr ';' ' ' | tr ' ' '\\n' | grep -cxE 'icanon|echo|isig|opost'");
        self.becomes("echo and lines", |screen| {
            screen.lines().next() == Some("4")
        });
    }

    /// The process in the terminal besides the shell.
    fn pid(&self) -> String {
        let shell = self.ask(&["display-message", "-p", "#{pane_pid}"]);
        let shell = shell.trim();
        let children = format!("/proc/{shell}/task/{shell}/children");
        let children = fs::read_to_string(children).unwrap();
        children.split_whitespace().next().unwrap().to_owned()
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        self.ask(&["kill-server"]);
    }
}

fn config(listener: SocketAddr, admin: &str, server: SocketAddr) -> String {
    format!(
        "workers = 1\n[admin]\nlisten = \"{admin}\"\n[[listener]]\nname = \"games\"\n\
         bind = [\"{listener}\"]\nupstream = \"arena\"\n[upstream.arena]\nservers = [\"{server}\"]\n"
    )
}

fn line(screen: &str, start: &str) -> Option<Vec<String>> {
    let line = screen.lines().find(|line| line.starts_with(start))?;
    Some(line.split_whitespace().map(str::to_owned).collect())
}

#[test]
fn an_operator_watches_a_proxy() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1").to_string());
    let folder = tempfile::tempdir().unwrap();
    let text = config(listener, &admin, server.local_addr().unwrap());
    let mut proxy = proxy_with(&folder, &text);
    let tmux = Tmux::start(80, 24);
    let file = folder.path().join("proxy.toml");
    let command = format!(
        "{} top --interval 100ms --config {}",
        binary().display(),
        file.display()
    );
    tmux.run(&command);
    tmux.shows("ready, up");
    // The rate of datagrams that are sent meanwhile.
    let client = socket("127.0.0.1");
    tmux.becomes("a rate of `games`", |screen| {
        for _ in 0..5 {
            served(&client, listener, &server);
        }
        line(screen, "games ").is_some_and(|words| {
            let is_rate = |word: &String| !["0", "-"].contains(&word.as_str());
            words.len() == 9 && words[2] == "1" && [4, 5, 6, 7].iter().all(|i| is_rate(&words[*i]))
        })
    });
    for key in ["Tab", "2"] {
        tmux.press(key);
        let label = server.local_addr().unwrap().to_string();
        tmux.becomes("the server", |screen| {
            line(screen, "arena ").is_some_and(|words| words[1..3] == ["1/1", "up"])
                && line(screen, &format!("  {label}"))
                    .is_some_and(|words| words[1..3] == ["up", "1"])
        });
    }
    tmux.press("3");
    tmux.shows("nothing has been dropped");
    tmux.press("4");
    tmux.becomes("the client", |screen| {
        line(screen, "127.0.0.1 ").is_some_and(|words| words[1] == "games" && words.len() == 6)
    });
    tmux.press("?");
    tmux.shows("sort by the next column");
    tmux.press("Escape");
    tmux.press("1");
    tmux.press("s");
    tmux.shows("sorted by LISTENER");
    tmux.press("p");
    tmux.shows("PAUSED");
    tmux.press("p");
    tmux.becomes("no pause", |screen| !screen.contains("PAUSED"));

    for (width, height, part) in [
        ("40", "10", "\nLISTENER"),
        ("10", "3", "ready, up…"),
        ("1", "1", "…"),
        ("120", "40", "UPSTREAM"),
    ] {
        tmux.ask(&["resize-window", "-x", width, "-y", height]);
        tmux.becomes("a picture of this size", |screen| {
            screen.contains(part) && screen.trim_end().lines().count() <= height.parse().unwrap()
        });
    }
    // The whole picture comes again after something else was written over it.
    tmux.shows("sorted by LISTENER");
    tmux.press("C-l");
    tmux.shows("sorted by LISTENER");

    proxy.signal("KILL");
    proxy.wait();
    tmux.shows("UNREACHABLE for");
    tmux.shows("Connection refused");
    drop(proxy);
    let _proxy = proxy_with(&folder, &text);
    tmux.becomes("the proxy again", |screen| {
        screen.contains("ready, up") && !screen.contains("UNREACHABLE")
    });
    tmux.press("q");
    tmux.is_restored();
}

#[test]
fn the_terminal_is_restored_after_signals_and_keys() {
    let tmux = Tmux::start(80, 24);
    // Nothing needs to be there.
    let nobody = address("127.0.0.1");
    let command = format!("{} top --admin {nobody}", binary().display());
    for signal in ["TERM", "INT", "HUP", "QUIT"] {
        tmux.run(&command);
        tmux.shows("UNREACHABLE");
        let pid = tmux.pid();
        let sent = Command::new("kill").args(["-s", signal, &pid]).status();
        assert!(sent.unwrap().success());
        tmux.is_restored();
    }
    tmux.run(&command);
    tmux.shows("UNREACHABLE");
    tmux.press("C-c");
    tmux.is_restored();
    // Suspended, and on again.
    tmux.run(&command);
    tmux.shows("UNREACHABLE");
    tmux.press("C-z");
    tmux.is_restored();
    tmux.run("fg");
    tmux.shows("UNREACHABLE");
    tmux.press("?");
    tmux.shows("draw again");
    tmux.press("q");
    tmux.is_restored();
}

/// A window that is closed ends it, also where no signal says so.
#[test]
fn it_ends_with_its_terminal() {
    let nobody = address("127.0.0.1");
    let folder = tempfile::tempdir().unwrap();
    let code = folder.path().join("code");
    let command = format!(
        "{} top --admin {nobody}; echo $? >{}",
        binary().display(),
        code.display()
    );
    let tmux = Tmux::start(80, 24);
    tmux.run(&format!("setsid -f sh -c '{command}'"));
    tmux.shows("UNREACHABLE");
    tmux.ask(&["respawn-pane", "-k", "sh"]);
    let code = || fs::read_to_string(&code).unwrap_or_default();
    eventually("the end", || code().ends_with('\n'));
    assert_eq!(code(), "1\n");
}

/// In another process, on a terminal, this test panics with the terminal in hands.
#[test]
fn the_terminal_is_restored_after_a_panic() {
    const INSIDE: &str = "PPV2_TEST_TOP_PANICS";

    if std::env::var_os(INSIDE).is_some() {
        let mut screen = Screen::open().unwrap();
        screen
            .draw(|frame| assert!(frame.area().is_empty(), "it panics"))
            .unwrap();
        return;
    }
    let test = std::env::current_exe().unwrap();
    let name = test_name!();
    let tmux = Tmux::start(80, 24);
    tmux.run(&format!(
        "{INSIDE}=1 {} --exact --nocapture {name}",
        test.display()
    ));
    tmux.shows("it panics");
    tmux.shows("test result: FAILED");
    tmux.is_restored();
}

#[test]
fn colours_are_left_out_where_they_are_not_wanted() {
    let tmux = Tmux::start(80, 24);
    let nobody = address("127.0.0.1");
    let has_red = |screen: &str| screen.contains("\u{1b}[38;5;1m");
    for (variable, coloured) in [("NO_COLOR=", true), ("NO_COLOR=1", false)] {
        tmux.run(&format!(
            "{variable} {} top --admin {nobody}",
            binary().display()
        ));
        tmux.shows("UNREACHABLE");
        assert_eq!(
            has_red(&tmux.coloured()),
            coloured,
            "{variable}: {:?}",
            tmux.coloured()
        );
        tmux.press("q");
        tmux.is_restored();
    }
    tmux.run(&format!(
        "TERM=dumb {} top --admin {nobody}",
        binary().display()
    ));
    tmux.shows("TERM=dumb can't show this; use --once");
}

#[test]
fn scripts_get_plain_text() {
    let server = socket("127.0.0.1");
    let listener = address("127.0.0.1");
    let folder = tempfile::tempdir().unwrap();
    // The proxy's user makes the socket.
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    let socket_file = folder.path().join("admin.sock");
    let admin = format!("unix:{}", socket_file.display());
    let mut proxy = proxy_with(
        &folder,
        &config(listener, &admin, server.local_addr().unwrap()),
    );
    served(&socket("127.0.0.1"), listener, &server);
    let once = ["top", "--once", "--interval", "100ms", "--admin", &admin];
    let (code, text, log) = output(&once);
    assert_eq!((code, log.as_str()), (Some(0), ""), "{text}");
    assert!(text.starts_with("ppv2-proxy "), "{text}");
    assert_eq!(
        line(&text, "games ").unwrap()[1..3],
        ["arena", "1"],
        "{text}"
    );
    assert_eq!(
        line(&text, "arena ").unwrap()[1..4],
        ["1/1", "up", "1"],
        "{text}"
    );
    assert!(text.contains("nothing has been dropped"), "{text}");
    assert!(!text.contains('\u{1b}'), "{text:?}");

    let (code, text, log) = output(&["top", "--admin", &admin]);
    assert_eq!((code, text.as_str()), (Some(2), ""));
    assert!(
        log.contains("standard output is not a terminal; use --once"),
        "{log}"
    );
    proxy.signal("KILL");
    proxy.wait();
    let (code, text, log) = output(&once);
    assert_eq!((code, text.as_str()), (Some(1), ""));
    assert!(log.contains("can't be asked"), "{log}");
}

#[test]
fn wrong_use_exits_with_2() {
    let folder = tempfile::tempdir().unwrap();
    let file = write(
        &folder,
        "none.toml",
        "[[listener]]\nbind = [\"127.0.0.1:53\"]\n",
    );
    let file = file.to_str().unwrap();
    for (wrong, part) in [
        (&["--config", file][..], "no admin address to ask"),
        (&["--admin", "here"], "here"),
        (&["--interval", "1ms"], "too short"),
        (
            &["--admin", "127.0.0.1:1", "--config", file],
            "cannot be used with",
        ),
    ] {
        let (code, _, log) = output(&[&["top", "--once"], wrong].concat());
        assert_eq!(code, Some(2), "{wrong:?}: {log}");
        assert!(log.contains(part), "{wrong:?}: {log}");
    }
}

#[test]
fn other_programs_are_no_proxies() {
    for (answer, part) in [
        (
            &b"SSH-2.0-OpenSSH_9.2\r\n"[..],
            "does not answer as an HTTP server",
        ),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "has no /status"),
        (b"HTTP/1.1 500 x\r\n\r\n", "answers 500 to /status"),
        (
            b"HTTP/1.1 200 OK\r\n\r\n{\"version\":\"1\"}",
            "nothing of use",
        ),
        (b"HTTP/1.1 200 OK\r\n\r\n<p>\x1b[2J", "nothing of use"),
    ] {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let admin = other.local_addr().unwrap().to_string();
        let answering = thread::spawn(move || {
            let (mut stream, _) = other.accept().unwrap();
            stream.write_all(answer).unwrap();
            // The request must be read: otherwise the answer is lost with a reset.
            stream.shutdown(Shutdown::Write).unwrap();
            std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
        });
        let (code, text, log) = output(&["top", "--once", "--admin", &admin]);
        assert_eq!((code, text.as_str()), (Some(1), ""), "{log}");
        assert!(log.contains(part) && !log.contains('\u{1b}'), "{log:?}");
        answering.join().unwrap();
    }
}
