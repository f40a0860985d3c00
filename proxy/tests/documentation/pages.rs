//! The pages of the reference that are made from the program.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use clap::{Arg, ArgAction, Command, CommandFactory};
use ppv2_engine::counters::DropReason;
use ppv2_proxy::cli::{Arguments, EXIT_CODES};

/// Stands at the top of each.
pub const NOTE: &str = "<!-- Made from the program by `make docs`; don't edit. -->";

/// `ppv2-proxy --help`, as a page.
pub fn command_line() -> String {
    let mut command = Arguments::command();
    command.build();
    let mut text = format!(
        "# Command line\n\n{NOTE}\n\n```text\n{}\n```\n\n{}.\n\n",
        command
            .render_usage()
            .to_string()
            .trim_start_matches("Usage: "),
        command.get_about().unwrap_or_default(),
    );
    text += "| command | |\n|---|---|\n";
    for sub in subcommands(&command) {
        let about = sub.get_about().unwrap_or_default();
        let _ = writeln!(text, "| [`{0}`](#{0}) | {about} |", sub.get_name());
    }
    text += "\n## Global options\n\n";
    text += &table(
        command
            .get_arguments()
            .filter(|argument| argument.is_global_set()),
    );
    text += "\n## Exit codes\n\n| code | meaning |\n|---|---|\n";
    for (code, meaning) in EXIT_CODES {
        let _ = writeln!(text, "| {code} | {meaning} |");
    }
    for sub in subcommands(&command) {
        let usage = sub.clone().render_usage().to_string();
        let _ = write!(
            text,
            "\n## {}\n\n{}.\n\n```text\n{}\n```\n",
            sub.get_name(),
            sub.get_about().unwrap_or_default(),
            usage
                .trim_start_matches("Usage: ")
                .replace("\n       ", "\n"),
        );
        let own = sub
            .get_arguments()
            .filter(|argument| !argument.is_global_set());
        let own: Vec<_> = own.filter(is_documented).collect();
        if !own.is_empty() {
            let _ = write!(text, "\n{}", table(own.into_iter()));
        }
        if let Some(after) = sub.get_after_help() {
            let lines: Vec<_> = after.to_string().lines().map(str::to_owned).collect();
            let _ = write!(text, "\n{}\n", lines.join("\n"));
        }
    }
    text
}

fn subcommands(command: &Command) -> impl Iterator<Item = &Command> {
    let all = command.get_subcommands();
    all.filter(|sub| !sub.is_hide_set() && sub.get_name() != "help")
}

fn is_documented(argument: &&Arg) -> bool {
    !argument.is_hide_set() && !matches!(argument.get_id().as_str(), "help" | "version")
}

/// What `arguments` mean, a row for each.
fn table<'a>(arguments: impl Iterator<Item = &'a Arg>) -> String {
    let mut text = "| option | meaning | default |\n|---|---|---|\n".to_owned();
    for argument in arguments {
        let takes_value = argument.get_action().takes_values();
        let values = argument.get_value_names().unwrap_or_default();
        let value = values.first().filter(|_| takes_value);
        let name = match (argument.get_long(), value) {
            (Some(long), Some(value)) => format!("--{long} {value}"),
            (Some(long), None) => format!("--{long}"),
            (None, _) => argument.get_id().as_str().to_uppercase(),
        };
        let mut help = argument
            .get_long_help()
            .or(argument.get_help())
            .map(|help| help.to_string().replace("\n\n", " ").replace('\n', " "))
            .unwrap_or_default();
        let mut default: Vec<_> = argument
            .get_default_values()
            .iter()
            .map(|value| format!("`{}`", value.to_string_lossy()))
            .collect();
        // A default that is decided later is told at the end of the help.
        if let Some((rest, told)) = help.clone().rsplit_once(" [default: ") {
            let told = told.trim_end_matches(']');
            default.push(match told.contains(' ') || told == "none" {
                true => told.to_owned(),
                false => format!("`{told}`"),
            });
            help = rest.to_owned();
        }
        if !help.ends_with('.') {
            help.push('.');
        }
        let possible: Vec<_> = argument.get_possible_values();
        if takes_value && !possible.is_empty() {
            let shown = possible.iter().filter(|value| !value.is_hide_set());
            let names: Vec<_> = shown
                .map(|value| format!("`{}`", value.get_name()))
                .collect();
            let _ = write!(help, " One of {}.", names.join(", "));
        }
        let is_list = matches!(argument.get_action(), ArgAction::Append);
        if is_list && !argument.is_positional() && !help.contains("repeatable") {
            help += " Repeatable.";
        }
        if let Some(variable) = argument.get_env() {
            let _ = write!(help, " Also by `{}`.", variable.to_string_lossy());
        }
        if !takes_value {
            default.clear();
        }
        let default = format!(" {} |", default.join(", ")).replace("  |", " |");
        let _ = writeln!(text, "| `{name}` | {} |{default}", cell(&help));
    }
    text
}

/// Text that fits into a cell of a table.
pub fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;")
}

/// Every drop reason, with what it means and what to do.
pub fn drop_reasons() -> String {
    let mut text = format!(
        "# Drop reasons

{NOTE}

Each datagram that the proxy drops is counted under one of these, as
`ppv2_dropped_datagrams_total{{listener, reason}}` in [`/metrics`](metrics.md). The log reports each
within a second, then at most once a minute. [Troubleshooting](../guides/troubleshooting.md) shows how
to find out which it was.

Reasons that begin with `reply_` concern replies of servers; the others concern datagrams of clients.

| reason | what happened | what to do |
|---|---|---|
"
    );
    for reason in DropReason::ALL {
        let _ = writeln!(
            text,
            "| `{}` | {} | {} |",
            reason.label(),
            cell(reason.description()),
            cell(reason.fix()),
        );
    }
    text
}

/// A metric, as `/metrics` shows it.
#[derive(Default)]
struct Metric {
    kind: String,
    help: String,
    /// The values of labels whose values are fixed.
    values: BTreeMap<String, Vec<String>>,
}

/// Every metric of `exposition`, which is in the classic text format.
pub fn metrics(exposition: &str) -> String {
    let mut metrics = BTreeMap::<&str, Metric>::new();
    let mut labels = BTreeMap::<&str, Vec<&str>>::new();
    for line in exposition.lines() {
        let mut words = line.splitn(4, ' ');
        let (first, second) = (words.next().unwrap(), words.next().unwrap());
        if first == "#" {
            let name = words.next().unwrap();
            let rest = words.next().unwrap_or_default().to_owned();
            let metric = metrics.entry(name).or_default();
            match second {
                "HELP" => metric.help = rest,
                _ => metric.kind = rest,
            }
            continue;
        }
        let (name, pairs) = line.split_once('{').unwrap_or((first, ""));
        let pairs = pairs.rsplit_once('}').map_or("", |(pairs, _)| pairs);
        let names = labels.entry(name).or_default();
        for pair in pairs.split(',').filter(|pair| !pair.is_empty()) {
            let (label, value) = pair.split_once('=').unwrap();
            if !names.contains(&label) {
                names.push(label);
            }
            let metric = metrics.entry(name).or_default();
            let values = metric.values.entry(label.to_owned()).or_default();
            let value = format!("`{}`", value.trim_matches('"'));
            if !values.contains(&value) {
                values.push(value);
            }
        }
    }
    let mut text = format!(
        "# Metrics

{NOTE}

`GET /metrics` of the [admin API](admin-api.md) shows all of these, in the classic text format of
Prometheus or, for scrapers that ask for it, in OpenMetrics 1.0. Counters start at 0 with the
process. [Observability](../guides/observability.md) says which to watch.
"
    );
    let mut groups = BTreeSet::new();
    for name in metrics.keys() {
        let all = labels.get(name).cloned().unwrap_or_default();
        let all: Vec<_> = all.into_iter().filter(|label| !is_fixed(label)).collect();
        groups.insert(all);
    }
    for group in groups {
        let heading = match group.as_slice() {
            [] => "Of the whole process".to_owned(),
            [one] => format!("By {one}"),
            [one, other, ..] => format!("By {one} and {other}"),
        };
        let _ = write!(text, "\n## {heading}\n\n");
        if !group.is_empty() {
            let shown: Vec<_> = group.iter().map(|label| format!("`{label}`")).collect();
            let _ = write!(text, "Labels: {}.\n\n", shown.join(", "));
        }
        text += "| metric | type | meaning |\n|---|---|---|\n";
        for (name, metric) in &metrics {
            let all = labels.get(name).cloned().unwrap_or_default();
            let own: Vec<_> = all
                .iter()
                .copied()
                .filter(|label| !is_fixed(label))
                .collect();
            if own != group {
                continue;
            }
            let mut help = metric.help.trim_end_matches('.').to_owned();
            for (label, values) in &metric.values {
                if !is_fixed(label) {
                    continue;
                }
                let known = EXPLAINED.iter().find(|(explained, _)| explained == name);
                let page = known.map_or("", |(_, page)| page);
                let _ = match *name {
                    "ppv2_dropped_datagrams_total" => write!(help, ". [Label `{label}`]({page})"),
                    _ => write!(help, ". [Label `{label}`]({page}): {}", values.join(", ")),
                };
            }
            let _ = writeln!(text, "| `{name}` | {} | {} |", metric.kind, cell(&help));
        }
    }
    text
}

/// Where the values of such labels are explained. What is missing here is a dead link.
const EXPLAINED: &[(&str, &str)] = &[
    ("ppv2_dropped_datagrams_total", "drop-reasons.md"),
    ("ppv2_sessions_ended_total", "../design/session.md"),
    (
        "ppv2_upstream_health_checks_total",
        "../guides/health-checks.md#what-a-probe-found",
    ),
    (
        "ppv2_reloads_total",
        "../guides/reload.md#see-whether-it-was-applied",
    ),
    (
        "ppv2_name_lookups_total",
        "../guides/dns-names.md#what-a-lookup-found",
    ),
];

/// Whether the program, not the operator, says which values the label has.
fn is_fixed(label: &str) -> bool {
    matches!(label, "reason" | "result")
}
