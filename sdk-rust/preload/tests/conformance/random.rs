//! Random sequences of calls, on plain sockets and through the library.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::network::Path;
use crate::program::Program;

/// Sequences that a process runs, one after the other.
const CHUNK: u64 = 10;

/// Processes that run at a time.
const AT_A_TIME: usize = 8;

/// Each process has addresses of its own. Those of one that has ended may be in use for a
/// moment, by one that is being started.
const PLACES: usize = 1500;

const FAMILIES: [&str; 3] = ["v4", "v6", "mapped"];

const PATHS: [Path; 5] = [
    Path::Relayed { junk: true },
    Path::Relayed { junk: false },
    Path::Tagged,
    Path::Peers,
    Path::Accepted,
];

/// A seed that nobody has chosen.
pub(crate) fn new_seed() -> u64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::from(time.subsec_nanos()) << 24 | u64::from(std::process::id())
}

/// Runs sequences from `seed` on. Returns how the first differs that does.
pub(crate) fn run(program: &Program, seed: u64, count: u64) -> Option<String> {
    let next = AtomicU64::new(0);
    let found = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while found.lock().unwrap().is_none()
                    && let done = next.fetch_add(CHUNK, Ordering::Relaxed)
                    && done < count
                {
                    let first = seed.wrapping_add(done);
                    let report = compare(program, first, CHUNK.min(count - done));
                    if let Some(report) = report {
                        found.lock().unwrap().get_or_insert(report);
                    }
                }
            });
        }
    });
    found.into_inner().unwrap()
}

/// Each family and path in its turn: the first seed says which.
fn way(seed: u64) -> (&'static str, Path) {
    let mut ways = PATHS
        .iter()
        .flat_map(|path| FAMILIES.map(|family| (family, *path)))
        .cycle();
    let turn = seed / CHUNK % (PATHS.len() * FAMILIES.len()) as u64;
    ways.nth(usize::try_from(turn).unwrap()).unwrap()
}

fn compare(program: &Program, seed: u64, count: u64) -> Option<String> {
    let (family, path) = way(seed);
    let (seed, count) = (seed.to_string(), count.to_string());
    let is_tagged = if path == Path::Tagged { "1" } else { "0" };
    let arguments = ["random", family, &seed, &count, is_tagged];
    let execute = |path| {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let place = NEXT.fetch_add(1, Ordering::Relaxed) % PLACES;
        program.execute(path, family, &arguments, place)
    };
    let (plain, through) = (execute(Path::Direct), execute(path));
    let lines = plain.lines.len().max(through.lines.len());
    let line = |lines: &[String], at: usize| lines.get(at).cloned().unwrap_or_default();
    let differs = (0..lines).find(|at| line(&plain.lines, *at) != line(&through.lines, *at));
    let ended = plain
        .lines
        .last()
        .is_some_and(|line| line == "exit status: 0");
    let at = match differs {
        None if ended => return through.uncounted,
        // Plain sockets fail alike.
        None => lines - 1,
        Some(at) => at,
    };
    let begin = (0..=at)
        .rev()
        .find(|at| line(&plain.lines, *at).starts_with("sequence "))
        .unwrap_or(0);
    let mut report = format!("PPV2_RANDOM={seed},{count}, {family} {path:?}:\n");
    for at in begin..at {
        report.push_str(&format!("  {}\n", line(&plain.lines, at)));
    }
    for at in at..lines.min(at + 6) {
        let (plain, through) = (line(&plain.lines, at), line(&through.lines, at));
        report.push_str(&format!("  plain:   {plain}\n  library: {through}\n"));
    }
    for line in through.stderr.lines().take(20) {
        report.push_str(&format!("  stderr:  {line}\n"));
    }
    Some(report)
}
