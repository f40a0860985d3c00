//! The four views as tables of text, for the screen and for `--once`.

use std::cmp::Ordering;

use ratatui::text::Span;

use super::answer::{Clients, Listener, Server, Status, Text, Upstream};
use super::rates::{self, Flow, Rates};

/// What the reason of drops by the kernel is called, as in metrics.
const OVERFLOWS: &str = "receive_overflows";

/// A list that the screen shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View {
    Listeners,
    Servers,
    Drops,
    Clients,
}

impl View {
    pub(super) const ALL: [Self; 4] = [Self::Listeners, Self::Servers, Self::Drops, Self::Clients];

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Listeners => "Listeners",
            Self::Servers => "Servers",
            Self::Drops => "Drops",
            Self::Clients => "Clients",
        }
    }

    pub(super) fn columns(self) -> &'static [Column] {
        match self {
            Self::Listeners => &LISTENERS,
            Self::Servers => &SERVERS,
            Self::Drops => &DROPS,
            Self::Clients => &CLIENTS,
        }
    }
}

/// A column. The first one of a table takes the width that the others leave.
#[derive(Debug)]
pub(super) struct Column {
    pub(super) title: &'static str,
    /// Its least width.
    pub(super) width: usize,
    pub(super) is_text: bool,
    /// Those with the highest rank are left out first on a narrow screen; 0 never.
    rank: u8,
}

const fn text(title: &'static str, width: usize, rank: u8) -> Column {
    Column {
        title,
        width,
        is_text: true,
        rank,
    }
}

const fn number(title: &'static str, width: usize, rank: u8) -> Column {
    Column {
        title,
        width,
        is_text: false,
        rank,
    }
}

static LISTENERS: [Column; 9] = [
    text("LISTENER", 14, 0),
    text("UPSTREAM", 14, 8),
    number("SESS", 6, 1),
    number("NEW/s", 6, 4),
    number("IN/s", 6, 0),
    number("IN B/s", 6, 5),
    number("OUT/s", 6, 2),
    number("OUT B/s", 7, 6),
    number("DROP/s", 6, 0),
];

static SERVERS: [Column; 9] = [
    text("UPSTREAM, SERVER", 16, 0),
    text("STATE", 8, 0),
    number("SESS", 6, 1),
    number("NEW/s", 6, 4),
    number("TO/s", 6, 0),
    number("TO B/s", 6, 6),
    number("FROM/s", 6, 2),
    number("FROM B/s", 8, 7),
    number("LOST/s", 6, 3),
];

static DROPS: [Column; 4] = [
    text("REASON", 18, 0),
    text("LISTENER", 14, 1),
    number("DROP/s", 6, 0),
    number("TOTAL", 12, 2),
];

static CLIENTS: [Column; 6] = [
    text("CLIENT", 15, 0),
    text("LISTENER", 14, 5),
    number("DGRAM/s", 7, 0),
    number("B/s", 6, 1),
    number("NEW/s", 6, 2),
    number("DROP/s", 6, 1),
];

/// How a row is told from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    None,
    /// It needs somebody's eyes.
    Bad,
    /// It is on its way out.
    Leaving,
}

#[derive(Clone, Debug)]
pub(super) struct Cell {
    pub(super) text: String,
    /// What a number sorts by.
    value: f64,
}

impl Cell {
    fn text(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            value: 0.0,
        }
    }

    /// A number as it is, as long as it is short.
    fn count(value: u64) -> Self {
        let text = match value < 100_000 {
            true => value.to_string(),
            false => short(value as f64),
        };
        Self {
            text,
            value: value as f64,
        }
    }

    fn whole(value: u64) -> Self {
        Self {
            text: value.to_string(),
            value: value as f64,
        }
    }

    fn rate(value: Option<f64>) -> Self {
        Self {
            text: value.map_or_else(|| "-".to_owned(), short),
            value: value.unwrap_or(-1.0),
        }
    }
}

/// A row that can be selected.
#[derive(Clone, Debug)]
pub(super) struct Row {
    /// What it is recognised by in the next answer.
    pub(super) key: String,
    pub(super) cells: Vec<Cell>,
    pub(super) mark: Mark,
    pub(super) is_heading: bool,
    /// More about it, for below the table.
    pub(super) details: String,
}

/// Rows that are sorted among themselves, below a heading that moves with them.
#[derive(Clone, Debug, Default)]
struct Group {
    heading: Option<Row>,
    rows: Vec<Row>,
}

#[derive(Clone, Debug)]
pub(super) struct Table {
    pub(super) columns: &'static [Column],
    groups: Vec<Group>,
    /// What stands below the rows, or instead of them.
    pub(super) note: Option<String>,
}

impl Table {
    pub(super) fn of(
        view: View,
        status: &Status,
        rates: Option<&Rates>,
        clients: Option<&Clients>,
    ) -> Self {
        match view {
            View::Listeners => listeners(status, rates),
            View::Servers => upstreams(status, rates),
            View::Drops => drops(status, rates),
            View::Clients => busiest(clients),
        }
    }

    /// Sorts by a column: numbers from the highest, texts from A. Equal rows keep their order.
    pub(super) fn sort(&mut self, column: usize) {
        let is_text = self.columns[column].is_text;
        let order = |one: &Row, other: &Row| -> Ordering {
            let (one, other) = (&one.cells[column], &other.cells[column]);
            match is_text {
                true => one.text.cmp(&other.text),
                false => other.value.total_cmp(&one.value),
            }
        };
        for group in &mut self.groups {
            group.rows.sort_by(order);
        }
        self.groups
            .sort_by(|one, other| match (&one.heading, &other.heading) {
                (Some(one), Some(other)) => order(one, other),
                _ => Ordering::Equal,
            });
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = &Row> {
        self.groups
            .iter()
            .flat_map(|group| group.heading.iter().chain(&group.rows))
    }

    /// The columns that fit into `width`, each with its own.
    pub(super) fn fit(&self, width: usize) -> Vec<(usize, usize)> {
        let columns = self.columns;
        let mut shown: Vec<usize> = (0..columns.len()).collect();
        let needed = |shown: &[usize]| shown.iter().map(|i| columns[*i].width + 1).sum::<usize>();
        while needed(&shown) > width + 1 {
            let Some(least) = shown.iter().copied().max_by_key(|i| columns[*i].rank) else {
                break;
            };
            if columns[least].rank == 0 {
                break;
            }
            shown.retain(|i| *i != least);
        }
        let mut left = (width + 1).saturating_sub(needed(&shown));
        let mut fitted = Vec::new();
        for i in shown {
            let mut width = columns[i].width;
            if columns[i].is_text {
                let more = self.widest(i).saturating_sub(width).min(left);
                (width, left) = (width + more, left - more);
            }
            fitted.push((i, width));
        }
        // Numbers stand at the right edge of a usual screen.
        if let Some((_, first)) = fitted.first_mut() {
            *first += left.min(MAX_STRETCH.saturating_sub(*first));
        }
        fitted
    }

    /// The width that a column's texts need.
    fn widest(&self, column: usize) -> usize {
        self.rows()
            .map(|row| width(&row.cells[column].text))
            .max()
            .unwrap_or(0)
    }

    /// All of it as lines with nothing cut off.
    pub(super) fn plain(&self) -> String {
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|i| self.widest(i).max(self.columns[i].title.len()))
            .collect();
        let titles = self.columns.iter().map(|column| column.title);
        let mut text = self.line(&widths, titles);
        for row in self.rows() {
            text += &self.line(&widths, row.cells.iter().map(|cell| cell.text.as_str()));
        }
        if let Some(note) = &self.note {
            text += note;
            text.push('\n');
        }
        text
    }

    fn line<'a>(&self, widths: &[usize], cells: impl Iterator<Item = &'a str>) -> String {
        let mut line = String::new();
        for ((column, widest), cell) in self.columns.iter().zip(widths).zip(cells) {
            let space = " ".repeat(widest.saturating_sub(width(cell)));
            match column.is_text {
                true => line.extend([cell, &space, " "]),
                false => line.extend([&space, cell, " "]),
            }
        }
        line.truncate(line.trim_end().len());
        line.push('\n');
        line
    }
}

/// How far the first column of a table is stretched beyond its content.
const MAX_STRETCH: usize = 40;

/// The cells that a text takes on a terminal.
pub(super) fn width(text: &str) -> usize {
    Span::raw(text).width()
}

/// A rate or a count in six characters at most.
pub(super) fn short(value: f64) -> String {
    if value < 0.05 {
        return "0".to_owned();
    }
    if value < 9.95 {
        return format!("{value:.1}");
    }
    let mut value = value;
    for unit in ["", "k", "M", "G", "T", "P"] {
        if value < 999.5 {
            let digits = match (unit, value) {
                ("", _) => 0,
                (_, v) if v < 9.995 => 2,
                (_, v) if v < 99.95 => 1,
                _ => 0,
            };
            return format!("{value:.digits$}{unit}");
        }
        value /= 1000.0;
    }
    match value < 999.5 {
        true => format!("{value:.0}E"),
        false => "MANY".to_owned(),
    }
}

/// A time in its two largest units.
pub(super) fn span(seconds: f64) -> String {
    // `as` saturates.
    #[allow(clippy::cast_possible_truncation, reason = "it saturates")]
    let seconds = seconds.max(0.0) as i64;
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let (minutes, seconds) = (seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {seconds}s"),
        (0, ..) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

fn flow_cells(flow: Option<Flow>, sessions: u64, lost: Mark) -> ([Cell; 7], Mark) {
    let rate = |value: fn(&Flow) -> f64| Cell::rate(flow.as_ref().map(value));
    let cells = [
        Cell::count(sessions),
        rate(|flow| flow.sessions),
        rate(|flow| flow.datagrams),
        rate(|flow| flow.bytes),
        rate(|flow| flow.reply_datagrams),
        rate(|flow| flow.reply_bytes),
        rate(|flow| flow.lost),
    ];
    let is_losing = flow.is_some_and(|flow| flow.lost > 0.0);
    (cells, if is_losing { lost } else { Mark::None })
}

fn left_out(number: u64, what: &str) -> Option<String> {
    (number > 0).then(|| format!("and {number} more {what}, which the proxy leaves out"))
}

fn listeners(status: &Status, rates: Option<&Rates>) -> Table {
    let row = |listener: &Listener| {
        let name = &listener.listener;
        let flow = rates.and_then(|rates| rates.listener(name));
        let (numbers, mut mark) = flow_cells(flow, listener.sessions, Mark::Bad);
        let mut cells = vec![Cell::text(name)];
        let mut details = format!("{}: ", &**name);
        match &listener.upstream {
            Some(upstream) => {
                cells.push(Cell::text(upstream));
                details += &listener
                    .bind
                    .iter()
                    .map(|bind| &**bind)
                    .collect::<Vec<_>>()
                    .join(", ");
                let mode = listener.mode.as_deref().unwrap_or("-");
                details += &format!(" -> {}, mode {mode}", &**upstream);
            }
            None => {
                mark = Mark::Leaving;
                cells.push(Cell::text("-"));
                details += "taken out of the configuration; its sessions end in their time";
            }
        }
        details += &format!(
            ". Since the start: {} in, {} out, {} dropped",
            listener.client_datagrams,
            listener.reply_datagrams,
            rates::lost(listener)
        );
        cells.extend(numbers);
        Row {
            key: name.to_string(),
            cells,
            mark,
            is_heading: false,
            details,
        }
    };
    let rows = status.listeners.iter().map(row).collect();
    Table {
        columns: &LISTENERS,
        groups: vec![Group {
            heading: None,
            rows,
        }],
        note: left_out(status.listeners_left_out, "listeners"),
    }
}

fn upstreams(status: &Status, rates: Option<&Rates>) -> Table {
    let groups = status.upstreams.iter().map(|upstream| {
        let rows = upstream.servers.iter();
        Group {
            heading: Some(upstream_row(upstream, rates)),
            rows: rows
                .map(|server| server_row(&upstream.upstream, server, status.unix_seconds, rates))
                .collect(),
        }
    });
    Table {
        columns: &SERVERS,
        groups: groups.collect(),
        note: left_out(status.servers_left_out, "servers"),
    }
}

fn upstream_row(upstream: &Upstream, rates: Option<&Rates>) -> Row {
    let name = &upstream.upstream;
    let servers = &upstream.servers;
    let flows = servers
        .iter()
        .filter_map(|server| rates?.server(name, &server.label));
    let flow = rates.map(|_| Flow::sum(flows));
    let sessions = servers.iter().map(|server| server.sessions);
    let sessions = sessions.fold(0, u64::saturating_add);
    let up = servers.iter().filter(|server| &*server.state == "up");
    let (up, all) = (up.count(), servers.len());
    let (numbers, _) = flow_cells(flow, sessions, Mark::None);
    let mut cells = vec![Cell::text(name), Cell::text(&format!("{up}/{all} up"))];
    cells.extend(numbers);
    Row {
        key: format!("{}\0", &**name),
        cells,
        mark: if up == 0 { Mark::Bad } else { Mark::None },
        is_heading: true,
        details: format!("upstream {}: {up} of {all} servers are up", &**name),
    }
}

fn server_row(upstream: &Text, server: &Server, now: f64, rates: Option<&Rates>) -> Row {
    let label = &server.label;
    let flow = rates.and_then(|rates| rates.server(upstream, label));
    let (numbers, _) = flow_cells(flow, server.sessions, Mark::None);
    let mut cells = vec![
        Cell::text(&format!("  {}", &**label)),
        Cell::text(&server.state),
    ];
    cells.extend(numbers);
    let mut details = format!("{}: ", &**label);
    if server.address != *label {
        details += &format!("{}, ", &*server.address);
    }
    if let Some(found_by) = &server.found_by {
        details += &format!("found by {}, ", &**found_by);
    }
    details += &format!("weight {}, ", server.weight);
    if server.backup {
        details += "backup, ";
    }
    details += &format!(
        "{} for {}",
        &*server.state,
        span(now - server.since_unix_seconds)
    );
    if !server.checked {
        details += ", not checked";
    } else if !server.why.is_empty() {
        details += &format!(": {}", &*server.why);
    }
    details += &format!(
        ". Since the start: {} ICMP errors, {} lost replies",
        server.icmp_errors, server.receive_overflows
    );
    Row {
        key: format!("{}\0{}", &**upstream, &**label),
        cells,
        mark: match &*server.state {
            "up" => Mark::None,
            "down" => Mark::Bad,
            _ => Mark::Leaving,
        },
        is_heading: false,
        details,
    }
}

fn drops(status: &Status, rates: Option<&Rates>) -> Table {
    let row = |listener: &Listener, reason: &Text, total: u64, rate: Option<f64>| {
        let meaning = status.drop_reasons.get(reason);
        let details = match meaning {
            Some(meaning) => format!(
                "{}: {}. Fix: {}",
                &**reason, &*meaning.description, &*meaning.fix
            ),
            None if &**reason == OVERFLOWS => format!(
                "{OVERFLOWS}: datagrams from clients that the kernel dropped because a receive buffer was full"
            ),
            None => reason.to_string(),
        };
        Row {
            key: format!("{}\0{}", &*listener.listener, &**reason),
            cells: vec![
                Cell::text(reason),
                Cell::text(&listener.listener),
                Cell::rate(rate),
                Cell::whole(total),
            ],
            mark: match rate.is_some_and(|rate| rate > 0.0) {
                true => Mark::Bad,
                false => Mark::None,
            },
            is_heading: false,
            details,
        }
    };
    let mut rows = Vec::new();
    for listener in &status.listeners {
        let name = &listener.listener;
        if listener.receive_overflows > 0 {
            let rate = rates.and_then(|rates| rates.overflows(name));
            let reason = Text::from(OVERFLOWS);
            rows.push(row(listener, &reason, listener.receive_overflows, rate));
        }
        for (reason, total) in &listener.drops {
            let rate = rates.and_then(|rates| rates.drops(name, reason));
            rows.push(row(listener, reason, *total, rate));
        }
    }
    let note = rows
        .is_empty()
        .then(|| "nothing has been dropped".to_owned());
    Table {
        columns: &DROPS,
        groups: vec![Group {
            heading: None,
            rows,
        }],
        note: note.or_else(|| left_out(status.listeners_left_out, "listeners")),
    }
}

fn busiest(clients: Option<&Clients>) -> Table {
    let mut table = Table {
        columns: &CLIENTS,
        groups: Vec::new(),
        note: None,
    };
    let Some(clients) = clients else {
        table.note = Some("the proxy has not said yet who its busiest clients are".to_owned());
        return table;
    };
    let window = clients.window_seconds;
    let per_second = |value: u64| Cell::rate((window > 0.0).then(|| value as f64 / window));
    let rows = clients.clients.iter().map(|client| {
        let listener = client.listener.as_deref().unwrap_or("-");
        Row {
            key: format!("{}\0{listener}", &*client.address),
            cells: vec![
                Cell::text(&client.address),
                Cell::text(listener),
                per_second(client.datagrams),
                per_second(client.bytes),
                per_second(client.new_sessions),
                per_second(client.drops),
            ],
            mark: Mark::None,
            is_heading: false,
            details: format!(
                "{}: in the last {}: {} datagrams, {} bytes, {} new sessions, {} drops",
                &*client.address,
                span(window),
                client.datagrams,
                client.bytes,
                client.new_sessions,
                client.drops
            ),
        }
    });
    let rows: Vec<Row> = rows.collect();
    table.note = Some(match rows.is_empty() {
        true => "no client was served lately".to_owned(),
        false => format!("averages of the last {}", span(window)),
    });
    table.groups = vec![Group {
        heading: None,
        rows,
    }];
    table
}
