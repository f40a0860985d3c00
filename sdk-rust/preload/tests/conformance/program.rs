//! The C program: compiled, and run for one case after another.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path as FilePath;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::differences::is_run;
use crate::network::{Family, Network, Path};

/// Cases that run at a time. They wait more than they work.
const AT_A_TIME: usize = 8;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) family: String,
}

/// What a case printed, and how it ended; nothing if it was not run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) lines: Vec<String>,
    pub(crate) stderr: String,
    /// What is wrong with the library's statistics.
    pub(crate) uncounted: Option<String>,
    took: Duration,
}

/// By what the program is compiled, and which library it is run with.
pub(crate) struct Built {
    /// Of the C library.
    pub(crate) name: &'static str,
    pub(crate) compiler: fn() -> Command,
    pub(crate) library: &'static FilePath,
}

pub(crate) struct Program {
    built: Built,
    folder: tempfile::TempDir,
    pub(crate) cases: Vec<Case>,
}

impl Program {
    pub(crate) fn compile(built: Built) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sources = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
        let entries = std::fs::read_dir(sources).unwrap();
        let sources = entries.map(|entry| entry.unwrap().path());
        let compilers: Vec<_> = sources
            .filter(|path| path.extension().is_some_and(|extension| extension == "c"))
            .map(|path| {
                let object = folder
                    .path()
                    .join(path.file_stem().unwrap())
                    .with_extension("o");
                let mut cc = (built.compiler)();
                // Bad pointers and sizes are what some cases are about.
                cc.args([
                    "-std=c11",
                    "-Wall",
                    "-Wextra",
                    "-Wno-nonnull",
                    "-Wno-unused-result",
                ]);
                cc.args([
                    "-Wno-stringop-overflow",
                    "-Wno-stringop-overread",
                    "-pthread",
                    "-c",
                ]);
                cc.args(match path.file_stem().unwrap().to_str() {
                    Some("fortified") => &["-O2", "-D_FORTIFY_SOURCE=2"][..],
                    _ => &["-O1", "-U_FORTIFY_SOURCE"],
                });
                let child = cc.arg(&path).arg("-o").arg(&object).spawn();
                (object, child.expect("cc is in the Debian package gcc"))
            })
            .collect();
        let mut link = (built.compiler)();
        for (object, mut compiler) in compilers {
            assert!(compiler.wait().unwrap().success(), "{}", object.display());
            link.arg(object);
        }
        let program = folder.path().join("conformance");
        let linked = link.arg("-pthread").arg("-o").arg(&program).status();
        assert!(linked.unwrap().success());
        let list = Command::new(&program).arg("list").output().unwrap();
        let cases = String::from_utf8(list.stdout).unwrap();
        let cases = cases.lines().map(|line| {
            let (name, family) = line.split_once(' ').unwrap();
            let (name, family) = (name.to_owned(), family.to_owned());
            Case { name, family }
        });
        // One case alone, while something is looked for.
        let only = std::env::var("PPV2_CONFORMANCE").unwrap_or_default();
        Self {
            built,
            cases: cases.filter(|case| case.name.contains(&only)).collect(),
            folder,
        }
    }

    /// Runs every case.
    pub(crate) fn run(&self, path: Path) -> Vec<Outcome> {
        let next = AtomicUsize::new(0);
        let outcomes = Mutex::new(vec![None; self.cases.len()]);
        std::thread::scope(|scope| {
            for _ in 0..AT_A_TIME {
                scope.spawn(|| {
                    while let index @ 0.. = next.fetch_add(1, Ordering::Relaxed)
                        && let Some(case) = self.cases.get(index)
                    {
                        let outcome = self.run_case(path, case, index);
                        outcomes.lock().unwrap()[index] = Some(outcome);
                    }
                });
            }
        });
        let outcomes = outcomes.into_inner().unwrap();
        let outcomes: Vec<Outcome> = outcomes.into_iter().map(Option::unwrap).collect();
        self.keep(path, &outcomes);
        outcomes
    }

    /// Writes everything to a file in target/tmp, to be looked at.
    fn keep(&self, path: Path, outcomes: &[Outcome]) {
        let mut file = File::create(format!(
            "{}/conformance {} {path:?}",
            env!("CARGO_TARGET_TMPDIR"),
            self.built.name
        ))
        .unwrap();
        for (case, outcome) in self.cases.iter().zip(outcomes) {
            writeln!(file, "{} {} {:?}", case.name, case.family, outcome.took).unwrap();
            for line in &outcome.lines {
                writeln!(file, "    {line}").unwrap();
            }
        }
    }

    fn run_case(&self, path: Path, case: &Case, index: usize) -> Outcome {
        if !is_run(case, path) {
            return Outcome::default();
        }
        self.execute(path, &case.family, &[&case.name, &case.family], index)
    }

    /// Runs the program with these arguments, and the addresses that belong to `index`.
    pub(crate) fn execute(
        &self,
        path: Path,
        family: &str,
        arguments: &[&str],
        index: usize,
    ) -> Outcome {
        let began = Instant::now();
        let mut network = Network::new(path, Family::parse(family), u16::try_from(index).unwrap());
        let name = format!("{}.{path:?}.{index}", arguments.join("."));
        let stderr = self.folder.path().join(&name);
        let stats = self.folder.path().join(name + ".prom");
        let mut command = Command::new(self.folder.path().join("conformance"));
        command
            .args(arguments)
            .args(network.names())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&stderr).unwrap());
        if let Some(settings) = path.settings() {
            command
                .env("LD_PRELOAD", self.built.library)
                .envs(settings)
                .env("PPV2_NEW_SOCKETS", "answer")
                .env("PPV2_STATS", &stats);
        }
        let mut child = command.spawn().unwrap();
        let mut requests = child.stdin.take().unwrap();
        let mut lines = Vec::new();
        for line in BufReader::new(child.stdout.take().unwrap()).split(b'\n') {
            let line = line.unwrap();
            let line = String::from_utf8_lossy(&line);
            if let Some(request) = line.strip_prefix('!') {
                if let Some(later) = request.strip_prefix("later ") {
                    answer(&mut requests, "done");
                    send_when_asleep(&mut network, later);
                } else {
                    answer(&mut requests, &network.answer(request));
                }
            } else {
                lines.push(line.strip_prefix('=').unwrap_or(&line).to_owned());
            }
        }
        let status = child.wait().unwrap();
        lines.extend(network.leaks());
        lines.push(status.to_string());
        let stderr = std::fs::read(stderr).unwrap();
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        let stats = std::fs::read_to_string(stats).ok();
        Outcome {
            lines,
            stderr,
            uncounted: stats.and_then(|stats| uncounted(&stats)),
            took: began.elapsed(),
        }
    }
}

/// Each datagram must have been delivered or dropped: says so if not.
fn uncounted(stats: &str) -> Option<String> {
    let sum = |name: &str| -> u64 {
        let lines = stats.lines().filter(|line| line.starts_with(name));
        lines
            .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
            .sum()
    };
    let received = sum("ppv2_preload_datagrams_received_total");
    let delivered = sum("ppv2_preload_datagrams_delivered_total");
    let dropped = sum("ppv2_preload_datagrams_dropped_total");
    (received != delivered + dropped)
        .then(|| format!("received {received}, delivered {delivered}, dropped {dropped}"))
}

fn answer(to: &mut impl Write, answer: &str) {
    // The program may have ended, which its status tells.
    let _ = to.write_all(format!("{answer}\n").as_bytes());
}

/// Sends as soon as a thread of the program sleeps, most likely in the call that the case
/// is about. The result is the same if it sleeps somewhere else.
fn send_when_asleep(network: &mut Network, request: &str) {
    let words: Vec<&str> = request.splitn(5, ' ').collect();
    let [process, thread, client, server, text] = words[..] else {
        panic!("not a request: {request}");
    };
    let stat = format!("/proc/{process}/task/{thread}/stat");
    // The state follows the name, which stands in brackets (proc(5)).
    let sleeps = || {
        let stat = std::fs::read_to_string(&stat).unwrap_or_default();
        stat.rsplit(") ")
            .next()
            .is_some_and(|state| state.starts_with('S'))
    };
    for _ in 0..1_000 {
        if sleeps() && sleeps() && sleeps() {
            break;
        }
        std::thread::yield_now();
    }
    network.answer(&format!("send {client} {server} 0 {text}"));
}
