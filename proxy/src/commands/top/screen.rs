//! Draws the state. Every line is cut to the screen, and a small one has fewer lines.

use std::time::Instant;

use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::widgets::{Block, Clear, Paragraph, Widget, Wrap};

use super::answer::Status;
use super::rates::Rates;
use super::state::{Shown, State};
use super::table::{Mark, Table, View, short, span, width};

/// Colours, or none of them where NO_COLOR is set: everything is told by words, too.
#[derive(Clone, Copy, Debug)]
pub(super) struct Theme {
    pub(super) has_colours: bool,
}

impl Theme {
    fn coloured(self, colour: Color) -> Style {
        match self.has_colours {
            true => Style::new().fg(colour),
            false => Style::new(),
        }
    }

    fn bad(self) -> Style {
        self.coloured(Color::Red).add_modifier(Modifier::BOLD)
    }

    fn mark(self, mark: Mark) -> Style {
        match mark {
            Mark::None => Style::new(),
            Mark::Bad => self.bad(),
            Mark::Leaving => self.coloured(Color::Yellow),
        }
    }
}

const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);
const REVERSED: Style = Style::new().add_modifier(Modifier::REVERSED);
const DIM: Style = Style::new().add_modifier(Modifier::DIM);

const KEYS: &str = "q quit  ? help  tab view  j/k move  s sort  p pause";

const HELP: &str = "\
1-4, tab, arrows  other views: listeners,
                  servers, drops, clients
j k, arrows       select a row: more about it
                  stands below the table
page up, down     a page; g and G: first, last
s, S              sort by the next column,
                  or by the one before
p, space          pause, and go on
ctrl-l            draw again
ctrl-z            suspend
q, ctrl-c         quit
?                 close this

Rates are of the latest interval; B/s is
payload. K, M, G are powers of 1000.
LOST: ICMP errors and lost replies.";

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, state: &mut State, theme: Theme, now: Instant) {
    let area = frame.area();
    if area.is_empty() {
        return;
    }
    let mut page = Page {
        buffer: frame.buffer_mut(),
        area,
        theme,
        top: area.top(),
        bottom: area.bottom(),
    };
    page.title(state, now);
    if area.height >= 10 {
        page.summary(state);
    }
    if area.height >= 5 {
        page.tabs(state);
    }
    if area.height >= 7 {
        page.keys();
    }
    match state.table() {
        Some(table) => page.table(state, &table),
        None => page.message(match state.failure {
            Some(_) => "There is nothing to show yet.",
            None => "Waiting for the first answer.",
        }),
    }
    if state.shows_help {
        page.help();
    }
}

/// The part of the screen that is still free.
struct Page<'b> {
    buffer: &'b mut Buffer,
    area: Rect,
    theme: Theme,
    top: u16,
    bottom: u16,
}

impl Page<'_> {
    /// The next free line from the top.
    fn line(&mut self) -> Option<u16> {
        let line = self.top;
        (line < self.bottom).then(|| {
            self.top += 1;
            line
        })
    }

    /// Writes from `x` on, at most `most` cells, and returns where it ends. What does not fit
    /// ends with an ellipsis.
    fn put(&mut self, x: u16, y: u16, text: &str, most: usize, style: Style) -> u16 {
        let most = most.min(usize::from(self.area.right().saturating_sub(x)));
        if width(text) <= most {
            return self.buffer.set_stringn(x, y, text, most, style).0;
        }
        let Some(most) = most.checked_sub(1) else {
            return x;
        };
        let (end, _) = self.buffer.set_stringn(x, y, text, most, style);
        self.buffer.set_stringn(end, y, "…", 1, style).0
    }

    /// A line with one text at the left and one at the right, which is the last to be cut.
    fn ends(&mut self, y: u16, left: (&str, Style), right: (&str, Style)) {
        let all = usize::from(self.area.width);
        let (left_edge, right_edge) = (self.area.left(), self.area.right());
        let taken = width(right.0).min(all);
        self.put(left_edge, y, left.0, all.saturating_sub(taken + 1), left.1);
        let start = right_edge - cells(taken);
        self.put(start, y, right.0, taken, right.1);
    }

    fn title(&mut self, state: &State, now: Instant) {
        let Some(y) = self.line() else {
            return;
        };
        let theme = self.theme;
        let shown = state.shown.as_deref();
        let left = name(state);
        let (mut right, style) = match (&state.failure, shown) {
            (Some(failure), _) => {
                let since = span(failure.lasts(now).as_secs_f64());
                (format!("UNREACHABLE for {since}"), theme.bad())
            }
            (None, None) => ("connecting".to_owned(), Style::new()),
            (None, Some(Shown { status, .. })) => {
                let style = match status.ready {
                    true => theme.coloured(Color::Green),
                    false => theme.bad(),
                };
                (readiness(status), style)
            }
        };
        if state.is_paused {
            right = format!("PAUSED, {right}");
        }
        self.ends(y, (&left, BOLD), (&right, style));
    }

    /// The proxy as a whole, in two lines; or why there is no answer.
    fn summary(&mut self, state: &State) {
        let (Some(first), Some(second)) = (self.line(), self.line()) else {
            return;
        };
        let (x, all) = (self.area.left(), usize::from(self.area.width));
        let bad = self.theme.bad();
        if let Some(failure) = &state.failure {
            self.put(x, first, &failure.why, all, bad);
            self.put(x, second, "Asking again at each interval.", all, DIM);
            return;
        }
        let Some(Shown { status, rates }) = state.shown.as_deref() else {
            return;
        };
        let (text, warnings) = (amounts(status), warnings(status));
        self.ends(first, (&text, Style::new()), (&warnings, bad));
        self.put(x, second, &totals(rates.as_ref()), all, Style::new());
    }

    fn tabs(&mut self, state: &State) {
        let Some(y) = self.line() else {
            return;
        };
        let all = usize::from(self.area.width);
        let whole = View::ALL.iter().map(|view| view.title().len() + 5);
        let is_narrow = whole.sum::<usize>() > all + 1;
        let mut x = self.area.left();
        for (i, view) in View::ALL.into_iter().enumerate() {
            let is_shown = view == state.view;
            let style = if is_shown { REVERSED } else { Style::new() };
            let title = match is_narrow && !is_shown {
                true => format!(" {} ", i + 1),
                false => format!(" {} {} ", i + 1, view.title()),
            };
            x = self.put(x, y, &title, all, style);
        }
        let sorted = format!("sorted by {}", state.sorted_by());
        let left = usize::from(self.area.right().saturating_sub(x));
        if width(&sorted) < left {
            let start = self.area.right() - cells(width(&sorted));
            self.put(start, y, &sorted, left, DIM);
        }
    }

    fn keys(&mut self) {
        if self.top < self.bottom {
            self.bottom -= 1;
            let all = usize::from(self.area.width);
            self.put(self.area.left(), self.bottom, KEYS, all, DIM);
        }
    }

    fn message(&mut self, text: &str) {
        if let Some(y) = self.line() {
            self.put(self.area.left(), y, text, usize::from(self.area.width), DIM);
        }
    }

    fn table(&mut self, state: &mut State, table: &Table) {
        let columns = table.fit(usize::from(self.area.width));
        if self.bottom - self.top > 1
            && let Some(y) = self.line()
        {
            let sorted = state.sorted_column();
            let titles = table.columns.iter().map(|column| column.title);
            let titles: Vec<&str> = titles.collect();
            let underlined = |i| match sorted == Some(i) {
                true => BOLD.add_modifier(Modifier::UNDERLINED),
                false => BOLD,
            };
            self.row(y, table, &columns, |i| (titles[i], underlined(i)));
        }
        // Details of the selected row, below a free line.
        let details = match self.bottom - self.top {
            0..10 => 0,
            10..16 => 2,
            _ => 3,
        };
        let below = if details > 0 { details + 1 } else { 0 };
        let note = u16::from(table.note.is_some());
        let rows = self.bottom - self.top;
        let rows = rows.saturating_sub(below + note).max(rows.min(1));
        let (selected, offset) = state.scroll(table, usize::from(rows));
        let visible = table
            .rows()
            .enumerate()
            .skip(offset)
            .take(usize::from(rows));
        for (index, row) in visible {
            let Some(y) = self.line() else {
                break;
            };
            let mut style = self.theme.mark(row.mark);
            if row.is_heading {
                style = style.add_modifier(Modifier::BOLD);
            }
            if selected == Some(index) {
                style = style.add_modifier(Modifier::REVERSED);
                let line = Rect::new(self.area.left(), y, self.area.width, 1);
                self.buffer.set_style(line, style);
            }
            self.row(y, table, &columns, |i| (&row.cells[i].text, style));
        }
        if let Some(note) = &table.note {
            self.message(note);
        }
        if details > 0
            && let Some(row) = selected.and_then(|index| table.rows().nth(index))
        {
            let area = Rect::new(self.area.left(), self.bottom - details, self.area.width, 2);
            Paragraph::new(row.details.as_str())
                .wrap(Wrap { trim: true })
                .render(area, self.buffer);
        }
    }

    /// A line of the table.
    fn row<'t>(
        &mut self,
        y: u16,
        table: &Table,
        columns: &[(usize, usize)],
        cell: impl Fn(usize) -> (&'t str, Style),
    ) {
        let mut x = self.area.left();
        for (i, all) in columns {
            let (text, style) = cell(*i);
            let space = match table.columns[*i].is_text {
                true => 0,
                false => all.saturating_sub(width(text)),
            };
            let start = x.saturating_add(cells(space));
            if start < self.area.right() {
                self.put(start, y, text, all - space, style);
            }
            x = x.saturating_add(cells(*all + 1));
        }
    }

    fn help(&mut self) {
        let lines = HELP.lines().count();
        let widest = HELP.lines().map(width).max().unwrap_or(0);
        let (height, width) = (cells(lines + 2), cells(widest + 4));
        let area = self.area;
        let size = (width.min(area.width), height.min(area.height));
        let corner = (
            area.x + (area.width - size.0) / 2,
            area.y + (area.height - size.1) / 2,
        );
        let area = Rect::new(corner.0, corner.1, size.0, size.1);
        Clear.render(area, self.buffer);
        let block = Block::bordered().title(" Keys ");
        Paragraph::new(HELP).block(block).render(area, self.buffer);
    }
}

/// Which proxy it is.
fn name(state: &State) -> String {
    let version = state.shown.as_ref().map(|shown| &*shown.status.version);
    let version = version.map(|version| format!("{version} "));
    format!(
        "ppv2-proxy {}at {}",
        version.unwrap_or_default(),
        state.address
    )
}

fn readiness(status: &Status) -> String {
    let ready = if status.ready { "ready" } else { "NOT READY" };
    format!("{ready}, up {}", span(status.uptime_seconds))
}

/// What it has, in one line.
fn amounts(status: &Status) -> String {
    let of = |max: Option<u64>| max.map(|max| format!("/{max}")).unwrap_or_default();
    let mut text = format!(
        "sessions {}{}  sockets {}{}  workers {}",
        status.sessions,
        of(status.sessions_max),
        status.session_sockets,
        of(status.session_sockets_max),
        status.workers,
    );
    if status.reloads.applied > 0 {
        text += &format!("  reloads {}", status.reloads.applied);
    }
    text
}

/// What somebody should look at.
fn warnings(status: &Status) -> String {
    let mut warnings = Vec::new();
    if !status.workers_not_responding.is_empty() {
        let workers = status.workers_not_responding.iter().take(8);
        let workers = workers.map(u64::to_string).collect::<Vec<_>>().join(", ");
        warnings.push(format!("NOT RESPONDING: worker {workers}"));
    }
    if status.reloads.latest_is_rejected {
        warnings.push("LATEST RELOAD REJECTED".to_owned());
    }
    warnings.join(", ")
}

/// What all listeners do, in one line.
fn totals(rates: Option<&Rates>) -> String {
    let Some(flow) = rates.map(Rates::total) else {
        return "rates with the next answer".to_owned();
    };
    format!(
        "in {}/s {}B/s  out {}/s {}B/s  new sessions {}/s  drops {}/s",
        short(flow.datagrams),
        short(flow.bytes),
        short(flow.reply_datagrams),
        short(flow.reply_bytes),
        short(flow.sessions),
        short(flow.lost),
    )
}

/// The lines above the tables as text, for `--once`.
pub(super) fn plain_summary(state: &State) -> String {
    let Some(Shown { status, rates }) = state.shown.as_deref() else {
        return String::new();
    };
    let mut text = format!("{}: {}\n", name(state), readiness(status));
    text += &format!("{}\n{}\n", amounts(status), totals(rates.as_ref()));
    let warnings = warnings(status);
    if !warnings.is_empty() {
        text += &format!("{warnings}\n");
    }
    text
}

/// A number of cells, as ratatui counts them.
fn cells(count: usize) -> u16 {
    u16::try_from(count).unwrap_or(u16::MAX)
}
