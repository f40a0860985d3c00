//! The admin address: health, metrics and the list of sessions over HTTP.
//!
//! It asks nothing of who reads it, so it belongs on loopback or a management
//! network; `/sessions` shows clients' addresses. Readers there may hang or come
//! in crowds all the same, and must not cost sessions: connections are few, none
//! lasts, and those who ask nothing make room for others.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use axum::extract::{Query, Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use prometheus_client::collector::Collector;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::AbortHandle;

use crate::discovery;
use crate::health::Status;
use crate::metrics::{Format, Metrics};
use ppv2_engine::worker::{Command, SessionReport};
use ppv2_udp::Waker;

/// How long a worker may take to answer before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(1);

/// Connections at once. It bounds the descriptors that readers take from
/// sessions, however many connect: the others wait in the kernel's backlog,
/// where they take none.
pub(crate) const MAX_CONNECTIONS: usize = 32;

/// How long a request may take to arrive. It bounds how long those who connect
/// and send nothing, or a byte now and then, take a descriptor.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);

/// How long one connection may last, whatever it does. It bounds those who ask
/// and don't read the answer.
const LIFETIME: Duration = Duration::from_secs(10);

/// How long whoever asks for a reload waits for its outcome: a reload may take longer
/// than a connection.
const OUTCOME: Duration = Duration::from_secs(8);

/// How long to accept nothing after that failed. It bounds the time spent on
/// trying while descriptors are short.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// How long to say nothing more of failures to accept.
const QUIET: Duration = Duration::from_secs(60);

/// Sessions on a page, unless asked for fewer; more are never returned.
const MAX_PAGE: usize = 1000;
const DEFAULT_PAGE: usize = 100;

const INDEX: &str = "ppv2-proxy admin: /metrics /healthz /readyz /upstreams /sessions?limit=N&after=CURSOR\n\
     by POST: /reload /drain?upstream=NAME&server=NAME /undrain?upstream=NAME&server=NAME\n";

/// Questions that may wait for a worker: what a handful of readers can ask at once.
/// More are turned away.
const MAX_WAITING: usize = 64;

/// A way to tell a worker something.
#[derive(Clone)]
pub struct WorkerHandle {
    commands: Sender<Command>,
    waker: Waker,
    /// Held by each question that waits.
    waiting: Arc<()>,
}

impl WorkerHandle {
    /// A way to the worker that looks at `commands` when `waker` wakes it.
    #[must_use]
    pub fn new(commands: Sender<Command>, waker: Waker) -> Self {
        Self {
            commands,
            waker,
            waiting: Arc::default(),
        }
    }

    /// Tells the worker. False if it is gone.
    #[must_use]
    pub fn tell(&self, command: Command) -> bool {
        self.commands.send(command).is_ok() && self.waker.wake().is_ok()
    }

    async fn sessions(&self, first: usize, limit: usize) -> Option<Vec<SessionReport>> {
        // Those of handles that were cloned do no harm.
        if Arc::strong_count(&self.waiting) > MAX_WAITING {
            return None;
        }
        let (reply, answer) = oneshot::channel();
        let place = Arc::clone(&self.waiting);
        let asked = self.tell(Command::Sessions {
            first,
            limit,
            reply: Box::new(move |sessions| {
                drop(place);
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
    /// What is known of the servers.
    pub health: Arc<Status>,
    /// What is known of servers that are names.
    pub names: Arc<discovery::Status>,
    /// Whether every listener takes datagrams.
    pub ready: Arc<AtomicBool>,
    /// Asks for another configuration to be taken over.
    pub reload: mpsc::Sender<ReloadRequest>,
}

/// Asks for the configuration to be read again and taken over; takes what came of
/// it, or why nothing did.
pub type ReloadRequest = oneshot::Sender<Result<String, String>>;

/// Serves `admin` on `listener` until the process ends.
pub async fn serve(listener: TcpListener, admin: Admin) {
    let routes = Router::new()
        .route("/", get(|| async { INDEX }))
        .route("/upstreams", get(upstreams))
        .route("/drain", post(drain))
        .route("/undrain", post(undrain))
        .route("/reload", post(reload))
        .route("/sessions", get(sessions))
        .layer(from_fn(refuse_names))
        // Monitors ask for these by whatever name leads here.
        .route("/metrics", get(metrics_text))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .fallback(|| async { (StatusCode::NOT_FOUND, INDEX) })
        .with_state(Arc::new(admin));
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut guests = VecDeque::<Guest>::new();
    let mut told: Option<Instant> = None;
    loop {
        guests.retain(|guest| !guest.task.is_finished());
        if places.available_permits() == 0 {
            make_room(&mut guests);
        }
        // Before accepting: an accepted connection already has its descriptor.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let asked = Arc::<AtomicBool>::default();
                let conversation = converse(stream, routes.clone(), Arc::clone(&asked));
                let task = tokio::spawn(async move {
                    conversation.await;
                    drop(place);
                });
                let task = task.abort_handle();
                guests.push_back(Guest { asked, task });
            }
            // Most often no descriptor is left, which passes.
            Err(error) => {
                if told.is_none_or(|at| at.elapsed() >= QUIET) {
                    told = Some(Instant::now());
                    tracing::warn!("the admin address can't accept a connection: {error}");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A connection that lasts.
struct Guest {
    /// Whether a whole request has come.
    asked: Arc<AtomicBool>,
    task: AbortHandle,
}

/// Ends the oldest connection that has asked nothing, if there is one.
fn make_room(guests: &mut VecDeque<Guest>) {
    let is_silent = |guest: &Guest| !guest.asked.load(Ordering::Relaxed);
    if let Some(guest) = guests.iter().position(is_silent) {
        guests.remove(guest).inspect(|guest| guest.task.abort());
    }
}

/// Answers the request of one connection, if it comes in time, and notes that it came.
async fn converse(stream: TcpStream, routes: Router, asked: Arc<AtomicBool>) {
    let routes = TowerToHyperService::new(routes);
    let answer = service_fn(move |request| {
        asked.store(true, Ordering::Relaxed);
        routes.call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        // Whoever has had an answer gives its place to others.
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    // What goes wrong with a connection is its reader's concern.
    let _ = tokio::time::timeout(LIFETIME, connection).await;
}

async fn metrics_text(State(admin): State<Arc<Admin>>, headers: HeaderMap) -> Response {
    let format = Format::accepted_by(&headers);
    let others: [Box<dyn Collector>; 2] = [
        Box::new(Arc::clone(&admin.health)),
        Box::new(Arc::clone(&admin.names)),
    ];
    match admin.metrics.text(format, others) {
        Ok(text) => ([(header::CONTENT_TYPE, format.content_type())], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn upstreams(State(admin): State<Arc<Admin>>) -> Response {
    Json(admin.health.report()).into_response()
}

/// A server, by the names that `/upstreams` shows.
#[derive(Deserialize)]
struct Named {
    upstream: String,
    server: String,
}

async fn drain(
    State(admin): State<Arc<Admin>>,
    headers: HeaderMap,
    Query(named): Query<Named>,
) -> Response {
    set_drain(&admin, &headers, &named, true)
}

async fn undrain(
    State(admin): State<Arc<Admin>>,
    headers: HeaderMap,
    Query(named): Query<Named>,
) -> Response {
    set_drain(&admin, &headers, &named, false)
}

/// Refuses who asks by a name. A page of another site could have its own name lead
/// here, and would be shown everything by its reader's browser (DNS rebinding).
async fn refuse_names(request: Request, next: Next) -> Response {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    if hosts.all(is_no_name) {
        return next.run(request).await;
    }
    let message = "ask by an IP address, or by localhost\n";
    (StatusCode::MISDIRECTED_REQUEST, message).into_response()
}

/// Whether a host, with its port or without, is an address or `localhost`.
fn is_no_name(host: &HeaderValue) -> bool {
    let Ok(authority) = Authority::try_from(host.as_bytes()) else {
        return false;
    };
    let host = authority.host().trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok()
}

/// The refusal of what a page of another site has a browser post.
fn refuse_browsers(headers: &HeaderMap) -> Option<Response> {
    let is_browser = headers.contains_key(header::ORIGIN);
    is_browser.then(|| (StatusCode::FORBIDDEN, "not from a browser\n").into_response())
}

/// Has the configuration read again. 422 says why nothing has changed.
async fn reload(State(admin): State<Arc<Admin>>, headers: HeaderMap) -> Response {
    if let Some(refusal) = refuse_browsers(&headers) {
        return refusal;
    }
    let (reply, outcome) = oneshot::channel();
    if admin.reload.try_send(reply).is_err() {
        let message = "other reloads are waiting; ask again\n";
        return (StatusCode::SERVICE_UNAVAILABLE, message).into_response();
    }
    match tokio::time::timeout(OUTCOME, outcome).await {
        Ok(Ok(Ok(done))) => format!("{done}\n").into_response(),
        Ok(Ok(Err(why))) => (StatusCode::UNPROCESSABLE_ENTITY, format!("{why}\n")).into_response(),
        Ok(Err(_)) => (StatusCode::SERVICE_UNAVAILABLE, "stopping\n").into_response(),
        Err(_) => {
            let message = "still reloading; the log will say what came of it\n";
            (StatusCode::ACCEPTED, message).into_response()
        }
    }
}

fn set_drain(admin: &Admin, headers: &HeaderMap, named: &Named, drain: bool) -> Response {
    if let Some(refusal) = refuse_browsers(headers) {
        return refusal;
    }
    let Named { upstream, server } = named;
    if admin.health.drain(upstream, server, drain) {
        return (if drain { "draining\n" } else { "serving\n" }).into_response();
    }
    let message =
        format!("there is no server `{server}` in an upstream `{upstream}`; see /upstreams\n");
    (StatusCode::NOT_FOUND, message).into_response()
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
struct SessionsPage {
    sessions: Vec<SessionEntry>,
    /// The `after` of the next page; null on the last.
    next: Option<String>,
}

#[derive(Serialize)]
struct SessionEntry {
    client: String,
    local: String,
    listener: String,
    upstream: String,
    server: String,
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
            entries.push(entry(worker, report));
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

fn entry(worker: usize, report: SessionReport) -> SessionEntry {
    SessionEntry {
        client: report.key.client.to_string(),
        local: report.key.local.to_string(),
        listener: report.listener.name.clone(),
        upstream: report.server.upstream.clone(),
        server: report.server.name.clone(),
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
    fn addresses_and_localhost_are_no_names() {
        let is_no_name = |host: &str| is_no_name(&host.parse().unwrap());
        for host in [
            "127.0.0.1",
            "192.0.2.1:9901",
            "[::1]",
            "[2001:db8::1]:9901",
            "localhost:9901",
            "LocalHost",
        ] {
            assert!(is_no_name(host), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "evil.example:9901",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "127.0.0.1@evil.example",
            "127.0.0.1:9901 evil.example",
        ] {
            assert!(!is_no_name(host), "{host}");
        }
    }

    #[test]
    fn cursors_are_read_or_refused() {
        assert_eq!(cursor(None), Some((0, 0)));
        assert_eq!(cursor(Some("3:17")), Some((3, 17)));
        for bad in ["", ":", "3", "3:", "x:1", "1:-1"] {
            assert_eq!(cursor(Some(bad)), None, "{bad}");
        }
    }
}
