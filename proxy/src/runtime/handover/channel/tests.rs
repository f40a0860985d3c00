use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;

use proptest::collection::vec;
use proptest::prelude::*;
use serde::Deserialize;

use super::*;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Message {
    number: u64,
    names: Vec<String>,
}

fn message(names: usize) -> Message {
    Message {
        number: u64::MAX,
        names: (0..names).map(|number| format!("name {number}")).collect(),
    }
}

fn pair() -> (Channel, Channel) {
    let (one, other) = UnixStream::pair().unwrap();
    (Channel::new(one), Channel::new(other))
}

/// What the other process has sent, and closed the connection after.
fn received(bytes: &[u8]) -> Result<(Message, Vec<OwnedFd>), ChannelError> {
    received_with(|stream| (&*stream).write_all(bytes).unwrap())
}

fn received_with(send: impl Fn(&UnixStream)) -> Result<(Message, Vec<OwnedFd>), ChannelError> {
    let (stream, mut receiver) = {
        let (one, other) = UnixStream::pair().unwrap();
        (one, Channel::new(other))
    };
    // A bug must not stop the tests.
    let patience = Some(Duration::from_secs(60));
    receiver.set_timeout(patience).unwrap();
    send(&stream);
    stream.shutdown(Shutdown::Write).unwrap();
    receiver.receive(Limits::STATE)
}

fn send_descriptors(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
    let channel = Channel::new(stream.try_clone().unwrap());
    let sent = channel.send_once(bytes, descriptors, &Clock::start(None));
    assert_eq!(sent.unwrap(), bytes.len());
}

fn head(len: usize, count: usize) -> Vec<u8> {
    let number = |number: usize| u32::try_from(number).unwrap().to_be_bytes();
    [MAGIC, number(len), number(count)].concat()
}

/// The bytes of a short message.
fn written(message: &Message) -> Vec<u8> {
    let (sender, unread) = Channel::unread().unwrap();
    sender.send(message, &[]).unwrap();
    drop(sender);
    let mut bytes = Vec::new();
    UnixStream::from(unread).read_to_end(&mut bytes).unwrap();
    bytes
}

fn name(descriptor: impl AsFd) -> u64 {
    sockopt::socket_cookie(descriptor).unwrap()
}

fn error_of<T: std::fmt::Debug>(result: Result<T, ChannelError>) -> String {
    result.unwrap_err().to_string()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_sent_is_received(names in 0..20_000_usize, count in 0..600_usize, number: u64) {
        let (sender, receiver) = pair();
        let sockets: Vec<_> = (0..4).map(|_| UnixStream::pair().unwrap()).collect();
        let descriptors: Vec<_> = (0..count)
            .map(|place| sockets[place * place % 4].0.as_fd())
            .collect();
        let sent = Message { number, ..message(names) };
        let (message, came) = thread::scope(|scope| {
            scope.spawn(|| {
                sender.send(&sent, &descriptors).unwrap();
                sender.send(&sent, &[]).unwrap();
            });
            let first = receiver.receive::<Message>(Limits::STATE).unwrap();
            let (second, none) = receiver.receive::<Message>(Limits::STATE).unwrap();
            assert_eq!((&second, none.len()), (&sent, 0));
            first
        });
        prop_assert_eq!(message, sent);
        let names = |all: &[BorrowedFd<'_>]| all.iter().map(name).collect::<Vec<_>>();
        let came: Vec<_> = came.iter().map(AsFd::as_fd).collect();
        prop_assert_eq!(names(&came), names(&descriptors));
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error(
        begin in prop_oneof![Just(Vec::new()), Just(MAGIC.to_vec()), Just(head(7, 0)), Just(head(300, 300))],
        bytes in vec(any::<u8>(), 0..400),
    ) {
        drop(received(&[begin, bytes].concat()));
    }

    #[test]
    fn a_message_with_changed_bytes_is_a_message_or_an_error(
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = written(&message(20));
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        drop(received(&bytes));
    }
}

#[test]
fn a_message_that_ends_early_is_an_error() {
    let bytes = written(&message(20));
    assert!(received(&bytes).is_ok());
    for len in 0..bytes.len() {
        let error = received(&bytes[..len]).unwrap_err();
        assert!(matches!(error, ChannelError::Closed), "{len}: {error}");
    }
}

#[test]
fn descriptors_of_a_message_that_ends_early_are_closed() {
    let body = rmp_serde::to_vec_named(&message(1)).unwrap();
    let (mut kept, sent) = UnixStream::pair().unwrap();
    let error = received_with(|stream| {
        (&*stream).write_all(&head(body.len(), 300)).unwrap();
        (&*stream).write_all(&body).unwrap();
        send_descriptors(stream, &[0], &vec![sent.as_fd(); BATCH]);
    });
    assert!(matches!(error, Err(ChannelError::Closed)));
    drop(sent);
    assert_eq!(kept.read(&mut [0]).unwrap(), 0, "nobody has the other end");
}

#[test]
fn a_message_beyond_the_limits_is_refused() {
    let error = received(&head(u32::MAX as usize, 0));
    assert!(error_of(error).contains("4294967295 bytes, and may have 1073741824"));
    let error = received(&head(1, u32::MAX as usize));
    assert!(error_of(error).contains("4294967295 descriptors"));

    let (sender, receiver) = pair();
    sender
        .send(&(), &[File::open("/dev/null").unwrap().as_fd()])
        .unwrap();
    let error = receiver.receive::<()>(Limits::WORDS);
    assert!(error_of(error).contains("1 descriptors, and may have 0"));
}

#[test]
fn another_protocol_is_refused() {
    let error = received(b"GET / HTTP/1.1\r\n\r\n");
    assert!(matches!(error, Err(ChannelError::Foreign)));
}

#[test]
fn descriptors_where_none_belong_are_refused() {
    let null = File::open("/dev/null").unwrap();
    let body = rmp_serde::to_vec_named(&message(1)).unwrap();
    let all = [head(body.len(), 0), body.clone()].concat();
    for place in 0..all.len() {
        let error = received_with(|stream| {
            (&*stream).write_all(&all[..place]).unwrap();
            send_descriptors(stream, &all[place..=place], &[null.as_fd()]);
            (&*stream).write_all(&all[place + 1..]).unwrap();
        });
        assert!(matches!(error, Err(ChannelError::Descriptors { .. })));
    }
    for (told, sent) in [(1, 2), (2, 1), (300, 252), (BATCH + 1, 1), (1, 0)] {
        let error = received_with(|stream| {
            let head = head(body.len(), told);
            (&*stream).write_all(&[&head[..], &body].concat()).unwrap();
            send_descriptors(stream, &[0], &vec![null.as_fd(); sent]);
        });
        let error = error.unwrap_err();
        let expected = told.min(BATCH);
        assert!(
            matches!(error, ChannelError::Descriptors { found, expected: e } if found == sent && e == expected),
            "{error}"
        );
    }
}

#[test]
fn a_long_body_comes_in_a_file_that_does_not_change() {
    const LEN: usize = MAX_INLINE + 1;
    let with = |file: BorrowedFd<'_>, len: usize| {
        error_of(received_with(|stream| {
            (&*stream).write_all(&head(len, 0)).unwrap();
            send_descriptors(stream, &[0], &[file]);
        }))
    };
    let file = in_memory(&[0; LEN]).unwrap();
    assert!(with(file.as_fd(), LEN).contains("understood"));
    assert!(with(file.as_fd(), LEN + 1).contains("another length"));

    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let unsealed = File::from(memfd_create("unsealed", flags).unwrap());
    unsealed.set_len(LEN as u64).unwrap();
    assert!(with(unsealed.as_fd(), LEN).contains("may change"));
    fcntl_add_seals(&unsealed, SEALS).unwrap();
    assert!(with(unsealed.as_fd(), LEN).contains("holes"));

    let (pipe, _writer) = io::pipe().unwrap();
    assert!(with(pipe.as_fd(), LEN).contains("another file"));
    let null = File::open("/dev/null").unwrap();
    assert!(with(null.as_fd(), LEN).contains("another file"));
}

#[test]
fn bytes_after_the_message_are_refused() {
    let body = rmp_serde::to_vec_named(&message(1)).unwrap();
    let error = received(&[head(body.len() + 1, 0), body, vec![0xc0]].concat());
    assert!(error_of(error).contains("bytes after it"));
}

#[test]
fn nested_without_end_is_refused() {
    // Arrays of one array each.
    let error = received(&[head(MAX_INLINE, 0), vec![0x91; MAX_INLINE]].concat());
    assert!(matches!(error, Err(ChannelError::Decode(_))));
}

#[test]
fn a_silent_process_is_given_up() {
    let (mut one, mut other) = pair();
    other.set_timeout(Some(Duration::from_millis(20))).unwrap();
    let error = other.receive::<Message>(Limits::WORDS);
    assert!(matches!(error, Err(ChannelError::TimedOut(_))));

    // Nobody reads.
    one.set_timeout(Some(Duration::from_millis(20))).unwrap();
    let error = (0..1_000_000).find_map(|_| one.send(&message(1000), &[]).err());
    assert!(matches!(error, Some(ChannelError::TimedOut(_))));
}

#[test]
fn a_process_that_sends_byte_by_byte_is_given_up() {
    let (slow, mut receiver) = {
        let (one, other) = UnixStream::pair().unwrap();
        (one, Channel::new(other))
    };
    receiver
        .set_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            // It ends once nobody receives.
            let mut bytes = head(MAX_INLINE, 0).into_iter().chain(vec![0; MAX_INLINE]);
            while bytes
                .next()
                .is_some_and(|byte| (&slow).write_all(&[byte]).is_ok())
            {
                thread::sleep(Duration::from_millis(5));
            }
        });
        let error = receiver.receive::<Message>(Limits::STATE);
        assert!(matches!(error, Err(ChannelError::TimedOut(_))));
        drop(receiver);
    });
}

#[test]
fn a_message_waits_until_somebody_reads_it() {
    let limit = rlimit::increase_nofile_limit(u64::MAX).unwrap();
    let count = usize::try_from(limit / 2).unwrap().min(10_000);
    make_room(count).unwrap();
    let (sender, unread) = Channel::unread().unwrap();
    let null = File::open("/dev/null").unwrap();
    let sent = message(400_000);
    sender.send(&sent, &vec![null.as_fd(); count]).unwrap();
    sender.send(&message(1), &[]).unwrap();
    drop(sender);
    let receiver = Channel::new(unread.into());
    let (came, descriptors) = receiver.receive::<Message>(Limits::STATE).unwrap();
    assert!(came == sent);
    assert_eq!(descriptors.len(), count);
    let (came, _) = receiver.receive::<Message>(Limits::STATE).unwrap();
    assert_eq!(came, message(1));
    let end = receiver.receive::<Message>(Limits::STATE);
    assert!(matches!(end, Err(ChannelError::Closed)));
}

#[test]
fn room_for_descriptors_is_made_within_the_limit() {
    make_room(100).unwrap();
    make_room(usize::MAX).unwrap();
}

#[test]
fn what_has_no_room_to_wait_is_an_error() {
    let (sender, _unread) = Channel::unread().unwrap();
    let error = (0..1_000_000).find_map(|_| sender.send(&message(1000), &[]).err());
    assert!(matches!(error, Some(ChannelError::Full)));
}

#[test]
fn a_connection_that_is_closed_is_an_error_to_send_to() {
    let (sender, receiver) = pair();
    drop(receiver);
    let error = sender.send(&message(1), &[]);
    assert!(matches!(error, Err(ChannelError::Closed)));
}

#[test]
fn the_user_of_the_other_process_is_known() {
    let (one, _other) = UnixStream::pair().unwrap();
    let ours = std::fs::metadata("/proc/self").unwrap().uid();
    assert_eq!(peer_uid(&one).unwrap(), ours);
}
