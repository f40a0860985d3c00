//! A proxy of a few lines that sends any header, right or wrong, for tests of the SDK.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};

use ppv2::Encoder;
use ppv2_sdk::Trust;

use crate::TIMEOUT;

pub const CLIENT: &str = "203.0.113.11:54321";
pub const OTHER_CLIENT: &str = "203.0.113.12:54321";
pub const CLIENT_V6: &str = "[2001:db8::11]:54321";
pub const LISTENER: &str = "198.51.100.10:9000";

pub fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// The networks of this host.
pub const LOOPBACK: [&str; 2] = ["127.0.0.0/8", "::1"];

/// Trust in this host.
pub fn loopback() -> Trust {
    Trust::networks(LOOPBACK).build().unwrap()
}

/// Trust in one address of this host, 127.0.0.1, so that 127.0.0.2 is a stranger.
pub fn one_address() -> Trust {
    Trust::networks(["127.0.0.1"]).build().unwrap()
}

pub fn from_client(client: &str, payload: &[u8]) -> Vec<u8> {
    from_client_at(addr(client), addr(LISTENER), payload)
}

/// What a proxy sends of a client that wrote to `listener`.
pub fn from_client_at(client: SocketAddr, listener: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
    let header = ppv2::encode_udp(client, listener, &mut buffer).unwrap();
    [header, payload].concat()
}

pub fn from_client_with_host(client: &str, host: &str, payload: &[u8]) -> Vec<u8> {
    let mut buffer = [0; 256];
    let header = Encoder::udp(&mut buffer, addr(client), addr(LISTENER))
        .and_then(|encoder| encoder.authority(host))
        .unwrap()
        .finish();
    [header, payload].concat()
}

/// Datagrams that a trusted peer must not send.
pub fn hostile() -> Vec<Vec<u8>> {
    let path = [b'a'; 108];
    let mut buffer = [0; 256];
    let tcp = Encoder::tcp(&mut buffer, addr(CLIENT), addr(LISTENER)).unwrap();
    let tcp = tcp.finish().to_vec();
    let unix = Encoder::unix(&mut buffer, ppv2::Transport::Datagram, &path, &path).unwrap();
    let unix = unix.finish().to_vec();
    let unspecified = Encoder::unspecified(&mut buffer).unwrap().finish().to_vec();
    let mut past_end = from_client(CLIENT, b"");
    past_end[14] = 0xff;
    let mut version = from_client(CLIENT, b"");
    version[12] = 0x11;
    vec![
        Vec::new(),
        b"no header".to_vec(),
        ppv2::SIGNATURE.to_vec(),
        past_end,
        version,
        tcp,
        unix,
        unspecified,
        from_client("203.0.113.11:0", b"x"),
        from_client("224.0.0.1:53", b"x"),
    ]
}

/// The proxy's socket towards servers.
pub struct Proxy(UdpSocket);

impl Proxy {
    pub fn bind(address: &str) -> Self {
        let socket = UdpSocket::bind(address).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        Self(socket)
    }

    pub fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    pub fn socket(&self) -> &UdpSocket {
        &self.0
    }

    pub fn send(&self, server: SocketAddr, datagram: &[u8]) {
        self.0.send_to(datagram, server).unwrap();
    }

    /// The next reply and its sender.
    pub fn receive(&self) -> (Vec<u8>, SocketAddr) {
        let mut buffer = [0; 65_535];
        let (len, from) = self.0.recv_from(&mut buffer).expect("a reply");
        (buffer[..len].to_vec(), from)
    }

    /// Asserts that no reply came. What a server sent before on this host has
    /// arrived already.
    #[track_caller]
    pub fn receives_nothing(&self) {
        self.0.set_nonblocking(true).unwrap();
        let error = self.0.recv_from(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        self.0.set_nonblocking(false).unwrap();
    }
}

/// A socket that receives IPv4 and IPv6 alike.
pub fn dual_stack() -> UdpSocket {
    use socket2::{Domain, Socket, Type};

    let socket = Socket::new(Domain::IPV6, Type::DGRAM, None).unwrap();
    socket.set_only_v6(false).unwrap();
    socket.bind(&addr("[::]:0").into()).unwrap();
    socket.into()
}

/// The address of this host at which a wildcard socket is reached by `ip`.
pub fn reached_by(ip: &str, socket: SocketAddr) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), socket.port())
}
