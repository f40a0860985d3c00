//! What the SDK costs a server, and what its batches save: `make bench-sdk`.
//!
//! Every figure is a ratio of two servers that are measured in turn, the median
//! of several rounds: the SDK's, whose clients come through a proxy and carry
//! headers, and one without the SDK, whose clients carry none.
#![expect(clippy::print_stdout, reason = "a program for people to look at")]
#![expect(clippy::unwrap_used, reason = "a benchmark that fails has no figures")]

mod datagrams;
mod quic;

use std::process::ExitCode;

/// What a ratio must be.
enum Wanted {
    AtMost(f64),
    AtLeast(f64),
}

struct Row {
    work: &'static str,
    against: &'static str,
    unit: &'static str,
    wanted: Wanted,
    /// One for each round.
    ratios: Vec<f64>,
}

impl Row {
    fn print(mut self) -> bool {
        self.ratios.sort_by(f64::total_cmp);
        let ratio = self.ratios[self.ratios.len() / 2];
        let (lowest, highest) = (self.ratios[0], self.ratios[self.ratios.len() - 1]);
        let (sign, bound, reached) = match self.wanted {
            Wanted::AtMost(bound) => ("<=", bound, ratio <= bound),
            Wanted::AtLeast(bound) => (">=", bound, ratio >= bound),
        };
        let verdict = if reached {
            "✓".to_owned()
        } else {
            format!("✗ short by {:.1} %", (ratio / bound - 1.0).abs() * 100.0)
        };
        println!(
            "| {} | {} | {} {ratio:.2} x ({lowest:.2} to {highest:.2}) | {sign} {bound:.2} x | {verdict} |",
            self.work, self.against, self.unit
        );
        reached
    }
}

fn main() -> ExitCode {
    println!("| work | against | measured: median (all rounds) | wanted | |");
    println!("|---|---|---|---|---|");
    let rows: [fn() -> Row; 4] = [
        datagrams::one_by_one,
        datagrams::scattered,
        datagrams::bursts,
        quic::bulk,
    ];
    let mut all = true;
    for row in rows {
        all &= row().print();
    }
    if all {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
