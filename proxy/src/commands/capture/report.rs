//! What is printed of a capture: a line for each datagram with a header or a mistake, and
//! a summary; as text or as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::net::IpAddr;

use ppv2::{Header, Origin};
use serde_json::{Value, json};

use super::super::decode;
use super::file::Record;
use super::header::Front;
use super::judge::{Finding, Mistake};
use super::packet::Datagram;
use super::{Options, counted};
use crate::config::printable;

/// Counts of a capture.
#[derive(Debug, Default)]
pub(super) struct Summary {
    pub(super) packets: u64,
    pub(super) other_ports: u64,
    pub(super) not_udp: u64,
    pub(super) malformed: u64,
    pub(super) unknown_link: u64,
    pub(super) last_unknown_link: i32,
    /// Datagrams with a mistake.
    pub(super) faulty: u64,
    datagrams: u64,
    v2: u64,
    local: u64,
    spp: u64,
    v1: u64,
    without: u64,
    replies: u64,
    bursts: u64,
    later_fragments: u64,
    /// Of each kind: how many, and the packet with the first.
    by_kind: BTreeMap<Mistake, (u64, u64)>,
}

impl Summary {
    pub(super) fn mistakes(&self) -> u64 {
        self.by_kind.values().map(|(count, _)| count).sum()
    }
}

/// Writes the lines.
pub(super) struct Report<'o, W> {
    options: &'o Options,
    out: &'o mut W,
    begin: Option<f64>,
    pub(super) summary: Summary,
}

impl<'o, W: Write> Report<'o, W> {
    pub(super) fn new(options: &'o Options, out: &'o mut W) -> Self {
        Self {
            options,
            out,
            begin: None,
            summary: Summary::default(),
        }
    }

    /// Seconds since the first packet that was printed.
    fn time(&mut self, record: &Record<'_>) -> f64 {
        record.time - *self.begin.get_or_insert(record.time)
    }

    /// Counts a datagram, and prints it if it is worth a line. `part` says which datagram of
    /// how many in its packet it is.
    pub(super) fn datagram(
        &mut self,
        record: &Record<'_>,
        datagram: &Datagram<'_>,
        payload: &[u8],
        part: (usize, usize),
        finding: &Finding<'_>,
    ) -> io::Result<()> {
        let time = self.time(record);
        self.count(record.number, part, finding);
        let has_header = finding.front.format().is_some();
        let is_shown = match self.options.mistakes {
            true => !finding.mistakes.is_empty(),
            false => has_header || !finding.mistakes.is_empty(),
        };
        if !is_shown {
            return Ok(());
        }
        if self.options.json {
            let line = as_json(record.number, time, datagram, part, finding);
            return writeln!(self.out, "{line}");
        }
        let number = match part {
            (_, 1) => record.number.to_string(),
            (part, count) => format!("{} ({part} of {count})", record.number),
        };
        let Datagram { from, to, .. } = datagram;
        let what = described(&finding.front);
        let reply = if finding.is_reply { "reply, " } else { "" };
        writeln!(
            self.out,
            "packet {number}, {time:.6} s, {from} to {to}: {reply}{what}"
        )?;
        for remark in &finding.remarks {
            writeln!(self.out, "  note: {remark}")?;
        }
        for (mistake, text) in &finding.mistakes {
            writeln!(self.out, "  mistake ({}): {text}", mistake.name())?;
        }
        if self.options.bytes
            && let Ok(text) = decode::explain(payload)
        {
            self.out.write_all(text.as_bytes())?;
        }
        Ok(())
    }

    fn count(&mut self, number: u64, (part, parts): (usize, usize), finding: &Finding<'_>) {
        let summary = &mut self.summary;
        summary.datagrams += 1;
        summary.bursts += u64::from(part == 1 && parts > 1);
        summary.replies += u64::from(finding.is_reply);
        summary.faulty += u64::from(!finding.mistakes.is_empty());
        match &finding.front {
            Front::V2(header, _) => {
                summary.v2 += 1;
                summary.local += u64::from(header.origin() == Origin::Local);
            }
            Front::Split(_) | Front::Invalid(_) => summary.v2 += 1,
            Front::Spp(..) => summary.spp += 1,
            Front::V1(..) => summary.v1 += 1,
            Front::Bare(_) => summary.without += 1,
        }
        for (mistake, _) in &finding.mistakes {
            let of_kind = summary.by_kind.entry(*mistake).or_insert((0, number));
            of_kind.0 += 1;
        }
    }

    /// A fragment that is not the first.
    pub(super) fn later_fragment(
        &mut self,
        record: &Record<'_>,
        from: IpAddr,
        to: IpAddr,
    ) -> io::Result<()> {
        let time = self.time(record);
        self.summary.later_fragments += 1;
        if self.options.mistakes || !self.options.ports.is_empty() {
            return Ok(());
        }
        let number = record.number;
        if self.options.json {
            let line = json!({ "packet": number, "time": time, "from": from, "to": to, "fragment": "later" });
            return writeln!(self.out, "{line}");
        }
        writeln!(
            self.out,
            "packet {number}, {time:.6} s, {from} to {to}: a later IP fragment of a datagram; the first has its header"
        )
    }

    /// Prints the summary.
    pub(super) fn end(&mut self, is_cut: bool, unfollowed: u64) -> io::Result<()> {
        let summary = &self.summary;
        if self.options.json {
            let mistakes: BTreeMap<_, _> = summary
                .by_kind
                .iter()
                .map(|(kind, (count, first))| {
                    (
                        kind.name(),
                        json!({ "count": count, "first_packet": first }),
                    )
                })
                .collect();
            let line = json!({ "summary": {
                "packets": summary.packets,
                "datagrams": summary.datagrams,
                "v2": summary.v2,
                "local": summary.local,
                "spp": summary.spp,
                "v1": summary.v1,
                "without": summary.without,
                "replies": summary.replies,
                "bursts": summary.bursts,
                "later_fragments": summary.later_fragments,
                "other_ports": summary.other_ports,
                "not_udp": summary.not_udp,
                "malformed": summary.malformed,
                "unknown_link": summary.unknown_link,
                "unfollowed": unfollowed,
                "cut": is_cut,
                "mistakes": mistakes,
            }});
            return writeln!(self.out, "{line}");
        }
        let mut text = format!(
            "{}, {}: {} with PROXY v2 ({} of them LOCAL), {} with SPP, {} with v1 text, {} without a header; {} are replies\n",
            counted(summary.packets, "packet"),
            counted(summary.datagrams, "UDP datagram"),
            summary.v2,
            summary.local,
            summary.spp,
            summary.v1,
            summary.without,
            summary.replies,
        );
        let link = summary.last_unknown_link;
        for (count, what) in [
            (summary.later_fragments, "later IP fragments"),
            (
                summary.bursts,
                "packets that hold a burst of datagrams, which the network interface splits or has joined",
            ),
            (summary.other_ports, "datagrams of other ports, left out"),
            (summary.not_udp, "packets of other protocols"),
            (summary.malformed, "packets that are damaged or too short"),
            (
                unfollowed,
                "datagrams of more flows than are followed: a missing header is not found there",
            ),
        ] {
            if count > 0 {
                let _ = writeln!(text, "{count} {what}");
            }
        }
        if summary.unknown_link > 0 {
            let _ = writeln!(
                text,
                "{} packets of link type {link}, which is not known here",
                summary.unknown_link
            );
        }
        if is_cut {
            text += "the file ends in the middle of a packet\n";
        }
        if summary.datagrams > 0 && summary.v2 + summary.spp + summary.v1 == 0 {
            text += "no datagram has a header\n";
        }
        for (kind, (count, first)) in &summary.by_kind {
            let name = kind.name();
            let advice = kind.advice();
            let _ = writeln!(
                text,
                "mistake ({name}): {count}, first in packet {first}: {advice}"
            );
        }
        self.out.write_all(text.as_bytes())
    }
}

fn described(front: &Front<'_>) -> String {
    match front {
        Front::V2(header, payload) => {
            let mut text = format!("PROXY v2, {}", origin(header));
            for tlv in header.tlvs() {
                let meaning = decode::meaning(header.tlvs(), tlv);
                let _ = write!(text, ", {} {}", tlv.kind, printable(&meaning));
            }
            let _ = write!(text, "; payload of {}", bytes(payload.len()));
            text
        }
        Front::Spp(header, payload) => format!(
            "SPP, client {}, proxy {}; payload of {}",
            header.client,
            header.proxy,
            bytes(payload.len())
        ),
        Front::V1(line, payload) => {
            format!(
                "PROXY v1 text `{line}`; payload of {}",
                bytes(payload.len())
            )
        }
        Front::Split(_) => "a PROXY v2 header that is not whole".to_owned(),
        Front::Invalid(_) => "a PROXY v2 header that is not valid".to_owned(),
        Front::Bare(payload) => format!("no header; payload of {}", bytes(payload.len())),
    }
}

fn bytes(count: usize) -> String {
    counted(count as u64, "byte")
}

fn origin(header: &Header<'_>) -> String {
    match header.origin() {
        Origin::Local => "LOCAL".to_owned(),
        Origin::Ip {
            source,
            destination,
            ..
        } => format!("client {source}, destination {destination}"),
        Origin::Unix { .. } => "UNIX sockets".to_owned(),
        Origin::Unspecified | _ => "no client".to_owned(),
    }
}

fn as_json(
    number: u64,
    time: f64,
    datagram: &Datagram<'_>,
    (part, parts): (usize, usize),
    finding: &Finding<'_>,
) -> Value {
    let mut line = json!({
        "packet": number,
        "time": time,
        "from": datagram.from,
        "to": datagram.to,
        "reply": finding.is_reply,
        "notes": finding.remarks,
        "mistakes": finding.mistakes.iter().map(|(kind, text)| json!({
            "kind": kind.name(),
            "text": text,
        })).collect::<Vec<_>>(),
    });
    if parts > 1 {
        line["part"] = part.into();
        line["parts"] = parts.into();
    }
    if datagram.is_fragment {
        line["fragment"] = "first".into();
    }
    line["header"] = match &finding.front {
        Front::V2(header, _) => v2_as_json(header),
        Front::Spp(header, _) => {
            json!({ "format": "spp", "client": header.client, "destination": header.proxy })
        }
        Front::V1(text, _) => json!({ "format": "v1", "text": text }),
        Front::Split(error) | Front::Invalid(error) => {
            json!({ "format": "v2", "error": error.to_string() })
        }
        Front::Bare(_) => Value::Null,
    };
    line["payload"] = match &finding.front {
        Front::V2(_, payload) | Front::Spp(_, payload) => payload.len().into(),
        Front::V1(_, payload) | Front::Bare(payload) => payload.len().into(),
        Front::Split(_) | Front::Invalid(_) => Value::Null,
    };
    line
}

fn v2_as_json(header: &Header<'_>) -> Value {
    let (source, destination) = match header.origin() {
        Origin::Ip {
            source,
            destination,
            ..
        } => (Some(source), Some(destination)),
        Origin::Local | Origin::Unspecified | Origin::Unix { .. } | _ => (None, None),
    };
    let tlvs = header.tlvs().iter().map(|tlv| {
        let value: String = tlv.value.iter().map(|byte| format!("{byte:02x}")).collect();
        json!({ "type": tlv.kind.0, "value": value })
    });
    json!({
        "format": "v2",
        "command": if header.origin() == Origin::Local { "local" } else { "proxy" },
        "client": source,
        "destination": destination,
        "tlvs": tlvs.collect::<Vec<_>>(),
    })
}
