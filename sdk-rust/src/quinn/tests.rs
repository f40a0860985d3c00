//! A listener's socket that has no room for a datagram.

use std::future::poll_fn;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ::quinn::Runtime as _;
use tokio::time::timeout;

use super::*;

const PATIENCE: Duration = Duration::from_secs(10);

/// A runtime whose sockets are full at first, but for the one that receives.
#[derive(Debug, Default)]
struct Full {
    made: AtomicUsize,
    /// How often somebody waited for a full one.
    waited: Arc<AtomicUsize>,
}

impl ::quinn::Runtime for Full {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        TokioRuntime.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let inner = TokioRuntime.wrap_udp_socket(socket)?;
        if self.made.fetch_add(1, Ordering::Relaxed) == 0 {
            return Ok(inner);
        }
        Ok(Arc::new(FullAtFirst {
            inner,
            sends: AtomicUsize::new(0),
            waited: Arc::clone(&self.waited),
        }))
    }
}

#[derive(Debug)]
struct FullAtFirst {
    inner: Arc<dyn AsyncUdpSocket>,
    sends: AtomicUsize,
    waited: Arc<AtomicUsize>,
}

impl AsyncUdpSocket for FullAtFirst {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.waited.fetch_add(1, Ordering::Relaxed);
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if self.sends.fetch_add(1, Ordering::Relaxed) == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        _cx: &mut Context<'_>,
        _bufs: &mut [IoSliceMut<'_>],
        _meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        panic!("a listener's socket only sends");
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }
}

#[tokio::test]
async fn who_sends_waits_for_the_socket_that_was_full() {
    let bound = |ip: &str| UdpSocket::bind((ip, 0)).unwrap();
    let (proxy, client) = (bound("127.0.0.1"), bound("127.0.1.1"));
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let to = client.local_addr().unwrap();
    let listener = SocketAddr::from(([127, 0, 4, 1], 9400));

    let full = Arc::new(Full::default());
    let trust = Trust::networks(["127.0.0.1"]).reply_from(ReplyFrom::Listener);
    let trust = trust.build().unwrap();
    let runtime = Runtime::around(full.clone(), trust);
    let socket = runtime.wrap_udp_socket(bound("127.0.0.1")).unwrap();

    let mut datagram = [0; ppv2::IPV4_HEADER_LEN + 1];
    ppv2::encode_udp(to, listener, &mut datagram).unwrap();
    proxy
        .send_to(&datagram, socket.local_addr().unwrap())
        .unwrap();
    let mut buffer = [0; 1500];
    let mut metas = [RecvMeta::default()];
    let receive = poll_fn(|cx| {
        let mut buffers = [IoSliceMut::new(&mut buffer)];
        socket.poll_recv(cx, &mut buffers, &mut metas)
    });
    assert_eq!(timeout(PATIENCE, receive).await.unwrap().unwrap(), 1);
    assert_eq!(metas[0].addr, to);

    let answer = Transmit {
        destination: to,
        ecn: None,
        contents: b"answer",
        segment_size: None,
        src_ip: None,
    };
    let mut poller = Arc::clone(&socket).create_io_poller();
    let waited = || full.waited.load(Ordering::Relaxed);
    let error = socket.try_send(&answer).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert_eq!((waited(), runtime.stats().replies_sent), (0, 0));
    for waits in [1, 1] {
        let writable = poll_fn(|cx| poller.as_mut().poll_writable(cx));
        timeout(PATIENCE, writable).await.unwrap().unwrap();
        assert_eq!(waited(), waits);
    }
    socket.try_send(&answer).unwrap();
    assert_eq!(runtime.stats().replies_sent, 1);
    let (len, from) = client.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..len], from), (b"answer".as_slice(), listener));
}

/// A client that comes through another proxy is answered from the address that this
/// one writes to, though quinn keeps to that of the first.
#[tokio::test]
async fn a_reply_leaves_from_the_address_that_the_latest_datagram_was_sent_to() {
    let runtime = Runtime::new(Trust::networks(["127.0.0.0/8"]).build().unwrap());
    let bound = UdpSocket::bind("0.0.0.0:0").unwrap();
    let port = bound.local_addr().unwrap().port();
    let socket = runtime.wrap_udp_socket(bound).unwrap();
    let client = "203.0.113.11:54321".parse().unwrap();
    let mut datagram = [0; ppv2::IPV4_HEADER_LEN + 1];
    let listener = "198.51.100.10:9000".parse().unwrap();
    ppv2::encode_udp(client, listener, &mut datagram).unwrap();
    let first = IpAddr::from([127, 7, 0, 2]);
    for ip in [first, IpAddr::from([127, 7, 0, 3])] {
        let proxy = UdpSocket::bind("127.0.0.1:0").unwrap();
        proxy.set_read_timeout(Some(PATIENCE)).unwrap();
        proxy.send_to(&datagram, (ip, port)).unwrap();
        let (mut buffer, mut metas) = ([0; 1500], [RecvMeta::default()]);
        let receive = poll_fn(|cx| {
            let mut buffers = [IoSliceMut::new(&mut buffer)];
            socket.poll_recv(cx, &mut buffers, &mut metas)
        });
        assert_eq!(timeout(PATIENCE, receive).await.unwrap().unwrap(), 1);
        let answer = Transmit {
            destination: client,
            ecn: None,
            contents: b"answer",
            segment_size: None,
            src_ip: Some(first),
        };
        socket.try_send(&answer).unwrap();
        let (len, from) = proxy.recv_from(&mut buffer).unwrap();
        assert_eq!(
            (&buffer[..len], from),
            (b"answer".as_slice(), (ip, port).into())
        );
    }
}

/// Each datagram of a burst has the header in front, also where headers make the burst
/// longer than the kernel takes at once.
#[tokio::test]
async fn a_burst_to_a_tagged_client_has_the_header_in_front_of_each_datagram() {
    let runtime = Runtime::new(Trust::networks(["127.0.0.0/8"]).build().unwrap());
    let bound = UdpSocket::bind("127.0.0.1:0").unwrap();
    let server = bound.local_addr().unwrap();
    let socket = runtime.wrap_udp_socket(bound).unwrap();
    let proxy = UdpSocket::bind("127.0.0.1:0").unwrap();
    proxy.set_read_timeout(Some(PATIENCE)).unwrap();
    let client = "203.0.113.11:54321".parse().unwrap();
    let listener = "198.51.100.10:9000".parse().unwrap();
    let tag = ppv2::ReplyTag::new(1, *b"abcdefgh");
    let mut header = [0; ppv2::MAX_TAGGED_HEADER_LEN];
    let header = ppv2::encode_udp_tagged(client, listener, tag, &mut header).unwrap();
    proxy.send_to(&[header, b"x"].concat(), server).unwrap();
    let (mut buffer, mut metas) = ([0; 2000], [RecvMeta::default()]);
    let receive = poll_fn(|cx| {
        let mut buffers = [IoSliceMut::new(&mut buffer)];
        socket.poll_recv(cx, &mut buffers, &mut metas)
    });
    assert_eq!(timeout(PATIENCE, receive).await.unwrap().unwrap(), 1);
    assert_eq!(metas[0].addr, client);

    let gso = socket.max_transmit_segments() > 1;
    let mut sent = 0;
    for (len, segment) in [
        (1200, None),
        (1200, Some(1200)),
        (3 * 1200, Some(1200)),
        (3 * 1200 + 7, Some(1200)),
        (40 * 1600, Some(1600)),
    ] {
        if !gso && segment.is_some_and(|segment| segment < len) {
            continue;
        }
        let contents: Vec<u8> = (0..=250).cycle().take(len).collect();
        let burst = Transmit {
            destination: client,
            ecn: None,
            contents: &contents,
            segment_size: segment,
            src_ip: None,
        };
        socket.try_send(&burst).unwrap();
        for payload in contents.chunks(segment.unwrap_or(len)) {
            let (len, from) = proxy.recv_from(&mut buffer).unwrap();
            assert_eq!((from, len), (server, header.len() + payload.len()));
            assert_eq!((&buffer[..41], &buffer[41..len]), (header, payload));
            sent += 1;
        }
    }
    assert_eq!(runtime.stats().replies_sent, sent);
}
