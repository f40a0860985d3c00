//! Processes that a test starts: their log is gathered, and they end with the test.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::{TIMEOUT, eventually};

/// A process that ends with the value.
pub struct Process {
    child: Child,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts `command` and gathers what it writes on standard error.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let log = Arc::new(Mutex::new(String::new()));
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let reader = std::thread::spawn({
            let log = Arc::clone(&log);
            move || {
                let mut line = Vec::new();
                while lines.read_until(b'\n', &mut line).unwrap_or(0) > 0 {
                    log.lock()
                        .unwrap()
                        .push_str(&String::from_utf8_lossy(&line));
                    line.clear();
                }
            }
        });
        Self {
            child,
            log,
            reader: Some(reader),
        }
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line with `word`.
    pub fn wait_for(&mut self, word: &str) {
        let deadline = Instant::now() + TIMEOUT;
        while !self.log().contains(word) {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.reader.take().map(JoinHandle::join);
                panic!(
                    "ended with {status} before it said `{word}`:\n{}",
                    self.log()
                );
            }
            let log = self.log();
            assert!(Instant::now() < deadline, "never said `{word}`:\n{log}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn signal(&self, name: &str) {
        let pid = self.pid().to_string();
        let sent = Command::new("kill")
            .args(["-s", name, &pid])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    /// Stops the process and waits until it stands still, which a signal alone
    /// does not; `CONT` lets it go on.
    pub fn pause(&self) {
        self.signal("STOP");
        let threads = format!("/proc/{}/task", self.pid());
        // The state follows the name, which stands in brackets (proc(5)).
        let stands = |stat: String| stat.rsplit(") ").next().unwrap().starts_with('T');
        eventually("all threads to stand still", || {
            std::fs::read_dir(&threads)
                .unwrap()
                .map(|thread| std::fs::read_to_string(thread.unwrap().path().join("stat")))
                .all(|stat| stands(stat.unwrap()))
        });
    }

    /// Waits for the end, and returns it with everything that was logged.
    pub fn wait(&mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.reader.take().map(JoinHandle::join);
                return (status, self.log());
            }
            assert!(Instant::now() < deadline, "still runs:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("log of process {}:\n{}", self.child.id(), self.log());
        }
    }
}
