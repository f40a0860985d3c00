//! The alert rules and the board ask for metrics that the proxy has, and each alert is
//! tested and explained.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;
use std::sync::LazyLock;

use ppv2_engine::counters::DropReason;
use ppv2_lab::output_of;
use regex::Regex;
use serde_json::Value;

use super::markdown::Page;
use super::{assert_none, root, running, yaml};

const PAGE: &str = "docs/guides/alerts.md";
const RULES: &str = "proxy/packaging/prometheus/ppv2-alerts.yml";
const TESTS: &str = "proxy/packaging/prometheus/ppv2-alerts.test.yml";
const BOARD: &str = "proxy/packaging/grafana/ppv2-proxy.json";

/// Labels that Prometheus adds.
const OF_PROMETHEUS: [&str; 2] = ["job", "instance"];

static NAME: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"(?-u:\b)ppv2_[a-z0-9_]+").unwrap());
/// A metric and its selector.
static SELECTOR: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(?-u:\b)(ppv2_[a-z0-9_]+)\{([^}]*)\}").unwrap());
static MATCHER: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r#"([a-z_]+)[ \n]*(=~|!~|!=|=)[ \n]*"([^"]*)""#).unwrap());
static GROUPING: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?-u:\b)(?:by|without|on|ignoring|group_left|group_right)[ \n]*\(([^)]*)\)")
        .unwrap()
});
/// Labels in the texts of alerts, and in legends of the board.
static IN_TEXT: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\$labels\.([a-z_]+)").unwrap());
static IN_LEGEND: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\{\{[ \n]*([a-z_]+)[ \n]*\}\}").unwrap());

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// The rules of the file.
fn rules() -> Vec<Value> {
    let documents = yaml::documents(&read(RULES));
    let groups = documents[0]["groups"].as_array().unwrap();
    let rules = groups
        .iter()
        .flat_map(|group| group["rules"].as_array().unwrap());
    rules.cloned().collect()
}

fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    let found = value.pointer(path).and_then(Value::as_str);
    found.unwrap_or_else(|| panic!("no {path} in {value:#}"))
}

/// The metrics of a proxy, each with its labels, and with the values of each.
struct Exposed(BTreeMap<String, BTreeMap<String, BTreeSet<String>>>);

impl Exposed {
    /// What a proxy shows that runs.
    fn read() -> Self {
        let mut metrics = BTreeMap::new();
        for line in running::metrics().lines() {
            if let Some(described) = line.strip_prefix("# TYPE ") {
                let name = described.split(' ').next().unwrap();
                metrics.entry(name.to_owned()).or_insert_with(BTreeMap::new);
                continue;
            }
            let Some(sample) = SELECTOR.captures(line) else {
                continue;
            };
            let labels = metrics.entry(sample[1].to_owned()).or_default();
            for pair in MATCHER.captures_iter(&sample[2]) {
                let values: &mut BTreeSet<_> = labels.entry(pair[1].to_owned()).or_default();
                values.insert(pair[3].to_owned());
            }
        }
        assert!(metrics.len() > 30, "{metrics:?}");
        Self(metrics)
    }

    /// What is wrong with `expression`. `shown` are the labels that its result must have.
    fn mistakes(&self, expression: &str, shown: &BTreeSet<String>) -> Vec<String> {
        let mut mistakes = Vec::new();
        let mut known: BTreeSet<&str> = OF_PROMETHEUS.into();
        for name in NAME.find_iter(expression) {
            match self.0.get(name.as_str()) {
                Some(labels) => known.extend(labels.keys().map(String::as_str)),
                None => mistakes.push(format!("there is no metric {}", name.as_str())),
            }
        }
        for selector in SELECTOR.captures_iter(expression) {
            let Some(labels) = self.0.get(&selector[1]) else {
                continue;
            };
            for matcher in MATCHER.captures_iter(&selector[2]) {
                let (label, value) = (&matcher[1], &matcher[3]);
                match labels.get(label) {
                    None if OF_PROMETHEUS.contains(&label) => {}
                    None => mistakes.push(format!("{} has no label {label}", &selector[1])),
                    // A variable of the board.
                    Some(_) if value.starts_with('$') => {}
                    // The program, not the operator, says which values there are.
                    Some(values) if matches!(label, "reason" | "result") => {
                        for one in value.split('|') {
                            let pattern = Regex::new(&format!("^(?:{one})$")).unwrap();
                            if !values.iter().any(|value| pattern.is_match(value)) {
                                mistakes.push(format!("{label} is never {one}"));
                            }
                        }
                    }
                    Some(_) => {}
                }
            }
        }
        let mut used = shown.clone();
        for grouping in GROUPING.captures_iter(expression) {
            let labels = grouping[1].split(',').map(str::trim);
            used.extend(labels.filter(|l| !l.is_empty()).map(str::to_owned));
        }
        for label in used {
            if !known.contains(label.as_str()) {
                mistakes.push(format!("no metric of it has a label {label}"));
            }
        }
        mistakes
    }
}

#[test]
fn alerts_ask_for_what_the_proxy_exposes() {
    let exposed = Exposed::read();
    let mut wrong = Vec::new();
    for rule in rules() {
        let texts = format!(
            "{} {}",
            text(&rule, "/annotations/summary"),
            text(&rule, "/annotations/description")
        );
        let shown = IN_TEXT.captures_iter(&texts).map(|c| c[1].to_owned());
        let expression = text(&rule, "/expr");
        let mistakes = exposed.mistakes(expression, &shown.collect());
        let name = text(&rule, "/alert");
        wrong.extend(mistakes.into_iter().map(|m| format!("{name}: {m}")));
        if !expression.contains("ppv2_") {
            assert!(expression.contains("up{"), "{name}: {expression}");
        }
    }
    assert_none(&wrong);
}

#[test]
fn mistakes_in_expressions_are_found() {
    let exposed = Exposed::read();
    let shown = |label: &str| BTreeSet::from([label.to_owned()]);
    for (expression, label, mistake) in [
        ("ppv2_up == 0", "job", "there is no metric ppv2_up"),
        (
            "rate(ppv2_client_datagrams[5m])",
            "job",
            "there is no metric ppv2_client_datagrams",
        ),
        (
            "ppv2_sessions{server=\"a\"}",
            "job",
            "ppv2_sessions has no label server",
        ),
        (
            "ppv2_dropped_datagrams_total{reason=~\"no_ports|no_port\"}",
            "job",
            "reason is never no_port",
        ),
        (
            "sum by (server) (ppv2_sessions)",
            "job",
            "no metric of it has a label server",
        ),
        (
            "ppv2_sessions > 1",
            "upstream",
            "no metric of it has a label upstream",
        ),
    ] {
        assert_eq!(exposed.mistakes(expression, &shown(label)), [mistake]);
    }
    let right = "sum by (listener) (ppv2_dropped_datagrams_total{reason!~\"reply_.*\"})";
    assert!(exposed.mistakes(right, &shown("listener")).is_empty());
}

#[test]
fn the_board_asks_for_what_the_proxy_exposes() {
    let exposed = Exposed::read();
    let board: Value = serde_json::from_str(&read(BOARD)).unwrap();
    let mut wrong = Vec::new();
    let variables = board["templating"]["list"].as_array().unwrap();
    let mut names = BTreeSet::from(["__rate_interval"]);
    for variable in variables {
        names.insert(text(variable, "/name"));
        if let Some(query) = variable.pointer("/query/query").and_then(Value::as_str) {
            let label = query.rsplit([' ', ',', ')']).nth(1).unwrap();
            let mistakes = exposed.mistakes(query, &BTreeSet::from([label.to_owned()]));
            wrong.extend(mistakes.into_iter().map(|m| format!("{query}: {m}")));
        }
    }
    assert_eq!(variables[0]["type"], "datasource");

    let mut rows = Vec::new();
    let mut ids = BTreeSet::new();
    let variable = Regex::new(r"\$([a-z_]+)").unwrap();
    for panel in board["panels"].as_array().unwrap() {
        let title = text(panel, "/title");
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}");
        if panel["type"] == "row" {
            rows.push(title);
            continue;
        }
        assert!(!text(panel, "/description").is_empty(), "{title}");
        for target in panel["targets"].as_array().unwrap() {
            assert_eq!(text(target, "/datasource/uid"), "${datasource}", "{title}");
            let expression = text(target, "/expr");
            let legend = text(target, "/legendFormat");
            let shown = IN_LEGEND.captures_iter(legend).map(|c| c[1].to_owned());
            let mistakes = exposed.mistakes(expression, &shown.collect());
            wrong.extend(mistakes.into_iter().map(|m| format!("{title}: {m}")));
            for used in variable.captures_iter(expression) {
                let used = used.get(1).unwrap().as_str();
                if !names.contains(used) {
                    wrong.push(format!("{title}: there is no variable ${used}"));
                }
            }
        }
        let place = &panel["gridPos"];
        assert!(
            place["x"].as_u64().unwrap() + place["w"].as_u64().unwrap() <= 24,
            "{title}"
        );
    }
    assert_none(&wrong);
    assert_eq!(
        rows,
        [
            "Traffic", "Sessions", "Drops", "Servers", "Replies", "Errors"
        ]
    );
}

#[test]
fn alerts_fire_and_stay_quiet() {
    assert!(
        Command::new("promtool").arg("--version").output().is_ok(),
        "promtool is missing: install the Debian package prometheus"
    );
    for arguments in [["check", "rules", RULES], ["test", "rules", TESTS]] {
        let mut command = Command::new("promtool");
        command.args(arguments).current_dir(root());
        let (code, report, error) = output_of(&mut command);
        assert_eq!(code, Some(0), "{arguments:?}: {report}{error}");
    }
    let documents = yaml::documents(&read(TESTS));
    let cases = documents[0]["tests"].as_array().unwrap();
    let cases: BTreeSet<_> = cases.iter().map(|case| text(case, "/name")).collect();
    for rule in rules() {
        let name = text(&rule, "/alert");
        for case in [format!("{name} fires"), format!("{name} stays quiet")] {
            assert!(cases.contains(case.as_str()), "there is no case `{case}`");
        }
    }
}

#[test]
fn the_page_explains_every_alert() {
    let written = read(PAGE);
    let page = Page::parse(&written);
    let mut names = BTreeSet::new();
    for rule in rules() {
        let name = text(&rule, "/alert").to_owned();
        let severity = text(&rule, "/labels/severity");
        let wait = match rule["for"].as_str() {
            None => "at once".to_owned(),
            Some("1m") => "after a minute".to_owned(),
            Some(wait) => format!("after {} minutes", wait.strip_suffix('m').unwrap()),
        };
        let anchor = name.to_lowercase();
        let row = format!("| [{name}](#{anchor}) | {severity} | {wait} |");
        assert!(written.lines().any(|line| line == row), "no line {row}");
        assert!(page.anchors.contains(&anchor), "no heading {name}");
        let runbook = format!("https://github.com/ppv2/ppv2/blob/main/{PAGE}#{anchor}");
        assert_eq!(text(&rule, "/annotations/runbook_url"), runbook);
        assert!(names.insert(name), "two alerts have one name");
    }
    let headings = written.lines().filter_map(|line| line.strip_prefix("### "));
    assert_eq!(headings.map(str::to_owned).collect::<BTreeSet<_>>(), names);
}

#[test]
fn every_drop_reason_has_an_alert_or_says_why_not() {
    let page = read(PAGE);
    let (_, without) = page.split_once("\n## Drops without an alert\n").unwrap();
    let reasons = Regex::new(r#"(?-u:\b)reason=~?"([^"]*)""#).unwrap();
    let mut alerted = BTreeSet::new();
    for rule in rules() {
        for found in reasons.captures_iter(text(&rule, "/expr")) {
            alerted.extend(found[1].split('|').map(str::to_owned));
        }
    }
    for reason in DropReason::ALL {
        let label = reason.label();
        let is_listed = without.contains(&format!("\n| `{label}` | "));
        assert!(
            alerted.contains(label) != is_listed,
            "{label} is to be in an alert, or under \"Drops without an alert\""
        );
    }
}
