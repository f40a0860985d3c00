//! The admin address: health, metrics and the list of sessions over HTTP.
//!
//! It has no authentication and shows clients' addresses, so it belongs on loopback or a
//! management network. Even there, many or stuck readers must not cost sessions: the
//! number of connections is bounded, each is short, and idle ones make room for others.

mod clients;
mod listener;
mod page;
mod status;

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use axum::extract::{Query, Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use prometheus_client::collector::Collector;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::AbortHandle;

use crate::config::Token;
use crate::discovery;
use crate::health::Status;
use crate::metrics::{Format, Metrics};
use ppv2_engine::worker::{Command, SessionReport};
use ppv2_udp::Waker;

use listener::Stream;
pub use listener::{Listener, SocketFile, adopt, bind_unix, bind_unix_socket};
pub use status::Started;

/// How long a worker may take to answer before it counts as stuck.
const WORKER_TIMEOUT: Duration = Duration::from_secs(1);

/// Connections at once. It bounds the descriptors that readers take from sessions. More
/// connections wait in the kernel's backlog, where they take none.
pub(crate) const MAX_CONNECTIONS: usize = 32;

/// How long a request may take to arrive. It bounds how long a reader that sends nothing,
/// or a byte now and then, holds a descriptor.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a connection may last. It bounds readers that don't read the answer.
const LIFETIME: Duration = Duration::from_secs(10);

/// How long a request for a reload waits for the outcome. A reload may take longer than
/// a connection may last.
const RELOAD_TIMEOUT: Duration = Duration::from_secs(8);

/// How long to wait after accepting failed. It bounds the attempts while no descriptor is
/// left.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// The time between two warnings of failures to accept.
const WARNING_PAUSE: Duration = Duration::from_secs(60);

/// The most sessions on a page, and the number unless the request names one.
const MAX_PAGE: usize = 1000;
const DEFAULT_PAGE: usize = 100;

const INDEX: &str = "ppv2-proxy admin: /metrics /healthz /readyz /status /upstreams /sessions?limit=N&after=CURSOR /clients?top=N&by=MEASURE\n\
     by POST: /reload /drain?upstream=NAME&server=NAME /undrain?upstream=NAME&server=NAME\n";

/// Requests that may wait for a worker. More are refused.
const MAX_WAITING: usize = 64;

/// Sends commands to a worker.
#[derive(Clone)]
pub struct WorkerHandle {
    commands: Sender<Command>,
    waker: Waker,
    /// Cloned for each request that waits.
    waiting: Arc<()>,
}

impl WorkerHandle {
    /// For the worker that reads `commands` when `waker` wakes it.
    #[must_use]
    pub fn new(commands: Sender<Command>, waker: Waker) -> Self {
        Self {
            commands,
            waker,
            waiting: Arc::default(),
        }
    }

    /// Sends a command. False if the worker is gone.
    #[must_use]
    pub fn tell(&self, command: Command) -> bool {
        self.commands.send(command).is_ok() && self.waker.wake().is_ok()
    }

    async fn sessions(&self, first: usize, limit: usize) -> Option<Vec<SessionReport>> {
        self.ask(first, limit).await.ok()
    }

    /// Whether the worker has not answered in time. One that has ended is told of elsewhere.
    pub async fn is_stuck(&self) -> bool {
        matches!(self.ask(0, 0).await, Err(NoAnswer::Stuck))
    }

    async fn ask(&self, first: usize, limit: usize) -> Result<Vec<SessionReport>, NoAnswer> {
        self.ask_by(|reply| Command::Sessions {
            first,
            limit,
            reply,
        })
        .await
    }

    /// What the worker says to a command, which has it call a function with that.
    async fn ask_by<T: Send + 'static>(
        &self,
        command: impl FnOnce(Box<dyn FnOnce(T) + Send>) -> Command,
    ) -> Result<T, NoAnswer> {
        // Clones of the handle count, too, and are few.
        if Arc::strong_count(&self.waiting) > MAX_WAITING {
            return Err(NoAnswer::Stuck);
        }
        let (reply, answer) = oneshot::channel();
        let waiting = Arc::clone(&self.waiting);
        let asked = self.tell(command(Box::new(move |said| {
            drop(waiting);
            // The request may have been given up.
            let _ = reply.send(said);
        })));
        if !asked {
            return Err(NoAnswer::Ended);
        }
        match tokio::time::timeout(WORKER_TIMEOUT, answer).await {
            Ok(answer) => answer.map_err(|_| NoAnswer::Ended),
            Err(_) => Err(NoAnswer::Stuck),
        }
    }
}

/// Why a worker does not answer.
enum NoAnswer {
    /// It has not within [`WORKER_TIMEOUT`], and others may wait already.
    Stuck,
    /// Its thread has ended.
    Ended,
}

/// What the admin address shows.
pub struct Admin {
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// The workers, by number.
    pub workers: Vec<WorkerHandle>,
    /// The status of servers.
    pub health: Arc<Status>,
    /// The status of DNS names.
    pub names: Arc<discovery::Status>,
    /// Whether every listener takes datagrams.
    pub ready: Arc<AtomicBool>,
    /// When the proxy began.
    pub started: Started,
    /// Takes requests for a reload.
    pub reload: mpsc::Sender<ReloadRequest>,
    /// What requests that change something must carry, if anything.
    pub(crate) token: Option<Token>,
}

/// A request to read the configuration again and apply it. It gets a summary, or why
/// nothing was applied.
pub type ReloadRequest = oneshot::Sender<Result<String, String>>;

/// Serves `admin` on `listener` until the process ends.
pub async fn serve(listener: Listener, admin: Admin) {
    let admin = Arc::new(admin);
    let routes = Router::new()
        .route("/drain", post(drain))
        .route("/undrain", post(undrain))
        .route("/reload", post(reload))
        .route_layer(from_fn_with_state(Arc::clone(&admin), refuse_strangers))
        .merge(page::routes(INDEX))
        .route("/status", get(status::status))
        .route("/upstreams", get(upstreams))
        .route("/sessions", get(sessions))
        .route("/clients", get(clients::clients))
        .layer(from_fn(refuse_names))
        // Monitors may use any name of this host for these.
        .route("/metrics", get(metrics_text))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .fallback(|| async { (StatusCode::NOT_FOUND, INDEX) })
        .layer(from_fn(page::protect))
        .with_state(admin);
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = VecDeque::<Connection>::new();
    let mut warned: Option<Instant> = None;
    loop {
        connections.retain(|connection| !connection.task.is_finished());
        if permits.available_permits() == 0 {
            make_room(&mut connections);
        }
        // Before accepting: an accepted connection already has its descriptor.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok(stream) => {
                let has_request = Arc::<AtomicBool>::default();
                let answered = answer(stream, routes.clone(), Arc::clone(&has_request));
                let task = tokio::spawn(async move {
                    answered.await;
                    drop(permit);
                });
                let task = task.abort_handle();
                connections.push_back(Connection { has_request, task });
            }
            // Usually no descriptor is left for the moment.
            Err(error) => {
                if warned.is_none_or(|at| at.elapsed() >= WARNING_PAUSE) {
                    warned = Some(Instant::now());
                    tracing::warn!("the admin address can't accept a connection: {error}");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// An open connection.
struct Connection {
    /// Whether a whole request has arrived.
    has_request: Arc<AtomicBool>,
    task: AbortHandle,
}

/// Closes the oldest connection without a request, if there is one.
fn make_room(connections: &mut VecDeque<Connection>) {
    let is_idle = |one: &Connection| !one.has_request.load(Ordering::Relaxed);
    if let Some(idle) = connections.iter().position(is_idle) {
        connections.remove(idle).inspect(|idle| idle.task.abort());
    }
}

/// Answers the request of one connection if it arrives in time, and notes that it did.
async fn answer(stream: Box<dyn Stream>, routes: Router, has_request: Arc<AtomicBool>) {
    let routes = TowerToHyperService::new(routes);
    let service = service_fn(move |request| {
        has_request.store(true, Ordering::Relaxed);
        routes.call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        // An answered connection makes room for others.
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // Errors of a connection concern only its reader.
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

/// Refuses requests whose `Host` is a name. A web page could make its own name resolve to
/// this address and read everything through its reader's browser (DNS rebinding).
async fn refuse_names(request: Request, next: Next) -> Response {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    if hosts.all(is_no_name) {
        return next.run(request).await;
    }
    let message = "use an IP address or localhost as the host\n";
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

/// Refuses requests without the token, if there is one (RFC 6750, section 2.1).
async fn refuse_strangers(
    State(admin): State<Arc<Admin>>,
    request: Request,
    next: Next,
) -> Response {
    let Some(token) = &admin.token else {
        return next.run(request).await;
    };
    let given = request.headers().get(header::AUTHORIZATION);
    let given = given.map(HeaderValue::as_bytes).and_then(bearer);
    if given.is_some_and(|given| token.is(given)) {
        return next.run(request).await;
    }
    let message = "this needs the header \"Authorization: Bearer TOKEN\", with the token of admin.token_file\n";
    let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
    (StatusCode::UNAUTHORIZED, challenge, message).into_response()
}

/// The token of `Bearer TOKEN`.
fn bearer(credentials: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = credentials.split_at_checked("Bearer ".len())?;
    scheme
        .eq_ignore_ascii_case(b"Bearer ")
        .then(|| token.trim_ascii())
}

/// Refuses what a web page makes a browser post. Browsers tell one or the other.
fn refuse_browsers(headers: &HeaderMap) -> Option<Response> {
    let is_browser = headers.contains_key(header::ORIGIN) || headers.contains_key("sec-fetch-site");
    is_browser.then(|| (StatusCode::FORBIDDEN, "not from a browser\n").into_response())
}

/// Reloads the configuration. 422 says why nothing has changed.
async fn reload(State(admin): State<Arc<Admin>>, headers: HeaderMap) -> Response {
    if let Some(refusal) = refuse_browsers(&headers) {
        return refusal;
    }
    let (reply, outcome) = oneshot::channel();
    if admin.reload.try_send(reply).is_err() {
        let message = "other reloads are waiting; try again\n";
        return (StatusCode::SERVICE_UNAVAILABLE, message).into_response();
    }
    match tokio::time::timeout(RELOAD_TIMEOUT, outcome).await {
        Ok(Ok(Ok(done))) => format!("{done}\n").into_response(),
        Ok(Ok(Err(why))) => (StatusCode::UNPROCESSABLE_ENTITY, format!("{why}\n")).into_response(),
        Ok(Err(_)) => (StatusCode::SERVICE_UNAVAILABLE, "stopping\n").into_response(),
        Err(_) => {
            let message = "still reloading; the log will have the outcome\n";
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

/// Every worker answers.
async fn healthz(State(admin): State<Arc<Admin>>) -> Response {
    for (number, worker) in admin.workers.iter().enumerate() {
        if worker.sessions(0, 0).await.is_none() {
            let message = format!("worker {number} does not answer\n");
            return (StatusCode::SERVICE_UNAVAILABLE, message).into_response();
        }
    }
    "ok\n".into_response()
}

/// Every listener takes datagrams, and the proxy is not stopping.
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
    proxy: Option<String>,
    listener: String,
    upstream: String,
    server: String,
    worker: usize,
    age_seconds: f64,
    idle_seconds: f64,
    requests: u64,
    replies: u64,
    /// The id of the session in its headers, if they carry one.
    unique_id: Option<String>,
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

/// Parses `worker:session`; the start if there is nothing to parse.
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
        proxy: report.proxy.map(|proxy| proxy.to_string()),
        listener: report.listener.name.clone(),
        upstream: report.server.upstream.clone(),
        server: report.server.name.clone(),
        worker,
        age_seconds: report.age.as_secs_f64(),
        idle_seconds: report.idle.as_secs_f64(),
        requests: report.requests,
        replies: report.replies,
        unique_id: report.unique_id.map(|id| id.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_localhost_are_not_names() {
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
    fn bearer_tokens_are_read() {
        for (credentials, token) in [
            ("Bearer abc", Some("abc")),
            ("bearer  abc ", Some("abc")),
            ("Bearer ", Some("")),
            ("Bearer", None),
            ("Basic abc", None),
            ("abc", None),
            ("", None),
        ] {
            let read = bearer(credentials.as_bytes());
            assert_eq!(read, token.map(str::as_bytes), "{credentials}");
        }
    }

    #[test]
    fn cursors_are_parsed_or_refused() {
        assert_eq!(cursor(None), Some((0, 0)));
        assert_eq!(cursor(Some("3:17")), Some((3, 17)));
        for bad in ["", ":", "3", "3:", "x:1", "1:-1"] {
            assert_eq!(cursor(Some(bad)), None, "{bad}");
        }
    }
}
