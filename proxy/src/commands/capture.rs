//! `capture`: explains the headers in a capture file, and finds mistakes in them.

mod file;
mod header;
mod judge;
mod packet;
mod report;

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use clap::Args;
use thiserror::Error;

use self::file::Ending;
pub use self::file::Unreadable;
use self::judge::Judge;
use self::packet::Packet;
use self::report::{Report, Summary};

/// What to read, and what to print.
#[derive(Args, Debug)]
#[allow(missing_docs, reason = "the help texts say it")]
pub struct Options {
    /// The pcap or pcapng file; - reads it from standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// Port of servers that get headers: datagrams to it must have one, and those of other ports
    /// are left out; repeatable
    #[arg(long = "port", value_name = "PORT")]
    pub ports: Vec<u16>,

    /// Print only datagrams with mistakes, and the summary
    #[arg(long)]
    pub mistakes: bool,

    /// Explain each header byte range by byte range, as `decode` does
    #[arg(long, conflicts_with = "json")]
    pub bytes: bool,

    /// Print a JSON object for each datagram, and one for the summary
    #[arg(long)]
    pub json: bool,
}

/// Why a capture was not read to its end, or not without mistakes.
#[derive(Debug, Error)]
pub enum CaptureError {
    /// The file can't be read on.
    #[error("{file}")]
    File {
        /// Its name.
        file: String,
        /// Why.
        #[source]
        error: Unreadable,
    },
    /// There are mistakes.
    #[error("{mistakes} in {datagrams}", mistakes = counted(*.mistakes, "mistake"), datagrams = counted(*.datagrams, "datagram"))]
    Mistakes {
        /// How many.
        mistakes: u64,
        /// In how many datagrams.
        datagrams: u64,
    },
    /// The result could not be written.
    #[error("writing the result")]
    Output(#[source] io::Error),
}

/// `1 mistake`, `2 mistakes`.
fn counted(count: u64, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

/// What ends the reading of a file.
enum Stop {
    Unreadable(Unreadable),
    Output(io::Error),
}

impl From<Unreadable> for Stop {
    fn from(error: Unreadable) -> Self {
        Self::Unreadable(error)
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

/// Explains the headers of a file, and writes the explanation to `out`.
///
/// # Errors
///
/// [`CaptureError`]; [`CaptureError::Mistakes`] once all is written.
pub fn run(options: &Options, out: &mut impl Write) -> Result<(), CaptureError> {
    let name = options.file.display().to_string();
    let result = match name.as_str() {
        "-" => explain(options, io::stdin(), out),
        _ => match File::open(&options.file) {
            Ok(file) => explain(options, file, out),
            Err(error) => Err(Stop::Unreadable(error.into())),
        },
    };
    match result {
        Ok(summary) if summary.mistakes() == 0 => Ok(()),
        Ok(summary) => Err(CaptureError::Mistakes {
            mistakes: summary.mistakes(),
            datagrams: summary.faulty,
        }),
        Err(Stop::Output(error)) => Err(CaptureError::Output(error)),
        Err(Stop::Unreadable(error)) => Err(CaptureError::File { file: name, error }),
    }
}

fn explain(
    options: &Options,
    input: impl Read + Send,
    out: &mut impl Write,
) -> Result<Summary, Stop> {
    let mut report = Report::new(options, out);
    let mut judge = Judge::new(&options.ports);
    let is_of_interest = |port: u16| options.ports.is_empty() || options.ports.contains(&port);
    let ending = file::read(input, |record| {
        report.summary.packets += 1;
        match Packet::read(record.link, record.data) {
            Packet::Udp(datagram) => {
                if !is_of_interest(datagram.to.port()) && !is_of_interest(datagram.from.port()) {
                    report.summary.other_ports += 1;
                    return Ok(());
                }
                let parts = header::split_burst(datagram.payload);
                let count = parts.len();
                for (part, payload) in (1..).zip(parts) {
                    let finding = judge.look(record.number, &datagram, payload);
                    report.datagram(record, &datagram, payload, (part, count), &finding)?;
                }
            }
            Packet::LaterFragment { from, to } => report.later_fragment(record, from, to)?,
            Packet::Other => report.summary.not_udp += 1,
            Packet::Malformed => report.summary.malformed += 1,
            Packet::UnknownLink => {
                report.summary.unknown_link += 1;
                report.summary.last_unknown_link = record.link.0;
            }
        }
        Ok(())
    });
    let is_cut = match ending {
        Ok(ending) => ending == Ending::Cut,
        Err(Stop::Output(error)) => return Err(error.into()),
        Err(stop) => {
            // What was read is worth its summary.
            if report.summary.packets > 0 {
                report.end(false, judge.unfollowed)?;
            }
            return Err(stop);
        }
    };
    let Summary {
        packets,
        unknown_link,
        last_unknown_link,
        ..
    } = report.summary;
    if packets > 0 && packets == unknown_link {
        return Err(Unreadable::LinkType(last_unknown_link).into());
    }
    report.end(is_cut, judge.unfollowed)?;
    Ok(report.summary)
}

#[cfg(test)]
mod tests;
