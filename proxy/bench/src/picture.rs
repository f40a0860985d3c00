//! The picture of the README: what a datagram costs each proxy, nginx being 1.

use std::fmt::Write;

use crate::outcome::{Measured, Outcome};
use crate::peer::Peer;
use crate::work::Figure;

const WORKS: [&str; 3] = ["scattered-64", "burst-8", "burst-32"];

const WIDTH: u32 = 720;
const LEFT: f64 = 130.0;
/// Pixels for the cost of nginx.
const UNIT: f64 = 250.0;
/// Longer bars are cut, their figure still told.
const LONGEST: f64 = 2.0;
const ROW: u32 = 22;

pub(crate) fn draw(outcome: &Outcome) -> String {
    let mut body = String::new();
    let mut y = 58;
    for work in WORKS.iter().filter_map(|name| outcome.work(name)) {
        group(&mut body, work, &mut y);
    }
    let height = y + 26;
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">
<title>CPU per datagram, nginx = 1</title>
<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>
<text x="16" y="26" font-size="16" font-weight="bold">CPU per datagram, nginx = 1 (less is better)</text>
"##
    );
    svg.push_str(&body);
    let _ = writeln!(
        svg,
        r##"<text x="16" y="{}" font-size="11" fill="#666666">one worker, over loopback, median of {} rounds · {} · repeat with: make bench</text>
</svg>"##,
        height - 8,
        outcome.rounds,
        escape(&outcome.machine.to_string()),
    );
    svg
}

fn group(body: &mut String, work: &Measured, y: &mut u32) {
    let _ = writeln!(
        body,
        r#"<text x="16" y="{y}" font-weight="bold">{}</text>"#,
        escape(work.title)
    );
    *y += 8;
    for series in &work.peers {
        let Some(ratio) = work.ratio(series.peer, Peer::Nginx, Figure::Cpu) else {
            continue;
        };
        let length = ratio.median.min(LONGEST) * UNIT;
        let colour = match series.peer {
            Peer::Ours | Peer::OursTransparent | Peer::OursDsr | Peer::OursDsrSdk => "#1a7f5a",
            Peer::Bare | Peer::BareCareful => "#b8c4bf",
            Peer::OursBusyPoll
            | Peer::OursCoalesce
            | Peer::OursTwice
            | Peer::Nginx
            | Peer::NginxTransparent
            | Peer::Envoy
            | Peer::Sozu
            | Peer::Udppp
            | Peer::Dnsdist => "#7d8fa6",
        };
        let header = if series.peer.header() {
            " + header"
        } else {
            ""
        };
        let _ = writeln!(
            body,
            r##"<text x="{}" y="{}" text-anchor="end">{}</text><rect x="{LEFT}" y="{}" width="{length:.1}" height="15" fill="{colour}"/><text x="{:.1}" y="{}" fill="#333333">{:.2}{header}</text>"##,
            LEFT - 8.0,
            *y + 12,
            escape(series.peer.name()),
            *y,
            LEFT + length + 6.0,
            *y + 12,
            ratio.median,
        );
        *y += ROW;
    }
    *y += 22;
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
