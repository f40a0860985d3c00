//! The tables that a run ends with.

use std::fmt::Write;

use crate::measure::{Bounded, Ratio, Spread};
use crate::outcome::{Measured, Outcome, Series};
use crate::peer::Peer;
use crate::work::{Figure, Limit, goals};

/// Ratios, never bare figures: those would say more of the machine than of the
/// proxies.
pub(crate) fn text(outcome: &Outcome) -> String {
    let mut text = format!(
        "\n{}; measured {}\nReceive buffers: {}.\nRatios are medians of {} rounds [lowest–highest]; \
         below 10 %, a difference is noise.\n",
        outcome.machine, outcome.priority, outcome.receive_buffers, outcome.rounds
    );
    for work in &outcome.works {
        comparison(&mut text, work);
    }
    text.push_str("\nWhat must be reached\n");
    for row in goal_rows(outcome) {
        let _ = writeln!(text, "  {row}");
    }
    text
}

/// One line for each peer: ours divided by it.
fn comparison(text: &mut String, work: &Measured) {
    let _ = writeln!(text, "\n{}: ppv2-proxy divided by", work.title);
    for series in &work.peers {
        let name = series.peer.name();
        let mut columns = Vec::new();
        if series.peer != Peer::Ours {
            columns.extend(work.figures.iter().filter_map(|figure| {
                let ratio = work.ratio(Peer::Ours, series.peer, *figure)?;
                Some(format!("{} {ratio}", figure.name()))
            }));
        }
        if work.figures.contains(&Figure::Throughput) {
            // Throughput of a proxy that had time left is the generator's.
            let busy = series.busy().unwrap_or(0.0) * 100.0;
            columns.push(format!("its core {busy:.0} % busy"));
        }
        columns.extend(remarks(series));
        if !columns.is_empty() {
            let _ = writeln!(text, "  {name:<28} {}", columns.join("  "));
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
        remarks.push(format!("WRONG REPLIES OR HEADERS: {wrong}"));
    }
    remarks
}

fn goal_rows(outcome: &Outcome) -> Vec<String> {
    let mut rows = Vec::new();
    for goal in goals() {
        let Some(work) = outcome.work(goal.work) else {
            continue;
        };
        let what = format!(
            "{}: {} {} ÷ {}",
            work.name,
            goal.ours.name(),
            goal.figure.name(),
            goal.peer.name()
        );
        rows.push(verdict(&what, outcome.ratio(&goal), goal.limit));
        if goal.work == "sessions" && goal.peer == Peer::Nginx && goal.limit == Limit::AtMost(1.0) {
            rows.extend(work.series(Peer::Ours).map(|ours| {
                let lost = ours.lost();
                let mark = if lost == 0 { '✓' } else { '✗' };
                format!("{mark} {:<68} {lost} (= 0)", "sessions: ppv2-proxy loss")
            }));
        }
    }
    rows.extend(outcome.micro.iter().map(micro_row));
    rows
}

pub(crate) fn micro_row(micro: &Ratio) -> String {
    let what = format!("{} ÷ {}", micro.ours, micro.other);
    match micro.at_most {
        Some(limit) => verdict(&what, Some(micro.ratio), Limit::AtMost(limit)),
        None => format!("· {what:<68} {}", micro.ratio),
    }
}

pub(crate) fn figure_row(figure: &Bounded) -> String {
    let what = format!("{}, {}", figure.what, figure.unit);
    verdict(&what, Some(figure.spread), Limit::AtMost(figure.at_most))
}

/// A tick; or the shortfall, with `~` where some rounds reached it.
fn verdict(what: &str, ratio: Option<Spread>, limit: Limit) -> String {
    let Some(ratio) = ratio else {
        return format!("? {what:<68} not measured ({limit})");
    };
    let mark = if limit.met(ratio.median) {
        '✓'
    } else if limit.met(ratio.low) || limit.met(ratio.high) {
        '~'
    } else {
        '✗'
    };
    format!("{mark} {what:<68} {ratio} ({limit})")
}
