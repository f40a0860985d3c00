//! What is wrong with a configuration, shown where it stands.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use serde::de;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A configuration that can't be used: where, why, and what to write instead.
#[derive(Debug)]
pub struct ConfigError {
    /// The keys that lead to the value, from the top of the file.
    path: Vec<Step>,
    place: Option<Box<Place>>,
    message: String,
    hint: Option<String>,
}

/// A step from a table or an array to one of its values.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Key(String),
    Index(usize),
}

impl From<&str> for Step {
    fn from(key: &str) -> Self {
        Self::Key(key.to_owned())
    }
}

impl From<usize> for Step {
    fn from(index: usize) -> Self {
        Self::Index(index)
    }
}

/// The way to a value: `key_path!["listener", 0, "bind"]`.
macro_rules! key_path {
    ($($step:expr),* $(,)?) => {
        vec![$($crate::config::error::Step::from($step)),*]
    };
}
pub(crate) use key_path;

/// Where an error is in the file.
#[derive(Debug)]
struct Place {
    file: String,
    line: usize,
    column: usize,
    text: String,
    width: usize,
}

/// Keys that exist no longer, with what to write instead.
const FORMER_KEYS: [(&str, &str); 6] = [
    ("df", "write `dont_fragment`"),
    ("jitter", "write `jitter_percent`"),
    ("unanswered", "write `unanswered_percent`"),
    ("at_least", "write `min_datagrams`"),
    ("answer", "write `expect_reply`"),
    (
        "share_sockets",
        "remove the key: source networks and tagged replies, coming next, replace it; until then, add addresses to `source` for more sessions",
    ),
];

/// The most characters of a line or a message that are shown.
const LONGEST: usize = 1000;

impl Place {
    /// Whether the line is worth showing: the file may be a binary.
    fn is_printable(&self) -> bool {
        let is_odd = |c: char| is_hidden(c) && c != '\t';
        self.text.chars().nth(LONGEST).is_none() && !self.text.contains(is_odd)
    }
}

impl ConfigError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            path: Vec::new(),
            place: None,
            message: message.into(),
            hint: None,
        }
    }

    /// What to write instead.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// At the value that `path` leads to; at what it stands in if it is not written.
    pub(crate) fn at(mut self, path: Vec<Step>) -> Self {
        self.path = path;
        self
    }

    /// The path of the error begins at what `path` leads to.
    pub(crate) fn within(mut self, path: Vec<Step>) -> Self {
        self.path.splice(0..0, path);
        self
    }

    /// As an error of serde, which knows the place. [`of_toml`](Self::of_toml) reads it.
    pub(crate) fn into_serde<E: de::Error>(self) -> E {
        let hint = self.hint.unwrap_or_default();
        E::custom(format!(
            "{}\n{}",
            printable(&self.message),
            printable(&hint)
        ))
    }

    /// Shows the error in the file that it was found in, by its path.
    pub(crate) fn located(self, file: &str, content: &str) -> Self {
        let Ok(root) = DeTable::parse(content) else {
            return self;
        };
        let mut span = 0..0;
        let mut value = None;
        for step in &self.path {
            let next = match (step, value.map(Spanned::get_ref)) {
                (Step::Key(key), None) => get(root.get_ref(), key),
                (Step::Key(key), Some(DeValue::Table(table))) => get(table, key),
                (Step::Index(index), Some(DeValue::Array(array))) => array.get(*index),
                _ => None,
            };
            let Some(next) = next else {
                break;
            };
            (span, value) = (next.span(), Some(next));
        }
        self.shown(file, content, span)
    }

    /// Shows the error at the bytes `span` of a file.
    fn shown(mut self, file: &str, content: &str, span: Range<usize>) -> Self {
        let start = floor_char_boundary(content, span.start);
        let before = &content[..start];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let rest = &content[line_start..];
        let text = rest.lines().next().unwrap_or_default().to_owned();
        let column = content[line_start..start].chars().count();
        let end = floor_char_boundary(content, span.end.max(start));
        let marked = content[start..end].lines().next().unwrap_or_default();
        self.place = Some(Box::new(Place {
            file: file.to_owned(),
            line: before.matches('\n').count() + 1,
            column: column + 1,
            text,
            width: marked.chars().count().max(1),
        }));
        self
    }

    /// Turns what the TOML parser and serde say into our words, with the nearest known
    /// key or value for one that is unknown.
    pub(crate) fn of_toml(error: &toml::de::Error, file: &str, content: &str) -> Self {
        let message = error.message().trim().trim_end_matches('.');
        let Some(mut span) = error.span() else {
            return Self::new(format!("{file}: {message}"));
        };
        if let Some((key, known)) = unknown(message, "field") {
            // As it is written: a key in quotes may hold anything.
            let written = content.get(span.clone()).unwrap_or_default();
            let shown = match written.starts_with(['"', '\'']) {
                true => written.to_owned(),
                false => format!("`{key}`"),
            };
            let error = match FORMER_KEYS.iter().find(|(former, _)| *former == key) {
                Some((_, instead)) => Self::new(format!("{shown} no longer exists")).hint(*instead),
                None => Self::new(format!("unknown key {shown}")).hint(
                    match nearest(key, known.iter().copied()) {
                        Some(near) => format!("did you mean `{near}`?"),
                        None => format!("known keys here: {}", known.join(", ")),
                    },
                ),
            };
            return error.shown(file, content, span);
        }
        let root = DeTable::parse(content).ok();
        let at = root.and_then(|root| find(&DeValue::Table(root.into_inner()), &span, message));
        let mut keys = String::new();
        if let Some((path, key)) = at {
            keys = path;
            span = key.unwrap_or(span);
        }
        let (message, hint) = match message.split_once('\n') {
            Some((message, hint)) => (message.to_owned(), hint.to_owned()),
            None => match unknown(message, "variant") {
                Some((value, known)) => {
                    let all = format!("known values: {}", known.join(", "));
                    let hint = match nearest(value, known.iter().copied()) {
                        Some(near) => format!("did you mean `{near}`? {all}"),
                        None => all,
                    };
                    (format!("`{value}` is not known"), hint)
                }
                None if message == "invalid socket address syntax" => (
                    "this is not an IP address with a port".to_owned(),
                    "write it as 192.0.2.1:53, [2001:db8::1]:53, 0.0.0.0:53 or [::]:53".to_owned(),
                ),
                None if message == "invalid IP address syntax" => (
                    "this is not an IP address".to_owned(),
                    "write an address without a port".to_owned(),
                ),
                None => (message.to_owned(), String::new()),
            },
        };
        let ours = Self::new(match keys.as_str() {
            "" => message,
            keys => format!("{keys}: {message}"),
        });
        match hint.is_empty() {
            true => ours,
            false => ours.hint(hint),
        }
        .shown(file, content, span)
    }
}

fn get<'t, 'i>(table: &'t DeTable<'i>, key: &str) -> Option<&'t Spanned<DeValue<'i>>> {
    table
        .iter()
        .find(|(own, _)| own.get_ref() == key)
        .map(|(_, value)| value)
}

/// The keys that lead to the value at `span`, with dots between, and the place of the
/// value of the key that `message` begins with, if it is a table that has one.
fn find(
    value: &DeValue<'_>,
    span: &Range<usize>,
    message: &str,
) -> Option<(String, Option<Range<usize>>)> {
    let within = |inner: &Spanned<DeValue<'_>>| -> Option<_> {
        if inner.span() != *span {
            return find(inner.get_ref(), span, message);
        }
        let key = message
            .strip_prefix('`')
            .and_then(|rest| rest.split_once('`'));
        let named = inner
            .get_ref()
            .as_table()
            .zip(key)
            .and_then(|(table, (key, _))| get(table, key));
        Some((String::new(), named.map(Spanned::span)))
    };
    if let Some(table) = value.as_table() {
        return table.iter().find_map(|(key, inner)| {
            let (keys, named) = within(inner)?;
            let dot = if keys.is_empty() { "" } else { "." };
            Some((format!("{}{dot}{keys}", key.get_ref()), named))
        });
    }
    value.as_array()?.iter().find_map(within)
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            let file = printable(&place.file);
            write!(f, "{file}:{}:{}: ", place.line, place.column)?;
        }
        match self.message.char_indices().nth(LONGEST) {
            Some((end, _)) => write!(f, "{}…", printable(&self.message[..end]))?,
            None => f.write_str(&printable(&self.message))?,
        }
        if let Some(place) = self.place.as_ref().filter(|place| place.is_printable()) {
            let number = place.line.to_string();
            let margin = " ".repeat(number.len());
            let indent = " ".repeat(place.column - 1);
            let carets = "^".repeat(place.width);
            write!(f, "\n {margin} |\n {number} | {}", place.text)?;
            write!(f, "\n {margin} | {indent}{carets}")?;
        }
        if let Some(hint) = &self.hint {
            let separator = if self.place.is_some() { "\n  = " } else { "; " };
            write!(f, "{separator}{}", printable(hint))?;
        }
        Ok(())
    }
}

/// Whether a character acts on a terminal or a log: controls, marks of direction, and
/// characters without width.
pub(crate) fn is_hidden(c: char) -> bool {
    let is_format = matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    c.is_control() || is_format
}

/// `text` for a terminal or a log, with [hidden](is_hidden) characters escaped.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match is_hidden(c) {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    Cow::Owned(shown)
}

/// Of `known`, the word that `word` was probably meant to be.
pub(crate) fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= candidate.len().max(word.len()) / 2)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Reads serde's wording for an unknown key or value: it, and the known ones. It may
/// have backticks of its own, known ones have none.
fn unknown<'m>(message: &'m str, what: &str) -> Option<(&'m str, Vec<&'m str>)> {
    let rest = message
        .strip_prefix("unknown ")?
        .strip_prefix(what)?
        .strip_prefix(" `")?;
    let (word, known) = rest.rsplit_once("`, expected ")?;
    Some((word, known.split('`').skip(1).step_by(2).collect()))
}

fn floor_char_boundary(text: &str, index: usize) -> usize {
    let index = index.min(text.len());
    (0..=index)
        .rev()
        .find(|index| text.is_char_boundary(*index))
        .unwrap_or(0)
}
