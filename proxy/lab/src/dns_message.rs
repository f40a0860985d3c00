//! DNS messages, where dig would take too long: one process for each question.

use std::str::FromStr;

use hickory_server::proto::op::{Message, Query};
use hickory_server::proto::rr::{Name, RecordType};

/// What a client needs of a reply.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    pub id: u16,
    /// The name that was asked about, without a dot at its end.
    pub name: String,
    /// The code of the response, such as `No Error` or `Query Refused`.
    pub status: String,
    /// The data of the answer's records.
    pub data: Vec<String>,
}

/// A question about the addresses of a name: A, or AAAA.
pub fn question(id: u16, name: &str, of_ipv6: bool) -> Vec<u8> {
    let kind = if of_ipv6 {
        RecordType::AAAA
    } else {
        RecordType::A
    };
    let mut message = Message::query();
    message.metadata.id = id;
    let name = Name::from_str(&format!("{name}.")).unwrap();
    message.add_query(Query::query(name, kind));
    message.to_vec().unwrap()
}

/// Reads a reply.
pub fn reply(bytes: &[u8]) -> Reply {
    let message = Message::from_vec(bytes).unwrap();
    let name = message.queries.first().map(|query| query.name().to_ascii());
    Reply {
        id: message.metadata.id,
        name: name.unwrap_or_default().trim_end_matches('.').to_owned(),
        status: message.metadata.response_code.to_string(),
        data: message.answers.iter().map(|r| r.data.to_string()).collect(),
    }
}
