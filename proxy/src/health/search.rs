//! Searches of servers' answers for a regular expression, on threads of their own: a
//! server that chooses its answer with care makes one last, and the control path
//! must go on meanwhile.

use std::sync::Arc;

use regex::bytes::Regex;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};

/// Bytes of an answer that are searched. With the size that an expression may have
/// (`config`), it bounds a search, which can't be interrupted.
const SEARCHED: usize = 4096;

/// Searches at once. It bounds the processor time that servers' answers take from
/// the data path; a server has one at a time, since its probe waits for it.
const SEARCHES: usize = 2;

static PLACES: Semaphore = Semaphore::const_new(SEARCHES);

/// Whether `regex` is found in the beginning of `answer`. `None` if no search could
/// begin before `deadline`, which says nothing about the answer.
pub(super) async fn is_found(regex: &Arc<Regex>, answer: &[u8], deadline: Instant) -> Option<bool> {
    let place = timeout_at(deadline, PLACES.acquire()).await.ok()?.ok()?;
    let regex = Arc::clone(regex);
    let answer = answer[..answer.len().min(SEARCHED)].to_vec();
    let search = spawn_blocking(move || {
        let is_found = regex.is_match(&answer);
        // Not before: whoever asked may be gone.
        drop(place);
        is_found
    });
    search.await.ok()
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};
    use std::time::Duration;

    use super::*;

    /// What comes of a search of `answer` for `pattern`.
    async fn searched(pattern: &str, answer: &[u8], patience: Duration) -> Option<bool> {
        let regex = Arc::new(Regex::new(pattern).unwrap());
        is_found(&regex, answer, Instant::now() + patience).await
    }

    #[tokio::test]
    async fn searches_are_few_and_one_that_finds_no_place_says_nothing() {
        let long = Duration::from_secs(60);
        assert_eq!(searched("b$", b"ab", long).await, Some(true));
        assert_eq!(searched("b$", b"ba", long).await, Some(false));
        let all = u32::try_from(SEARCHES).unwrap();
        let taken = PLACES.acquire_many(all).await.unwrap();
        let soon = Duration::from_millis(20);
        assert_eq!(searched("b$", b"ab", soon).await, None);
        drop(taken);
        assert_eq!(searched("b$", b"ab", long).await, Some(true));
    }
    #[tokio::test]
    async fn a_long_search_lets_all_else_go_on() {
        let regex = Arc::new(Regex::new(r"([a-z]{1,100}){1,5}\W\W$").unwrap());
        let answer = [b'a'; SEARCHED];
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut search = pin!(is_found(&regex, &answer, deadline));
        let mut context = Context::from_waker(Waker::noop());
        assert!(search.as_mut().poll(&mut context).is_pending());
        assert_eq!(search.await, Some(false));
    }
}
