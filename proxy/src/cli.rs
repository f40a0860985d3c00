//! The command line: what `--help` shows, and what the reference page is made of.

#![allow(missing_docs, reason = "the help texts say it")]

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ppv2_hosts::{doctor, host_setup};

use crate::config::{Config, ConfigError, Flags};

/// UDP reverse proxy that tells servers who their clients are, without root
#[derive(Parser)]
#[command(version, max_term_width = 100)]
pub struct Arguments {
    /// How log lines are written, on standard error
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,

    /// What is logged: error, warn, info, debug, trace, or a tracing filter
    #[arg(
        long,
        global = true,
        value_name = "LEVEL",
        env = "PPV2_LOG",
        default_value = "info"
    )]
    pub log_level: String,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Subcommand)]
pub enum Command {
    /// Run the proxy, from flags or from a file
    #[command(
        after_help = "SIGTERM and SIGINT stop it once the replies in flight are through; a second \
                      one stops it at once.\nSIGHUP has the file read again, and the access log \
                      opened anew."
    )]
    Run(Box<Run>),
    /// Check a configuration file, resolve its names and say what it comes to
    Check {
        /// The TOML file
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Find what this host lacks for a configuration, and how to fix it
    #[command(after_help = "Exit code 1 if anything fatal was found, 0 otherwise.")]
    Doctor(Box<doctor::Options>),
    /// Print the commands that a host needs for modes transparent and dsr, as a shell script
    HostSetup(Box<host_setup::Options>),
    /// Show a server, the proxy and a client on loopback, and what each saw
    Demo,
    /// Explain a datagram with a PROXY v2 header, byte range by byte range
    Decode {
        /// The datagram in hexadecimal digits; - reads them from standard input
        #[arg(value_name = "HEX", default_value = "-")]
        hex: String,
    },
    /// Run a server that answers each client with its own address and port
    Whoami {
        /// Address to listen on
        #[arg(long, value_name = "ADDR")]
        listen: SocketAddr,
        /// Network of the proxies, whose datagrams must carry a header; repeatable
        #[arg(long, value_name = "NET", required = true)]
        trusted: Vec<String>,
    },
}

#[derive(Args)]
pub struct Run {
    /// TOML file; all other settings are then made there
    // Not `exclusive`, which refuses the global flags for the log too.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = [
            "listen", "upstream", "mode", "rewrite_on", "source_port", "balance", "user", "workers",
            "admin", "idle_timeout", "responses", "requests", "max_sessions", "busy_poll",
            "coalesce", "allow",
        ]
    )]
    pub config: Option<PathBuf>,

    /// Address that clients write to; repeatable
    #[arg(
        long,
        value_name = "ADDR",
        required_unless_present = "config",
        requires = "upstream"
    )]
    pub listen: Vec<String>,

    /// Server to pass datagrams on to, as IP:PORT, HOST:PORT, dns:HOST:PORT or
    /// srv:_SERVICE._udp.NAME; repeatable
    #[arg(long, value_name = "ADDR", required_unless_present = "config")]
    pub upstream: Vec<String>,

    /// How servers are told of the client: ppv2, transparent, dsr or plain [default: ppv2]
    #[arg(long)]
    pub mode: Option<String>,

    /// Mode dsr: who makes replies come from the listener: proxy, server or sdk [default: proxy]
    #[arg(long, value_name = "WHERE")]
    pub rewrite_on: Option<String>,

    /// Mode transparent: from which port of the client's address: any or client [default: any]
    #[arg(long, value_name = "PORT")]
    pub source_port: Option<String>,

    /// Whom to run as, if started as root [default: nobody]
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,

    /// How sessions are spread over servers: maglev, round_robin, least_sessions or random_two
    /// [default: maglev]
    #[arg(long)]
    pub balance: Option<String>,

    /// Worker threads [default: one per core]
    #[arg(long, value_name = "N")]
    pub workers: Option<usize>,

    /// Address for /metrics, /healthz, /readyz and /sessions [default: none]
    #[arg(long, value_name = "ADDR")]
    pub admin: Option<String>,

    /// End a session after this long without a datagram [default: 30s]
    #[arg(long, value_name = "DURATION")]
    pub idle_timeout: Option<String>,

    /// End a session after N replies to each datagram; 0 for never
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub responses: u64,

    /// Begin a new session after N client datagrams; 0 for never
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub requests: u64,

    /// The most sessions [default: what open files, local ports and memory allow]
    #[arg(long, value_name = "N")]
    pub max_sessions: Option<usize>,

    /// Look for datagrams for this long before sleeping: latency for CPU [default: 0us]
    #[arg(long, value_name = "DURATION")]
    pub busy_poll: Option<String>,

    /// Let datagrams gather for this long after a wake-up: CPU for latency [default: 0us]
    #[arg(long, value_name = "DURATION")]
    pub coalesce: Option<String>,

    /// Network whose clients are served; repeatable [default: everybody]
    #[arg(long, value_name = "NET")]
    pub allow: Vec<String>,
}

impl Run {
    /// The configuration that the flags or the file describe.
    ///
    /// # Errors
    ///
    /// [`ConfigError`].
    pub fn config(self) -> Result<Config, ConfigError> {
        match self.config {
            Some(path) => Config::from_file(&path),
            None => Config::from_flags(Flags {
                listen: self.listen,
                upstream: self.upstream,
                mode: self.mode,
                rewrite_on: self.rewrite_on,
                source_port: self.source_port,
                user: self.user,
                balance: self.balance,
                workers: self.workers,
                admin: self.admin,
                idle_timeout: self.idle_timeout,
                max_sessions: self.max_sessions,
                responses: self.responses,
                requests: self.requests,
                allow: self.allow,
                busy_poll: self.busy_poll,
                coalesce: self.coalesce,
            }),
        }
    }
}
