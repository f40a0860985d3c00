//! The terminal: raw and on its second screen while `top` runs, and as before afterwards,
//! however it ends.

use std::io::{self, BufWriter, Stdout, Write};
use std::mem::ManuallyDrop;
use std::panic;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::{Hide, Show};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use ratatui::layout::Rect;
use ratatui::{Frame, Terminal};

/// Room for a whole picture, which the terminal then gets at once.
const PICTURE: usize = 64 * 1024;

/// Whether the terminal is to be given back.
static IS_TAKEN: AtomicBool = AtomicBool::new(false);

/// The terminal of standard output, which is as before once this is dropped or a thread
/// panics.
pub struct Screen {
    /// Its own end prints an error where the terminal is gone, which panics without standard
    /// error.
    terminal: ManuallyDrop<Terminal<CrosstermBackend<BufWriter<Stdout>>>>,
}

impl Screen {
    /// Takes the terminal.
    ///
    /// # Errors
    ///
    /// There is none, or it does not take commands.
    pub fn open() -> io::Result<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let hook = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                restore();
                hook(info);
            }));
        });
        take().inspect_err(|_| restore())?;
        let writer = BufWriter::with_capacity(PICTURE, io::stdout());
        let terminal = Terminal::new(CrosstermBackend::new(writer)).inspect_err(|_| restore())?;
        Ok(Self {
            terminal: ManuallyDrop::new(terminal),
        })
    }

    /// Draws a picture: what has changed is written.
    ///
    /// # Errors
    ///
    /// The terminal is gone.
    pub fn draw(&mut self, picture: impl FnOnce(&mut Frame<'_>)) -> io::Result<()> {
        self.terminal.draw(picture)?;
        self.terminal.backend_mut().flush()
    }

    /// Has the next picture written whole.
    ///
    /// # Errors
    ///
    /// The terminal is gone.
    pub fn clear(&mut self) -> io::Result<()> {
        // Its `clear` asks the terminal for the cursor, and another thread reads what it answers.
        let size = self.terminal.size()?;
        self.terminal.resize(Rect::from(size))
    }

    /// Takes the terminal again, after another program may have used it.
    ///
    /// # Errors
    ///
    /// The terminal is gone.
    pub fn retake(&mut self) -> io::Result<()> {
        // It notes the modes that are restored at the end.
        let _ = disable_raw_mode();
        take()?;
        self.clear()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        restore();
    }
}

fn take() -> io::Result<()> {
    IS_TAKEN.store(true, Ordering::SeqCst);
    enable_raw_mode()?;
    execute!(io::stdout(), EnterAlternateScreen, Hide)
}

/// Gives the terminal back. Each part is tried: there is nobody to tell of errors.
pub(super) fn restore() {
    if IS_TAKEN.swap(false, Ordering::SeqCst) {
        let _ = disable_raw_mode();
        let _ = execute!(io::stdout(), LeaveAlternateScreen, Show);
    }
}

/// As much of it as a terminal that takes no output can't hold back.
pub(super) fn set_modes_back() {
    if IS_TAKEN.swap(false, Ordering::SeqCst) {
        let _ = disable_raw_mode();
    }
}
