//! The picture of the README: what a datagram costs each proxy, nginx being 1.

use std::fmt::Write;

use crate::echo::Header;
use crate::outcome::{Measured, Outcome};
use crate::peer::{Peer, Program};
use crate::work::Figure;

/// What is shown, where it was measured.
const WORKS: [&str; 5] = [
    "scattered-64",
    "runs-64",
    "scattered-1024",
    "scattered-16384",
    "burst-32",
];
const PEERS: [Peer; 9] = [
    Peer::Ours,
    Peer::Network,
    Peer::Tagged,
    Peer::TaggedBatch,
    Peer::Bare,
    Peer::Nginx,
    Peer::Envoy,
    Peer::Sozu,
    Peer::Udppp,
];

const WIDTH: f64 = 760.0;
const MARGIN: f64 = 16.0;
/// Where bars begin: names end before it.
const LEFT: f64 = 228.0;
/// Pixels for the cost of nginx.
const UNIT: f64 = 164.0;
/// Longer bars are cut, their figure still told.
const LONGEST: f64 = 2.0;
const ROW: f64 = 21.0;
const GAP: f64 = 24.0;
const SMALL: f64 = 11.0;
const NORMAL: f64 = 13.0;
const LARGE: f64 = 16.0;

/// Of a character, relative to the size of the font: more than the average of the fonts
/// that browsers take for `sans-serif`.
const CHARACTER: f64 = 0.6;

/// Colours for light and dark pages; the background is drawn too, since a page's own is
/// not known to a picture.
const STYLE: &str = "<style>
text { fill: #1f2328 } .page { fill: #ffffff } .note { fill: #59636e }
.ours { fill: #1a7f5a } .floor { fill: #b8c4bf } .other { fill: #7d8fa6 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .page { fill: #0d1117 } .note { fill: #9198a1 }
.ours { fill: #2fa77a } .floor { fill: #4d5a54 } .other { fill: #66788f }
}
</style>
";

/// Draws downward.
struct Canvas {
    body: String,
    y: f64,
}

pub(crate) fn draw(outcome: &Outcome) -> String {
    let mut canvas = Canvas {
        body: String::new(),
        y: 28.0,
    };
    let title = "CPU that a proxy spends on a datagram; nginx = 1, less is better";
    canvas.text(MARGIN, LARGE, "font-weight=\"bold\"", title);
    canvas.y += 20.0;
    canvas.note(
        "In brackets: proxy, server and clients together. The bare loop has a socket per session,",
    );
    canvas.note(
        "sends each datagram with its header, and does nothing else. nginx and Envoy send none.",
    );
    canvas.y += 12.0;
    for work in WORKS.iter().filter_map(|name| outcome.work(name)) {
        canvas.group(work);
    }
    canvas.y -= 6.0;
    let rounds = outcome.rounds;
    canvas.note(&format!(
        "One worker, over loopback; medians of {rounds} rounds. Repeat it with: make bench"
    ));
    canvas.note(&outcome.machine.to_string());
    let height = canvas.y;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\">\n<title>{title}</title>\n{STYLE}\
         <rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\"/>\n{}</svg>\n",
        canvas.body
    )
}

impl Canvas {
    /// A line of text, in a smaller font where it would not fit.
    fn text(&mut self, x: f64, size: f64, attributes: &str, text: &str) {
        let size = fitting(size, WIDTH - MARGIN - x, text);
        let _ = writeln!(
            self.body,
            "<text x=\"{x:.0}\" y=\"{:.0}\" font-size=\"{size:.1}\" {attributes}>{}</text>",
            self.y,
            escape(text)
        );
    }

    fn note(&mut self, text: &str) {
        self.text(MARGIN, SMALL, "class=\"note\"", text);
        self.y += 15.0;
    }

    fn group(&mut self, work: &Measured) {
        let rows: Vec<_> = PEERS
            .into_iter()
            .filter_map(|peer| Some((peer, work.ratio(peer, Peer::Nginx, Figure::Cpu)?.median)))
            .collect();
        if rows.is_empty() {
            return;
        }
        self.text(MARGIN, NORMAL, "font-weight=\"bold\"", work.title);
        self.y += 10.0;
        for (peer, ratio) in rows {
            self.row(work, peer, ratio);
        }
        self.y += GAP;
    }

    fn row(&mut self, work: &Measured, peer: Peer, ratio: f64) {
        let length = ratio.min(LONGEST) * UNIT;
        let class = match peer.program() {
            Program::Ours | Program::Reference => "ours",
            Program::Bare => "floor",
            Program::Nginx | Program::Envoy | Program::Sozu | Program::Udppp | Program::Dnsdist => {
                "other"
            }
        };
        let _ = writeln!(
            self.body,
            "<rect class=\"{class}\" x=\"{LEFT:.0}\" y=\"{:.0}\" width=\"{length:.1}\" \
             height=\"15\"/>",
            self.y
        );
        self.y += 12.0;
        let name = peer.name();
        let size = fitting(NORMAL, LEFT - 8.0 - MARGIN, name);
        let _ = writeln!(
            self.body,
            "<text x=\"{:.0}\" y=\"{:.0}\" font-size=\"{size:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            self.y,
            escape(name)
        );
        let mut figures = format!("{ratio:.2}");
        if let Some(whole) = work.ratio(peer, Peer::Nginx, Figure::Whole) {
            let _ = write!(figures, " ({:.2})", whole.median);
        }
        if peer.header() == Header::None {
            figures.push_str(" no header");
        }
        self.text(LEFT + length + 6.0, NORMAL, "", &figures);
        self.y += ROW - 12.0;
    }
}

/// Pixels that a text takes, or rather less.
fn width(text: &str, size: f64) -> f64 {
    text.chars().count() as f64 * CHARACTER * size
}

/// A size of the font, or a smaller one in which a text fits.
fn fitting(size: f64, room: f64, text: &str) -> f64 {
    let largest = room / width(text, 1.0);
    // One decimal is written.
    size.min((largest * 10.0).floor() / 10.0)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::tests::{measured, outcome};

    /// The attribute `name` of an element, as a number.
    fn number(element: &str, name: &str) -> f64 {
        let (_, rest) = element.split_once(&format!(" {name}=\"")).unwrap();
        rest.split_once('"').unwrap().0.parse().unwrap()
    }

    #[test]
    fn all_text_fits() {
        let works = WORKS.map(|name| {
            // All costs, from next to nothing to more than is drawn.
            let cpu = [0.01, 1.9, 40.0, 2.0, 1.0, 1.0, 2.0, 123.0, 0.5].map(|cpu| [cpu]);
            let peers = PEERS.into_iter().zip(&cpu);
            let peers: Vec<_> = peers.map(|(peer, cpu)| (peer, &cpu[..])).collect();
            measured(name, &peers)
        });
        let svg = draw(&outcome(works.into()));
        let texts: Vec<_> = svg
            .lines()
            .filter(|line| line.starts_with("<text "))
            .collect();
        assert!(texts.len() > WORKS.len() * PEERS.len() * 2, "{svg}");
        for text in texts {
            let content = text.split(['>', '<']).nth(2).unwrap();
            let width = width(content, number(text, "font-size"));
            let x = number(text, "x");
            if text.contains("text-anchor=\"end\"") {
                assert!(x - width >= MARGIN - 0.5, "{text}");
            } else {
                assert!(x + width <= WIDTH - MARGIN + 0.5, "{text}");
            }
        }
    }
}
