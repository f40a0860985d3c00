//! The command line: what `--help` shows, and what the reference page is made of.

#![allow(missing_docs, reason = "the help texts say it")]

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use ppv2_hosts::{doctor, host_setup};

use crate::commands::{capture, healthcheck, send, top, whoami, wrap};
use crate::config::{Config, ConfigError, Flags, LogFormat};

/// What the program ends with, and what that means.
pub const EXIT_CODES: [(u8, &str); 5] = [
    (0, "done"),
    (
        1,
        "the host refused something; or `doctor` found something fatal; or `decode` found no valid header; or `send` had no reply; or `capture` found mistakes; or `healthcheck` found a proxy that is not well; or `top --once` had no answer; or `wrap` has no library for the program",
    ),
    (
        2,
        "wrong usage or configuration, including a name without `dns:` or `srv:` that does not resolve; or a file that `capture` can't read",
    ),
    (126, "`wrap`: the program can't be executed"),
    (127, "`wrap`: there is no such program"),
];

/// UDP reverse proxy that passes each client's real address to your servers
#[derive(Parser)]
#[command(version, max_term_width = 100)]
pub struct Arguments {
    /// How log lines are written, on standard error
    #[arg(
        long,
        global = true,
        help_heading = "Log options",
        value_name = "FORMAT",
        value_enum,
        default_value_t
    )]
    pub log_format: LogFormat,

    /// What is logged: error, warn, info, debug, trace, or a tracing filter
    #[arg(
        long,
        global = true,
        help_heading = "Log options",
        value_name = "LEVEL",
        env = "PPV2_LOG",
        default_value = "info"
    )]
    pub log_level: String,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Run the proxy, from flags or from a file
    #[command(
        after_help = "SIGTERM and SIGINT stop it after outstanding replies; a second one stops it at \
                      once.\nSIGHUP reloads the file and reopens the access log.\nSIGUSR2 leaves all sockets and sessions to the next process, in the service manager's store, and exits; without\nsuch a store it is as SIGTERM."
    )]
    Run(Box<Run>),
    /// Check a configuration file, resolve its names and print the resulting setup
    Check {
        /// The TOML file
        #[arg(long, value_name = "FILE", required_unless_present = "schema")]
        config: Option<PathBuf>,

        /// Print the JSON Schema of the file instead: every key with type, default and description
        #[arg(long, conflicts_with = "config")]
        schema: bool,
    },
    /// Find what this host lacks for a configuration, and how to fix it
    #[command(after_help = "Exit code 1 if anything fatal was found, 0 otherwise.")]
    Doctor(Box<doctor::Options>),
    /// Print the commands that a host needs for modes transparent and dsr, as a shell script
    HostSetup(Box<host_setup::Options>),
    /// Show a server, the proxy and a client on loopback, and what each saw
    Demo,
    /// Explain a datagram with a PROXY v2 or SPP header, byte range by byte range
    Decode {
        /// The datagram in hexadecimal digits; - reads them from standard input
        #[arg(value_name = "HEX", default_value = "-")]
        hex: String,
    },
    /// Explain the headers in a capture file, and find the mistakes in them
    #[command(
        after_help = "Exit code 1 if mistakes were found, 2 if the file can't be read, 0 otherwise."
    )]
    Capture(capture::Options),
    /// Send datagrams with a header to a server, and show its replies
    #[command(after_help = "Exit code 1 if a datagram had no reply, 0 otherwise.")]
    Send(Box<send::Options>),
    /// Run a server that answers each client with its own address and port
    Whoami(whoami::Options),
    /// Run a server that can't read headers, with a library that reads them for it
    #[command(
        after_help = "`wrap` becomes the program: process ID, signals and exit code are the program's.\n\
                      Exit code 126 if the program can't be executed, 127 if there is none, as env(1).\n\
                      Exit code 1 if no library can take its sockets over, 2 if an option is wrong."
    )]
    Wrap(Box<wrap::Options>),
    /// Ask the admin address of a running proxy whether it is well, as container engines do
    #[command(
        after_help = "Exit code 0 if the proxy is well, 1 if it is not or does not answer, 2 if no admin address \
                      is known."
    )]
    Healthcheck(healthcheck::Options),
    /// Show a running proxy on the terminal: listeners, servers, drops and busiest clients, with
    /// rates
    #[command(
        after_help = "Keys: 1-4 and tab for views, j and k to move, s to sort, p to pause, q to quit, ? for \
                      help.\nColours are left out if NO_COLOR is set."
    )]
    Top(top::Options),
    /// Print a man page as roff: that of a command, or that of the program
    Man {
        /// The command
        #[arg(value_name = "COMMAND")]
        command: Option<String>,
    },
    /// Print a script that has a shell complete commands and options
    Completions {
        /// The shell
        #[arg(value_name = "SHELL", value_enum)]
        shell: Shell,
    },
}

#[derive(Args)]
pub struct Run {
    /// TOML file; it replaces all flags but those of the log
    // Not `exclusive`, which refuses the global flags for the log too.
    #[arg(long, value_name = "FILE", conflicts_with_all = Flags::GROUPS)]
    pub config: Option<PathBuf>,

    /// Take over all sockets and sessions from the proxy that listens on this Unix socket, its
    /// `upgrade.socket`; without SOCKET, on that of FILE. If that fails, the other proxy goes on
    /// and this one exits with 1
    #[arg(long, value_name = "SOCKET")]
    pub takeover: Option<Option<PathBuf>>,

    /// With --takeover: start as without it if no proxy listens there, for scripts that don't know
    #[arg(long, requires = "takeover")]
    pub if_running: bool,

    #[command(flatten)]
    pub flags: Flags,
}

/// The socket that `--takeover` names, or that of the configuration if it names none.
///
/// # Errors
///
/// [`ConfigError`] if neither names one.
pub fn takeover(named: Option<PathBuf>, config: &Config) -> Result<PathBuf, ConfigError> {
    let configured = || config.upgrade_socket().map(Path::to_path_buf);
    named.or_else(configured).ok_or_else(|| {
        ConfigError::new("--takeover without a socket, and the configuration has no `upgrade.socket`")
            .hint("name the `upgrade.socket` of the proxy that runs, as in --takeover /run/ppv2/upgrade.sock")
    })
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
            None => Config::from_flags(self.flags),
        }
    }
}
