//! The DNS check: any response passes, except SERVFAIL.

use hickory_resolver::proto::op::{Header, MessageType, OpCode, ResponseCode};
use hickory_resolver::proto::serialize::binary::BinDecodable;
use tokio::time::Instant;

use super::check::{HealthCheck, Outcome, Target};
use super::udp::{Wanted, exchange};
use crate::config;

pub(super) struct Dns {
    pub(super) target: Target,
    /// The query, whose first two bytes each check replaces by an unpredictable id.
    pub(super) query: Vec<u8>,
    pub(super) header: config::Header,
}

impl HealthCheck for Dns {
    async fn check(&mut self, deadline: Instant) -> Outcome {
        let id = super::random_u16();
        self.query[..2].copy_from_slice(&id.to_be_bytes());
        let wanted = Wanted::Matching(&|answer| answers(answer, id));
        let question = (self.header, &self.query[..]);
        exchange(&self.target, question, wanted, deadline).await
    }
}

fn answers(answer: &[u8], id: u16) -> bool {
    Header::from_bytes(answer).is_ok_and(|header| {
        header.id == id
            && header.message_type == MessageType::Response
            && header.op_code == OpCode::Query
            && header.response_code != ResponseCode::ServFail
    })
}
