//! `doctor`: what this host lacks for a configuration, and how to mend it.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;

use super::host_setup::{Role, gateway, unicast};
use crate::config::Config;
use crate::doctor::{self, Finding, ProbeError, Told, Verdict};

/// What is looked at.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// The proxy's TOML file
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,

    /// Which host this is
    #[arg(long, default_value = "proxy")]
    pub role: Role,

    /// Send one datagram to each server, in modes transparent and dsr in a client's name, and say
    /// whether and from where it is answered
    #[arg(long)]
    pub probe: bool,

    /// Client in whose name routes are asked for and datagrams are sent [default: one of a network in `allow`]
    #[arg(long, value_name = "IP", value_parser = unicast)]
    pub client: Option<IpAddr>,

    /// Mode dsr by the SDK: servers route their replies through this host
    #[arg(long)]
    pub is_gateway: bool,

    /// Role server: the proxy's address that replies must be routed to, one for each family
    #[arg(long, value_name = "IP", value_parser = gateway)]
    pub gateway: Vec<IpAddr>,

    /// Role server: address of the server that this host is, repeatable [default: those that it has]
    #[arg(long, value_name = "IP", value_parser = unicast)]
    pub server: Vec<IpAddr>,
}

/// What was found, as text, and whether anything of it is fatal.
///
/// # Errors
///
/// [`ProbeError`].
pub fn report(config: &Config, options: &Options) -> Result<(String, bool), ProbeError> {
    if options.probe && options.role == Role::Server {
        return Err(ProbeError::OnServer);
    }
    let told = Told {
        client: options.client,
        is_gateway: options.is_gateway,
        gateways: options.gateway.clone(),
        servers: options.server.clone(),
    };
    let mut findings = match options.role {
        Role::Proxy => doctor::examine_proxy(config, &told),
        Role::Server => doctor::examine_server(config, &told),
    };
    if options.probe {
        findings.extend(doctor::probe(config, &told)?);
    }
    let mut text = String::new();
    for Finding {
        what,
        found,
        verdict,
    } in &findings
    {
        let (word, mend) = match verdict {
            Verdict::Right => ("ok", None),
            Verdict::Advice(mend) => ("advice", Some(mend)),
            Verdict::Fatal(mend) => ("FATAL", Some(mend)),
        };
        let _ = writeln!(text, "{word:<7} {what}: {found}");
        if let Some(mend) = mend {
            let _ = writeln!(text, "        mend: {mend}");
        }
    }
    let fatal = findings.iter().filter(|finding| finding.is_fatal()).count();
    let _ = match fatal {
        0 => writeln!(
            text,
            "nothing that the configuration needs is missing, as far as can be seen"
        ),
        _ => writeln!(text, "{fatal} of {} must be mended", findings.len()),
    };
    Ok((text, fatal > 0))
}
