//! `doctor`: what this host lacks for a configuration, found without privilege and
//! without changing anything. `run` refuses to start because of the fatal findings, and
//! reports them in the same words.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;
use thiserror::Error;

use crate::host_setup::{Role, other_host, unicast};
use crate::kernel;
use crate::reply_path::{ReplyPath, Rewriter};
use crate::topology::Topology;

mod answer_source;
mod capabilities;
mod forged;
mod mtu;
mod nft_rules;
mod probe;
mod proxy_host;
mod server_host;
pub(crate) mod source_networks;

pub use probe::{ProbeError, QUESTION};
pub use source_networks::add_route;

/// Options of the command.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// The proxy's TOML file
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,

    /// Which host this is
    #[arg(long, default_value = "proxy")]
    pub role: Role,

    /// Send one datagram to each server and report whether and from where it is answered;
    /// modes transparent and dsr send it from a client's address
    #[arg(long)]
    pub probe: bool,

    /// Client address for route lookups and --probe [default: one of a network in `allow`]
    #[arg(long, value_name = "IP", value_parser = unicast)]
    pub client: Option<IpAddr>,

    /// Mode dsr by the SDK: servers route their replies through this host
    #[arg(long)]
    pub is_gateway: bool,

    /// Role server: the proxy's address that replies must be routed to, one for each family
    #[arg(long, value_name = "IP", value_parser = other_host)]
    pub gateway: Vec<IpAddr>,

    /// Role server: address of a server on this host, repeatable [default: servers with an address
    /// of this host]
    #[arg(long, value_name = "IP", value_parser = unicast)]
    pub server: Vec<IpAddr>,
}

/// The result of one check.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The thing that was checked.
    pub what: String,
    pub found: String,
    pub verdict: Verdict,
}

/// What follows from a finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is wrong.
    Ok,
    /// Nothing is known to be missing; this command improves the setup or makes it certain.
    Advice(String),
    /// Clients get no replies until this command has fixed it.
    Fatal(String),
}

impl Finding {
    /// Nothing is wrong.
    #[must_use]
    pub fn ok(what: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(what, found, Verdict::Ok)
    }

    /// Something could be better.
    #[must_use]
    pub fn advice(
        what: impl Into<String>,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::new(what, found, Verdict::Advice(fix.into()))
    }

    fn fatal(what: impl Into<String>, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(what, found, Verdict::Fatal(fix.into()))
    }

    fn lookup_failed(what: impl Into<String>, error: &io::Error, question: &str) -> Self {
        let found = format!("the kernel did not answer a route lookup: {error}");
        Self::advice(what, found, format!("try `{question}`"))
    }

    /// Packets that `interface` drops for their source address.
    fn bad_source(what: impl Into<String>, packets: &str, interface: &str) -> Self {
        let strict = kernel::larger_of_all_and(interface, "rp_filter");
        Self::fatal(
            what,
            format!(
                "{packets} dropped for their source address: rp_filter is {strict} on {interface}"
            ),
            format!("sysctl -w net.ipv4.conf.{interface}.rp_filter=2"),
        )
    }

    fn new(what: impl Into<String>, found: impl Into<String>, verdict: Verdict) -> Self {
        Self {
            what: what.into(),
            found: found.into(),
            verdict,
        }
    }

    fn is_fatal(&self) -> bool {
        matches!(self.verdict, Verdict::Fatal(_))
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.found)?;
        match &self.verdict {
            Verdict::Ok => Ok(()),
            Verdict::Advice(fix) | Verdict::Fatal(fix) => write!(f, "; fix: {fix}"),
        }
    }
}

/// This host can't serve as configured.
#[derive(Debug, Error)]
#[error("this host lacks what the configuration needs: {}", list(.0))]
pub struct Unfit(Vec<Finding>);

impl Unfit {
    /// The fix of the first finding.
    #[must_use]
    pub fn fix(&self) -> &str {
        match self.0.first().map(|finding| &finding.verdict) {
            Some(Verdict::Advice(fix) | Verdict::Fatal(fix)) => fix,
            Some(Verdict::Ok) | None => "",
        }
    }
}

fn list(findings: &[Finding]) -> String {
    let lines: Vec<_> = findings.iter().map(ToString::to_string).collect();
    lines.join("\n  ")
}

/// Checks the proxy's host for what is certain to leave clients without replies.
///
/// # Errors
///
/// [`Unfit`] with each fatal finding.
pub fn check_proxy_host(topology: &Topology) -> Result<(), Unfit> {
    let paths = topology.reply_paths();
    let mut findings = capabilities::examine(&paths);
    findings.extend(proxy_host::examine(topology, &paths, None));
    findings.extend(source_networks::examine(topology));
    findings.retain(Finding::is_fatal);
    if findings.is_empty() {
        Ok(())
    } else {
        Err(Unfit(findings))
    }
}

/// All findings as text, and whether one of them is fatal. `more` are the proxy's own.
///
/// # Errors
///
/// [`ProbeError`].
pub fn report(
    topology: &Topology,
    options: &Options,
    more: Vec<Finding>,
) -> Result<(String, bool), ProbeError> {
    if options.probe && options.role == Role::Server {
        return Err(ProbeError::OnServer);
    }
    let mut findings = match options.role {
        Role::Proxy => examine_proxy_host(topology, options),
        Role::Server => server_host::examine(topology, options),
    };
    findings.extend(more);
    if options.probe {
        findings.extend(probe::probe(topology, options.client)?);
    }
    let mut text = String::new();
    for finding in &findings {
        let Finding { what, found, .. } = finding;
        let (word, fix) = match &finding.verdict {
            Verdict::Ok => ("ok", None),
            Verdict::Advice(fix) => ("advice", Some(fix)),
            Verdict::Fatal(fix) => ("FATAL", Some(fix)),
        };
        text.push_str(&format!("{word:<7} {what}: {found}\n"));
        text.extend(fix.map(|fix| format!("        fix: {fix}\n")));
    }
    let fatal = findings.iter().filter(|finding| finding.is_fatal()).count();
    text.push_str(&match fatal {
        0 => "no requirement of the configuration is known to be missing\n".to_owned(),
        _ => format!("{fatal} of {} must be fixed\n", findings.len()),
    });
    Ok((text, fatal > 0))
}

fn examine_proxy_host(topology: &Topology, options: &Options) -> Vec<Finding> {
    let paths = topology.reply_paths();
    let mut findings = capabilities::examine(&paths);
    findings.extend(proxy_host::examine(topology, &paths, options.client));
    findings.extend(source_networks::examine(topology));
    findings.extend(source_networks::examine_more(topology));
    if options.is_gateway {
        let gateway = proxy_host::examine_gateway(topology, &paths, options.client);
        findings.extend(gateway);
    }
    let rewritten = servers_of(&paths, Rewriter::ProxyHost);
    findings.extend(nft_rules::examine(&rewritten, Role::Proxy));
    findings.extend(forged::examine(topology, options.client));
    findings.extend(mtu::examine(topology));
    findings
}

/// The first path of each server whose replies `rewriter` rewrites.
fn servers_of(paths: &[ReplyPath], rewriter: Rewriter) -> Vec<&ReplyPath> {
    let mut seen = BTreeSet::new();
    let of_it = paths.iter().filter(|path| path.rewriter == rewriter);
    of_it.filter(|path| seen.insert(path.server)).collect()
}
