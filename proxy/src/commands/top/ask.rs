//! Asks the admin API, in a thread of its own: a proxy that does not answer must not stop
//! the keys.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use super::Event;
use super::answer::{Clients, Status};
use crate::admin_client;
use crate::config::{AdminAddress, printable};

/// How long an answer may take. The proxy waits 1 s for workers that don't respond.
const TIMEOUT: Duration = Duration::from_secs(3);

/// The most bytes of an answer: a thousand listeners and a thousand servers with long names.
const MAX_ANSWER: usize = 8 << 20;

/// The most objects of an answer and the most commas, several times what a proxy sends: they
/// bound the memory of what is read from them.
const MAX_OBJECTS: usize = 20_000;
const MAX_COMMAS: usize = 500_000;

/// How many clients are asked for.
const CLIENTS: usize = 50;

/// What the screen needs besides the status.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wanted {
    /// The measure of the busiest clients, which are asked for at once.
    pub(super) clients: Option<&'static str>,
}

/// Asks at each interval, until nobody listens.
pub(super) fn ask_for_ever(
    address: &AdminAddress,
    interval: Duration,
    wanted: &Receiver<Wanted>,
    events: &SyncSender<Event>,
) {
    let mut needs = Wanted::default();
    let mut due = Instant::now();
    loop {
        let is_due = match wanted.recv_timeout(due.saturating_duration_since(Instant::now())) {
            Ok(wanted) => {
                needs = wanted;
                false
            }
            Err(RecvTimeoutError::Timeout) => true,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        // Keys may be faster than answers: the latest counts.
        needs = wanted.try_iter().last().unwrap_or(needs);
        let mut is_there = true;
        if is_due {
            let status = status(address);
            is_there = status.is_ok();
            if events.send(Event::Status(status)).is_err() {
                return;
            }
            due = (due + interval).max(Instant::now());
        }
        if let Some(measure) = needs.clients.filter(|_| is_there) {
            let clients = clients(address, measure);
            if events.send(Event::Clients(clients)).is_err() {
                return;
            }
        }
    }
}

/// What the proxy says of itself, or why it does not.
pub(super) fn status(address: &AdminAddress) -> Result<Box<Status>, String> {
    get(address, "/status", "")
}

/// The busiest clients by a measure, or why there are none.
pub(super) fn clients(address: &AdminAddress, measure: &str) -> Result<Clients, String> {
    get(address, "/clients", &format!("?top={CLIENTS}&by={measure}"))
}

fn get<T: DeserializeOwned>(address: &AdminAddress, path: &str, query: &str) -> Result<T, String> {
    let answer = admin_client::get(address, &format!("{path}{query}"), TIMEOUT, MAX_ANSWER)
        .map_err(|error| printable(&error.to_string()).into_owned())?;
    let other = "another program, or a proxy of another release?";
    let why = match answer.status {
        200 => match parse(&answer.body) {
            Some(parsed) => return Ok(parsed),
            None => format!("{address} answers nothing of use to {path}: {other}"),
        },
        404 => format!("{address} has no {path}: {other}"),
        status => format!("{address} answers {status} to {path}"),
    };
    Err(printable(&why).into_owned())
}

/// Reads an answer. Another program may have the port.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Option<T> {
    let count = |wanted: u8| body.iter().filter(|byte| **byte == wanted).count();
    let is_usual = count(b'{') <= MAX_OBJECTS && count(b',') <= MAX_COMMAS;
    is_usual.then(|| serde_json::from_slice(body).ok())?
}
