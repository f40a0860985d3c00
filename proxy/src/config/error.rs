//! What is wrong with a configuration, shown where it stands.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

/// A configuration that can't be used, with the place and the mend.
#[derive(Debug)]
pub struct ConfigError {
    place: Option<Place>,
    message: String,
    mend: Option<String>,
}

#[derive(Debug)]
struct Place {
    file: String,
    line: usize,
    column: usize,
    text: String,
    width: usize,
}

/// The most characters of a line or a message that are shown.
const LONGEST: usize = 1000;

impl Place {
    /// Whether the line is worth showing: somebody may have named a file that is none
    /// of ours.
    fn is_printable(&self) -> bool {
        let is_odd = |c: char| is_hidden(c) && c != '\t';
        self.text.chars().nth(LONGEST).is_none() && !self.text.contains(is_odd)
    }
}

impl ConfigError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            place: None,
            message: message.into(),
            mend: None,
        }
    }

    pub(crate) fn mend(mut self, mend: impl Into<String>) -> Self {
        self.mend = Some(mend.into());
        self
    }

    /// Shows the error at the bytes `span` of a file.
    pub(crate) fn at(mut self, file: &str, content: &str, span: Range<usize>) -> Self {
        let start = floor_char_boundary(content, span.start);
        let before = &content[..start];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let rest = &content[line_start..];
        let text = rest.lines().next().unwrap_or_default().to_owned();
        let column = content[line_start..start].chars().count();
        let end = floor_char_boundary(content, span.end.max(start));
        let marked = content[start..end].lines().next().unwrap_or_default();
        self.place = Some(Place {
            file: file.to_owned(),
            line: before.matches('\n').count() + 1,
            column: column + 1,
            text,
            width: marked.chars().count().max(1),
        });
        self
    }

    /// Turns what the TOML parser says into our words, with the nearest known
    /// key for one that is unknown.
    pub(crate) fn of_toml(error: &toml::de::Error, file: &str, content: &str) -> Self {
        let message = error.message().trim().trim_end_matches('.');
        let ours = match unknown_key(message) {
            Some((key, known)) => {
                let nearest = nearest(key, known.iter().copied());
                let mend = match nearest {
                    Some(nearest) => format!("did you mean `{nearest}`?"),
                    None => format!("known keys here: {}", known.join(", ")),
                };
                // As it is written, for a key in quotes may hold anything.
                let written = error.span().and_then(|span| content.get(span));
                let written = written.filter(|text| text.starts_with(['"', '\'']));
                match written {
                    Some(written) => Self::new(format!("unknown key {written}")).mend(mend),
                    None => Self::new(format!("unknown key `{key}`")).mend(mend),
                }
            }
            None => Self::new(message.replace('\n', ", ")),
        };
        match error.span() {
            Some(span) => ours.at(file, content, span),
            None => Self::new(format!("{file}: {}", ours.message)),
        }
    }
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
        if let Some(mend) = &self.mend {
            let separator = if self.place.is_some() { "\n  = " } else { "; " };
            write!(f, "{separator}{}", printable(mend))?;
        }
        Ok(())
    }
}

/// Whether a character does something to a terminal or a log rather than show: controls,
/// and what turns the direction of text or has no width.
pub(crate) fn is_hidden(c: char) -> bool {
    let is_format = matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    c.is_control() || is_format
}

/// `text` with controls, and what turns or hides text, as Rust and TOML escape them, for a
/// terminal or a log.
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

/// Reads serde's wording for an unknown key: the key, and the known ones. The key
/// may have backticks of its own, known ones have none.
fn unknown_key(message: &str) -> Option<(&str, Vec<&str>)> {
    let rest = message.strip_prefix("unknown field `")?;
    let (key, known) = rest.rsplit_once("`, expected ")?;
    Some((key, known.split('`').skip(1).step_by(2).collect()))
}

fn floor_char_boundary(text: &str, index: usize) -> usize {
    let mut index = index.min(text.len());
    while !text.is_char_boundary(index) {
        index -= 1;
    }
    index
}
