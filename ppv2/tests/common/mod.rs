//! What the tests of the codec share. Each test file uses its own part of it.
#![allow(dead_code)]

pub(crate) mod invariants;
pub(crate) mod wire;

use proptest::test_runner::Config;

/// Failures are kept as named wire cases rather than as seeds in a file that
/// nobody reads.
pub(crate) fn cases(cases: u32) -> Config {
    Config {
        failure_persistence: None,
        ..Config::with_cases(cases)
    }
}
