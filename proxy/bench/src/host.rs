//! The place where everything runs: a network namespace of its own, two cores,
//! and receive buffers of one size for everybody.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;

/// Set for the process that is in the namespace.
const INSIDE: &str = "PPV2_BENCH_INSIDE";

/// Goes on in a network namespace of its own, in which loopback is up. Without
/// root, in a user namespace too.
pub(crate) fn enter_namespace() -> Result<()> {
    if std::env::var_os(INSIDE).is_none() {
        let mut unshare = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            unshare.args(["--user", "--map-root-user"]);
        }
        let error = unshare
            .args(["--net", "--mount"])
            .arg(std::env::current_exe()?)
            .args(std::env::args_os().skip(1).collect::<Vec<OsString>>())
            .env(INSIDE, "1")
            .exec();
        return Err(error).context("running unshare, of the Debian package util-linux");
    }
    let status = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()
        .context("running ip, of the Debian package iproute2")?;
    ensure!(status.success(), "loopback can't be brought up");
    Ok(())
}

/// Where things run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cores {
    /// Of the clients and servers.
    pub(crate) around: usize,
    /// Of the proxy.
    pub(crate) proxy: usize,
    /// Both.
    pub(crate) all: [usize; 2],
}

impl Cores {
    /// The first two cores that this process may use.
    pub(crate) fn find() -> Result<Self> {
        let allowed = sched_getaffinity(None)?;
        let mut cores = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core));
        match (cores.next(), cores.next()) {
            (Some(around), Some(proxy)) => Ok(Self {
                around,
                proxy,
                all: [around, proxy],
            }),
            _ => bail!("two cores are needed: one for the proxy, one for all else"),
        }
    }
}

/// Keeps this thread, and what it starts from now on, on these cores.
pub(crate) fn stay_on(cores: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for core in cores {
        set.set(*core);
    }
    sched_setaffinity(None, &set).context("setting the CPU affinity")
}

/// What the measured programs have before others of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Priority {
    None,
    Raised,
    RealTime,
}

impl Priority {
    /// Raises the priority of everything that is started from now on, where root
    /// may: then the others' noise is less of it. What is measured may have real-time
    /// priority beside; this process has none, since the kernel waits in a busy loop for
    /// others to let go of a process that has ended, who might never have their turn.
    pub(crate) fn raise(real_time: bool) -> Self {
        let raised = rustix::process::setpriority_process(None, -10).is_ok();
        if real_time {
            Self::RealTime
        } else if raised {
            Self::Raised
        } else {
            Self::None
        }
    }
}

impl std::fmt::Display for Priority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "at ordinary priority",
            Self::Raised => "at priority -10",
            Self::RealTime => "at real-time priority",
        })
    }
}

/// Descriptors that session sockets need in the largest work, and what else has some.
const DESCRIPTORS: u64 = 40_000;

/// Programs have tables of as many entries as they may have descriptors.
const MOST_DESCRIPTORS: u64 = 1 << 16;

/// Lets everything that is started from now on have many descriptors: as many as are
/// needed, or as this process may have. Says how many.
pub(crate) fn allow_descriptors() -> u64 {
    let now = getrlimit(Resource::Nofile);
    let hard = now.maximum.unwrap_or(u64::MAX);
    let allow = |most| {
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most.max(hard)),
        };
        setrlimit(Resource::Nofile, limit).is_ok()
    };
    // More than the hard limit takes a capability that root may lack.
    for most in [hard.max(DESCRIPTORS), hard] {
        let most = most.min(MOST_DESCRIPTORS);
        if allow(most) {
            return most;
        }
    }
    now.current.unwrap_or(hard)
}

/// Compiles the library that makes receive buffers equal.
pub(crate) fn preload(folder: &Path) -> Result<PathBuf> {
    let source = folder.join("preload.c");
    let library = folder.join("preload.so");
    fs::write(&source, include_str!("preload.c"))?;
    let status = Command::new("cc")
        .args(["-O2", "-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .arg("-ldl")
        .status()
        .context("running cc")?;
    ensure!(status.success(), "cc failed on {}", source.display());
    Ok(library)
}

/// What a figure can't be read without.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    cores: usize,
    model: String,
    kernel: String,
    /// Of the minute before the first measurement: who else was there.
    load_average: String,
}

impl Machine {
    pub(crate) fn describe() -> Result<Self> {
        let info = fs::read_to_string("/proc/cpuinfo")?;
        let model = info
            .lines()
            .find_map(|line| line.strip_prefix("model name"))
            .map_or("unknown", |value| {
                value.trim_start_matches(['\t', ' ', ':'])
            });
        let load = fs::read_to_string("/proc/loadavg")?;
        Ok(Self {
            cores: std::thread::available_parallelism()?.get(),
            model: model.to_owned(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .split('-')
                .next()
                .unwrap_or_default()
                .to_owned(),
            load_average: load.split(' ').next().unwrap_or_default().to_owned(),
        })
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} × {}, Linux {}, load average {} before",
            self.cores, self.model, self.kernel, self.load_average
        )
    }
}
