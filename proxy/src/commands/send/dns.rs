//! DNS questions as payloads, and the answers to them.

use std::fmt::Write as _;
use std::str::FromStr;

use hickory_resolver::proto::op::{Edns, Message, MessageType, Query};
use hickory_resolver::proto::rr::{Name, RecordType};
use thiserror::Error;

use crate::config::printable;

/// Bytes of the longest answer that is asked for: what fits into a packet nearly
/// everywhere (DNS flag day 2020).
const MAX_ANSWER: u16 = 1232;

/// A question.
#[derive(Clone, Debug)]
pub struct Question {
    name: Name,
    kind: RecordType,
}

/// A text is no question.
#[derive(Debug, Error)]
#[error("give NAME or NAME/TYPE, as in example.org or example.org/TXT")]
pub struct NotAQuestion;

impl FromStr for Question {
    type Err = NotAQuestion;

    fn from_str(text: &str) -> Result<Self, NotAQuestion> {
        let (name, kind) = text.rsplit_once('/').unwrap_or((text, "A"));
        let mut name = Name::from_ascii(name).map_err(|_| NotAQuestion)?;
        name.set_fqdn(true);
        let kind = RecordType::from_str(&kind.to_uppercase()).map_err(|_| NotAQuestion)?;
        let question = Self { name, kind };
        let is_empty = text.is_empty() || text.starts_with('/');
        match question.message().to_vec() {
            Ok(_) if !is_empty => Ok(question),
            _ => Err(NotAQuestion),
        }
    }
}

impl Question {
    /// A query with an id that no other has.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.message().to_vec().unwrap_or_default()
    }

    fn message(&self) -> Message {
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(self.name.clone(), self.kind));
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_ANSWER);
        message.set_edns(edns);
        message
    }
}

/// Whether `reply` is a response with the id of `query`.
pub(super) fn is_answer(reply: &[u8], query: &[u8]) -> bool {
    let is_response = reply.get(2).is_some_and(|flags| flags & 0x80 != 0);
    is_response && reply.get(..2) == query.get(..2)
}

/// An answer, a line for each record.
pub(super) fn described(answer: &[u8]) -> String {
    let message = match Message::from_vec(answer) {
        Ok(message) if message.metadata.message_type == MessageType::Response => message,
        Ok(_) => return format!("not a DNS response\n{}", super::described(answer)),
        Err(error) => {
            let error = error.to_string();
            return format!(
                "not a DNS message: {}\n{}",
                printable(&error),
                super::described(answer)
            );
        }
    };
    let mut text = format!("{:?}", message.metadata.response_code);
    if message.metadata.truncation {
        text += ", truncated";
    }
    for (section, records) in [("", &message.answers), ("authority ", &message.authorities)] {
        for record in records {
            let record = record.to_string();
            let _ = write!(text, "\n{section}{}", printable(&record));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use hickory_resolver::proto::op::ResponseCode;
    use hickory_resolver::proto::rr::rdata::TXT;
    use hickory_resolver::proto::rr::{RData, Record};

    use super::*;

    #[test]
    fn questions_are_read_with_and_without_a_type() {
        for (text, name, kind) in [
            ("example.org", "example.org.", RecordType::A),
            ("example.org./aaaa", "example.org.", RecordType::AAAA),
            (
                "_dns._udp.example.org/SRV",
                "_dns._udp.example.org.",
                RecordType::SRV,
            ),
            (".", ".", RecordType::A),
        ] {
            let question: Question = text.parse().unwrap();
            let message = Message::from_vec(&question.bytes()).unwrap();
            assert_eq!(message.queries[0].name().to_string(), name);
            assert_eq!(message.queries[0].query_type(), kind);
        }
        let label = "a".repeat(64);
        for text in ["", "/A", "example.org/", "example.org/NOPE", "a..b", &label] {
            assert!(text.parse::<Question>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn answers_are_told_from_others_and_shown() {
        let question: Question = "answer.test/TXT".parse().unwrap();
        let query = question.bytes();
        let mut answer = Message::from_vec(&query).unwrap();
        answer.metadata.message_type = MessageType::Response;
        answer.metadata.response_code = ResponseCode::NXDomain;
        let hostile = RData::TXT(TXT::new(vec!["\u{1b}[2J".to_owned()]));
        answer.add_answer(Record::from_rdata(question.name, 5, hostile));
        let bytes = answer.to_vec().unwrap();
        assert!(is_answer(&bytes, &query));
        assert!(!is_answer(&query, &query) && !is_answer(b"", &query));
        assert!(!is_answer(&bytes, &[!query[0], query[1]]));
        let text = described(&bytes);
        assert!(
            text.starts_with("NXDomain\nanswer.test. 5 IN TXT "),
            "{text}"
        );
        assert!(!text.contains('\u{1b}'), "{text}");
        assert!(described(b"\x01\x02").starts_with("not a DNS message: "));
    }
}
