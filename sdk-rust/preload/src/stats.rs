//! The statistics file: Prometheus text in mapped memory, kept current in place.
//!
//! Every number has a fixed width, so a new one replaces it byte by byte. The file is
//! mapped before the program begins: it stays current after fork, chroot, setuid, and when
//! the program closes all descriptors. Its numbers are those of the program that took over
//! a socket last; programs that take none over, such as helper scripts that inherit the
//! environment, leave it as it is.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};

use ppv2_preload_settings::STATS_OPENED;
use ppv2_preload_settings::stats_file::{self, StatsFileError};
use ppv2_sdk::DropReason;
use thiserror::Error;

use crate::settings::Fork;

const REASONS: usize = DropReason::ALL.len();

/// What is counted, in the order of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cell {
    Received,
    Delivered,
    Direct,
    Dropped(DropReason),
    DroppedClientFamily,
    DroppedOtherClient,
    DroppedNoMemory,
    DroppedInterrupted,
    DroppedBadPointer,
    RepliesSent,
    RepliesWithoutPath,
    Clients,
    ClientsEvicted,
    SendersNotRemembered,
    TableResets,
    Interrupted,
    Panics,
}

/// The drop reasons that the SDK doesn't have, in the order of their cells.
const OWN_REASONS: [&str; 5] = [
    "client_family",
    "other_client",
    "no_memory",
    "interrupted",
    "bad_pointer",
];

/// The first cell behind the SDK's drop reasons.
const AFTER_REASONS: usize = 3 + REASONS;
const AFTER_DROPS: usize = AFTER_REASONS + OWN_REASONS.len();
const CELLS: usize = AFTER_DROPS + 8;

impl Cell {
    #[inline]
    fn index(self) -> usize {
        match self {
            Self::Received => 0,
            Self::Delivered => 1,
            Self::Direct => 2,
            Self::Dropped(reason) => {
                let position = DropReason::ALL.iter().position(|other| *other == reason);
                3 + position.unwrap_or_default()
            }
            Self::DroppedClientFamily => AFTER_REASONS,
            Self::DroppedOtherClient => AFTER_REASONS + 1,
            Self::DroppedNoMemory => AFTER_REASONS + 2,
            Self::DroppedInterrupted => AFTER_REASONS + 3,
            Self::DroppedBadPointer => AFTER_REASONS + 4,
            Self::RepliesSent => AFTER_DROPS,
            Self::RepliesWithoutPath => AFTER_DROPS + 1,
            Self::Clients => AFTER_DROPS + 2,
            Self::ClientsEvicted => AFTER_DROPS + 3,
            Self::SendersNotRemembered => AFTER_DROPS + 4,
            Self::TableResets => AFTER_DROPS + 5,
            Self::Interrupted => AFTER_DROPS + 6,
            Self::Panics => AFTER_DROPS + 7,
        }
    }
}

/// Name, type and meaning; the cells that follow one another, each with its label's value.
struct Metric {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    reasons: bool,
}

const fn counter(name: &'static str, help: &'static str) -> Metric {
    Metric {
        name,
        kind: "counter",
        help,
        reasons: false,
    }
}

/// In the order of the cells.
const METRICS: [Metric; 12] = [
    counter(
        "ppv2_preload_datagrams_received_total",
        "Datagrams received on the sockets that are taken over: those delivered and those dropped.",
    ),
    counter(
        "ppv2_preload_datagrams_delivered_total",
        "Datagrams handed to the program.",
    ),
    counter(
        "ppv2_preload_datagrams_direct_total",
        "Datagrams among those delivered that are handed over as they came, from PPV2_PEERS.",
    ),
    Metric {
        reasons: true,
        ..counter(
            "ppv2_preload_datagrams_dropped_total",
            "Datagrams not handed to the program, by reason.",
        )
    },
    counter(
        "ppv2_preload_replies_sent_total",
        "Datagrams sent to clients by their reply paths.",
    ),
    counter(
        "ppv2_preload_replies_without_path_total",
        "Datagrams not sent: their address is no client's, or was forgotten.",
    ),
    Metric {
        kind: "gauge",
        ..counter(
            "ppv2_preload_clients",
            "Clients remembered, as of the latest datagram.",
        )
    },
    counter(
        "ppv2_preload_clients_evicted_total",
        "Clients forgotten early to make room: raise PPV2_MAX_CLIENTS.",
    ),
    counter(
        "ppv2_preload_senders_not_remembered_total",
        "Headers whose sender found no room: raise PPV2_MAX_CLIENTS.",
    ),
    counter(
        "ppv2_preload_table_resets_total",
        "Times that all clients were forgotten: a process died while it used the table, or the table was full.",
    ),
    counter(
        "ppv2_preload_interrupted_total",
        "Calls of signal handlers that failed, since they had interrupted this library.",
    ),
    counter(
        "ppv2_preload_panics_total",
        "Faults of this library, each caught.",
    ),
];

const WIDTH: usize = 20;

/// The counters, and the text that shows them.
#[derive(Debug)]
pub(crate) struct Counts {
    /// In memory that processes share, whether or not they share the table.
    cells: &'static [AtomicU64; CELLS],
    /// Whether processes have a table, and with it a lock, each.
    fork: Fork,
    text: Option<Text>,
    /// Whether this program has bound a socket or received by one, and the text shows its
    /// numbers. One that has merely inherited a socket leaves those of its parent.
    shown: AtomicBool,
}

/// The mapped file, and where each cell's number is in it.
#[derive(Debug)]
pub(crate) struct Text {
    start: *mut u8,
    at: [usize; CELLS],
}

/// The statistics file can't be used.
#[derive(Debug, Error)]
#[error("PPV2_STATS={}: {problem}", file.display())]
pub(crate) struct StatsError {
    file: PathBuf,
    problem: StatsFileError,
}

impl Counts {
    /// # Errors
    ///
    /// There is no memory for the numbers.
    pub(crate) fn new(text: Option<Text>, fork: Fork) -> io::Result<Self> {
        // SAFETY: a new mapping changes no other memory.
        let cells = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size_of::<[AtomicU64; CELLS]>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if cells == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            // SAFETY: it is mapped for good, and zeroes are valid numbers.
            cells: unsafe { &*cells.cast() },
            fork,
            text,
            shown: AtomicBool::new(false),
        })
    }

    /// Has the text show these counts from now on.
    #[inline]
    pub(crate) fn show(&self) {
        if !self.shown.load(Ordering::Relaxed) {
            self.show_all();
        }
    }

    #[cold]
    fn show_all(&self) {
        if let Some(text) = &self.text
            && !self.shown.swap(true, Ordering::SeqCst)
        {
            for index in 0..CELLS {
                self.write(text, index);
            }
        }
    }

    /// Whether anybody sees what is counted. Without the file, nobody can.
    #[inline]
    pub(crate) fn are_shown(&self) -> bool {
        self.text.is_some()
    }

    #[inline]
    fn are_read(&self) -> bool {
        cfg!(test) || self.are_shown()
    }

    #[inline]
    pub(crate) fn add(&self, cell: Cell, by: u64) {
        if !self.are_read() {
            return;
        }
        let index = cell.index();
        self.cells[index].fetch_add(by, Ordering::Relaxed);
        if let Some(text) = &self.text {
            self.write(text, index);
            self.show();
        }
    }

    /// As `add`, for a cell that changes under the table's lock alone.
    #[inline]
    pub(crate) fn add_locked(&self, cell: Cell, by: u64) {
        if self.fork == Fork::Separate {
            // Each process holds another lock.
            return self.add(cell, by);
        }
        if !self.are_read() {
            return;
        }
        let index = cell.index();
        let number = self.cells[index].load(Ordering::Relaxed).wrapping_add(by);
        self.cells[index].store(number, Ordering::Relaxed);
        if let Some(text) = &self.text {
            text.write(index, number);
            self.show();
        }
    }

    /// For [`Cell::Clients`], which goes up and down. Only under the table's lock. Not where
    /// each process has a table: nobody takes away what one had when it ended.
    pub(crate) fn add_signed(&self, cell: Cell, by: i64) {
        if by != 0 && self.fork == Fork::Shared {
            // Wraps around, as the sum of what is added and subtracted doesn't.
            self.add_locked(cell, by.cast_unsigned());
        }
    }

    /// Sets a cell to 0. Only under the table's lock.
    pub(crate) fn clear(&self, cell: Cell) {
        if self.fork == Fork::Separate {
            return;
        }
        let number = self.get(cell);
        self.add_locked(cell, number.wrapping_neg());
    }

    pub(crate) fn get(&self, cell: Cell) -> u64 {
        self.cells[cell.index()].load(Ordering::Relaxed)
    }

    /// Writes a cell's number. Several processes may do so at once: one that writes an old
    /// number, or between another's digits, sees the new one afterwards and writes again.
    fn write(&self, text: &Text, index: usize) {
        loop {
            let number = self.cells[index].load(Ordering::SeqCst);
            text.write(index, number);
            fence(Ordering::SeqCst);
            if self.cells[index].load(Ordering::SeqCst) == number {
                return;
            }
        }
    }
}

impl Text {
    fn write(&self, index: usize, mut number: u64) {
        for position in (0..WIDTH).rev() {
            let digit = u8::try_from(number % 10).unwrap_or_default();
            number /= 10;
            // SAFETY: each number's place lies within the text, which stays mapped.
            let byte = unsafe { AtomicU8::from_ptr(self.start.add(self.at[index] + position)) };
            byte.store(b'0' + digit, Ordering::Relaxed);
        }
    }

    /// Creates or reuses `file`, and maps it.
    pub(crate) fn open(file: &Path) -> Result<Self, StatsError> {
        let failed = |problem| StatsError {
            file: file.to_owned(),
            problem,
        };
        Self::map(file).map_err(failed)
    }

    fn map(file: &Path) -> Result<Self, StatsFileError> {
        let (text, at) = layout();
        // SAFETY: it only asks.
        let user = unsafe { libc::geteuid() };
        let mut opened = stats_file::open(file, user)?;
        let mut before = Vec::new();
        (&mut opened)
            .take(1 + text.len() as u64)
            .read_to_end(&mut before)?;
        if !before.is_empty() && before.len() != text.len() {
            // Another version's, which may have it mapped: a shorter file would end that
            // program.
            fs::remove_file(file)?;
            opened = stats_file::open(file, user)?;
            before.clear();
        }
        if !same_but_numbers(&before, text.as_bytes()) {
            opened.rewind()?;
            opened.write_all(text.as_bytes())?;
        }
        // SAFETY: a new mapping changes no other memory.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                text.len(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                opened.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        Ok(Self {
            start: start.cast(),
            at,
        })
    }
}

/// Opens the file that PPV2_STATS names. Once, before the program begins.
///
/// A program that was started by one with the same environment may lack the right to
/// open it, or its path, and goes without: only the first is refused.
pub(crate) fn start(file: Option<&Path>) -> Result<Option<Text>, StatsError> {
    let Some(file) = file else {
        return Ok(None);
    };
    let before = env::var_os(STATS_OPENED).is_some_and(|opened| opened == file);
    match Text::open(file) {
        Ok(text) => {
            // SAFETY: the program has not begun, so no other thread reads the environment.
            unsafe { env::set_var(STATS_OPENED, file) };
            Ok(Some(text))
        }
        Err(_) if before => Ok(None),
        Err(error) => Err(error),
    }
}

/// The text with all numbers 0, and where they are.
fn layout() -> (String, [usize; CELLS]) {
    let mut text = String::new();
    let mut at = [0; CELLS];
    let mut cells = at.iter_mut();
    let mut line = |text: &mut String, name: &str, label: Option<&str>| {
        text.push_str(name);
        if let Some(reason) = label {
            let _ = write!(text, "{{reason=\"{reason}\"}}");
        }
        text.push(' ');
        if let Some(at) = cells.next() {
            *at = text.len();
        }
        let _ = writeln!(text, "{:0WIDTH$}", 0);
    };
    for Metric {
        name,
        kind,
        help,
        reasons,
    } in METRICS
    {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        if reasons {
            let sdk = DropReason::ALL.iter().map(|reason| reason.as_str());
            for reason in sdk.chain(OWN_REASONS) {
                line(&mut text, name, Some(reason));
            }
        } else {
            line(&mut text, name, None);
        }
    }
    (text, at)
}

/// Whether a file is one of this version: its numbers are those of a program that ran
/// before, or still runs.
fn same_but_numbers(before: &[u8], text: &[u8]) -> bool {
    before.len() == text.len()
        && before
            .iter()
            .zip(text)
            .all(|(before, now)| before == now || *now == b'0' && before.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use ppv2_preload_settings::stats_file::START;

    use super::*;

    /// A path in a directory of its own, which is removed at the end.
    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            let directory = env::temp_dir().join(format!("ppv2-{}-{name}", std::process::id()));
            fs::create_dir_all(&directory).unwrap();
            Self(directory)
        }

        fn file(&self) -> PathBuf {
            self.0.join("stats")
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn counts(file: &Path) -> Counts {
        let counts = Counts::new(Some(Text::open(file).unwrap()), Fork::Shared).unwrap();
        counts.show();
        counts
    }

    #[test]
    fn every_cell_has_a_line_of_its_own() {
        let place = Place::new("cells");
        let counts = counts(&place.file());
        let reasons = DropReason::ALL.iter().copied().map(Cell::Dropped);
        let cells = [Cell::Received, Cell::Delivered, Cell::Direct]
            .into_iter()
            .chain(reasons)
            .chain([
                Cell::DroppedClientFamily,
                Cell::DroppedOtherClient,
                Cell::DroppedNoMemory,
                Cell::DroppedInterrupted,
                Cell::DroppedBadPointer,
                Cell::RepliesSent,
                Cell::RepliesWithoutPath,
                Cell::Clients,
                Cell::ClientsEvicted,
                Cell::SendersNotRemembered,
                Cell::TableResets,
                Cell::Interrupted,
                Cell::Panics,
            ]);
        let mut expected = 0;
        for cell in cells {
            expected += 1;
            counts.add(cell, expected);
        }
        assert_eq!(usize::try_from(expected), Ok(CELLS));

        let text = fs::read_to_string(place.file()).unwrap();
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let numbers = lines.map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap());
        assert_eq!(
            numbers.collect::<Vec<u64>>(),
            (1..=expected).collect::<Vec<_>>()
        );
        for line in [
            "# TYPE ppv2_preload_datagrams_received_total counter",
            "ppv2_preload_datagrams_received_total 00000000000000000001",
            "ppv2_preload_datagrams_dropped_total{reason=\"untrusted\"} 00000000000000000004",
            "ppv2_preload_datagrams_dropped_total{reason=\"other_client\"} 00000000000000000016",
            "ppv2_preload_datagrams_dropped_total{reason=\"bad_pointer\"} 00000000000000000019",
            "ppv2_preload_replies_sent_total 00000000000000000020",
            "# TYPE ppv2_preload_clients gauge",
            "ppv2_preload_panics_total 00000000000000000027",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} in {text}");
        }
        counts.add(Cell::Received, u64::MAX - 1);
        let text = fs::read_to_string(place.file()).unwrap();
        assert!(
            text.contains("received_total 18446744073709551615\n"),
            "{text}"
        );
    }

    #[test]
    fn a_program_that_counts_nothing_leaves_the_numbers() {
        let place = Place::new("shared");
        let first = counts(&place.file());
        let text = || fs::read_to_string(place.file()).unwrap();
        for begin in [
            |second: &Counts| second.add(Cell::Delivered, 1),
            |second: &Counts| second.add_locked(Cell::Delivered, 1),
        ] {
            first.add(Cell::Received, 5);
            let second = Text::open(&place.file()).unwrap();
            let second = Counts::new(Some(second), Fork::Shared).unwrap();
            assert!(!text().contains("received_total 00000000000000000000\n"));
            begin(&second);
            assert!(text().contains("received_total 00000000000000000000\n"));
            assert!(text().contains("delivered_total 00000000000000000001\n"));
        }
    }

    #[test]
    fn errors_name_the_file() {
        let place = Place::new("foreign");
        let foreign = "x".repeat(layout().0.len());
        fs::write(place.file(), &foreign).unwrap();
        let error = Text::open(&place.file()).unwrap_err().to_string();
        let start = format!("PPV2_STATS={}: it holds", place.file().display());
        assert!(error.starts_with(&start), "{error}");
        assert_eq!(fs::read_to_string(place.file()).unwrap(), foreign);
    }

    #[test]
    fn a_file_of_another_version_is_replaced() {
        let place = Place::new("version");
        let other = format!("{START}something_else That.\n");
        fs::write(place.file(), other).unwrap();
        let counts = counts(&place.file());
        counts.add(Cell::Panics, 1);
        let text = fs::read_to_string(place.file()).unwrap();
        assert_eq!(text.len(), layout().0.len());
        assert!(text.ends_with("ppv2_preload_panics_total 00000000000000000001\n"));
    }
}
