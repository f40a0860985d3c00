//! The documentation says what the program does: pages made from it are up to date, links
//! lead somewhere, configurations pass `check`, and commands exist.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]
#![allow(unreachable_pub, reason = "nothing is published")]

mod admin_api;
mod alerts;
mod configuration;
mod kubernetes;
mod manual;
mod markdown;
mod pages;
mod running;
mod schema;
mod yaml;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use markdown::{Page, commands};
use ppv2_lab::{output, write};
use ppv2_proxy::cli::Arguments;

/// Has the pages written rather than compared: what `make docs` sets.
const WRITE: &str = "PPV2_WRITE_DOCS";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every page, by its path from the top of the repository.
fn all_pages() -> Vec<(String, Page)> {
    let mut paths = Vec::new();
    for name in [
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "CHANGELOG.md",
    ] {
        paths.push(PathBuf::from(name));
    }
    for folder in [
        "ppv2",
        "ppv2/udp",
        "proxy",
        "proxy/engine",
        "proxy/hosts",
        "proxy/lab",
    ] {
        paths.push(Path::new(folder).join("README.md"));
    }
    for folder in ["proxy/bench", "sdk-rust", "sdk-python", "examples", "fuzz"] {
        paths.push(Path::new(folder).join("README.md"));
    }
    let mut folders = vec![PathBuf::from("docs")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).unwrap() {
            let path = folder.join(entry.unwrap().file_name());
            if root().join(&path).is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                paths.push(path);
            }
        }
    }
    paths.retain(|path| root().join(path).exists());
    let read = |path: PathBuf| {
        let text = fs::read_to_string(root().join(&path)).unwrap();
        (path.to_str().unwrap().to_owned(), Page::parse(&text))
    };
    paths.into_iter().map(read).collect()
}

/// Fails with everything that was found.
fn assert_none(found: &[String]) {
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn generated_pages_are_up_to_date() {
    let mut outdated = Vec::new();
    for (path, made) in [
        ("docs/reference/command-line.md", pages::command_line()),
        ("docs/reference/drop-reasons.md", pages::drop_reasons()),
        ("docs/reference/configuration.md", configuration::page()),
        (
            "docs/reference/metrics.md",
            pages::metrics(&running::metrics()),
        ),
    ] {
        let file = root().join(path);
        if std::env::var_os(WRITE).is_some() {
            fs::write(&file, made).unwrap();
        } else if fs::read_to_string(&file).unwrap_or_default() != made {
            outdated.push(format!("{path} is out of date; `make docs` updates it"));
        }
    }
    assert_none(&outdated);
}

#[test]
fn links_lead_somewhere() {
    let pages = all_pages();
    let mut dead = Vec::new();
    for (path, page) in &pages {
        for (line, link) in &page.links {
            if link.starts_with("http://") || link.starts_with("https://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => join(path, file),
            };
            let is_of_book = path.starts_with("docs/");
            let anchors = pages.iter().find(|(other, _)| *other == target);
            if !root().join(&target).exists() {
                dead.push(format!("{path}:{line}: {link}: there is no {target}"));
            } else if is_of_book && !target.starts_with("docs/") {
                dead.push(format!("{path}:{line}: {link}: leads out of the book"));
            } else if !anchor.is_empty()
                && !anchors.is_some_and(|(_, page)| page.anchors.iter().any(|id| id == anchor))
            {
                dead.push(format!(
                    "{path}:{line}: {link}: {target} has no heading #{anchor}"
                ));
            }
        }
    }
    assert_none(&dead);
}

/// `file` as seen from the folder of `page`.
fn join(page: &str, file: &str) -> String {
    let mut parts: Vec<_> = page.split('/').collect();
    parts.pop();
    for part in file.split('/') {
        match part {
            "." | "" => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[test]
fn the_table_of_contents_has_every_page() {
    let pages = all_pages();
    let (_, summary) = pages
        .iter()
        .find(|(path, _)| path == "docs/SUMMARY.md")
        .unwrap();
    let listed: BTreeSet<_> = summary
        .links
        .iter()
        .map(|(_, link)| join("docs/SUMMARY.md", link))
        .collect();
    let there: BTreeSet<_> = pages
        .iter()
        .map(|(path, _)| path.clone())
        .filter(|path| path.starts_with("docs/") && path != "docs/SUMMARY.md")
        .collect();
    assert_eq!(listed, there);
}

#[test]
fn files_that_are_named_exist() {
    let mut missing = Vec::new();
    for (path, page) in all_pages() {
        if path == "CHANGELOG.md" {
            continue;
        }
        for (line, span) in &page.spans {
            let folder = span.split('/').next().unwrap();
            let is_path = span.contains('/')
                && span
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c))
                && [
                    "proxy",
                    "ppv2",
                    "sdk-rust",
                    "sdk-python",
                    "examples",
                    "fuzz",
                    "docs",
                    ".ci",
                ]
                .contains(&folder);
            if is_path && !span.starts_with("fuzz/target") && !root().join(span).exists() {
                missing.push(format!("{path}:{line}: there is no {span}"));
            }
        }
    }
    assert_none(&missing);
}

#[test]
fn metrics_that_are_named_exist() {
    let metrics = fs::read_to_string(root().join("docs/reference/metrics.md")).unwrap();
    // The preload library has its own.
    let of_library = fs::read_to_string(root().join("sdk-rust/preload/src/stats.rs")).unwrap();
    // Crates of Rust, and tables of nftables.
    let others = ["ppv2_sdk", "ppv2_udp", "ppv2_dsr", "ppv2_dsr_server"];
    let mut missing = Vec::new();
    for (path, page) in all_pages() {
        if path == "CHANGELOG.md" {
            continue;
        }
        for (line, span) in &page.spans {
            let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let name = span.split(|c| !is_part(c)).next().unwrap();
            if name.starts_with("ppv2_")
                && !others.contains(&name)
                && !metrics.contains(&format!("`{name}`"))
                && !of_library.contains(&format!("\"{name}\""))
            {
                missing.push(format!("{path}:{line}: there is no metric {name}"));
            }
        }
    }
    assert_none(&missing);
}

/// Every configuration of the pages and examples, with its place. What is a part of one there
/// is a whole here.
fn whole_configurations(pages: &[(String, Page)]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (path, page) in pages {
        for block in &page.blocks {
            let text = &block.text;
            let whole = match block.info.as_str() {
                "toml" if !text.starts_with("[dependencies]") => text.clone(),
                "toml listener" => format!(
                    "[[listener]]\n{text}[upstream.resolvers]\nservers = [\"192.0.2.10:53\"]\n"
                ),
                "toml upstream" => format!(
                    "[[listener]]\nbind = [\"198.51.100.10:53\"]\nupstream = \"u\"\n[upstream.u]\n{text}"
                ),
                _ => continue,
            };
            found.push((format!("{path}:{}", block.line), whole));
        }
    }
    let examples = root().join("examples/configurations");
    for file in fs::read_dir(examples).unwrap() {
        let path = file.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        found.push((path.display().to_string(), text));
    }
    found
}

#[test]
fn configurations_pass_check() {
    let folder = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    let configurations = whole_configurations(&all_pages());
    assert!(configurations.len() > 20, "{}", configurations.len());
    for (place, config) in configurations {
        let file = write(&folder, "proxy.toml", &config);
        let (code, report, error) = output(&["check", "--config", file.to_str().unwrap()]);
        if code != Some(0) {
            wrong.push(format!("{place}: {error}"));
        }
        // A machine without DNS can test, too.
        let warnings = report.lines().filter(|line| line.starts_with("warning:"));
        let is_elsewhere =
            |line: &&str| line.contains(".example") || line.contains(".cluster.local");
        for warning in warnings.filter(|line| !is_elsewhere(line)) {
            wrong.push(format!("{place}: {warning}"));
        }
    }
    assert_none(&wrong);
}

#[test]
fn commands_exist() {
    let mut wrong = Vec::new();
    let mut tried = 0;
    for (path, page) in all_pages() {
        for block in &page.blocks {
            let found = match block.info.split([' ', ',']).next().unwrap() {
                "sh" | "console" => commands(&block.text),
                "ini" => {
                    let starts = block
                        .text
                        .lines()
                        .filter_map(|line| line.strip_prefix("ExecStart="));
                    starts.flat_map(commands_of_line).collect()
                }
                _ => continue,
            };
            for command in found {
                let Some(at) = command.iter().position(|word| is_proxy(word)) else {
                    continue;
                };
                // What is before it runs it; what it is given to, as `setcap`, does not.
                if command[..at].iter().any(|word| !is_runner(word)) {
                    continue;
                }
                tried += 1;
                if let Err(error) = Arguments::command().try_get_matches_from(&command[at..])
                    && error.use_stderr()
                {
                    let error = error.to_string();
                    let line = error.lines().next().unwrap_or_default();
                    wrong.push(format!(
                        "{path}:{}: `{}`: {line}",
                        block.line,
                        command.join(" ")
                    ));
                }
            }
        }
        for (line, span) in &page.spans {
            if let Some(rest) = span.strip_prefix("ppv2-proxy ") {
                tried += 1;
                wrong.extend(
                    unknown_of(rest).map(|what| format!("{path}:{line}: `{span}`: {what}")),
                );
            }
        }
    }
    assert_none(&wrong);
    assert!(tried > 20, "{tried}");
}

fn commands_of_line(line: &str) -> Vec<Vec<String>> {
    commands(&format!("{line}\n"))
}

fn is_proxy(word: &str) -> bool {
    word == "ppv2-proxy" || word.ends_with("/ppv2-proxy")
}

/// Whether a word in front of a program has it run.
fn is_runner(word: &str) -> bool {
    word == "sudo" || word.contains('=')
}

/// The first word of a command in running text that the program does not know. Its values
/// may be placeholders.
fn unknown_of(words: &str) -> Option<String> {
    let mut command = Arguments::command();
    command.build();
    let name = words.split(' ').next()?;
    let Some(sub) = command.find_subcommand(name) else {
        let is_flag = name.starts_with("--") && command.get_arguments().any(|a| is_option(a, name));
        return (!is_flag && !matches!(name, "--help" | "--version"))
            .then(|| format!("there is no command `{name}`"));
    };
    // What is behind `--` is another program's.
    let own = words.split(' ').take_while(|word| *word != "--");
    let mut options = own.filter(|word| word.starts_with("--"));
    options
        .find(|option| {
            !sub.get_arguments()
                .any(|argument| is_option(argument, option))
        })
        .map(|option| format!("`{name}` has no option `{option}`"))
}

fn is_option(argument: &clap::Arg, word: &str) -> bool {
    argument
        .get_long()
        .is_some_and(|long| word.strip_prefix("--") == Some(long))
}

#[test]
fn the_readme_is_short_and_begins_with_a_command() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    assert!(readme.lines().count() <= 150);
    let first = readme.lines().position(|line| line.starts_with("```sh"));
    assert!(first.is_some_and(|line| line < 19), "{first:?}");
}
