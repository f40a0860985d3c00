//! Arguments, logging and exit codes: 0 done, 1 runtime failure, 2 bad usage or
//! configuration.

use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::Parser;
use ppv2_hosts::host_setup;
use ppv2_proxy::cli::{self, Arguments, Command, Run};
use ppv2_proxy::commands::{
    capture, check, decode, demo, healthcheck, manual, send, top, whoami, wrap,
};
use ppv2_proxy::config::{Config, ConfigError, printable};
use ppv2_proxy::discovery;
use ppv2_proxy::log::{Log, LogError};
use ppv2_proxy::privilege::{self, Needs, PrivilegeError};
use ppv2_proxy::{runtime, topology};

/// How long the last log lines may delay the exit. Longer than the log's own thread
/// waits.
const LAST_LINES: Duration = Duration::from_secs(2);

/// An error and the exit code that it ends with.
struct Failure(ExitCode, anyhow::Error);

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self(ExitCode::FAILURE, error)
    }
}

/// An error of the user's: wrong flags or configuration.
fn usage(error: impl Into<anyhow::Error>) -> Failure {
    Failure(ExitCode::from(2), error.into())
}

fn main() -> ExitCode {
    // The binary of the packages brings its own C library.
    ppv2_udp::look_up_without_plugins();
    let arguments = Arguments::parse();
    let (log, result) = match start(arguments) {
        Ok((log, task)) => (Some(log), task()),
        Err(failure) => (None, Err(failure)),
    };
    let (code, error) = match result {
        Ok(()) => (ExitCode::SUCCESS, None),
        Err(Failure(code, error)) => (code, Some(error)),
    };
    end_log(log, error);
    code
}

/// Writes the last log lines and the error, without waiting for a reader that has
/// stopped.
fn end_log(log: Option<Log>, error: Option<anyhow::Error>) {
    let (done, is_done) = mpsc::channel();
    let write_last = move || {
        if let Some(log) = log {
            log.finish();
        }
        if let Some(error) = error {
            // It fails if standard error is closed.
            let _ = writeln!(io::stderr(), "ppv2-proxy: {}", shown(&format!("{error:#}")));
        }
        let _ = done.send(());
    };
    if thread::Builder::new().spawn(write_last).is_ok() {
        let _ = is_done.recv_timeout(LAST_LINES);
    }
}

/// An error with its lines and tabs, and other control characters escaped: a file or an
/// argument may have any.
fn shown(error: &str) -> String {
    let mut text = String::new();
    for piece in error.split_inclusive(['\n', '\t']) {
        let (words, space) = piece.split_at(piece.trim_end_matches(['\n', '\t']).len());
        text.extend([&printable(words), space]);
    }
    text
}

/// A command that is ready to run.
type Task = Box<dyn FnOnce() -> Result<(), Failure>>;

/// Drops privileges that are not needed while there is one thread, then starts the
/// log, which has its own.
fn start(arguments: Arguments) -> Result<(Log, Task), Failure> {
    let task = match arguments.command {
        Command::Run(run) => prepare(*run)?,
        Command::Check { config, .. } => Box::new(move || {
            let text = match config {
                Some(path) => check::report(&Config::from_file(&path).map_err(usage)?),
                None => format!("{:#}\n", Config::schema()),
            };
            Ok(print(&text)?)
        }),
        Command::Doctor(options) => Box::new(move || {
            let config = resolved(&options.config).map_err(usage)?;
            let (text, is_fatal) = topology::doctor(&config, &options).map_err(usage)?;
            print(&text)?;
            if is_fatal {
                return Err(anyhow!("this host lacks what the configuration needs").into());
            }
            Ok(())
        }),
        Command::HostSetup(options) => Box::new(move || {
            let script = match &options.config {
                // It is undone as it was noted, not as a file says by now.
                Some(path) if !options.undo => {
                    let config = resolved(path).map_err(usage)?;
                    host_setup::script(&topology::of(&config), &options).map_err(usage)?
                }
                _ => host_setup::undo(options.role),
            };
            Ok(print(&script)?)
        }),
        Command::Demo => Box::new(|| Ok(print(&demo::run()?)?)),
        Command::Decode { hex } => Box::new(move || {
            let hex = if hex == "-" { standard_input()? } else { hex };
            let datagram = decode::bytes_of_hex(&hex).map_err(usage)?;
            let text = decode::explain(&datagram).map_err(anyhow::Error::from)?;
            Ok(print(&text)?)
        }),
        Command::Capture(options) => Box::new(move || capture(&options)),
        Command::Send(options) => Box::new(move || send(&options)),
        Command::Healthcheck(options) => Box::new(move || {
            let answer = healthcheck::run(&options).map_err(|error| match error.is_usage() {
                true => usage(error),
                false => Failure::from(anyhow::Error::from(error)),
            })?;
            Ok(print(&answer)?)
        }),
        Command::Top(options) => Box::new(move || {
            let text = top::run(&options).map_err(|error| match error.is_usage() {
                true => usage(error),
                false => Failure::from(anyhow::Error::from(error)),
            })?;
            Ok(print(&text)?)
        }),
        Command::Man { command } => {
            let page = manual::page(command.as_deref()).map_err(usage)?;
            Box::new(move || Ok(print(&page)?))
        }
        Command::Completions { shell } => Box::new(move || Ok(print(&manual::completions(shell))?)),
        Command::Whoami(options) => Box::new(move || {
            let server = whoami::Whoami::bind(&options).map_err(|error| match error {
                whoami::WhoamiError::Trust(_)
                | whoami::WhoamiError::Remember(_)
                | whoami::WhoamiError::NoHost(_) => usage(error),
                whoami::WhoamiError::Bind(..) => Failure::from(anyhow::Error::from(error)),
            })?;
            let listen = server.address().context("the socket's address")?;
            tracing::info!(%listen, "ready");
            Ok(server.serve().context("the socket no longer works")?)
        }),
        Command::Wrap(options) => Box::new(move || wrap(&options)),
    };
    let level = arguments.log_level;
    let log = Log::start(arguments.log_format, &level).map_err(|error| {
        let is_usage = matches!(error, LogError::Level(_));
        let error = anyhow::Error::from(error);
        match is_usage {
            true => usage(error.context(format!("--log-level `{level}`"))),
            false => Failure::from(error),
        }
    })?;
    Ok((log, task))
}

fn prepare(run: Run) -> Result<Task, Failure> {
    // Before anything has a descriptor that these could be taken for.
    let inherited = runtime::Inherited::of_environment();
    let (file, takeover) = (run.config.clone(), run.takeover.clone());
    let if_running = run.if_running;
    runtime::outlast_hang_ups().context("listening to signals")?;
    let config = run.config().map_err(usage)?;
    let takeover = takeover
        .map(|socket| cli::takeover(socket, &config))
        .transpose()
        .map_err(usage)?;
    let takeover = takeover.filter(|socket| !if_running || runtime::hands_over(socket));
    // Otherwise the process before has the addresses.
    if takeover.is_none() && !inherited.has_state() {
        runtime::probe(&config, &inherited).map_err(anyhow::Error::from)?;
    }
    let manager = runtime::NotifySocket::of_environment();
    let needs = Needs::of(&config, |address| inherited.has(address));
    let standing = privilege::reduce(config.user.as_deref(), needs);
    let standing = standing.map_err(|error| {
        if matches!(error, PrivilegeError::NoUser(_) | PrivilegeError::IsRoot(_)) {
            usage(error)
        } else {
            Failure::from(anyhow::Error::from(error))
        }
    })?;
    Ok(Box::new(move || {
        runtime::announce_privileges(&standing);
        // That one is about to end.
        let is_alone = takeover.is_none();
        if let Some(warning) = privilege::shared_user(&config).filter(|_| is_alone) {
            tracing::warn!("{warning}");
        }
        let ended = runtime::run(config, file, takeover, manager, inherited);
        Ok(ended.map_err(anyhow::Error::from)?)
    }))
}

/// A configuration with the servers that its names resolve to now.
fn resolved(path: &Path) -> Result<Config, ConfigError> {
    let config = Config::from_file(path)?;
    let resolved = discovery::resolve_once(&config);
    Ok(config.expand(&resolved.answers).config)
}

/// Runs `capture`. A reader that stops reading ends it.
fn capture(options: &capture::Options) -> Result<(), Failure> {
    use capture::CaptureError::{File, Output};

    let mut out = io::BufWriter::new(io::stdout());
    let result = capture::run(options, &mut out);
    let result = result.and(out.flush().map_err(Output));
    match result {
        Err(Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error @ File { .. }) => Err(usage(error)),
        result => Ok(result.map_err(anyhow::Error::from)?),
    }
}

/// Runs `send`. A reader that stops reading ends it.
fn send(options: &send::Options) -> Result<(), Failure> {
    match send::run(options, &mut io::stdout()) {
        Err(send::SendError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) if error.is_usage() => Err(usage(error)),
        result => Ok(result.map_err(anyhow::Error::from)?),
    }
}

/// Runs `wrap`, which comes back only if it prints the environment or fails.
fn wrap(options: &wrap::Options) -> Result<(), Failure> {
    let failure = |error: wrap::WrapError| Failure(error.exit_code().into(), error.into());
    let wrapped = wrap::prepare(options).map_err(failure)?;
    for warning in &wrapped.warnings {
        // The log's thread would end with this process, and its last lines too.
        let _ = writeln!(io::stderr(), "ppv2-proxy: warning: {}", printable(warning));
    }
    if options.print_env {
        return Ok(print_bytes(&wrapped.lines())?);
    }
    Err(failure(wrapped.run()))
}

/// Reads standard input for `decode`.
fn standard_input() -> Result<String, Failure> {
    let mut text = Vec::new();
    io::stdin()
        .take(decode::MAX_TEXT + 1)
        .read_to_end(&mut text)
        .context("reading standard input")?;
    if text.len() as u64 > decode::MAX_TEXT {
        return Err(usage(anyhow!(
            "standard input has more than {} bytes, longer than any datagram in hex; give one datagram as hex, as in 0d0a0d0a000d0a51…",
            decode::MAX_TEXT
        )));
    }
    // `decode` refuses what is not text.
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Prints a command's result. A reader that stops reading is not an error.
fn print(text: &str) -> anyhow::Result<()> {
    print_bytes(text.as_bytes())
}

fn print_bytes(text: &[u8]) -> anyhow::Result<()> {
    match io::stdout().write_all(text) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("writing the result"),
    }
}
