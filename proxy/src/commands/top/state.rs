//! What the screen shows and what keys change, without a terminal and without a proxy.

use std::rc::Rc;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::answer::{Clients, Status};
use super::rates::Rates;
use super::table::{Table, View};

/// By what `/clients` sorts, and the column of it.
pub(super) const MEASURES: [(&str, usize); 4] = [
    ("datagrams", 2),
    ("bytes", 3),
    ("sessions", 4),
    ("drops", 5),
];

/// What a key asks for besides another picture.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    None,
    /// Ask for the busiest clients now.
    Ask,
    /// Draw everything again.
    Redraw,
    Suspend,
    /// Take the terminal again.
    Retake,
    Quit,
}

/// A view's own part of the state.
#[derive(Clone, Debug, Default)]
struct Place {
    /// The key of the selected row, and where it stood.
    selected: Option<String>,
    index: usize,
    /// The first row on the screen.
    offset: usize,
    /// The sorted column; None for the order of the configuration.
    sort: Option<usize>,
}

/// What the latest answers say.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) status: Status,
    pub(super) rates: Option<Rates>,
}

/// Since when there is no answer, and why.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) since: Instant,
    pub(super) why: String,
}

#[derive(Debug)]
pub(super) struct State {
    /// The admin address.
    pub(super) address: String,
    pub(super) view: View,
    pub(super) is_paused: bool,
    pub(super) shows_help: bool,
    pub(super) shown: Option<Rc<Shown>>,
    pub(super) failure: Option<Failure>,
    /// The latest answer, also while the screen is paused.
    latest: Option<Rc<Shown>>,
    clients: Option<Clients>,
    /// Why there are no busiest clients.
    no_clients: Option<String>,
    /// The measure of the busiest clients.
    measure: usize,
    places: [Place; View::ALL.len()],
    /// How many rows a page has, as drawn.
    page: usize,
}

impl State {
    pub(super) fn new(address: String) -> Self {
        Self {
            address,
            view: View::Listeners,
            is_paused: false,
            shows_help: false,
            shown: None,
            failure: None,
            latest: None,
            clients: None,
            no_clients: None,
            measure: 0,
            places: Default::default(),
            page: 1,
        }
    }

    /// Takes an answer, or why there is none.
    pub(super) fn take(&mut self, answer: Result<Box<Status>, String>, now: Instant) {
        match answer {
            Ok(status) => {
                self.failure = None;
                let old = self.latest.as_ref();
                let rates = old.and_then(|old| Rates::between(&old.status, &status));
                self.latest = Some(Rc::new(Shown {
                    status: *status,
                    rates,
                }));
                if !self.is_paused {
                    self.shown.clone_from(&self.latest);
                }
            }
            Err(why) => {
                let since = self.failure.take().map_or(now, |failure| failure.since);
                self.failure = Some(Failure { since, why });
            }
        }
    }

    pub(super) fn take_clients(&mut self, answer: Result<Clients, String>) {
        if self.is_paused {
            return;
        }
        match answer {
            Ok(clients) => (self.clients, self.no_clients) = (Some(clients), None),
            Err(why) => (self.clients, self.no_clients) = (None, Some(why)),
        }
    }

    /// The measure of the clients that the screen needs now.
    pub(super) fn wants_clients(&self) -> Option<&'static str> {
        (self.view == View::Clients).then(|| MEASURES[self.measure].0)
    }

    /// What the table is sorted by.
    pub(super) fn sorted_by(&self) -> &'static str {
        match (self.view, self.place().sort) {
            (View::Clients, _) => self.view.columns()[MEASURES[self.measure].1].title,
            (_, Some(column)) => self.view.columns()[column].title,
            (_, None) => "configuration",
        }
    }

    /// The column that the table is sorted by.
    pub(super) fn sorted_column(&self) -> Option<usize> {
        match self.view {
            View::Clients => Some(MEASURES[self.measure].1),
            View::Listeners | View::Servers | View::Drops => self.place().sort,
        }
    }

    /// The table of the view, sorted. None before the first answer.
    pub(super) fn table(&self) -> Option<Table> {
        let Shown { status, rates } = self.shown.as_deref()?;
        let mut table = Table::of(self.view, status, rates.as_ref(), self.clients.as_ref());
        if self.view == View::Clients
            && let Some(why) = &self.no_clients
        {
            table.note = Some(why.clone());
        }
        if let Some(column) = self.sorted_column() {
            table.sort(column);
        }
        Some(table)
    }

    fn place(&self) -> &Place {
        &self.places[self.view as usize]
    }

    fn place_mut(&mut self) -> &mut Place {
        &mut self.places[self.view as usize]
    }

    /// The index of the selected row, and of the first one on the screen if `page` rows fit.
    pub(super) fn scroll(&mut self, table: &Table, page: usize) -> (Option<usize>, usize) {
        self.page = page.max(1);
        let page = self.page;
        let count = table.rows().count();
        let place = self.place_mut();
        let Some(last) = count.checked_sub(1) else {
            (place.index, place.offset) = (0, 0);
            return (None, 0);
        };
        // A row keeps the selection wherever it goes. Once it is gone, its neighbour has it.
        let at = place.selected.as_ref();
        let at = at.and_then(|key| table.rows().position(|row| row.key == *key));
        place.index = at.unwrap_or(place.index).min(last);
        place.offset = place
            .offset
            .clamp((place.index + 1).saturating_sub(page), place.index)
            .min(count.saturating_sub(page));
        (Some(place.index), place.offset)
    }

    /// Moves the selection by rows.
    fn go(&mut self, by: isize) {
        let Some(table) = self.table() else {
            return;
        };
        let (Some(index), _) = self.scroll(&table, self.page) else {
            return;
        };
        let last = table.rows().count() - 1;
        let index = index.saturating_add_signed(by).min(last);
        let key = table.rows().nth(index).map(|row| row.key.clone());
        let place = self.place_mut();
        (place.index, place.selected) = (index, key);
    }

    fn show(&mut self, view: View) -> Action {
        self.view = view;
        // What is known of clients may be of another minute.
        match view == View::Clients && !self.is_paused {
            true => Action::Ask,
            false => Action::None,
        }
    }

    fn sort(&mut self, by: isize) -> Action {
        let next = |at: usize, count: usize| {
            let count = count.cast_signed();
            (at.cast_signed() + by).rem_euclid(count).cast_unsigned()
        };
        match self.view {
            View::Clients => {
                self.measure = next(self.measure, MEASURES.len());
                match self.is_paused {
                    true => Action::None,
                    false => Action::Ask,
                }
            }
            View::Listeners | View::Servers | View::Drops => {
                let count = self.view.columns().len() + 1;
                let place = self.place_mut();
                let at = place.sort.map_or(0, |column| column + 1);
                place.sort = next(at, count).checked_sub(1);
                Action::None
            }
        }
    }

    /// Does what a key means.
    #[allow(clippy::wildcard_enum_match_arm, reason = "other keys mean nothing")]
    pub(super) fn press(&mut self, key: KeyEvent) -> Action {
        if key.kind == KeyEventKind::Release {
            return Action::None;
        }
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return match key.code {
                KeyCode::Char('c') => Action::Quit,
                KeyCode::Char('z') => Action::Suspend,
                KeyCode::Char('l') => Action::Redraw,
                _ => Action::None,
            };
        }
        let page = self.page.cast_signed();
        let view = self.view as usize;
        let views = View::ALL.len();
        match key.code {
            KeyCode::Char('q') => return Action::Quit,
            KeyCode::Char('?' | 'h') | KeyCode::F(1) => self.shows_help = !self.shows_help,
            KeyCode::Esc => self.shows_help = false,
            KeyCode::Char('p' | ' ') => {
                self.is_paused = !self.is_paused;
                if !self.is_paused {
                    self.shown.clone_from(&self.latest);
                    return Action::Ask;
                }
            }
            KeyCode::Char('s') => return self.sort(1),
            KeyCode::Char('S') => return self.sort(-1),
            KeyCode::Char('1') => return self.show(View::Listeners),
            KeyCode::Char('2') => return self.show(View::Servers),
            KeyCode::Char('3') => return self.show(View::Drops),
            KeyCode::Char('4') => return self.show(View::Clients),
            KeyCode::Tab | KeyCode::Right => return self.show(View::ALL[(view + 1) % views]),
            KeyCode::BackTab | KeyCode::Left => {
                return self.show(View::ALL[(view + views - 1) % views]);
            }
            KeyCode::Char('j') | KeyCode::Down => self.go(1),
            KeyCode::Char('k') | KeyCode::Up => self.go(-1),
            KeyCode::PageDown => self.go(page),
            KeyCode::PageUp => self.go(-page),
            KeyCode::Home | KeyCode::Char('g') => self.go(isize::MIN),
            KeyCode::End | KeyCode::Char('G') => self.go(isize::MAX),
            _ => {}
        }
        Action::None
    }
}

impl Failure {
    pub(super) fn lasts(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }
}
