//! A C program runs every call that the library takes the place of, on plain sockets and
//! through the library, and what it sees must be the same: results, errno, lengths, flags,
//! addresses and payloads.
//!
//! Plain, the clients' datagrams come from the clients' own addresses. Through the library,
//! they come from a relay with a header in front, and between them come datagrams that must
//! be dropped. The program asks this test for what is to be sent to it, so that nothing
//! depends on time. It runs once for each case and address family, and with random sequences
//! of calls. glibc and musl have a program and a library each.
//!
//! `PPV2_CONFORMANCE=NAME` in the environment runs the cases whose name contains `NAME`,
//! `PPV2_RANDOM=SEED,COUNT` that many random sequences from this one on.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

#[path = "conformance/differences.rs"]
mod differences;
#[path = "conformance/network.rs"]
mod network;
#[path = "conformance/program.rs"]
mod program;
#[path = "conformance/random.rs"]
mod random;

use std::process::Command;

use differences::{expected, is_counted, is_run};
use network::Path;
use ppv2_lab::{musl_gcc, namespace, preload_library, preload_library_musl};
use program::{Built, Case, Outcome, Program};

fn glibc() -> Built {
    Built {
        name: "glibc",
        compiler: || Command::new("cc"),
        library: preload_library(),
    }
}

fn musl() -> Built {
    Built {
        name: "musl",
        compiler: || {
            let mut cc = musl_gcc();
            // The headers of the kernel.
            cc.args(["-idirafter", "/usr/include", "-idirafter"]);
            cc.arg(format!("/usr/include/{}-linux-gnu", std::env::consts::ARCH));
            cc
        },
        library: preload_library_musl(),
    }
}

#[test]
fn programs_see_the_same_through_the_library() {
    see_the_same("programs_see_the_same_through_the_library", glibc());
}

#[test]
fn programs_for_musl_see_the_same_through_the_library() {
    see_the_same("programs_for_musl_see_the_same_through_the_library", musl());
}

fn see_the_same(test: &str, built: Built) {
    if !namespace::enter(test, &network::setup()) {
        return;
    }
    let program = Program::compile(built);
    let plain = program.run(Path::Direct);
    for (case, outcome) in program.cases.iter().zip(&plain) {
        assert!(
            outcome
                .lines
                .last()
                .is_some_and(|line| line == "exit status: 0"),
            "{case:?} on plain sockets: {outcome:#?}"
        );
    }
    let mut report = String::new();
    for path in [
        Path::Relayed { junk: false },
        Path::Relayed { junk: true },
        Path::Tagged,
    ] {
        let through = program.run(path);
        for ((case, plain), through) in program.cases.iter().zip(&plain).zip(&through) {
            report.push_str(&compare(path, case, plain, through));
        }
    }
    assert!(report.is_empty(), "{report}");
}

#[test]
fn random_programs_see_the_same_through_the_library() {
    see_random_the_same("random_programs_see_the_same_through_the_library", glibc());
}

#[test]
fn random_programs_for_musl_see_the_same_through_the_library() {
    see_random_the_same(
        "random_programs_for_musl_see_the_same_through_the_library",
        musl(),
    );
}

fn see_random_the_same(test: &str, built: Built) {
    if !namespace::enter(test, &network::setup()) {
        return;
    }
    let program = Program::compile(built);
    let report = match std::env::var("PPV2_RANDOM") {
        Ok(given) => {
            let (seed, count) = given.split_once(',').expect("PPV2_RANDOM=SEED,COUNT");
            random::run(&program, seed.parse().unwrap(), count.parse().unwrap())
        }
        Err(_) => {
            let known = random::run(&program, 1, 200);
            known.or_else(|| random::run(&program, random::new_seed(), 100))
        }
    };
    assert!(report.is_none(), "{}", report.unwrap_or_default());
}

/// How the outcome of a case differs, empty if it does not.
fn compare(path: Path, case: &Case, plain: &Outcome, through: &Outcome) -> String {
    let expected = expected(case, path, plain.lines.clone());
    let uncounted = through.uncounted.as_ref().filter(|_| is_counted(case));
    if expected == through.lines && uncounted.is_none() || !is_run(case, path) {
        return String::new();
    }
    let mut report = format!("\n{} {} {path:?}\n", case.name, case.family);
    if let Some(uncounted) = uncounted {
        report.push_str(&format!("  {uncounted}\n"));
    }
    for n in 0..expected.len().max(through.lines.len()) {
        let line = |lines: &[String]| lines.get(n).cloned().unwrap_or_default();
        let (expected, found) = (line(&expected), line(&through.lines));
        if expected != found {
            report.push_str(&format!("  plain:   {expected}\n  library: {found}\n"));
        }
    }
    for line in through.stderr.lines().take(20) {
        report.push_str(&format!("  stderr:  {line}\n"));
    }
    report
}
