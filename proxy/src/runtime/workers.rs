//! The workers: their threads, and what they are told.

use std::panic::AssertUnwindSafe;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::RunError;
use crate::admin::WorkerHandle;
use ppv2_engine::worker::{Command, Worker, WorkerSetup};

/// How long to wait for workers that have not applied another snapshot.
const PATIENCE: Duration = Duration::from_secs(2);

/// The running workers.
pub(super) struct Workers {
    pub(super) handles: Vec<WorkerHandle>,
    /// How each worker ended that did.
    ended: UnboundedReceiver<(usize, Result<(), String>)>,
    running: usize,
}

impl Workers {
    /// Starts a thread for each worker. `setup` makes what the one of this number is
    /// given.
    pub(super) fn start(
        workers: usize,
        mut setup: impl FnMut(usize, mpsc::Receiver<Command>) -> WorkerSetup,
    ) -> Result<Self, RunError> {
        let (tell, ended) = unbounded_channel();
        let mut handles = Vec::new();
        for number in 0..workers {
            let (commands, receiver) = mpsc::channel();
            let (worker, waker) = Worker::new(setup(number, receiver))?;
            let tell = tell.clone();
            thread::Builder::new()
                .name(format!("worker{number}"))
                .spawn(move || {
                    let run = AssertUnwindSafe(|| worker.run());
                    let result = match std::panic::catch_unwind(run) {
                        Ok(result) => result.map_err(|error| error.to_string()),
                        Err(_) => Err("it panicked".to_owned()),
                    };
                    // Without a receiver, the process is ending.
                    let _ = tell.send((number, result));
                })?;
            handles.push(WorkerHandle::new(commands, waker));
        }
        Ok(Self {
            handles,
            ended,
            running: workers,
        })
    }

    /// Waits for a worker that ends by itself, which none should.
    pub(super) async fn failure(&mut self) -> RunError {
        match self.ended.recv().await {
            Some((number, result)) => RunError::Worker {
                number,
                reason: result.err().unwrap_or_else(|| "it ended".to_owned()),
            },
            None => std::future::pending().await,
        }
    }

    /// Waits until all workers have ended.
    pub(super) async fn all_ended(&mut self) -> Result<(), RunError> {
        while self.running > 0
            && let Some((number, result)) = self.ended.recv().await
        {
            self.running -= 1;
            result.map_err(|reason| RunError::Worker { number, reason })?;
        }
        Ok(())
    }

    /// Tells every worker something of its own. The future waits until each calls `done`:
    /// false if one has not, yet.
    pub(super) fn tell_each(
        &self,
        mut command: impl FnMut(usize, Box<dyn FnOnce() + Send>) -> Command,
    ) -> impl Future<Output = bool> {
        let (done, mut is_done) = unbounded_channel();
        for (number, worker) in self.handles.iter().enumerate() {
            let done = done.clone();
            // One that is gone ends the process, which is told elsewhere.
            let _ = worker.tell(command(number, Box::new(move || _ = done.send(()))));
        }
        let all = async move {
            for _ in &self.handles {
                is_done.recv().await?;
            }
            Some(())
        };
        async { matches!(tokio::time::timeout(PATIENCE, all).await, Ok(Some(()))) }
    }

    /// Tells every worker something.
    pub(super) fn tell_all(&self, command: impl Fn() -> Command) {
        for worker in &self.handles {
            // One that is gone ends the process, which is told elsewhere.
            let _ = worker.tell(command());
        }
    }
}
