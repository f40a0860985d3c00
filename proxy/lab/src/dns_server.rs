//! A DNS server in the test's own process, on hickory-server, whose records change
//! when the test says so, and which fails when it is told to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hickory_server::Server;
use hickory_server::net::runtime::Time;
use hickory_server::proto::op::{Header, HeaderCounts, Metadata, ResponseCode};
use hickory_server::proto::rr::rdata::{CNAME, SRV};
use hickory_server::proto::rr::{Name, RData, Record};
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use hickory_server::zone_handler::MessageResponseBuilder;
use tokio::net::{TcpListener, UdpSocket};

use crate::TIMEOUT;

/// What the server does with questions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Answers {
    /// It answers them.
    #[default]
    Right,
    /// It says that it failed.
    ServFail,
    /// It says that there is no such name.
    NxDomain,
    /// It answers with a code that means nothing.
    Unassigned,
    /// It says nothing.
    Silence,
}

#[derive(Debug, Default)]
struct Zone {
    /// By name, in lower case and with a dot at its end.
    records: BTreeMap<String, Vec<(u32, RData)>>,
    answers: Answers,
    /// Names that it says nothing of.
    hushed: BTreeSet<String>,
    /// Questions for each name, whatever their kind.
    asked: BTreeMap<String, usize>,
}

/// A DNS server that runs as long as the process.
pub struct DnsServer {
    address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
}

impl DnsServer {
    /// Starts it on a loopback address, over UDP and TCP.
    pub fn start() -> Self {
        let zone = Arc::<Mutex<Zone>>::default();
        let (tell, told) = std::sync::mpsc::channel();
        let handler = Handler(Arc::clone(&zone));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let (udp, tcp) = loop {
                    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
                    // Another process may have that port of UDP.
                    if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()).await {
                        break (udp, tcp);
                    }
                };
                let address = udp.local_addr().unwrap();
                let mut server = Server::new(handler);
                server.register_socket(udp);
                server.register_listener(tcp, TIMEOUT, 16);
                tell.send(address).unwrap();
                server.block_until_done().await.unwrap();
            });
        });
        let address = told.recv_timeout(TIMEOUT).unwrap();
        Self { address, zone }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A `[resolver]` table that asks this server, and often.
    pub fn table(&self) -> String {
        format!(
            "[resolver]\nservers = [\"{}\"]\ntimeout = \"1s\"\nmin_ttl = \"100ms\"\nretry = \"100ms\"\n",
            self.address
        )
    }

    /// Gives a name these records and no others: addresses, `PRIORITY WEIGHT PORT
    /// TARGET` for SRV, or another name, which it is then an alias of.
    pub fn set(&self, name: &str, ttl: u32, records: &[&str]) {
        let data = records.iter().map(|record| (ttl, data(record)));
        let data = data.collect();
        self.zone.lock().unwrap().records.insert(key(name), data);
    }

    /// Takes a name away.
    pub fn remove(&self, name: &str) {
        self.zone.lock().unwrap().records.remove(&key(name));
    }

    /// Says nothing of a name from now on.
    pub fn hush(&self, name: &str) {
        self.zone.lock().unwrap().hushed.insert(key(name));
    }

    /// Has all questions answered so from now on.
    pub fn answer(&self, answers: Answers) {
        self.zone.lock().unwrap().answers = answers;
    }

    /// How many questions there were for a name.
    pub fn asked(&self, name: &str) -> usize {
        let zone = self.zone.lock().unwrap();
        zone.asked.get(&key(name)).copied().unwrap_or_default()
    }
}

fn key(name: &str) -> String {
    format!("{}.", name.trim_end_matches('.').to_lowercase())
}

fn data(record: &str) -> RData {
    let fields: Vec<_> = record.split(' ').collect();
    if let Ok(ip) = record.parse::<IpAddr>() {
        return RData::from(ip);
    }
    let number = |field: &str| field.parse().unwrap();
    match fields.as_slice() {
        [priority, weight, port, target] => RData::SRV(SRV::new(
            number(priority),
            number(weight),
            number(port),
            Name::from_str(target).unwrap(),
        )),
        _ => RData::CNAME(CNAME(Name::from_str(&key(record)).unwrap())),
    }
}

impl Zone {
    /// The records of a kind that a name has, aliases followed and shown.
    fn find(&self, name: &Name, pick: impl Fn(&RData) -> bool) -> Option<Vec<Record>> {
        let (mut name, mut found) = (name.clone(), Vec::new());
        let mut seen = BTreeSet::new();
        while seen.insert(key(&name.to_ascii())) {
            let records = self.records.get(&key(&name.to_ascii()))?;
            let mut next = None;
            for (ttl, data) in records {
                if let RData::CNAME(alias) = data {
                    next = Some(alias.0.clone());
                } else if !pick(data) {
                    continue;
                }
                found.push(Record::from_rdata(name.clone(), *ttl, data.clone()));
            }
            match next {
                Some(alias) => name = alias,
                None => break,
            }
        }
        Some(found)
    }
}

struct Handler(Arc<Mutex<Zone>>);

#[async_trait::async_trait]
impl RequestHandler for Handler {
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        mut reply: R,
    ) -> ResponseInfo {
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.authoritative = true;
        metadata.recursion_available = true;
        let mut found = Vec::new();
        let how = {
            let mut zone = self.0.lock().unwrap();
            let info = request.request_info().unwrap();
            let name = info.query.original().name().clone();
            *zone.asked.entry(key(&name.to_ascii())).or_default() += 1;
            let kind = info.query.query_type();
            let records = zone.find(&name, |data| data.record_type() == kind);
            let answers = match zone.hushed.contains(&key(&name.to_ascii())) {
                true => Answers::Silence,
                false => zone.answers,
            };
            match (answers, records) {
                (Answers::Right, Some(records)) => found = records,
                (Answers::Right | Answers::NxDomain, _) => {
                    metadata.response_code = ResponseCode::NXDomain;
                }
                (Answers::Unassigned, records) => {
                    metadata.response_code = ResponseCode::Unknown(14);
                    found = records.unwrap_or_default();
                }
                (Answers::ServFail, _) => metadata.response_code = ResponseCode::ServFail,
                (Answers::Silence, _) => {}
            }
            answers
        };
        if how == Answers::Silence {
            // By then the client has given up.
            tokio::time::sleep(Duration::from_secs(3600)).await;
        }
        let nothing: [&Record; 0] = [];
        let response = MessageResponseBuilder::from_message_request(request)
            .build(metadata, &found, nothing, nothing, nothing);
        match reply.send_response(response).await {
            Ok(info) => info,
            Err(_) => {
                metadata.response_code = ResponseCode::ServFail;
                let counts = HeaderCounts::default();
                ResponseInfo::from(Header { metadata, counts })
            }
        }
    }
}
