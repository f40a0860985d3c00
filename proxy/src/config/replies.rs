//! `replies`, `tag_key_file` and `sessions`: how replies find their client.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use ppv2_engine::mode::{Emit, Mode};
use ppv2_engine::server::Replies;
use ppv2_engine::tag::TagKeys;

use super::error::{Within, key_path, refuse};
use super::options::{BalanceKind, ReplyKind, Upstream};
use super::secret::Secret;
use super::values::Hex;
use super::{Config, ConfigError, Listener};

/// Bytes of a key.
const KEY_LEN: usize = 16;

/// The most bytes of a key file: a key, however it is spaced.
const MAX_KEY_FILE: u64 = 4096;

/// What a key file must be, and how to make one.
const MAKE_KEY: &str = "openssl rand -hex 16 >FILE; chmod 600 FILE";

impl Upstream {
    /// Checks `replies` and `tag_key_file`, and reads the key.
    pub(super) fn reply_paths(&self) -> Result<Replies, ConfigError> {
        let keys = match (self.replies, &self.tag_key_file) {
            (ReplyKind::Session, None) => return Ok(Replies::Session),
            (ReplyKind::Session, Some(_)) => {
                return refuse(
                    "`tag_key_file` without tags",
                    "set replies = \"auto\" or \"tagged\", or leave `tag_key_file` out",
                )
                .within(key_path!["tag_key_file"]);
            }
            (_, Some(file)) => read_key(file).within(key_path!["tag_key_file"])?,
            (_, None) => key_of_process().within(key_path!["replies"])?,
        };
        Ok(match self.replies {
            ReplyKind::Session => Replies::Session,
            ReplyKind::Auto => Replies::Auto(keys),
            ReplyKind::Tagged => Replies::Tagged(keys),
        })
    }
}

/// The key of tags where no file has one: the same for every configuration of this process,
/// so that a reload leaves replies in flight valid.
fn key_of_process() -> Result<Arc<TagKeys>, ConfigError> {
    static KEY: OnceLock<Arc<TagKeys>> = OnceLock::new();
    if let Some(key) = KEY.get() {
        return Ok(Arc::clone(key));
    }
    match TagKeys::random() {
        Ok(key) => Ok(Arc::clone(KEY.get_or_init(|| Arc::new(key)))),
        Err(error) => refuse(
            format!("there are no random numbers for the key of tags: {error}"),
            format!("name a file with a key in `tag_key_file` ({MAKE_KEY})"),
        ),
    }
}

/// Reads a key. Errors never show what is in the file.
fn read_key(file: &Path) -> Result<Arc<TagKeys>, ConfigError> {
    let name = file.display();
    let bad = |what: String, hint: String| refuse(format!("key file {name} {what}"), hint);
    let make = MAKE_KEY.replace("FILE", &name.to_string());
    let text = Secret {
        what: "key file",
        file,
        max: MAX_KEY_FILE,
        forbidden: 0o077,
        make: &make,
        leaked: "who has read the key can write to any client in the proxy's name, so make another: openssl rand -hex 16",
    };
    let text = text.read()?;
    let Ok(Hex(bytes)) = text.parse() else {
        return bad(
            "has something else than hexadecimal digits".to_owned(),
            format!("make it: {make}"),
        );
    };
    match bytes.first_chunk::<KEY_LEN>() {
        Some(key) if bytes.len() == KEY_LEN => Ok(Arc::new(TagKeys::new(*key))),
        _ => bad(
            format!("has {} hexadecimal digits", bytes.len() * 2),
            format!("a key has {}: {make}", KEY_LEN * 2),
        ),
    }
}

impl Config {
    /// Refuses tags where no header can carry them, and listeners without sessions where
    /// something depends on these.
    pub(super) fn check_replies(
        &mut self,
        listener: &Listener,
        upstream: &Upstream,
        index: usize,
    ) -> Result<(), ConfigError> {
        let name = &listener.upstream;
        if upstream.replies != ReplyKind::Session {
            let bad = listener
                .modes()
                .find(|mode| !matches!(mode, Mode::Ppv2 { emit, .. } if *emit == Emit::Every));
            if let Some(mode) = bad {
                let what = match mode {
                    Mode::Ppv2 { .. } => "header.emit = \"first\"".to_owned(),
                    Mode::Spp => "header.format = \"spp\"".to_owned(),
                    Mode::Transparent { .. } | Mode::Dsr(_) | Mode::Plain => {
                        format!("mode {}", mode.name())
                    }
                };
                return refuse(
                    format!(
                        "replies = {} with {what} (listener `{}`): a tag needs a PROXY v2 header on each datagram",
                        upstream.replies.quoted(),
                        listener.name
                    ),
                    "set mode = \"ppv2\", header.format = \"v2\" and header.emit = \"every\", or replies = \"session\"",
                )
                .within(key_path!["upstream", name.as_str(), "replies"]);
            }
            if listener.requests > 0 {
                return refuse(
                    format!(
                        "requests = {} with replies = {} in [upstream.{name}]: a tag names the client, not which of its sessions a reply belongs to",
                        listener.requests,
                        upstream.replies.quoted()
                    ),
                    format!("leave `requests` out, or set replies = \"session\" in [upstream.{name}]"),
                )
                .within(key_path!["listener", index, "requests"]);
            }
        }
        if listener.sessions.0 {
            return Ok(());
        }
        if upstream.replies != ReplyKind::Tagged {
            return refuse(
                format!(
                    "sessions = false with replies = {}: without a session, a reply finds its client by a tag alone",
                    upstream.replies.quoted()
                ),
                format!("set replies = \"tagged\" in [upstream.{name}], whose servers must then return tags"),
            )
            .within(key_path!["listener", index, "sessions"]);
        }
        let balance = match upstream.balance {
            BalanceKind::Maglev => None,
            BalanceKind::RoundRobin => Some("round_robin"),
            BalanceKind::LeastSessions => Some("least_sessions"),
            BalanceKind::RandomTwo => Some("random_two"),
        };
        if let Some(balance) = balance {
            return refuse(
                format!(
                    "sessions = false with balance = \"{balance}\" in [upstream.{name}]: without a session, each datagram of a client would go to another server"
                ),
                format!("set balance = \"maglev\" in [upstream.{name}], or leave `sessions` out"),
            )
            .within(key_path!["listener", index, "sessions"]);
        }
        // Bounds on what attackers can do must not vanish silently.
        for (is_set, key, what) in [
            (
                listener.rules().amplification.is_some(),
                "amplification",
                "`amplification` bounds the replies of a session",
            ),
            (
                listener.per_client.sessions.is_some(),
                "per_client",
                "`per_client.sessions` bounds sessions",
            ),
        ] {
            if is_set {
                return refuse(
                    format!("{what}, which sessions = false does without"),
                    "leave it out, or leave `sessions` out",
                )
                .within(key_path!["listener", index, key]);
            }
        }
        let unused = [
            (listener.responses > 0, "responses"),
            (listener.idle_timeout != Default::default(), "idle_timeout"),
            (listener.returns, "on_return"),
            (self.access_log.is_some(), "the access log"),
        ];
        let unused: Vec<_> = unused.iter().filter(|(is_set, _)| *is_set).collect();
        if !unused.is_empty() {
            let unused: Vec<_> = unused.iter().map(|(_, what)| *what).collect();
            self.warnings.push(format!(
                "listener `{}` has no sessions (sessions = false), so this doesn't apply to it: {}",
                listener.name,
                unused.join(", ")
            ));
        }
        Ok(())
    }

    /// The files with keys of tags.
    pub fn tag_key_files(&self) -> impl Iterator<Item = &Path> {
        self.key_files.iter().map(|file| &**file)
    }
}
