//! `healthcheck`: asks the admin address of a running proxy, as container engines and
//! scripts do, which have no `curl` in a minimal image.

use std::path::PathBuf;

use clap::Args;
use thiserror::Error;

use crate::admin_client::{self, AdminError};
use crate::config::{AdminAddress, Config, ConfigError, Time, printable};

/// The most bytes of an answer that are read. What has the port may be another program.
const MAX_ANSWER: usize = 4096;

/// What to ask, and where.
#[derive(Args, Debug)]
#[allow(missing_docs, reason = "the help texts say it")]
pub struct Options {
    /// The proxy's admin address: an IP address with a port, or unix:/PATH
    #[arg(long, value_name = "ADDR", default_value = admin_client::USUAL, conflicts_with = "config")]
    pub admin: AdminAddress,

    /// The proxy's TOML file: its `admin.listen` is asked
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Ask whether every address takes datagrams and the proxy is not stopping (/readyz), instead
    /// of whether every worker responds (/healthz)
    #[arg(long)]
    pub ready: bool,

    /// How long the whole check may take
    #[arg(long, value_name = "DURATION", default_value_t)]
    pub timeout: Time<1_000, 3_600_000_000, 3_000_000>,
}

/// Why a proxy does not count as well.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HealthcheckError {
    /// The file can't be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The file has no admin address.
    #[error(
        "{} has no admin address to ask; add `[admin]` with `listen = \"127.0.0.1:9901\"`", path.display()
    )]
    NoAdmin {
        /// The file.
        path: PathBuf,
    },
    /// The proxy answers, and says that something is wrong.
    #[error("{address} answers {status} to {path}: {why}")]
    Unwell {
        /// The admin address.
        address: AdminAddress,
        /// What was asked.
        path: &'static str,
        /// The status of HTTP.
        status: u16,
        /// What the proxy says.
        why: String,
    },
    /// There is no answer.
    #[error(transparent)]
    Admin(#[from] AdminError),
}

impl HealthcheckError {
    /// Whether the command was used wrongly, rather than that the proxy is not well.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Config(_) | Self::NoAdmin { .. })
    }
}

/// Asks, and returns what the proxy says if it is well.
///
/// # Errors
///
/// [`HealthcheckError`].
pub fn run(options: &Options) -> Result<String, HealthcheckError> {
    let address = match &options.config {
        None => options.admin.clone(),
        Some(path) => Config::admin_of_file(path)?
            .ok_or_else(|| HealthcheckError::NoAdmin { path: path.clone() })?,
    };
    let path = if options.ready { "/readyz" } else { "/healthz" };
    let answer = admin_client::get(&address, path, *options.timeout, MAX_ANSWER)?;
    let body = String::from_utf8_lossy(&answer.body);
    let why = printable(body.lines().next().unwrap_or_default()).into_owned();
    if answer.status == 200 {
        return Ok(format!("{why}\n"));
    }
    Err(HealthcheckError::Unwell {
        address: admin_client::reachable(&address),
        path,
        status: answer.status,
        why,
    })
}
