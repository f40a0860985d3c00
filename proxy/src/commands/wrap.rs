//! `wrap`: runs a program with the preload library, which gives it its clients' addresses.
//!
//! The program is checked first: where no library can take its sockets over, it would serve
//! without one and take headers for data. Then it replaces this process, so that its process
//! ID, signals and descriptors are those that it was started with.

mod elf;
mod environment;
mod launcher;
mod library;
mod privilege;
mod program;
mod start;

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum, ValueHint};
use nix::errno::Errno;
use ppv2_preload_settings::{Sockets, stats_file};
use rustix::process::geteuid;
use thiserror::Error;

pub use self::elf::Libc;
pub use self::environment::Environment;
pub use self::launcher::Launcher;
pub use self::privilege::Privilege;
use self::program::Looked;
pub use self::program::Unsuitable;
use super::whoami::{Format, NOT_WITH_SPP, Remember};
use crate::config::{Network, Number, Time};

/// What to do where no library helps.
const INSTEAD: &str = "use an unwrapper or mode transparent instead, see \
     `docs/guides/servers-without-header.md`";

#[derive(Args, Debug)]
#[allow(missing_docs, reason = "the help texts say it")]
pub struct Options {
    /// Network of the proxies, whose datagrams must carry a header; repeatable, or with
    /// commas between
    #[arg(long, value_name = "NET", required = true, value_delimiter = ',')]
    pub trusted: Vec<Network>,

    /// UDP sockets to take over, by their port (53, 5000-5010), address (192.0.2.10) or both
    /// (192.0.2.10:53); repeatable [default: all]
    #[arg(long, value_name = "SOCKET", value_delimiter = ',')]
    pub only: Vec<Sockets>,

    /// What happens to datagrams from other senders
    #[arg(long, value_name = "WHAT", value_enum, default_value_t)]
    pub untrusted: Untrusted,

    /// Network of other servers, with which the program exchanges datagrams without headers;
    /// repeatable
    #[arg(long, value_name = "NET", value_delimiter = ',')]
    pub peer: Vec<Network>,

    /// How the proxies write their header; repeatable
    #[arg(long, value_enum, default_value = "v2", value_delimiter = ',')]
    pub format: Vec<Format>,

    /// For proxies that write the header once: how long a sender's client is remembered after the
    /// sender's latest datagram
    #[arg(long, value_name = "DURATION")]
    pub remember: Option<Remember>,

    /// How long after a client's latest datagram the program can send to it
    #[arg(long, value_name = "DURATION", default_value_t)]
    pub forget_after: Time<1_000_000, 86_400_000_000, 120_000_000>,

    /// Most clients remembered at a time, for each address and port of the program
    #[arg(long, value_name = "N", default_value_t)]
    pub max_clients: Number<usize, 1, 16_777_216, 65_536>,

    /// Destination of a datagram that the program sees if it asks (IP_PKTINFO)
    #[arg(long, value_name = "ADDRESS", value_enum, default_value_t)]
    pub pktinfo: PacketInfo,

    /// What happens when the program sends to a client from a new socket on another port, as TFTP
    /// servers do. Don't use answer if the program asks other servers: a client can forge their
    /// addresses
    #[arg(long, value_name = "WHAT", value_enum, default_value_t)]
    pub new_sockets: NewSockets,

    /// Whether processes that the program forks share one table of clients. Use separate if they
    /// must not trust one another
    #[arg(long, value_name = "TABLE", value_enum, default_value_t)]
    pub fork: Fork,

    /// File in which the library keeps its counters, as text for Prometheus
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,

    /// The preload library [default: libppv2_preload.so, or libppv2_preload_musl.so for programs
    /// that use musl, beside this program, in ../lib/ppv2, /usr/lib/ppv2 or /usr/local/lib/ppv2]
    #[arg(long, value_name = "FILE")]
    pub library: Option<PathBuf>,

    /// Print the environment that the program needs, a line for each variable, instead of running
    /// the program
    #[arg(long)]
    pub print_env: bool,

    /// Program to run, with its arguments
    #[arg(
        value_names = ["PROGRAM", "ARGS"],
        num_args = 1..,
        trailing_var_arg = true,
        value_hint = ValueHint::CommandWithArguments,
        required_unless_present = "print_env"
    )]
    pub program: Vec<OsString>,
}

/// What happens to datagrams from outside the trusted networks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Untrusted {
    /// The program never sees them
    #[default]
    Drop,
    /// The program gets them as they are
    Accept,
}

/// Which address the program learns as a datagram's destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PacketInfo {
    /// The address of this host that the proxy wrote to
    #[default]
    Local,
    /// The address that the client wrote to, as the header says
    Destination,
}

/// What happens when the program sends to a client from a socket on another port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum NewSockets {
    /// The datagram bypasses the proxy, as without the library
    #[default]
    Pass,
    /// It goes through the proxy, from the server's address and port
    Answer,
}

/// Whether forked processes share one table of clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Fork {
    /// Any of them answers any client; each can write to the memory of this table
    #[default]
    Shared,
    /// Each answers the clients that it, or its parent before the fork, has received from
    Separate,
}

/// What is ready to be done.
#[derive(Debug)]
pub struct Wrapped {
    /// What the operator should know before the program runs.
    pub warnings: Vec<String>,
    environment: Environment,
    program: Option<Program>,
}

/// A program that was found and looked at.
#[derive(Debug)]
struct Program {
    path: PathBuf,
    /// With the name that it was called by in front.
    arguments: Vec<OsString>,
}

/// Why a program is not run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WrapError {
    /// An option that can't be used.
    #[error("{flag} {value}: {problem}")]
    Option {
        /// Its name.
        flag: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// The library for the program's C library is nowhere.
    #[error("{}", no_library(program.as_deref(), *libc, *name, searched))]
    NoLibrary {
        /// The program, or the interpreter of the script.
        program: Option<PathBuf>,
        /// Its C library, or this host's.
        libc: Libc,
        /// The file that is missing, if there is a library for this one.
        name: Option<&'static str>,
        /// The folders.
        searched: Vec<String>,
    },
    /// The library can't be used.
    #[error("the library {path:?} {problem}")]
    Library {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// There is no such program.
    #[error("{program:?} is not found{}", place(program))]
    NotFound {
        /// As it was called.
        program: OsString,
    },
    /// The program can't be executed.
    #[error("{path:?} can't be executed")]
    NotExecutable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// No library can take over the sockets of the program.
    #[error("{program:?} {why}")]
    Unsuitable {
        /// The program, or the interpreter of the script.
        program: PathBuf,
        /// Why.
        why: Unsuitable,
    },
}

/// Says which library is missing.
fn no_library(
    program: Option<&Path>,
    libc: Libc,
    name: Option<&str>,
    searched: &[String],
) -> String {
    let needed = match program {
        Some(program) => format!("{program:?} uses {libc} as its C library"),
        None => format!("this host uses {libc} as its C library"),
    };
    match name {
        Some(name) => format!(
            "{needed}, and the preload library for it, {name}, is not in {}; `make build` or a package of ppv2-proxy \
             brings it, --library names it elsewhere",
            searched.join(", ")
        ),
        None => format!("{needed}, for which there is no preload library; {INSTEAD}"),
    }
}

/// Where a program was looked for.
fn place(program: &OsStr) -> &'static str {
    match program::is_path(program) {
        true => "",
        false => " in PATH; name its path, such as /usr/sbin/nsd",
    }
}

impl WrapError {
    /// What the command ends with: as env(1) does where the program is at fault.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Option { .. } => 2,
            Self::NoLibrary { .. } | Self::Library { .. } | Self::Unsuitable { .. } => 1,
            Self::NotExecutable { .. } => 126,
            Self::NotFound { .. } => 127,
        }
    }
}

impl WrapError {
    fn option(flag: &'static str, value: impl Display, problem: impl Display) -> Self {
        Self::Option {
            flag,
            value: value.to_string(),
            problem: problem.to_string(),
        }
    }
}

/// Checks the options and the program, and finds the library for the program's C library.
///
/// Without a program, nothing of this host is looked at if the options name the library: the
/// environment may be for another host or a container.
///
/// # Errors
///
/// [`WrapError`].
pub fn prepare(options: &Options) -> Result<Wrapped, WrapError> {
    if let Some(idle) = options.remember
        && options.format.contains(&Format::Spp)
    {
        return Err(WrapError::option("--remember", idle, NOT_WITH_SPP));
    }
    let mut warnings: Vec<_> = options.trusted.iter().filter_map(everybody).collect();
    let named = options.library.as_deref().map(library::absolute);
    let named = named.transpose()?;
    let stats = options.stats.as_deref();
    let stats = stats.map(|path| environment::absolute("--stats", path));
    let stats = stats.transpose()?;
    if let (Some(library), []) = (&named, &options.program[..]) {
        return Ok(Wrapped {
            warnings,
            environment: Environment::new(options, library, stats),
            program: None,
        });
    }
    let path = options.program.first().map(|name| program::find(name));
    let path = path.transpose()?;
    let looked = match &path {
        Some(path) => program::look(path, &options.program)?,
        None => Looked::default(),
    };
    let library = match named {
        Some(library) => library,
        None => {
            let (program, libc) = looked.libc();
            library::find(libc, program)?
        }
    };
    looked.check(&library::read(&library)?)?;
    // A printed environment may be for another user, and a folder that is made later.
    if let Some(file) = stats.as_ref().filter(|_| !options.print_env) {
        stats_file::open(file, geteuid().as_raw())
            .map_err(|error| WrapError::option("--stats", file.display(), error))?;
    }
    warnings.extend(looked.warnings);
    Ok(Wrapped {
        warnings,
        environment: Environment::new(options, &library, stats),
        program: path.map(|path| Program {
            path,
            arguments: options.program.clone(),
        }),
    })
}

/// A warning that a network has everybody in it.
fn everybody(trusted: &Network) -> Option<String> {
    (trusted.0.prefix_len() == 0).then(|| {
        format!(
            "--trusted {trusted}: anybody can send a header that names any client. Name the addresses of the proxies \
             alone"
        )
    })
}

impl Wrapped {
    /// The variables as lines, for `--print-env`.
    #[must_use]
    pub fn lines(&self) -> Vec<u8> {
        self.environment.lines()
    }

    /// Runs the program in place of this process, and returns only if that fails.
    #[must_use]
    pub fn run(self) -> WrapError {
        let Some(Program { path, arguments }) = self.program else {
            unreachable!("clap asks for a program unless the environment is printed");
        };
        let errno = start::execute(&path, &arguments, &self.environment);
        failed(path, errno)
    }
}

/// What the kernel had against a program that was found.
fn failed(path: PathBuf, errno: Errno) -> WrapError {
    let error = match errno == Errno::ENOENT {
        // The program itself is there.
        true => io::Error::other(missing_interpreter(&path)),
        false => errno.into(),
    };
    WrapError::NotExecutable { path, error }
}

/// Names what the kernel has not found.
fn missing_interpreter(path: &Path) -> String {
    match program::interpreter(path) {
        Some(interpreter) => format!("its interpreter {interpreter:?} does not exist"),
        None => "its interpreter does not exist".to_owned(),
    }
}
