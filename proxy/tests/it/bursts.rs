//! Bursts, as QUIC and media send them: each datagram arrives whole, in order,
//! once, with a header of its own, also where the kernel can't take the burst
//! in one piece.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::net::{SocketAddr, UdpSocket};

use ppv2_lab::service::*;
use ppv2_lab::*;
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};

/// A socket that sends and receives bursts in one piece, by quinn's code.
pub(crate) struct Peer {
    socket: UdpSocket,
    state: UdpSocketState,
    arrived: VecDeque<(Vec<u8>, SocketAddr)>,
}

impl Peer {
    pub(crate) fn new(socket: UdpSocket) -> Self {
        let room = socket2::SockRef::from(&socket);
        room.set_recv_buffer_size(4 << 20).unwrap();
        let state = UdpSocketState::new((&socket).into()).unwrap();
        Self {
            socket,
            state,
            arrived: VecDeque::new(),
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    /// Sends `bytes` in one piece, to be cut every `segment` bytes.
    pub(crate) fn send(&self, to: SocketAddr, bytes: &[u8], segment: usize) {
        let transmit = Transmit {
            destination: to,
            ecn: None,
            contents: bytes,
            segment_size: Some(segment),
            src_ip: None,
        };
        let sent = self.state.try_send((&self.socket).into(), &transmit);
        sent.unwrap();
    }

    /// The next datagram.
    pub(crate) fn receive(&mut self) -> (Vec<u8>, SocketAddr) {
        eventually("a datagram", || !self.arrived.is_empty() || self.poll());
        self.arrived.pop_front().unwrap()
    }

    pub(crate) fn receive_nothing(&mut self) {
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(self.arrived.is_empty() && !self.poll());
    }

    fn poll(&mut self) -> bool {
        let mut bytes = vec![0; 65_536];
        let mut meta = [RecvMeta::default()];
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let received = self
            .state
            .recv((&self.socket).into(), &mut buffers, &mut meta);
        if received.is_err() {
            return false;
        }
        let RecvMeta {
            len, stride, addr, ..
        } = meta[0];
        let datagrams = bytes[..len].chunks(stride.max(1));
        self.arrived.extend(datagrams.map(|d| (d.to_vec(), addr)));
        true
    }
}

/// Bytes that tell datagrams and places within them apart.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let row = |n: u8| (0..=u8::MAX).map(move |byte| byte.wrapping_mul(3) ^ n ^ seed);
    (0..=u8::MAX).flat_map(row).take(len).collect()
}

/// Some bursts there and back, of sizes that fill, overflow and fall short.
pub(crate) fn exchange(client: &mut Peer, listener: SocketAddr, server: &mut Peer) {
    let own = client.address();
    let sizes = [
        (8 * 1200, 1200),
        (7 * 1200 + 1, 1200),
        (32 * 1200, 1200),
        (45 * 1400, 1400),
        (64 * 64, 64),
        (2, 1),
        (1200, 1200),
    ];
    for (seed, (len, segment)) in (0..).zip(sizes) {
        let bytes = pattern(len, seed);
        client.send(listener, &bytes, segment);
        let mut session = None;
        for expected in bytes.chunks(segment) {
            let (datagram, from) = server.receive();
            let (seen, destination, payload) = read_header(&datagram);
            assert_eq!((seen, destination), (own, listener));
            assert!(payload == expected, "{len} bytes in pieces of {segment}");
            session = Some(from);
        }
        server.send(session.unwrap(), &bytes, segment);
        for expected in bytes.chunks(segment) {
            let (datagram, from) = client.receive();
            assert_eq!(from, listener);
            assert!(datagram == expected, "{len} bytes in pieces of {segment}");
        }
    }
}

#[test]
fn bursts_pass_both_ways_over_ipv4_and_ipv6() {
    let network = ["--source", "127.64.0.0/10"];
    for (ip, source) in [
        ("127.0.0.1", &[][..]),
        ("::1", &[][..]),
        ("127.0.0.1", &network[..]),
    ] {
        let (mut server, listener) = (Peer::new(socket(ip)), address(ip));
        let admin = address("127.0.0.1").to_string();
        let more = [&["--admin", &admin], source].concat();
        let admin = admin.parse().unwrap();
        let _proxy = proxy_between(listener, server.address(), &more);
        exchange(&mut Peer::new(socket(ip)), listener, &mut server);
        let sent = 8 + 8 + 32 + 45 + 64 + 2 + 1;
        for name in ["ppv2_client_datagrams_total", "ppv2_reply_datagrams_total"] {
            let name = format!("{name}{{listener=\"listener1\"}}");
            eventually(&name, || metric(admin, &name) == sent);
        }
    }
}

#[test]
fn a_burst_whose_headers_exceed_the_path_is_fragmented_not_lost() {
    // 1,400 bytes and their header of 28 pass a client's link of 1,500, but not
    // the server's of 1,440.
    let setup = "ip link add name va mtu 1440 type veth peer name vb mtu 1440
                 ip link set va up; ip addr add 10.7.0.1/24 dev va
                 ip link set vb up; ip addr add 10.7.0.2/24 dev vb
                 echo 1 > /proc/sys/net/ipv4/conf/all/accept_local
                 echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter
                 ip rule del pref 0; ip rule add pref 10 lookup local
                 ip rule add pref 1 to 10.7.0.2 iif lo lookup 71; ip route add 10.7.0.2 dev va src 10.7.0.1 table 71
                 ip rule add pref 2 to 10.7.0.1 iif lo lookup 72; ip route add 10.7.0.1 dev vb src 10.7.0.2 table 72";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    let mut server = Peer::new(socket("10.7.0.2"));
    let listener = address("127.0.0.1");
    let _proxy = proxy_between(listener, server.address(), &[]);
    exchange(&mut Peer::new(socket("127.0.0.1")), listener, &mut server);
}

#[test]
fn with_responses_or_requests_each_datagram_of_a_burst_counts() {
    let (mut server, listener) = (Peer::new(socket("127.0.0.1")), address("127.0.0.1"));
    let more = ["--requests", "2", "--responses", "1"];
    let _proxy = proxy_between(listener, server.address(), &more);
    let mut client = Peer::new(socket("127.0.0.1"));
    client.send(listener, &pattern(4 * 100, 0), 100);
    let sessions: Vec<_> = (0..4).map(|_| server.receive().1).collect();
    assert_eq!(sessions[0], sessions[1]);
    assert_ne!(sessions[1], sessions[2]);
    assert_eq!(sessions[2], sessions[3]);
    // Two replies are expected by the first session; a third is too many.
    server.send(sessions[0], &pattern(3 * 100, 0), 100);
    for expected in pattern(2 * 100, 0).chunks(100) {
        assert_eq!(client.receive().0, expected);
    }
    client.receive_nothing();
}

#[test]
fn after_a_reload_too_each_datagram_of_a_burst_counts() {
    let (mut server, a) = (Peer::new(socket("127.0.0.1")), address("127.0.0.1"));
    let config = |keys: &str, of_upstream: &str| {
        let upstream = format!("servers = [\"{}\"]\n{of_upstream}\n", server.address());
        listener("a", a, "u") + keys + "[upstream.u]\n" + &upstream
    };
    let first_only = config("", "header = { emit = \"first\" }").replace("plain", "ppv2");
    let settings = [config("", ""), config("requests = 2\n", ""), first_only];
    let proxy = Proxy::start(&settings[0]);
    let client = Peer::new(socket("127.0.0.1"));
    let burst = pattern(5 * 100, 0);
    let mut pass = || {
        client.send(a, &burst, 100);
        [(); 5].map(|()| server.receive())
    };
    let session = pass()[0].1;

    // The session that has had its two and more is followed by others.
    proxy.reload(&settings[1]);
    let came = pass();
    let by = came.each_ref().map(|(_, by)| *by);
    assert!(came.iter().all(|(datagram, _)| datagram.len() == 100));
    assert!(by[0] == by[1] && by[2] == by[3]);
    let all = std::collections::BTreeSet::from([session, by[0], by[2], by[4]]);
    assert_eq!(all.len(), 4);
    // The last of them has one left.
    assert_eq!(pass()[0].1, by[4]);

    proxy.reload(&settings[2]);
    let came = pass();
    for ((datagram, by), expected) in came.iter().zip(burst.chunks(100)) {
        let (seen, destination, payload) = read_header(datagram);
        assert_eq!((seen, destination), (client.address(), a));
        assert_eq!((payload.as_slice(), *by), (expected, came[0].1));
    }
}
