//! `wrap`: runs a program with the preload library, which gives it its clients' addresses.
//!
//! The program is checked first: where no library can take its sockets over, it would serve
//! without one and take headers for data. Then it replaces this process, so that its process
//! ID, signals and descriptors are those that it was started with.

mod elf;
mod environment;
mod library;
mod program;
mod sockets;
mod start;

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum, ValueHint};
use nix::errno::Errno;
use ppv2_sdk::{Trust, TrustError};
use thiserror::Error;

pub use self::elf::Libc;
pub use self::environment::Environment;
pub use self::program::{Privilege, Unsuitable};
pub use self::sockets::LocalSockets;
use super::whoami::Format;
use crate::config::{Network, Number, Time};

/// What to do where no library helps.
const INSTEAD: &str = "use an unwrapper or mode transparent instead, see \
     `docs/guides/servers-without-header.md`";

#[derive(Args, Debug)]
#[allow(missing_docs, reason = "the help texts say it")]
pub struct Options {
    /// Network of the proxies, whose datagrams must carry a header; repeatable
    #[arg(long, value_name = "NET", required = true)]
    pub trusted: Vec<String>,

    /// UDP sockets to take over, by what the program binds them to: a port, ports as in
    /// 5000-5010, an address, or both as in 192.0.2.10:53; repeatable [default: all]
    #[arg(long, value_name = "SOCKET")]
    pub only: Vec<LocalSockets>,

    /// What becomes of datagrams from all other senders
    #[arg(long, value_name = "WHAT", value_enum, default_value_t)]
    pub untrusted: Untrusted,

    /// Network that the program exchanges datagrams with directly, without headers; repeatable
    #[arg(long, value_name = "NET")]
    pub peer: Vec<Network>,

    /// How the proxies write their header; repeatable
    #[arg(long, value_enum, default_value = "v2")]
    pub format: Vec<Format>,

    /// Take datagrams without header for those of the client that the sender's latest header
    /// named, for this long after its latest datagram
    #[arg(long, value_name = "DURATION")]
    pub remember: Option<Time<1_000_000, 86_400_000_000, 30_000_000>>,

    /// How long after a client's latest datagram the program can send to it
    #[arg(long, value_name = "DURATION", default_value_t)]
    pub forget_after: Time<1_000_000, 86_400_000_000, 120_000_000>,

    /// Clients that can be answered at a time, for each address and port of the program
    #[arg(long, value_name = "N", default_value_t)]
    pub max_clients: Number<usize, 1, 16_777_216, 65_536>,

    /// Which address the program learns as that of the datagram's destination, if it asks: the
    /// host's own, or the one that the header names
    #[arg(long, value_name = "ADDRESS", value_enum, default_value_t)]
    pub pktinfo: PacketInfo,

    /// What becomes of a socket with a port of its own when the program sends to a client from it.
    /// Answer is for servers that answer from new sockets, as those of TFTP do: not where the
    /// program asks other servers, whose addresses could be forged
    #[arg(long, value_name = "WHAT", value_enum, default_value_t)]
    pub new_sockets: NewSockets,

    /// Whether processes that the program forks share one table of clients. Separate is for
    /// programs whose processes must not trust one another
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

/// What becomes of datagrams from outside the trusted networks.
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
    /// The one of this host that the proxy wrote to
    #[default]
    Local,
    /// The one that the client wrote to, as the header says
    Destination,
}

/// What becomes of a socket that is not bound to a listener's address, when it sends to a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum NewSockets {
    /// It sends there directly, as without the library
    #[default]
    Pass,
    /// It answers this client, from the listener's address
    Answer,
}

/// Whether forked processes share one table of clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Fork {
    /// Any of them answers any client; each can write to the memory of this table
    #[default]
    Shared,
    /// Each answers the clients that it, or its parent before the fork, has heard
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
    /// A network that is none.
    #[error("--trusted")]
    Trust(#[source] TrustError),
    /// A format with which no sender can be remembered.
    #[error("--remember")]
    Remember(#[source] TrustError),
    /// A path that the environment can't carry.
    #[error("{flag} {path:?} {problem}")]
    Path {
        /// The option.
        flag: &'static str,
        /// Its value.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        problem: &'static str,
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
        false => " in PATH",
    }
}

impl WrapError {
    /// What the command ends with: as env(1) does where the program is at fault.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Trust(_) | Self::Remember(_) | Self::Path { .. } => 2,
            Self::NoLibrary { .. } | Self::Library { .. } | Self::Unsuitable { .. } => 1,
            Self::NotExecutable { .. } => 126,
            Self::NotFound { .. } => 127,
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
    check_trust(options)?;
    let named = options.library.as_deref().map(library::absolute);
    let named = named.transpose()?;
    let stats = options.stats.as_deref();
    let stats = stats.map(|path| environment::absolute("--stats", path));
    let stats = stats.transpose()?;
    if let (Some(library), []) = (&named, &options.program[..]) {
        return Ok(Wrapped {
            warnings: Vec::new(),
            environment: Environment::new(options, library, stats),
            program: None,
        });
    }
    check_folder(options.stats.as_deref())?;
    let path = options.program.first().map(|name| program::find(name));
    let path = path.transpose()?;
    let looked = path.as_deref().map(program::look).transpose()?;
    let looked = looked.unwrap_or_default();
    let library = match named {
        Some(library) => library,
        None => {
            let (program, libc) = looked.libc();
            library::find(libc, program)?
        }
    };
    looked.check(&library::read(&library)?)?;
    Ok(Wrapped {
        warnings: looked.warnings,
        environment: Environment::new(options, &library, stats),
        program: path.map(|path| Program {
            path,
            arguments: options.program.clone(),
        }),
    })
}

/// Has the SDK check what it will be given by the library.
fn check_trust(options: &Options) -> Result<(), WrapError> {
    let formats = options.format.iter().copied().map(ppv2_sdk::Format::from);
    let untrusted = match options.untrusted {
        Untrusted::Drop => ppv2_sdk::Untrusted::Drop,
        Untrusted::Accept => ppv2_sdk::Untrusted::Accept,
    };
    let mut trust = Trust::networks(&options.trusted)
        .formats(formats)
        .untrusted(untrusted)
        .forget_after(*options.forget_after)
        .max_clients(*options.max_clients);
    if let Some(idle) = options.remember {
        trust = trust.remember_senders(*idle, *options.max_clients);
    }
    match trust.build() {
        Ok(_) => Ok(()),
        Err(error @ TrustError::RememberSpp) => Err(WrapError::Remember(error)),
        Err(error) => Err(WrapError::Trust(error)),
    }
}

/// The library would stop the program.
fn check_folder(stats: Option<&Path>) -> Result<(), WrapError> {
    let is_missing = |path: &&Path| {
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        folder.is_some_and(|folder| !folder.is_dir())
    };
    match stats.filter(is_missing) {
        None => Ok(()),
        Some(path) => Err(WrapError::Path {
            flag: "--stats",
            path: path.to_owned(),
            problem: "is in a folder that does not exist",
        }),
    }
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
