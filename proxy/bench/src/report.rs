//! The tables that a run ends with.

use std::fmt::Write;

use crate::measure::{Bounded, Ratio, Spread};
use crate::outcome::{Measured, Outcome, Series};
use crate::peer::Peer;
use crate::target::{Limit, Reached, Verdict};
use crate::work::Figure;

/// Ratios, never bare figures: those would say more of the machine than of the
/// proxies.
pub(crate) fn text(outcome: &Outcome) -> String {
    let mut text = format!(
        "\n{}; measured {}\nReceive buffers: {}.\nWhole machine's CPU: {}.\nRatios are medians \
         of {} rounds [lowest–highest], each between neighbours in one round; below 7 %, a \
         difference is noise.\n",
        outcome.machine, outcome.priority, outcome.receive_buffers, outcome.whole, outcome.rounds
    );
    for work in &outcome.works {
        comparison(&mut text, work);
    }
    text.push_str("\nWhat must be reached\n");
    for row in outcome.targets.iter().map(target_row) {
        let _ = writeln!(text, "  {row}");
    }
    for row in outcome.micro.iter().map(micro_row) {
        let _ = writeln!(text, "  {row}");
    }
    text
}

/// The targets and all ratios, as tables in Markdown.
pub(crate) fn markdown(outcome: &Outcome) -> String {
    let mut text = format!(
        "# Results\n\n{}; measured {}; medians of {} rounds [lowest–highest].\n\n## Targets\n\n\
         | | work | of | figure | divided by | target | reached |\n|---|---|---|---|---|---|---|\n",
        outcome.machine, outcome.priority, outcome.rounds
    );
    for verdict in &outcome.targets {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} |",
            verdict.reached.mark(),
            verdict.work,
            verdict.ours,
            verdict.figure,
            verdict.against.unwrap_or("–"),
            verdict.limit,
            reached(verdict.value),
        );
    }
    for work in &outcome.works {
        let _ = write!(text, "\n## {}: {}\n\n| |", work.name, work.title);
        for figure in work.figures {
            let _ = write!(text, " {}{} |", figure.name(), figure.unit());
        }
        let _ = writeln!(text, " |\n|---|{}---|", "---|".repeat(work.figures.len()));
        for series in &work.peers {
            let _ = write!(text, "| {} |", series.peer.name());
            for figure in work.figures {
                let value = work.value(series.peer, *figure);
                let _ = write!(text, " {} |", reached(value));
            }
            let _ = writeln!(text, " {} |", remarks(series).join("; "));
        }
    }
    text
}

fn reached(value: Option<Spread>) -> String {
    value.map_or("not measured".to_owned(), |value| value.to_string())
}

/// One line for each peer: ours divided by it.
fn comparison(text: &mut String, work: &Measured) {
    let what = match work.series(Peer::Ours) {
        Some(_) => "ppv2-proxy divided by",
        None => "as it is",
    };
    let _ = writeln!(text, "\n{} ({}): {what}", work.title, work.name);
    for series in &work.peers {
        let name = series.peer.name();
        let mut columns = Vec::new();
        if series.peer != Peer::Ours {
            columns.extend(work.figures.iter().filter_map(|figure| {
                let ratio = work.ratio(Peer::Ours, series.peer, *figure)?;
                Some(format!("{} {ratio}", figure.name()))
            }));
        }
        if work.series(Peer::Ours).is_none() {
            columns.extend(work.figures.iter().filter_map(|figure| {
                let value = work.value(series.peer, *figure)?;
                Some(format!("{} {value}", figure.name()))
            }));
        }
        // Throughput of a proxy that had time left is the generator's.
        let busy = series.busy();
        if let Some(busy) = busy.filter(|_| work.figures.contains(&Figure::Throughput)) {
            columns.push(format!("its core {:.0} % busy", busy * 100.0));
        }
        columns.extend(remarks(series));
        if !columns.is_empty() {
            let _ = writeln!(text, "  {name:<30} {}", columns.join("  "));
        }
    }
}

fn remarks(series: &Series) -> Vec<String> {
    let mut remarks = Vec::new();
    if let Some(failure) = &series.failure {
        remarks.push(format!("NOT MEASURED: {failure}"));
    }
    let (lost, wrong) = (series.lost(), series.wrong());
    if lost > 0 {
        let sent = series.sent();
        remarks.push(format!("lost {lost} (of {sent} and the warm-up)"));
    }
    if wrong > 0 {
        remarks.push(format!(
            "WRONG OR REORDERED REPLIES, OR WRONG HEADERS: {wrong}"
        ));
    }
    remarks
}

fn target_row(verdict: &Verdict) -> String {
    let against = verdict.against.map(|peer| format!(" ÷ {peer}"));
    let what = format!(
        "{}: {} {}{}",
        verdict.work,
        verdict.ours,
        verdict.figure,
        against.unwrap_or_default()
    );
    row(&what, verdict.value, verdict.limit)
}

pub(crate) fn micro_row(micro: &Ratio) -> String {
    let what = format!("{} ÷ {}", micro.ours, micro.other);
    match micro.at_most {
        Some(limit) => row(&what, Some(micro.ratio), Limit::AtMost(limit)),
        None => format!("· {what:<76} {}", micro.ratio),
    }
}

pub(crate) fn figure_row(figure: &Bounded) -> String {
    let what = format!("{}, {}", figure.what, figure.unit);
    row(&what, Some(figure.spread), Limit::AtMost(figure.at_most))
}

/// A tick; or the shortfall, with `~` where some rounds reached it.
fn row(what: &str, value: Option<Spread>, limit: Limit) -> String {
    let mark = Reached::of(limit, value).mark();
    format!("{mark} {what:<76} {} ({limit})", reached(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::tests::{measured, outcome};
    use crate::target;

    #[test]
    fn markdown_tells_of_each_target_whether_it_was_reached() {
        let cpu: [(Peer, &[f64]); 3] = [
            (Peer::Ours, &[80.0, 90.0, 85.0]),
            (Peer::Bare, &[100.0, 100.0, 100.0]),
            (Peer::Nginx, &[90.0, 95.0, 90.0]),
        ];
        let mut outcome = outcome(vec![measured("runs-64", &cpu)]);
        outcome.targets = target::verdicts(&outcome);
        let text = markdown(&outcome);
        let row = |mark, figure, against, limit, reached| {
            format!(
                "| {mark} | runs-64 | {figure} | CPU per datagram | {against} | {limit} | {reached} |\n"
            )
        };
        let rows = [
            row('✓', "ppv2-proxy", "bare loop", "≤ 0.85", "0.85 [0.80–0.90]"),
            row('~', "ppv2-proxy", "nginx", "≤ 0.90", "0.94 [0.89–0.95]"),
            row(
                '?',
                "ppv2-proxy, source network",
                "bare loop",
                "≤ 0.85",
                "not measured",
            ),
        ];
        for row in rows {
            assert!(text.contains(&row), "{row}{text}");
        }
    }
}
