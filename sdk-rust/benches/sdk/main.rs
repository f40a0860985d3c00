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
    /// Anything: the row shows what can be had at all.
    Nothing,
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
        let (wanted, bound, reached) = match self.wanted {
            Wanted::AtMost(bound) => (format!("<= {bound:.2} x"), bound, ratio <= bound),
            Wanted::AtLeast(bound) => (format!(">= {bound:.2} x"), bound, ratio >= bound),
            Wanted::Nothing => ("for comparison".to_owned(), ratio, true),
        };
        let verdict = match (reached, &self.wanted) {
            (true, Wanted::Nothing) => String::new(),
            (true, Wanted::AtMost(_) | Wanted::AtLeast(_)) => "✓".to_owned(),
            (false, _) => format!("✗ short by {:.1} %", (ratio / bound - 1.0).abs() * 100.0),
        };
        println!(
            "| {} | {} | {} {ratio:.2} x ({lowest:.2} to {highest:.2}) | {wanted} | {verdict} |",
            self.work, self.against, self.unit
        );
        reached
    }
}

fn main() -> ExitCode {
    println!("| work | against | measured: median (all rounds) | wanted | |");
    println!("|---|---|---|---|---|");
    let rows: [fn() -> Row; 6] = [
        datagrams::one_by_one,
        datagrams::scattered,
        datagrams::bare_calls,
        datagrams::bursts,
        datagrams::tagged,
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
