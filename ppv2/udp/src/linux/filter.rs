//! A program in the kernel that drops what no session of a shared socket can have asked for:
//! classic BPF, which takes no privilege (SO_ATTACH_FILTER in socket(7)).
//!
//! Packets are at their UDP header when a UDP socket's filter runs. The addresses are at the
//! beginning of the IP header, which may have options or extension headers behind them.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{sock_filter, sock_fprog};

use super::{len_of, set};

/// The most networks and servers that are looked for, one after the other. With more, all
/// datagrams pass: a long search of each would cost more than it saves.
const MOST: usize = 64;

/// From here on, a load's offset counts from the IP header (SKF_NET_OFF).
const IP_HEADER: u32 = (-0x10_0000_i32).cast_unsigned();

/// The words of source and destination address in IP headers of both families.
const SOURCE_V4: &[u32] = &[IP_HEADER + 12];
const DESTINATION_V4: &[u32] = &[IP_HEADER + 16];
const SOURCE_V6: &[u32] = &[
    IP_HEADER + 8,
    IP_HEADER + 12,
    IP_HEADER + 16,
    IP_HEADER + 20,
];
const DESTINATION_V6: &[u32] = &[
    IP_HEADER + 24,
    IP_HEADER + 28,
    IP_HEADER + 32,
    IP_HEADER + 36,
];

/// Where UDP has the source port.
const SOURCE_PORT: u32 = 0;

/// What the kernel keeps of a packet that passes: all.
const ALL: u32 = u32::MAX;
const NOTHING: u32 = 0;

const LOAD_WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const LOAD_HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
const TO_X: u32 = libc::BPF_MISC | libc::BPF_TAX;
const FROM_X: u32 = libc::BPF_MISC | libc::BPF_TXA;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const JUMP: u32 = libc::BPF_JMP | libc::BPF_JA;
const JUMP_IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// Has the kernel drop what is not addressed to one of `networks`, each an address with the
/// length of its prefix, or does not come from one of `servers`, if there are any given.
/// Takes the place of the filter before, without a gap; where it can't, there is none.
pub(crate) fn attach_filter(
    socket: BorrowedFd<'_>,
    v6: bool,
    networks: &[(IpAddr, u8)],
    servers: Option<&[SocketAddr]>,
) -> io::Result<()> {
    let program = program(v6, networks, servers);
    let filter = sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the option value points at a program of that length, which the kernel copies.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            len_of::<sock_fprog>(),
        )
    };
    if status == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // The one before would drop what new servers answer.
    let _ = set(socket, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0);
    Err(error)
}

/// What [`attach_filter`] has the kernel run.
fn program(
    v6: bool,
    networks: &[(IpAddr, u8)],
    servers: Option<&[SocketAddr]>,
) -> Vec<sock_filter> {
    let (source, destination) = if v6 {
        (SOURCE_V6, DESTINATION_V6)
    } else {
        (SOURCE_V4, DESTINATION_V4)
    };
    let networks = networks.iter().filter(|(ip, _)| ip.is_ipv6() == v6);
    let networks = networks.map(|(ip, prefix)| {
        let mut tests = tests(destination, *ip);
        let mut left = u32::from(*prefix);
        for test in &mut tests {
            let bits = left.min(u32::BITS);
            test.mask = u32::MAX.checked_shl(u32::BITS - bits).unwrap_or(0);
            test.value &= test.mask;
            left -= bits;
        }
        tests.retain(|test| test.mask != 0);
        tests
    });
    let mut program = any_of(&networks.collect::<Vec<_>>());
    if let Some(servers) = servers {
        let servers = servers.iter().filter(|server| server.is_ipv6() == v6);
        let servers = servers.map(|server| {
            let mut tests = tests(source, server.ip());
            // Servers' addresses differ most in their last word.
            tests.reverse();
            tests.push(Test {
                load: (LOAD_HALF, SOURCE_PORT),
                mask: u32::MAX,
                value: server.port().into(),
            });
            tests
        });
        program.extend(any_by_first(&servers.collect::<Vec<_>>()));
    }
    program.push(instruction(RETURN, ALL));
    program
}

/// Whether a part of a packet, under a mask, has this value.
struct Test {
    /// Instruction and offset that load it.
    load: (u32, u32),
    mask: u32,
    value: u32,
}

/// That the words at these offsets are those of `ip`.
fn tests(offsets: &[u32], ip: IpAddr) -> Vec<Test> {
    let bytes = match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let values = bytes.chunks_exact(4);
    let values = values.map(|word| {
        word.iter()
            .fold(0, |value, byte| value << 8 | u32::from(*byte))
    });
    let tests = offsets.iter().zip(values).map(|(at, value)| Test {
        load: (LOAD_WORD, *at),
        mask: u32::MAX,
        value,
    });
    tests.collect()
}

/// As [`any_of`], for choices that all begin with a test of one word without a mask: only
/// choices with the value that it has are looked at further.
fn any_by_first(choices: &[Vec<Test>]) -> Vec<sock_filter> {
    if choices.len() > MOST {
        return Vec::new();
    }
    let mut by_first: BTreeMap<u32, Vec<&[Test]>> = BTreeMap::new();
    let mut program = Vec::new();
    for tests in choices {
        let [first, others @ ..] = &tests[..] else {
            continue;
        };
        program = vec![instruction(first.load.0, first.load.1)];
        by_first.entry(first.value).or_default().push(others);
    }
    // First a comparison for each value, which leads to a jump for each, and those to what
    // is to be done: a comparison can't jump far.
    let hit = u8::try_from(by_first.len()).unwrap_or(u8::MAX);
    program.extend(by_first.keys().map(|value| sock_filter {
        jt: hit,
        ..instruction(JUMP_IF_EQUAL, *value)
    }));
    program.push(instruction(RETURN, NOTHING));
    let others: Vec<_> = by_first.values().map(|others| any_of(others)).collect();
    let mut before = 0;
    for (index, one) in others.iter().enumerate() {
        program.push(instruction(JUMP, offset(others.len() - index - 1 + before)));
        before += one.len() + 1;
    }
    let mut left = before;
    for one in others {
        left -= one.len() + 1;
        program.extend(one);
        program.push(instruction(JUMP, offset(left)));
    }
    program
}

/// Drops what passes all tests of none of `choices`; all goes on if they are too many.
fn any_of(choices: &[impl AsRef<[Test]>]) -> Vec<sock_filter> {
    if choices.len() > MOST {
        return Vec::new();
    }
    let choices = || choices.iter().map(AsRef::as_ref);
    // What each begins with is loaded once: from the IP header, that is a call.
    let first = choices().find_map(|tests| tests.first());
    let mut program = Vec::new();
    if let Some(Test {
        load: (code, at), ..
    }) = first
    {
        program.extend([instruction(*code, *at), instruction(TO_X, 0)]);
    }
    let choices: Vec<_> = choices()
        .map(|tests| choice(tests, first.map(|test| test.load)))
        .collect();
    let mut left: usize = choices.iter().map(|choice| choice.len() + 1).sum();
    for choice in choices {
        left -= choice.len() + 1;
        program.extend(choice);
        // Behind all others, and what drops the packet.
        program.push(instruction(JUMP, offset(left + 1)));
    }
    program.push(instruction(RETURN, NOTHING));
    program
}

/// Goes on if all tests pass, else behind the instruction that follows. X has what `first`
/// loads.
fn choice(tests: &[Test], first: Option<(u32, u32)>) -> Vec<sock_filter> {
    let mut program = Vec::new();
    // Backwards, since each jump has to know what follows.
    for test in tests.iter().rev() {
        let mut one = Vec::new();
        if Some(test.load) == first {
            one.push(instruction(FROM_X, 0));
        } else {
            one.push(instruction(test.load.0, test.load.1));
        }
        if test.mask != u32::MAX {
            one.push(instruction(AND, test.mask));
        }
        let miss = u8::try_from(program.len() + 1).unwrap_or(u8::MAX);
        one.push(sock_filter {
            jf: miss,
            ..instruction(JUMP_IF_EQUAL, test.value)
        });
        one.append(&mut program);
        program = one;
    }
    program
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a program has few instructions"
)]
const fn offset(instructions: usize) -> u32 {
    instructions as u32
}

#[expect(clippy::cast_possible_truncation, reason = "codes have 16 bits")]
const fn instruction(code: u32, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}
