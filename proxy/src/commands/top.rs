//! `top`: what a running proxy does, on a terminal, as its admin API tells it.
//!
//! One thread asks the proxy, one reads keys and one waits for signals; the main thread takes
//! their events in turn, changes the state and draws it. `--once` prints the same tables.

use std::env;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::crossterm::event::{self, Event as Input};
use ratatui::crossterm::terminal::size;
use rustix::process::{getpid, kill_process};
use thiserror::Error;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::admin_client::{USUAL, reachable};
use crate::config::{AdminAddress, Config, ConfigError, Time, printable};

use answer::{Clients, Status};
use ask::Wanted;
use screen::Theme;
use state::{Action, MEASURES, State};
use table::{Table, View};
pub use terminal::Screen;

mod answer;
mod ask;
mod rates;
mod screen;
mod state;
mod table;
mod terminal;
#[cfg(test)]
mod tests;

/// How often the screen is drawn without events: times on it grow, and a terminal that is
/// gone is noticed.
const TICK: Duration = Duration::from_secs(1);

/// How long a terminal that takes nothing may delay the end.
const PATIENCE: Duration = Duration::from_secs(2);

/// Events that may wait. More keys wait in the terminal.
const MAX_EVENTS: usize = 64;

/// Which proxy to show, and how.
#[derive(Args, Debug)]
#[allow(missing_docs, reason = "the help texts say it")]
pub struct Options {
    /// The proxy's admin address: an IP address with a port, or unix:/PATH
    #[arg(long, value_name = "ADDR", default_value = USUAL, conflicts_with = "config")]
    pub admin: AdminAddress,

    /// The proxy's TOML file: its `admin.listen` is asked
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// How often to ask the proxy; rates are of this time
    #[arg(long, value_name = "DURATION", default_value_t)]
    pub interval: Time<100_000, 3_600_000_000, 1_000_000>,

    /// Print everything once as plain text, after one interval, and end
    #[arg(long)]
    pub once: bool,
}

/// Why there is nothing to see.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TopError {
    /// The file can't be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The file has no admin address.
    #[error(
        "{} has no admin address to ask; add `[admin]` with `listen = \"127.0.0.1:9901\"`", path.display()
    )]
    NoAdmin {
        /// The file.
        path: PathBuf,
    },
    /// Standard output is a file or a pipe.
    #[error("standard output is not a terminal; use --once for plain text")]
    NoTerminal,
    /// The terminal can't move its cursor.
    #[error("a terminal with TERM={term} can't show this; use --once for plain text")]
    Dumb {
        /// The environment variable TERM.
        term: String,
    },
    /// The terminal has no size.
    #[error("the terminal does not say how large it is; run `stty rows 24 cols 80` first")]
    NoSize,
    /// The terminal refuses something, or is gone.
    #[error("the terminal can't be used: {0}")]
    Terminal(io::Error),
    /// The kernel refuses something else.
    #[error("this can't be started: {0}")]
    Start(io::Error),
    /// The proxy does not answer as it should.
    #[error("{0}")]
    NoAnswer(String),
}

impl TopError {
    /// Whether the command was used wrongly.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Config(_) | Self::NoAdmin { .. } | Self::NoTerminal | Self::Dumb { .. } => true,
            Self::NoSize | Self::Terminal(_) | Self::Start(_) | Self::NoAnswer(_) => false,
        }
    }
}

/// What the main thread waits for.
#[derive(Debug)]
enum Event {
    Status(Result<Box<Status>, String>),
    Clients(Result<Clients, String>),
    Input(Input),
    /// The terminal has failed.
    Gone(io::Error),
    /// A signal asks for the end.
    Stop,
    /// The process was stopped and goes on.
    Continued,
}

/// Shows the proxy until the operator quits. With `--once`, returns the text instead.
///
/// # Errors
///
/// [`TopError`].
pub fn run(options: &Options) -> Result<String, TopError> {
    let address = match &options.config {
        None => options.admin.clone(),
        Some(path) => {
            Config::admin_of_file(path)?.ok_or_else(|| TopError::NoAdmin { path: path.clone() })?
        }
    };
    let address = reachable(&address);
    if options.once {
        return once(&address, *options.interval);
    }
    if !io::stdout().is_terminal() {
        return Err(TopError::NoTerminal);
    }
    if let Some(term) = env::var("TERM").ok().filter(|term| term == "dumb") {
        return Err(TopError::Dumb { term });
    }
    let (columns, rows) = size().map_err(TopError::Terminal)?;
    if columns == 0 || rows == 0 {
        return Err(TopError::NoSize);
    }
    show(address, *options.interval)?;
    Ok(String::new())
}

/// Everything as text, with the rates of one interval.
fn once(address: &AdminAddress, interval: Duration) -> Result<String, TopError> {
    let status = || ask::status(address).map_err(TopError::NoAnswer);
    let mut state = State::new(printable(&address.to_string()).into_owned());
    state.take(Ok(status()?), Instant::now());
    thread::sleep(interval);
    state.take(Ok(status()?), Instant::now());
    state.take_clients(ask::clients(address, MEASURES[0].0));
    let mut text = screen::plain_summary(&state);
    for view in View::ALL {
        state.view = view;
        let table = state.table();
        text.push('\n');
        text += &table.as_ref().map(Table::plain).unwrap_or_default();
    }
    Ok(text)
}

/// Shows the proxy on the terminal.
fn show(address: AdminAddress, interval: Duration) -> Result<(), TopError> {
    let (sender, events) = mpsc::sync_channel(MAX_EVENTS);
    let (wanted, receiver) = mpsc::channel();
    // Before the terminal is taken: a signal would leave it so.
    let signals = Signals::listen().map_err(TopError::Start)?;
    let has_colours = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let mut state = State::new(printable(&address.to_string()).into_owned());
    let mut screen = Screen::open().map_err(TopError::Terminal)?;
    let start = |name: &str, task: Box<dyn FnOnce() + Send>| {
        let thread = thread::Builder::new().name(name.to_owned());
        thread.spawn(task).map(drop).map_err(TopError::Start)
    };
    let to = sender.clone();
    start("signals", Box::new(move || signals.pass_on(&to)))?;
    let to = sender.clone();
    start("keys", Box::new(move || pass_input_on(&to)))?;
    let ask = move || ask::ask_for_ever(&address, interval, &receiver, &sender);
    start("ask", Box::new(ask))?;
    let theme = Theme { has_colours };
    react(&mut screen, &mut state, theme, &events, &wanted)
}

/// Draws, and changes the state by events, until one of them is the end.
fn react(
    screen: &mut Screen,
    state: &mut State,
    theme: Theme,
    events: &Receiver<Event>,
    wanted: &Sender<Wanted>,
) -> Result<(), TopError> {
    let mut wants = state.wants_clients();
    loop {
        screen
            .draw(|frame| screen::draw(frame, state, theme, Instant::now()))
            .map_err(TopError::Terminal)?;
        let first = match events.recv_timeout(TICK) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => None,
            // Every thread has panicked, which its hook has told.
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        for event in first.into_iter().chain(events.try_iter()) {
            let action = match event {
                Event::Status(answer) => {
                    state.take(answer, Instant::now());
                    Action::None
                }
                Event::Clients(answer) => {
                    state.take_clients(answer);
                    Action::None
                }
                Event::Input(Input::Key(key)) => state.press(key),
                // The next picture has the new size.
                Event::Input(_) => Action::None,
                Event::Gone(error) => return Err(TopError::Terminal(error)),
                Event::Stop => return Ok(()),
                Event::Continued => Action::Retake,
            };
            match action {
                Action::None | Action::Ask => {}
                Action::Quit => return Ok(()),
                Action::Redraw => screen.clear().map_err(TopError::Terminal)?,
                Action::Suspend => {
                    terminal::restore();
                    // It returns once the process goes on, or at once if nobody could make it.
                    let _ = kill_process(getpid(), rustix::process::Signal::TSTP);
                    screen.retake().map_err(TopError::Terminal)?;
                }
                Action::Retake => screen.retake().map_err(TopError::Terminal)?,
            }
            let now_wants = state.wants_clients();
            if action == Action::Ask || now_wants != wants {
                wants = now_wants;
                // Without the other thread, the screen says that there are no answers.
                let _ = wanted.send(Wanted { clients: wants });
            }
        }
    }
}

/// Passes keys and sizes on, until nobody listens.
fn pass_input_on(events: &SyncSender<Event>) {
    loop {
        let event = event::read().map_or_else(Event::Gone, Event::Input);
        let is_last = matches!(event, Event::Gone(_));
        if events.send(event).is_err() || is_last {
            return;
        }
    }
}

/// Signals that the process listens to.
struct Signals {
    runtime: tokio::runtime::Runtime,
    ends: [Signal; 4],
    continued: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        let inside = runtime.enter();
        let ends = [
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
            signal(SignalKind::hangup())?,
            signal(SignalKind::quit())?,
        ];
        let continued = signal(SignalKind::from_raw(rustix::process::Signal::CONT.as_raw()))?;
        drop(inside);
        Ok(Self {
            runtime,
            ends,
            continued,
        })
    }

    /// Passes them on. The process ends without the main thread if a terminal that takes
    /// nothing holds that back.
    fn pass_on(self, events: &SyncSender<Event>) {
        let Self {
            runtime,
            ends: [mut terminate, mut interrupt, mut hangup, mut quit],
            mut continued,
        } = self;
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = continued.recv() => {
                        if events.send(Event::Continued).is_err() {
                            return;
                        }
                    }
                    _ = terminate.recv() => return,
                    _ = interrupt.recv() => return,
                    _ = hangup.recv() => return,
                    _ = quit.recv() => return,
                }
            }
        });
        let _ = events.try_send(Event::Stop);
        thread::sleep(PATIENCE);
        terminal::set_modes_back();
        process::exit(1);
    }
}
