//! The UDP check: sends one datagram from a socket of its own and judges the answers.

use std::io;
use std::sync::Arc;

use regex::bytes::Regex;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};

use super::check::{HealthCheck, Outcome, Reads, Target, header_of_own, own};
use crate::config::{Expect, Header};

/// Answers that one check reads. It bounds the work that a server causes which answers
/// one datagram with hundreds.
const MAX_ANSWERS: usize = 16;

/// Bytes of an answer that are searched. With the size limit on expressions (`config`),
/// it bounds a search, which can't be interrupted.
const SEARCHED: usize = 4096;

/// Searches at once. It bounds the processor time that servers' answers take from the
/// data path.
const MAX_SEARCHES: usize = 2;

static SEARCHES: Semaphore = Semaphore::const_new(MAX_SEARCHES);

pub(super) struct Udp {
    pub(super) target: Target,
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
    pub(super) expect: Expect,
}

impl HealthCheck for Udp {
    async fn check(&mut self, deadline: Instant) -> Outcome {
        let wanted = Wanted::Expected(&self.expect);
        let question = (self.header, &self.payload[..]);
        exchange(&self.target, question, wanted, deadline).await
    }
}

/// The answer that passes.
pub(super) enum Wanted<'a> {
    Expected(&'a Expect),
    Matching(&'a (dyn Fn(&[u8]) -> bool + Sync)),
}

impl Wanted<'_> {
    /// Whether `answer` passes. `None` if this host could not find out by `deadline`.
    async fn is(&self, answer: &[u8], deadline: Instant) -> Option<bool> {
        match self {
            Self::Expected(Expect::Any | Expect::Silence) => Some(true),
            Self::Expected(Expect::Bytes(bytes)) => Some(answer == bytes),
            Self::Expected(Expect::Matching(regex)) => is_found(regex, answer, deadline).await,
            Self::Matching(is_right) => Some(is_right(answer)),
        }
    }
}

/// Sends a payload behind what `header` says, and waits for the wanted answer.
pub(super) async fn exchange(
    target: &Target,
    (header, payload): (Header, &[u8]),
    wanted: Wanted<'_>,
    deadline: Instant,
) -> Outcome {
    let (socket, sent) = match ask(target, header, payload).await {
        Ok(asked) => asked,
        Err(error) => return Outcome::of(&error),
    };
    let is_silence_fine = matches!(wanted, Wanted::Expected(Expect::Silence));
    let mut outcome = match is_silence_fine {
        true => Outcome::Passed,
        false => Outcome::Timeout,
    };
    // Without it, clients would not get the server's replies either.
    let returned = match target.reads {
        Reads::Spp if header == Header::Auto && !is_silence_fine => &sent[..],
        Reads::Spp | Reads::V2 | Reads::Payload => &[],
    };
    let mut answer = vec![0; 65_536];
    for _ in 0..MAX_ANSWERS {
        let len = match timeout_at(deadline, socket.recv(&mut answer)).await {
            Err(_) => break,
            Ok(Ok(len)) => len,
            // An answer that follows proves the error forged.
            Ok(Err(error)) => {
                outcome = Outcome::of_sent(&error).unwrap_or(outcome);
                continue;
            }
        };
        let is_right = match answer[..len].strip_prefix(returned) {
            Some(answer) => wanted.is(answer, deadline).await,
            None => Some(false),
        };
        match is_right {
            Some(true) => return Outcome::Passed,
            Some(false) => outcome = Outcome::WrongAnswer,
            None => return Outcome::Unknown,
        }
        // A full receive buffer must not prolong the check.
        if Instant::now() >= deadline {
            break;
        }
    }
    outcome
}

/// Sends a payload by a socket of its own. Returns the header in front of it, too.
async fn ask(target: &Target, header: Header, payload: &[u8]) -> io::Result<(UdpSocket, Vec<u8>)> {
    let domain = Domain::for_address(target.address);
    let socket = Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    target.bind(&socket).map_err(own)?;
    let socket = UdpSocket::from_std(socket.into())?;
    socket.connect(target.address).await?;
    let header = header_of_own(header, target.reads, socket.local_addr()?, target.address);
    socket.send(&[&header, payload].concat()).await?;
    Ok((socket, header))
}

/// Whether `regex` is found at the beginning of `answer`. The search runs on a thread of
/// its own, since a hostile server can make it last. `None` if no search could begin
/// before `deadline`, which says nothing about the answer.
async fn is_found(regex: &Arc<Regex>, answer: &[u8], deadline: Instant) -> Option<bool> {
    let permit = timeout_at(deadline, SEARCHES.acquire()).await.ok()?.ok()?;
    let regex = Arc::clone(regex);
    let answer = answer[..answer.len().min(SEARCHED)].to_vec();
    let search = spawn_blocking(move || {
        let is_found = regex.is_match(&answer);
        // Only now: the check may have been dropped meanwhile.
        drop(permit);
        is_found
    });
    search.await.ok()
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};
    use std::time::Duration;

    use super::*;

    /// What comes of a search of `answer` for `pattern`.
    async fn searched(pattern: &str, answer: &[u8], patience: Duration) -> Option<bool> {
        let regex = Arc::new(Regex::new(pattern).unwrap());
        is_found(&regex, answer, Instant::now() + patience).await
    }

    #[tokio::test]
    async fn searches_are_bounded_and_one_without_a_permit_says_nothing() {
        let long = Duration::from_secs(60);
        assert_eq!(searched("b$", b"ab", long).await, Some(true));
        assert_eq!(searched("b$", b"ba", long).await, Some(false));
        let all = u32::try_from(MAX_SEARCHES).unwrap();
        let taken = SEARCHES.acquire_many(all).await.unwrap();
        let soon = Duration::from_millis(20);
        assert_eq!(searched("b$", b"ab", soon).await, None);
        drop(taken);
        assert_eq!(searched("b$", b"ab", long).await, Some(true));
    }

    #[tokio::test]
    async fn a_long_search_blocks_nothing_else() {
        let regex = Arc::new(Regex::new(r"([a-z]{1,100}){1,5}\W\W$").unwrap());
        let answer = [b'a'; SEARCHED];
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut context = Context::from_waker(Waker::noop());
        let mut has_waited = false;
        // On a busy machine, one may be done before it is looked at.
        for _ in 0..20 {
            let mut search = pin!(is_found(&regex, &answer, deadline));
            let first = search.as_mut().poll(&mut context);
            has_waited |= first.is_pending();
            let found = match first {
                Poll::Ready(found) => found,
                Poll::Pending => search.await,
            };
            assert_eq!(found, Some(false));
        }
        assert!(has_waited);
    }
}
