//! Programs that the bench starts: on which core, with which receive buffers,
//! what CPU and memory they and all their children take, and their end.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command};

use anyhow::{Context, Result};
use procfs::process::{Process, all_processes};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::host;

/// How and where a program is to run.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) cores: &'a [usize],
    pub(crate) preload: &'a Path,
    /// Before every ordinary program of this machine.
    pub(crate) real_time: bool,
    /// The host, as `ip netns` names it, if it is not this one.
    pub(crate) host: Option<&'static str>,
    /// As `nobody`, with no capability and no way to gain one.
    pub(crate) unprivileged: bool,
}

impl Place<'_> {
    /// Starts a program that dies with this one, whatever ends this one.
    pub(crate) fn start(
        self,
        program: &Path,
        configure: impl FnOnce(&mut Command),
    ) -> Result<Child> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        if let Some(host) = self.host {
            command.args(["ip", "netns", "exec", host]);
        }
        if self.real_time {
            command.args(["chrt", "--rr", "1"]);
        }
        if self.unprivileged {
            // The signal is asked for again: another user doesn't inherit it.
            command.args([
                "setpriv",
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
            ]);
            command.args(["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]);
            command.args(["--pdeathsig", "KILL"]);
        }
        command.arg(program).env("LD_PRELOAD", self.preload);
        configure(&mut command);
        let before = rustix::thread::sched_getaffinity(None)?;
        host::stay_on(self.cores)?;
        let child = command.spawn();
        rustix::thread::sched_setaffinity(None, &before)?;
        child.with_context(|| format!("starting {}", program.display()))
    }
}

/// A process and its descendants, as they were when looked for.
pub(crate) struct Tree {
    members: Vec<Process>,
}

impl Tree {
    pub(crate) fn of(root: u32) -> Result<Self> {
        let all: Vec<_> = all_processes()?
            .filter_map(|process| {
                let process = process.ok()?;
                let parent = process.stat().ok()?.ppid;
                Some((process.pid, parent))
            })
            .collect();
        let mut pids = vec![i32::try_from(root)?];
        let mut next = 0;
        while let Some(&parent) = pids.get(next) {
            pids.extend(all.iter().filter(|(_, p)| *p == parent).map(|(pid, _)| pid));
            next += 1;
        }
        Self::with(&pids)
    }

    /// These processes.
    pub(crate) fn with(pids: &[i32]) -> Result<Self> {
        let members = pids.iter().map(|pid| Ok(Process::new(*pid)?));
        Ok(Self {
            members: members.collect::<Result<_>>()?,
        })
    }

    pub(crate) fn pids(&self) -> impl Iterator<Item = i32> {
        self.members.iter().map(|process| process.pid)
    }

    /// Nanoseconds that all threads have run for. What the kernel does for a datagram on
    /// loopback, up to the receiver's buffer, it does in the name of the sender.
    pub(crate) fn cpu(&self) -> u64 {
        self.members
            .iter()
            .filter_map(|process| process.tasks().ok())
            .flatten()
            .filter_map(|task| Some(task.ok()?.schedstat().ok()?.sum_exec_runtime))
            .sum()
    }

    /// Bytes of memory, pages that several share counted once in all.
    pub(crate) fn memory(&self) -> u64 {
        self.members
            .iter()
            .filter_map(|process| process.smaps_rollup().ok())
            .flat_map(|rollup| rollup.memory_map_rollup)
            .filter_map(|map| map.extension.map.get("Pss").copied())
            .sum()
    }

    /// Open files and sockets.
    pub(crate) fn descriptors(&self) -> u64 {
        let counts = self
            .members
            .iter()
            .filter_map(|process| process.fd_count().ok());
        counts.map(|count| count as u64).sum()
    }
}

/// Ends all of a tree when it is dropped. The descriptors name the processes themselves,
/// not numbers that others may have by then.
pub(crate) struct End(Vec<OwnedFd>);

impl End {
    pub(crate) fn of(tree: &Tree) -> Result<Self> {
        let open = |pid| {
            let pid = Pid::from_raw(pid).context("process 0")?;
            Ok(pidfd_open(pid, PidfdFlags::empty())?)
        };
        Ok(Self(tree.pids().map(open).collect::<Result<_>>()?))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        for process in &self.0 {
            // Gone is what it shall be.
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
    }
}
