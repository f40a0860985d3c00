//! What is wrong with a configuration, shown where it stands.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use serde::de;
use toml::de::{DeTable, DeValue};

/// A configuration that can't be used: where, why, and what to write instead.
#[derive(Debug)]
pub struct ConfigError {
    /// The keys that lead to the value, from the top of the file.
    path: Vec<Step>,
    place: Option<Box<Place>>,
    message: String,
    /// Empty for none.
    hint: String,
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

/// An error: what is wrong, and what to write instead.
pub(crate) fn refuse<T>(
    message: impl Into<String>,
    hint: impl Into<String>,
) -> Result<T, ConfigError> {
    Err(ConfigError::new(message).hint(hint))
}

/// Puts an error at a value: the one that `path` leads to, or what that stands in if it
/// is not written. The path that the error has already begins there.
pub(crate) trait Within {
    fn within(self, path: Vec<Step>) -> Self;
}

impl<T> Within for Result<T, ConfigError> {
    fn within(self, path: Vec<Step>) -> Self {
        self.map_err(|mut error| {
            error.path.splice(0..0, path);
            error
        })
    }
}

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
        "remove the key: a network in `source` gives each session an address instead, as in source = [\"127.64.0.0/10\"]",
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
            hint: String::new(),
        }
    }

    /// What to write instead.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// As an error of serde, which knows the place. [`of_toml`](Self::of_toml) reads it.
    pub(crate) fn into_serde<E: de::Error>(self) -> E {
        let [message, hint] = [&self.message, &self.hint].map(|text| printable(text));
        E::custom(format!("{message}\n{hint}"))
    }

    /// Shows the error in the file that it was found in, by its path.
    pub(crate) fn located(self, file: &str, content: &str) -> Self {
        let (span, _) = span_of(content, &self.path);
        self.shown(file, content, span)
    }

    /// Shows the error at the bytes `span` of a file.
    fn shown(mut self, file: &str, content: &str, span: Range<usize>) -> Self {
        let start = floor_char_boundary(content, span.start);
        let end = floor_char_boundary(content, span.end.max(start));
        let line_start = content[..start]
            .rfind('\n')
            .map_or(0, |newline| newline + 1);
        let line_of = |text: &str| text.lines().next().unwrap_or_default().to_owned();
        self.place = Some(Box::new(Place {
            file: file.to_owned(),
            line: content[..start].matches('\n').count() + 1,
            column: content[line_start..start].chars().count() + 1,
            text: line_of(&content[line_start..]),
            width: line_of(&content[start..end]).chars().count().max(1),
        }));
        self
    }

    /// Turns what the TOML parser and serde say into our words, with the nearest known
    /// key or value for one that is unknown.
    pub(crate) fn of_toml(error: &toml::de::Error, file: &str, content: &str) -> Self {
        let text = error.message().trim().trim_end_matches('.');
        let Some(mut span) = error.span() else {
            return Self::new(format!("{file}: {text}"));
        };
        if let Some((key, known)) = unknown(text, "field") {
            return Self::unknown_key(key, &known, &content[span.clone()])
                .shown(file, content, span);
        }
        let keys = keys_of(error);
        let (message, hint) = match (text.split_once('\n'), unknown(text, "variant")) {
            (Some((message, hint)), _) => (message.to_owned(), hint.to_owned()),
            (None, Some((value, known))) => {
                let near = nearest(value, known.iter().copied());
                let near = near.map_or_else(String::new, |near| format!("did you mean `{near}`? "));
                let hint = format!("{near}known values: {}", known.join(", "));
                (format!("`{value}` is not known"), hint)
            }
            _ if text == "invalid socket address syntax" => (
                "this is not an IP address with a port".to_owned(),
                "write it as 192.0.2.1:53, [2001:db8::1]:53, 0.0.0.0:53 or [::]:53".to_owned(),
            ),
            _ if text == "invalid IP address syntax" => (
                "this is not an IP address".to_owned(),
                "write an address without a port".to_owned(),
            ),
            _ => (text.to_owned(), String::new()),
        };
        // An error of a whole table that begins with one of its keys is at that key.
        if let Some((key, _)) = text.strip_prefix('`').and_then(|rest| rest.split_once('`'))
            && let path = keys
                .split('.')
                .chain([key])
                .map(Step::from)
                .collect::<Vec<_>>()
            && let (of_key, true) = span_of(content, &path)
        {
            span = of_key;
        }
        let colon = if keys.is_empty() { "" } else { ": " };
        Self::new(format!("{keys}{colon}{message}"))
            .hint(hint)
            .shown(file, content, span)
    }

    /// `written` is the key as the file has it: one in quotes may hold anything.
    fn unknown_key(key: &str, known: &[&str], written: &str) -> Self {
        let shown = match written.starts_with(['"', '\'']) {
            true => written.to_owned(),
            false => format!("`{key}`"),
        };
        if let Some((_, instead)) = FORMER_KEYS.iter().find(|(former, _)| *former == key) {
            return Self::new(format!("{shown} no longer exists")).hint(*instead);
        }
        let hint = match nearest(key, known.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("known keys here: {}", known.join(", ")),
        };
        Self::new(format!("unknown key {shown}")).hint(hint)
    }
}

/// The keys that lead to an error's value, with dots between. The library tells them
/// only in the text of an error without input.
fn keys_of(error: &toml::de::Error) -> String {
    let mut error = error.clone();
    error.set_input(None);
    let text = error.to_string();
    let keys = text.rsplit_once("\nin `").map(|(_, keys)| keys.trim_end());
    keys.unwrap_or_default().trim_end_matches('`').to_owned()
}

/// Where the value is that `path` leads to, or the last that it leads to, and whether it
/// leads to its end.
fn span_of(content: &str, path: &[Step]) -> (Range<usize>, bool) {
    let Ok(root) = DeTable::parse(content) else {
        return (0..0, false);
    };
    let (mut span, mut value) = (0..0, DeValue::Table(root.into_inner()));
    for step in path {
        let next = match (step, value) {
            (Step::Key(key), DeValue::Table(table)) => {
                let mut all = table.into_iter();
                all.find(|(own, _)| own.get_ref() == key)
                    .map(|(_, next)| next)
            }
            (Step::Index(index), DeValue::Array(array)) => array.into_iter().nth(*index),
            _ => None,
        };
        let Some(next) = next else {
            return (span, false);
        };
        (span, value) = (next.span(), next.into_inner());
    }
    (span, true)
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
        if !self.hint.is_empty() {
            let separator = if self.place.is_some() { "\n  = " } else { "; " };
            write!(f, "{separator}{}", printable(&self.hint))?;
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

/// `text` for a terminal or a log, with hidden characters escaped.
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
