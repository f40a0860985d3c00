//! `run` at a terminal, which `script` of util-linux makes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ppv2_lab::*;

/// A proxy at a terminal of its own, and what that shows.
struct AtTerminal {
    script: Process,
    shown: PathBuf,
    folder: tempfile::TempDir,
}

impl AtTerminal {
    fn start(config: &str, options: &str, environment: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = write(&folder, "proxy.toml", config);
        let (shown, pid) = (folder.path().join("shown"), folder.path().join("pid"));
        let run = format!(
            "echo $$ >{}; exec {} run {options} --config {}",
            pid.display(),
            binary().display(),
            file.display()
        );
        let mut command = Command::new("script");
        command.args(["--quiet", "--flush", "--return", "--command", &run]);
        command.arg(&shown).env("TERM", "xterm");
        command
            .env_remove("NO_COLOR")
            .stdout(std::process::Stdio::null());
        let script = Process::start(command.envs(environment.iter().copied()));
        Self {
            script,
            shown,
            folder,
        }
    }

    fn text(&self) -> String {
        let text = fs::read(&self.shown).unwrap_or_default();
        String::from_utf8_lossy(&text).replace("\r\n", "\n")
    }

    #[track_caller]
    fn wait_for(&self, what: &str) {
        eventually(what, || self.text().contains(what));
    }

    fn pid(&self) -> Option<String> {
        let pid = fs::read_to_string(self.folder.path().join("pid")).ok()?;
        Some(pid.trim().to_owned()).filter(|pid| Path::new("/proc").join(pid).exists())
    }

    fn kill(&self, signal: &str) {
        if let Some(pid) = self.pid() {
            let _ = Command::new("kill").args(["-s", signal, &pid]).status();
        }
    }
}

impl Drop for AtTerminal {
    fn drop(&mut self) {
        // It survives the end of its terminal.
        self.kill("KILL");
    }
}

#[test]
fn a_terminal_shows_what_is_served_and_how_servers_are() {
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let (well, closed) = (socket("127.0.0.1"), address("127.0.0.1"));
    let well_address = well.local_addr().unwrap();
    let config = format!(
        "workers = 1\ndrain_timeout = \"50ms\"\n[admin]\nlisten = \"{admin}\"\n\
         [[listener]]\nname = \"dns\"\nbind = [\"{listener}\"]\nupstream = \"resolvers\"\n\
         [upstream.resolvers]\nservers = [\"{well_address}\", {{ address = \"{closed}\", backup = true }}]\n\
         health = {{ every = \"50ms\", probe = {{ kind = \"udp\", send = \"?\" }} }}\n"
    );
    let mut it = AtTerminal::start(&config, "", &[]);
    let answering = std::thread::spawn(move || {
        let (_, proxy) = receive(&well);
        well.send_to(b"!", proxy).unwrap();
    });
    it.wait_for(&format!("resolvers {well_address}: first check passed"));
    it.wait_for(&format!("resolvers {closed}: first check refused"));
    answering.join().unwrap();
    let text = it.text();
    let lines: Vec<_> = text.lines().collect();
    for line in [
        format!("  \u{1b}[1mdns\u{1b}[0m  {listener} → resolvers"),
        format!("    {well_address}  \u{1b}[2mmode ppv2\u{1b}[0m"),
        format!("    {closed}  \u{1b}[2mmode ppv2, backup\u{1b}[0m"),
        format!("  admin API: http://{admin}/"),
        format!("  \u{1b}[32m●\u{1b}[0m resolvers {well_address}: first check passed"),
        format!("  \u{1b}[31m○\u{1b}[0m resolvers {closed}: first check refused"),
    ] {
        assert!(lines.contains(&line.as_str()), "no `{line}` in\n{text}");
    }
    assert!(text.contains("\u{1b}[1mppv2-proxy\u{1b}[0m "), "{text}");
    assert!(
        text.contains("\u{1b}[32mready\u{1b}[0m: 1 worker, at most "),
        "{text}"
    );
    assert!(!text.contains(" INFO "), "{text}");
    // What happens later has its time and level.
    it.wait_for("server is down");
    it.kill("TERM");
    let (status, log) = it.script.wait();
    assert!(status.success(), "{log}");
    assert!(
        it.text().contains(" INFO\u{1b}[0m stopped"),
        "{}",
        it.text()
    );
}

#[test]
fn a_terminal_has_no_colour_if_it_is_not_wanted() {
    for environment in [[("NO_COLOR", "1")], [("TERM", "dumb")]] {
        let config = format!(
            "[[listener]]\nbind = [\"{}\"]\nupstream = \"u\"\n[upstream.u]\nservers = [\"127.0.0.1:1\"]\n",
            address("127.0.0.1")
        );
        let it = AtTerminal::start(&config, "", &environment);
        it.wait_for("\nready: ");
        it.kill("HUP");
        it.wait_for("INFO reloaded: ");
        assert!(!it.text().contains('\u{1b}'), "{}", it.text());
    }
}

#[test]
fn json_is_json_at_a_terminal_too() {
    let listener = address("127.0.0.1");
    let config = format!(
        "[[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n[upstream.u]\nservers = [\"127.0.0.1:1\"]\n"
    );
    let it = AtTerminal::start(&config, "--log-format json", &[]);
    it.wait_for("\"message\":\"ready\"");
    let text = it.text();
    let json = text.lines().filter(|line| line.starts_with('{'));
    assert!(json.clone().count() >= 3, "{text}");
    for line in json {
        serde_json::from_str::<serde_json::Value>(line).unwrap();
    }
}

#[test]
fn a_terminal_shows_no_start_if_the_level_leaves_it_out() {
    let admin = address("127.0.0.1");
    let config = format!(
        "[admin]\nlisten = \"{admin}\"\n[[listener]]\nbind = [\"{}\"]\nupstream = \"u\"\n[upstream.u]\n\
         servers = [\"127.0.0.1:1\"]\n",
        address("127.0.0.1")
    );
    let it = AtTerminal::start(&config, "--log-level error", &[]);
    eventually("the start", || std::net::TcpStream::connect(admin).is_ok());
    eventually("readiness", || http_get(admin, "/readyz").0 == 200);
    it.kill("TERM");
    eventually("the end", || it.pid().is_none());
    assert!(!it.text().contains("ready"), "{}", it.text());
}
