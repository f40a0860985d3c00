//! A process at the other end that is not what it should be, or ends too early.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use serde::{Deserialize, Serialize};

use super::*;

/// What both processes say, as far as a stranger needs it.
#[derive(Serialize, Deserialize)]
pub(super) enum Message {
    Hello {
        format: u32,
        version: String,
        process: u32,
    },
    Offer {
        format: u32,
        version: String,
        process: u32,
    },
    Begin,
    Freeze,
    Ready,
    Yours,
    Refused(String),
}

impl Message {
    pub(super) fn hello(format: u32) -> Self {
        Self::Hello {
            format,
            version: "9.9.9".to_owned(),
            process: 1,
        }
    }

    fn offer(format: u32) -> Self {
        Self::Offer {
            format,
            version: "9.9.9".to_owned(),
            process: 1,
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let body = rmp_serde::to_vec_named(self).unwrap();
        [&head(body.len(), 0), &body[..]].concat()
    }
}

fn head(len: usize, descriptors: usize) -> Vec<u8> {
    let number = |number: usize| u32::try_from(number).unwrap().to_be_bytes();
    [*b"ppv2", number(len), number(descriptors)].concat()
}

/// Byte strings that no process of the proxy sends first.
fn garbage() -> Vec<Vec<u8>> {
    let hello = Message::hello(1).bytes();
    let mut all = vec![
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 100_000],
        head(usize::try_from(u32::MAX).unwrap(), 0),
        head(10, usize::try_from(u32::MAX).unwrap()),
        head(10, 300),
        head(60_000, 0),
        [head(60_000, 0), vec![0x91; 60_000]].concat(),
        Message::Begin.bytes(),
        Message::Ready.bytes(),
        Message::Yours.bytes(),
        Message::Refused("no".to_owned()).bytes(),
        [&hello[..], &hello].concat(),
    ];
    all.extend((0..hello.len()).step_by(7).map(|len| hello[..len].to_vec()));
    all
}

pub(super) fn connect(setup: &Setup) -> UnixStream {
    let stream = UnixStream::connect(setup.socket()).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream
}

#[test]
fn strangers_do_the_old_process_no_harm() {
    let setup = Setup::simple();
    let mut proxy = setup.start(2);
    let load = setup.load(RATE);
    for bytes in garbage() {
        let mut stream = UnixStream::connect(setup.socket()).unwrap();
        // It may have closed the connection before all was written.
        let _ = stream.write_all(&bytes);
    }
    eventually("the log to say it", || {
        proxy.log().matches("no upgrade").count() >= 3
    });

    // Another format is refused in words. Connections are closed at once while there are
    // several.
    eventually("an answer in words", || {
        let mut stream = connect(&setup);
        let mut answer = Vec::new();
        let sent = stream.write_all(&Message::hello(1_000_000).bytes());
        let received = sent.and_then(|()| stream.read_to_end(&mut answer));
        received.is_ok() && String::from_utf8_lossy(&answer).contains("format 1000000")
    });

    // It stops half-way, after workers have stopped for it.
    for _ in 0..3 {
        eventually("sessions to be handed over", || {
            let mut stream = connect(&setup);
            let hello = [Message::hello(1), Message::Begin, Message::Freeze].map(|one| one.bytes());
            let sent = stream.write_all(&hello.concat());
            sent.and_then(|()| stream.read_exact(&mut [0; 5000]))
                .is_ok()
        });
        load.wait_for_a_round();
    }
    assert!(!proxy.has_ended(), "{}", proxy.log());

    // It is silent, and another one takes over meanwhile.
    let silent = UnixStream::connect(setup.socket()).unwrap();
    setup.upgrade(&mut proxy, &setup.config(2));
    drop(silent);
    clean(load);
}

#[test]
fn strangers_in_place_of_the_old_process_are_given_up() {
    let setup = Setup::simple();
    let socket = setup.folder.path().join("stranger.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    listener.set_nonblocking(true).unwrap();
    // The proxy is another user, if started as root.
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    let offer = Message::offer(1).bytes();
    let mut all = garbage();
    all.push(Message::offer(1_000_000).bytes());
    all.push(offer.clone());
    all.push([&offer[..], &Message::Yours.bytes()].concat());
    for bytes in all {
        let mut new = Process::start(&mut setup.taking_from(&socket, &setup.config(2)));
        let mut stream = None;
        eventually("a connection", || {
            stream = listener.accept().ok();
            stream.is_some() || new.has_ended()
        });
        let (mut stream, _) = stream.unwrap_or_else(|| panic!("{}", new.log()));
        let _ = stream.write_all(&bytes);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let (status, log) = new.wait();
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(log.contains("nothing was taken over"), "{log}");
        assert!(!log.contains("panicked"), "{log}");
    }
}
