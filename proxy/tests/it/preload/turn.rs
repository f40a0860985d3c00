//! coturn as a STUN and TURN server.

use std::net::{IpAddr, SocketAddr};

use ppv2_lab::dig::program;
use ppv2_lab::wrapped::{LOOPBACK, Scene, at, setup, wrapped};
use ppv2_lab::*;

const MAGIC: [u8; 4] = 0x2112_a442_u32.to_be_bytes();

// Methods and attributes: RFC 8489, sections 18.2 and 18.3; RFC 8656, sections 17 and 18.
const BINDING: u16 = 0x0001;
const ALLOCATE: u16 = 0x0003;
const CREATE_PERMISSION: u16 = 0x0008;
const SEND_INDICATION: u16 = 0x0016;
const DATA_INDICATION: u16 = 0x0017;
const SUCCESS: u16 = 0x0100;
const XOR_PEER_ADDRESS: u16 = 0x0012;
const DATA: u16 = 0x0013;
const XOR_RELAYED_ADDRESS: u16 = 0x0016;
const REQUESTED_TRANSPORT: u16 = 0x0019;
const XOR_MAPPED_ADDRESS: u16 = 0x0020;

type Id = [u8; 12];

struct Message {
    kind: u16,
    id: Id,
    attributes: Vec<(u16, Vec<u8>)>,
}

impl Message {
    fn read(bytes: &[u8]) -> Self {
        let number = |bytes: &[u8]| u16::from_be_bytes([bytes[0], bytes[1]]);
        let mut rest = &bytes[20..];
        let mut attributes = Vec::new();
        while !rest.is_empty() {
            let len = usize::from(number(&rest[2..]));
            attributes.push((number(rest), rest[4..4 + len].to_vec()));
            rest = &rest[4 + len.next_multiple_of(4)..];
        }
        Self {
            kind: number(bytes),
            id: bytes[8..20].try_into().unwrap(),
            attributes,
        }
    }

    fn attribute(&self, kind: u16) -> &[u8] {
        let found = self.attributes.iter().find(|(of, _)| *of == kind);
        &found.unwrap_or_else(|| panic!("no attribute {kind:#x}")).1
    }

    fn address(&self, kind: u16) -> SocketAddr {
        let value = xored(self.attribute(kind), self.id);
        let port = u16::from_be_bytes([value[2], value[3]]);
        let ip = match value[1] {
            1 => IpAddr::from(<[u8; 4]>::try_from(&value[4..]).unwrap()),
            _ => IpAddr::from(<[u8; 16]>::try_from(&value[4..]).unwrap()),
        };
        SocketAddr::new(ip, port)
    }
}

fn message(kind: u16, id: Id, attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for &(kind, value) in attributes {
        body.extend(kind.to_be_bytes());
        body.extend(u16::try_from(value.len()).unwrap().to_be_bytes());
        body.extend(value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let len = u16::try_from(body.len()).unwrap();
    let head = [kind.to_be_bytes(), len.to_be_bytes()].concat();
    [&head, &MAGIC[..], &id, &body].concat()
}

/// The value of an address attribute, or what it stands for.
fn xored(value: &[u8], id: Id) -> Vec<u8> {
    let key = [&MAGIC[..2], &MAGIC, &id].concat();
    let xor = value[2..].iter().zip(key).map(|(byte, key)| byte ^ key);
    value[..2].iter().copied().chain(xor).collect()
}

fn address_value(address: SocketAddr, id: Id) -> Vec<u8> {
    let (family, ip) = match address.ip() {
        IpAddr::V4(ip) => (1, ip.octets().to_vec()),
        IpAddr::V6(ip) => (2, ip.octets().to_vec()),
    };
    xored(
        &[&[0, family], &address.port().to_be_bytes()[..], &ip].concat(),
        id,
    )
}

/// No other client's question has it in the same round.
fn id(client: SocketAddr, round: usize) -> Id {
    let mut id = [u8::try_from(round).unwrap(); 12];
    id[..2].copy_from_slice(&client.port().to_be_bytes());
    id[2] = match client.ip() {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(ip) => ip.octets()[15],
    };
    id
}

fn coturn(folder: &tempfile::TempDir, port: u16) -> Process {
    let (log, database) = (folder.path().join("log"), folder.path().join("turndb"));
    let port = port.to_string();
    let first = ports(100);
    let (first, last) = (first.to_string(), (first + 99).to_string());
    let listening = LOOPBACK.map(|ip| ["--listening-ip", ip, "--relay-ip", ip]);
    let mut arguments = vec![
        "-n",
        "--no-auth",
        "--no-tcp",
        "--no-tls",
        "--no-dtls",
        "--no-cli",
        "--allow-loopback-peers",
        "--log-file",
        "stdout",
        "--listening-port",
        &port,
        "--min-port",
        &first,
        "--max-port",
        &last,
        "--pidfile",
        log.to_str().unwrap(),
        "--userdb",
        database.to_str().unwrap(),
    ];
    arguments.extend(listening.iter().flatten());
    // Peers write to the relay's ports without a proxy between.
    let options = ["--only", &port];
    wrapped(&options, &program("turnserver", "coturn"), &arguments)
}

#[test]
fn coturn_tells_each_client_its_address() {
    if !namespace::enter(test_name!(), &setup()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let port = port();
    let _server = coturn(&folder, port);
    for family in [0, 1] {
        let scene = Scene::new(at(family, port));
        let question = |client, round| message(BINDING, id(client, round), &[]);
        scene.until_answered(&message(BINDING, [7; 12], &[]));
        scene.strangers(&message(BINDING, [8; 12], &[]));
        scene.exchange(question, |client, round, answer| {
            let answer = Message::read(answer);
            assert_eq!(answer.kind, BINDING | SUCCESS);
            assert_eq!(answer.id, id(client, round));
            assert_eq!(answer.address(XOR_MAPPED_ADDRESS), client);
        });
    }
}

/// What a peer writes reaches the client that the relay's port is for.
#[test]
fn coturn_relays_for_each_client() {
    if !namespace::enter(test_name!(), &setup()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let port = port();
    let _server = coturn(&folder, port);
    let scene = Scene::new(at(0, port));
    scene.until_answered(&message(BINDING, [7; 12], &[]));
    let peer = socket(LOOPBACK[0]);
    let peer_address = peer.local_addr().unwrap();
    let relays: Vec<SocketAddr> = scene.clients[..10]
        .iter()
        .map(|client| {
            let address = client.local_addr().unwrap();
            let asks = |kind, round, attribute: (u16, &[u8])| {
                let id = id(address, round);
                let question = message(kind, id, &[attribute]);
                client.send_to(&question, scene.listener).unwrap();
                let answer = Message::read(&receive(client).0);
                assert_eq!((answer.kind, answer.id), (kind | SUCCESS, id));
                answer
            };
            let udp = [17, 0, 0, 0];
            let answer = asks(ALLOCATE, 0, (REQUESTED_TRANSPORT, &udp));
            assert_eq!(answer.address(XOR_MAPPED_ADDRESS), address);
            let allowed = address_value(peer_address, id(address, 1));
            asks(CREATE_PERMISSION, 1, (XOR_PEER_ADDRESS, &allowed));
            answer.address(XOR_RELAYED_ADDRESS)
        })
        .collect();
    for (client, &relay) in scene.clients.iter().zip(&relays) {
        let address = client.local_addr().unwrap();
        let to_peer = message(
            SEND_INDICATION,
            id(address, 2),
            &[
                (
                    XOR_PEER_ADDRESS,
                    &address_value(peer_address, id(address, 2)),
                ),
                (DATA, address.to_string().as_bytes()),
            ],
        );
        client.send_to(&to_peer, scene.listener).unwrap();
        let (from_client, from) = receive(&peer);
        assert_eq!(
            (from_client.as_slice(), from),
            (address.to_string().as_bytes(), relay)
        );
    }
    for (client, &relay) in scene.clients.iter().zip(&relays) {
        let text = client.local_addr().unwrap().to_string();
        peer.send_to(text.as_bytes(), relay).unwrap();
    }
    for (client, _) in scene.clients.iter().zip(&relays) {
        let answer = Message::read(&receive(client).0);
        assert_eq!(answer.kind, DATA_INDICATION);
        assert_eq!(answer.address(XOR_PEER_ADDRESS), peer_address);
        let text = client.local_addr().unwrap().to_string();
        assert_eq!(answer.attribute(DATA), text.as_bytes());
    }
    scene.nothing_more(&scene.clients);
}
