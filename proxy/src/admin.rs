//! The admin address: health, metrics and the list of sessions over HTTP.
//!
//! It asks nothing of who reads it, so it belongs on loopback or a management
//! network; `/sessions` shows clients' addresses.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use mio::Waker;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::metrics::{self, Metrics};
use crate::worker::{Command, SessionReport};

/// How long a worker may take to answer before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(1);

/// Sessions on a page, unless asked for fewer; more are never returned.
const MAX_PAGE: usize = 1000;
const DEFAULT_PAGE: usize = 100;

const INDEX: &str = "ppv2-proxy admin: /metrics /healthz /readyz /sessions?limit=N&after=CURSOR\n";

/// A way to tell a worker something.
#[derive(Clone)]
pub struct WorkerHandle {
    /// Where it looks for commands.
    pub commands: SyncSender<Command>,
    /// Makes it look.
    pub waker: Arc<Waker>,
}

impl WorkerHandle {
    /// Tells the worker. False if it is gone or has too many commands waiting.
    #[must_use]
    pub fn tell(&self, command: Command) -> bool {
        self.commands.try_send(command).is_ok() && self.waker.wake().is_ok()
    }

    async fn sessions(&self, first: usize, limit: usize) -> Option<Vec<SessionReport>> {
        let (reply, answer) = oneshot::channel();
        let asked = self.tell(Command::Sessions {
            first,
            limit,
            reply: Box::new(move |sessions| {
                // Nobody listens any more if the request was given up.
                let _ = reply.send(sessions);
            }),
        });
        if !asked {
            return None;
        }
        tokio::time::timeout(PATIENCE, answer).await.ok()?.ok()
    }
}

/// What the admin address shows.
pub struct Admin {
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// The workers, by number.
    pub workers: Vec<WorkerHandle>,
    /// Whether every listener takes datagrams.
    pub ready: Arc<AtomicBool>,
}

/// Serves `admin` on `listener` until the process ends.
///
/// # Errors
///
/// Those of accepting connections.
pub async fn serve(listener: TcpListener, admin: Admin) -> io::Result<()> {
    let routes = Router::new()
        .route("/", get(|| async { INDEX }))
        .route("/metrics", get(metrics_text))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/sessions", get(sessions))
        .fallback(|| async { (StatusCode::NOT_FOUND, INDEX) })
        .with_state(Arc::new(admin));
    axum::serve(listener, routes).await
}

async fn metrics_text(State(admin): State<Arc<Admin>>) -> Response {
    match admin.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// Alive: every worker still answers.
async fn healthz(State(admin): State<Arc<Admin>>) -> Response {
    for (number, worker) in admin.workers.iter().enumerate() {
        if worker.sessions(0, 0).await.is_none() {
            let message = format!("worker {number} does not answer\n");
            return (StatusCode::SERVICE_UNAVAILABLE, message).into_response();
        }
    }
    "ok\n".into_response()
}

/// Ready: every listener takes datagrams, and the proxy is not stopping.
async fn readyz(State(admin): State<Arc<Admin>>) -> Response {
    if admin.ready.load(Ordering::Acquire) {
        "ready\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n").into_response()
    }
}

#[derive(Deserialize)]
struct Page {
    limit: Option<usize>,
    after: Option<String>,
}

#[derive(Serialize)]
struct SessionsPage<'a> {
    sessions: Vec<SessionEntry<'a>>,
    /// The `after` of the next page; null on the last.
    next: Option<String>,
}

#[derive(Serialize)]
struct SessionEntry<'a> {
    client: String,
    local: String,
    listener: &'a str,
    upstream: &'a str,
    server: &'a str,
    worker: usize,
    age_seconds: f64,
    idle_seconds: f64,
    requests: u64,
    replies: u64,
}

async fn sessions(State(admin): State<Arc<Admin>>, Query(page): Query<Page>) -> Response {
    let limit = page.limit.unwrap_or(DEFAULT_PAGE).clamp(1, MAX_PAGE);
    let Some((mut worker, mut first)) = cursor(page.after.as_deref()) else {
        let message = "after: expected the `next` of another page\n";
        return (StatusCode::BAD_REQUEST, message).into_response();
    };
    let mut entries = Vec::new();
    let mut next = None;
    while let Some(handle) = admin.workers.get(worker) {
        // One more than wanted tells whether another page follows.
        let wanted = limit - entries.len() + 1;
        let Some(reports) = handle.sessions(first, wanted).await else {
            let message = format!("worker {worker} does not answer\n");
            return (StatusCode::SERVICE_UNAVAILABLE, message).into_response();
        };
        for report in reports {
            if entries.len() == limit {
                next = Some(format!("{worker}:{}", report.number));
                break;
            }
            entries.push(entry(&admin.metrics, worker, &report));
        }
        if next.is_some() {
            break;
        }
        (worker, first) = (worker + 1, 0);
    }
    let sessions = entries;
    Json(SessionsPage { sessions, next }).into_response()
}

/// Reads `worker:session`; the beginning if there is nothing to read.
fn cursor(after: Option<&str>) -> Option<(usize, usize)> {
    let Some(after) = after else {
        return Some((0, 0));
    };
    let (worker, first) = after.split_once(':')?;
    Some((worker.parse().ok()?, first.parse().ok()?))
}

fn entry<'a>(metrics: &'a Metrics, worker: usize, report: &SessionReport) -> SessionEntry<'a> {
    let (upstream, server) = &metrics.servers[report.server];
    SessionEntry {
        client: report.key.client.to_string(),
        local: report.key.local.to_string(),
        listener: &metrics.listeners[report.listener],
        upstream,
        server,
        worker,
        age_seconds: report.age.as_secs_f64(),
        idle_seconds: report.idle.as_secs_f64(),
        requests: report.requests,
        replies: report.replies,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_are_read_or_refused() {
        assert_eq!(cursor(None), Some((0, 0)));
        assert_eq!(cursor(Some("3:17")), Some((3, 17)));
        for bad in ["", ":", "3", "3:", "x:1", "1:-1"] {
            assert_eq!(cursor(Some(bad)), None, "{bad}");
        }
    }
}
