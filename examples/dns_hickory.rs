//! A DNS server on hickory-server that sees its clients: to every question for
//! TXT records it answers with the client's own address.
//!
//!     cargo run -p ppv2-examples --bin dns_hickory -- --listen 127.0.0.1:5300 --trusted 127.0.0.0/8
//!
//! `hickory_server::Server` opens its UDP sockets itself and has no hook for one
//! of another kind. Its request handlers need no more of a socket than `Reply`
//! offers, though. `Whoami` stands for any of them, such as a `Catalog` of zones.
#![expect(clippy::print_stderr, reason = "a program for people to look at")]

use std::error::Error;
use std::sync::Arc;
use std::{env, process};

use hickory_server::net::{NetError, runtime::Time, runtime::TokioTime, xfer::Protocol};
use hickory_server::proto::op::{Header, HeaderCounts, Metadata, ResponseCode};
use hickory_server::proto::rr::{RData, Record, RecordType, rdata::TXT};
use hickory_server::proto::serialize::binary::BinEncoder;
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use hickory_server::zone_handler::{MessageResponse, MessageResponseBuilder};
use ppv2_sdk::{Datagram, Trust, tokio::UdpSocket};
use tokio::sync::Semaphore;

/// Questions in work at once. More are left in the socket's buffer, which drops
/// what doesn't fit: a flood of them takes no memory.
const MOST_AT_ONCE: usize = 1024;

/// Bytes of an answer to a client that doesn't say how many it takes (RFC 1035,
/// section 4.2.1).
const SHORTEST_LIMIT: u16 = 512;

/// The recipient of one answer.
#[derive(Clone)]
struct Reply {
    socket: Arc<UdpSocket>,
    datagram: Arc<Datagram>,
}

#[async_trait::async_trait]
impl ResponseHandler for Reply {
    async fn send_response<'a>(
        &mut self,
        response: MessageResponse<
            '_,
            'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
        >,
    ) -> Result<ResponseInfo, NetError> {
        let mut message = Vec::new();
        let limit = response
            .edns()
            .map_or(SHORTEST_LIMIT, |edns| edns.max_payload());
        let info = {
            let mut encoder = BinEncoder::new(&mut message);
            encoder.set_max_size(limit);
            response.destructive_emit(&mut encoder)?
        };
        self.socket.reply(&self.datagram, &message).await?;
        Ok(info)
    }
}

/// Tells each client its own address.
struct Whoami;

#[async_trait::async_trait]
impl RequestHandler for Whoami {
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        mut reply: R,
    ) -> ResponseInfo {
        let mut metadata = Metadata::response_from_request(&request.metadata);
        let mut answers = Vec::new();
        match request.request_info() {
            Ok(info) if info.query.query_type() == RecordType::TXT => {
                let text = TXT::new(vec![info.src.to_string()]);
                let name = info.query.original().name().clone();
                answers.push(Record::from_rdata(name, 0, RData::TXT(text)));
            }
            Ok(_) => {}
            Err(_) => metadata.response_code = ResponseCode::FormErr,
        }
        let nothing: [&Record; 0] = [];
        let response = MessageResponseBuilder::from_message_request(request)
            .build(metadata, &answers, nothing, nothing, nothing);
        match reply.send_response(response).await {
            Ok(info) => info,
            Err(error) => {
                eprintln!("no answer to {}: {error}", request.src());
                metadata.response_code = ResponseCode::ServFail;
                let counts = HeaderCounts::default();
                ResponseInfo::from(Header { metadata, counts })
            }
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    if let Err(error) = serve(Arc::new(Whoami)).await {
        eprintln!("dns_hickory: {error}");
        process::exit(1);
    }
}

async fn serve(handler: Arc<impl RequestHandler>) -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let ["--listen", listen, "--trusted", trusted @ ..] = args.as_slice() else {
        return Err("usage: dns_hickory --listen ADDR --trusted NET [NET ...]".into());
    };

    let socket = Arc::new(UdpSocket::bind(*listen, Trust::networks(trusted).build()?).await?);
    eprintln!("ready on {}", socket.local_addr()?);
    let places = Arc::new(Semaphore::new(MOST_AT_ONCE));
    loop {
        let place = Arc::clone(&places).acquire_owned().await?;
        let datagram = socket.recv_datagram().await?;
        let (message, client) = (datagram.payload.to_vec(), datagram.client);
        let Ok(request) = Request::from_bytes(message, client, Protocol::Udp) else {
            continue;
        };
        let reply = Reply {
            socket: Arc::clone(&socket),
            datagram: Arc::new(datagram),
        };
        let handler = Arc::clone(&handler);
        tokio::spawn(async move {
            handler
                .handle_request::<_, TokioTime>(&request, reply)
                .await;
            drop(place);
        });
    }
}
