//! DNS servers from Debian packages, and dig as their client from many addresses.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::{Process, TIMEOUT};

/// The name that all questions are about.
pub const NAME: &str = "answer.ppv2.test";

/// Clients that ask at the same time.
const AT_ONCE: usize = 8;

/// What dig was told.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// NOERROR, REFUSED and so on.
    pub status: String,
    /// The data of the answer's records, as dig prints it.
    pub data: Vec<String>,
}

impl Answer {
    /// The only record of an answer without an error.
    #[track_caller]
    pub fn only(&self) -> &str {
        assert_eq!((self.status.as_str(), self.data.len()), ("NOERROR", 1));
        &self.data[0]
    }
}

/// A program of a Debian package. Debian keeps servers in `/usr/sbin`, which
/// ordinary users don't have in their path.
pub fn program(name: &str, package: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
        .unwrap_or_else(|| panic!("{name} is missing: install the Debian package {package}"))
}

/// Starts a server and gathers its log, from standard output and standard error.
pub fn server(program: &PathBuf, arguments: &[&str]) -> Process {
    Process::start(
        Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" >&2"])
            .arg(program)
            .args(arguments),
    )
}

/// Asks for the record of each kind (A, TXT and so on), one after the other and
/// each but once, so that a lost datagram is a failure. `None` for a question
/// that was not answered within `seconds`.
pub fn ask(from: SocketAddr, to: SocketAddr, kinds: &[&str], seconds: u64) -> Option<Vec<Answer>> {
    let mut dig = Command::new(program("dig", "bind9-dnsutils"));
    // `-r`: the user's ~/.digrc must not change what is asked.
    dig.args(["-r", &format!("@{}", to.ip()), "-p", &to.port().to_string()])
        .args(["-b", &format!("{}#{}", from.ip(), from.port())]);
    for kind in kinds {
        dig.args([NAME, kind, "+tries=1", &format!("+time={seconds}")])
            .args(["+ignore", "+noall", "+comments", "+answer"]);
    }
    let output = dig.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    match output.status.code() {
        Some(0) => {}
        // dig's code for "no reply from server".
        Some(9) => return None,
        _ => panic!("{dig:?}: {}\n{text}", output.status),
    }
    let answers = answers(&text);
    assert_eq!(answers.len(), kinds.len(), "{dig:?}:\n{text}");
    Some(answers)
}

/// As [`ask`], where an answer must come.
pub fn answered(from: SocketAddr, to: SocketAddr, kinds: &[&str]) -> Vec<Answer> {
    ask(from, to, kinds, TIMEOUT.as_secs())
        .unwrap_or_else(|| panic!("no answer to {from} from {to}"))
}

/// Asserts that no answer comes within a moment.
pub fn unanswered(from: SocketAddr, to: SocketAddr) {
    assert_eq!(ask(from, to, &["TXT"], 1), None, "an answer to {from}");
}

fn answers(text: &str) -> Vec<Answer> {
    let mut answers: Vec<Answer> = Vec::new();
    for line in text.lines() {
        if let Some((_, status)) = line.split_once("->>HEADER<<-") {
            let status = status.split_once("status: ").unwrap().1;
            let status = status.split(',').next().unwrap().to_owned();
            let data = Vec::new();
            answers.push(Answer { status, data });
        } else if !line.starts_with(';') && !line.is_empty() {
            // Name, time to live, class and kind, then the data.
            let mut fields = line.split_whitespace().skip(4);
            let data = fields.by_ref().collect::<Vec<_>>().join(" ");
            answers.last_mut().unwrap().data.push(data);
        }
    }
    answers
}

/// Does `work` for each item, `AT_ONCE` at a time; a panic of any is one of
/// the caller.
pub fn for_each<T: Sync>(items: &[T], work: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(items.len()) {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(item);
                }
            });
        }
    });
}

/// Addresses `prefix` + 1, `prefix` + 2 and so on, all with one port.
pub fn clients(prefix: &str, count: usize, port: u16) -> Vec<SocketAddr> {
    (1..=count)
        // In hexadecimal, so that IPv6 addresses are those that `lo` was given.
        .map(|i| match prefix.ends_with(':') {
            true => format!("{prefix}{i:x}"),
            false => format!("{prefix}{i}"),
        })
        .map(|ip| SocketAddr::new(ip.parse::<IpAddr>().unwrap(), port))
        .collect()
}

/// Shell commands that give `lo` the IPv6 addresses of [`clients`]. Those of
/// 127.0.0.0/8 it has.
pub fn setup_clients(prefixes: &[(&str, usize)]) -> String {
    let add = |(prefix, count): &(&str, usize)| {
        clients(prefix, *count, 0)
            .iter()
            .map(|client| format!("addr add {}/128 dev lo nodad\n", client.ip()))
            .collect::<String>()
    };
    let lines: String = prefixes.iter().map(add).collect();
    format!("ip -batch - <<END\n{lines}END")
}
