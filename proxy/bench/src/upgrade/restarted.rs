//! A proxy that a service manager runs and restarts. What one process leaves in the service
//! manager's store of descriptors, the next one goes on with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ppv2_lab::Process;
use ppv2_lab::service_manager::{Systemd, stand_in};

/// The unit of the packages.
const UNIT: &str = include_str!("../../../packaging/systemd/ppv2-proxy.service");

/// Its name, and those of the files beside it.
const SERVICE: &str = "ppv2-proxy.service";
const PROXY: &str = "ppv2-proxy";
const CONFIG: &str = "proxy.toml";
const LOG: &str = "log";

/// What the proxy says when it serves.
const READY: &str = " ready ";

/// Between two looks at its log.
const LOOK: Duration = Duration::from_millis(1);

/// How long a restart may take.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Restarted {
    manager: Manager,
    starts: usize,
}

enum Manager {
    /// A small program.
    StandIn(Process),
    Systemd(Systemd),
}

impl Restarted {
    /// By the small program that stands in for systemd.
    pub(super) fn by_stand_in(proxy: &Path, config: &Path) -> Result<Self> {
        let mut run = Command::new(proxy);
        run.args(["run", "--config"]).arg(config);
        let sockets = ["store".to_owned()];
        let process = Process::start(&mut stand_in(&sockets, &run));
        Self::started(Manager::StandIn(process))
    }

    /// By systemd and the unit of the packages.
    pub(super) fn by_systemd(proxy: &Path, config: &str) -> Result<Self> {
        let systemd = Systemd::start();
        let file = |name: &str| systemd.folder().join(name);
        fs::copy(proxy, file(PROXY))?;
        fs::write(file(CONFIG), config)?;
        fs::write(file(SERVICE), UNIT)?;
        let [proxy, config, log] = [PROXY, CONFIG, LOG].map(Systemd::seen);
        let changes = format!(
            "[Unit]\nDefaultDependencies=no\nStartLimitIntervalSec=0\n\
             [Service]\nExecStart=\nExecStart={} run --config {}\nStandardError=append:{}\n",
            proxy.display(),
            config.display(),
            log.display()
        );
        let folder = file(&format!("{SERVICE}.d"));
        fs::create_dir(&folder)?;
        fs::write(folder.join("bench.conf"), changes)?;
        let (is_done, said) = systemd.systemctl(&["daemon-reload"]);
        ensure!(is_done, "systemd does not read the unit: {said}");
        let (is_done, said) = systemd.systemctl(&["start", SERVICE]);
        let manager = Manager::Systemd(systemd);
        ensure!(
            is_done,
            "systemd does not start it: {said}{}",
            manager.log()
        );
        Self::started(manager)
    }

    fn started(manager: Manager) -> Result<Self> {
        let mut it = Self { manager, starts: 0 };
        it.wait_for_start()?;
        Ok(it)
    }

    /// Restarts the proxy, and waits until the next process serves. Returns how long that took.
    pub(super) fn restart(&mut self) -> Result<Duration> {
        let began = Instant::now();
        match &self.manager {
            Manager::StandIn(process) => process.signal("USR1"),
            Manager::Systemd(systemd) => {
                let (is_done, said) = systemd.systemctl(&["restart", SERVICE]);
                ensure!(is_done, "systemd does not restart it: {said}{}", self.log());
            }
        }
        self.wait_for_start()?;
        let took = began.elapsed();
        let goes_on = self.log().matches("took over from another process").count();
        ensure!(
            goes_on + 1 == self.starts,
            "a process has begun anew:\n{}",
            self.log()
        );
        Ok(took)
    }

    fn wait_for_start(&mut self) -> Result<()> {
        self.starts += 1;
        let began = Instant::now();
        while self.log().matches(READY).count() < self.starts {
            ensure!(began.elapsed() < PATIENCE, "no start:\n{}", self.log());
            thread::sleep(LOOK);
        }
        Ok(())
    }

    pub(super) fn log(&self) -> String {
        self.manager.log()
    }

    /// Has the proxy end.
    pub(super) fn stop(self) -> Result<()> {
        match self.manager {
            Manager::StandIn(mut process) => {
                process.signal("TERM");
                let (status, log) = process.wait();
                ensure!(
                    status.success(),
                    "the last process ended with {status}:\n{log}"
                );
            }
            Manager::Systemd(systemd) => {
                let (is_done, said) = systemd.systemctl(&["stop", SERVICE]);
                ensure!(is_done, "systemd does not stop it: {said}");
            }
        }
        Ok(())
    }
}

impl Manager {
    fn log(&self) -> String {
        match self {
            Self::StandIn(process) => process.log(),
            Self::Systemd(systemd) => {
                let log: PathBuf = systemd.folder().join(LOG);
                fs::read_to_string(log).unwrap_or_default()
            }
        }
    }
}
