//! What this host lacks for a configuration, found without privilege and without
//! changing anything: `doctor` tells it all, and `run` refuses to start over the
//! fatal part in the same words.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use thiserror::Error;

use crate::config::{Answers, Config, Expanded};
use crate::returns::{self, By, Return};

mod forged;
mod limits;
mod privilege;
mod probe;
mod replies;
mod rewriting;
mod sender;
mod server;

pub use probe::{ProbeError, probe};
pub use server::examine_server;

/// One thing that was looked at.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What was looked at, and for whom.
    pub what: String,
    /// What was found.
    pub found: String,
    /// What it comes to.
    pub verdict: Verdict,
}

/// What a finding comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be, or good to know.
    Right,
    /// Nothing is known to be missing, but the mend, a command, makes it better or
    /// certain.
    Advice(String),
    /// Clients go without replies until it is mended, by a command.
    Fatal(String),
}

impl Finding {
    fn right(what: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(what, found, Verdict::Right)
    }

    fn advice(what: impl Into<String>, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::new(what, found, Verdict::Advice(mend.into()))
    }

    fn fatal(what: impl Into<String>, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::new(what, found, Verdict::Fatal(mend.into()))
    }

    fn new(what: impl Into<String>, found: impl Into<String>, verdict: Verdict) -> Self {
        Self {
            what: what.into(),
            found: found.into(),
            verdict,
        }
    }

    /// Whether the proxy can't do its work so.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        matches!(self.verdict, Verdict::Fatal(_))
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.found)?;
        match &self.verdict {
            Verdict::Right => Ok(()),
            Verdict::Advice(mend) | Verdict::Fatal(mend) => write!(f, "; mend: {mend}"),
        }
    }
}

/// This host can't serve as configured.
#[derive(Debug, Error)]
#[error("this host lacks what the configuration needs: {}", list(.0))]
pub struct Lacking(Vec<Finding>);

fn list(findings: &[Finding]) -> String {
    let lines: Vec<_> = findings.iter().map(ToString::to_string).collect();
    lines.join("\n  ")
}

/// What is fatal on the proxy's host and can be seen for certain at a start. Servers
/// that names lead to are no matter: see [`expand`].
///
/// # Errors
///
/// [`Lacking`] with each finding.
pub fn fatal_at_start(config: &Config) -> Result<(), Lacking> {
    let returns = returns::of(&config.as_written());
    let findings: Vec<_> = fatal(config, &returns).collect();
    if findings.is_empty() {
        Ok(())
    } else {
        Err(Lacking(findings))
    }
}

/// The configuration with the servers that its names lead to, without those that
/// this host lacks something for: whoever answers for a name must not be able to
/// keep the proxy from starting.
#[must_use]
pub fn expand(config: &Config, answers: &Answers) -> Expanded {
    config.expand_but(answers, |name, server| {
        let returns = returns::of_found(config, name, server);
        fatal(config, &returns).find_map(|finding| match finding.verdict {
            Verdict::Fatal(mend) => {
                Some(format!("this host lacks what its mode needs; mend: {mend}"))
            }
            Verdict::Right | Verdict::Advice(_) => None,
        })
    })
}

fn fatal(config: &Config, returns: &[Return]) -> impl Iterator<Item = Finding> {
    let privileges = privilege::examine(returns).into_iter();
    let all = privileges.chain(replies::examine(config, returns, None));
    all.filter(Finding::is_fatal)
}

/// What else is told than the configuration says.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// A client, in the name of whom routes are asked for.
    pub client: Option<IpAddr>,
    /// Servers on the SDK route their replies through the proxy's host.
    pub is_gateway: bool,
    /// On a server's host: the proxy's addresses.
    pub gateways: Vec<IpAddr>,
    /// On a server's host: which servers it is.
    pub servers: Vec<IpAddr>,
}

/// Everything that can be told on the proxy's host.
#[must_use]
pub fn examine_proxy(config: &Config, told: &Told) -> Vec<Finding> {
    let returns = returns::of(config);
    let mut findings = privilege::examine(&returns);
    findings.extend(replies::examine(config, &returns, told.client));
    if told.is_gateway {
        findings.extend(replies::examine_gateway(config, &returns, told.client));
    }
    findings.extend(rewriting::examine_proxy(&returns));
    findings.extend(forged::examine(config, told.client));
    findings.extend(limits::examine(config));
    findings
}

/// The ways of `by`, one for each server.
fn servers_of(returns: &[Return], by: By) -> Vec<&Return> {
    let mut seen = BTreeSet::new();
    let of_it = returns.iter().filter(|found| found.by == by);
    of_it.filter(|found| seen.insert(found.server)).collect()
}
