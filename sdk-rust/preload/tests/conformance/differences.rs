//! Where programs see something else through the library, by intention.

use crate::network::Path;
use crate::program::Case;

/// A line that is another one through the library.
pub(crate) struct Difference {
    case: &'static str,
    plain: &'static str,
    through: &'static str,
}

pub(crate) const DIFFERENCES: &[Difference] = &[
    // There is no way to a client that no proxy has spoken for, and its own address is not
    // the library's to send to.
    line(
        "sends_to_strangers",
        "never seen -> 4",
        "never seen -> EHOSTUNREACH",
    ),
    line(
        "sends_to_strangers",
        "c3 has 'push' from s1",
        "c3 has nothing",
    ),
    line(
        "connected_to_a_stranger",
        "connect -> 0",
        "connect -> EHOSTUNREACH",
    ),
    line(
        "connected_to_a_stranger",
        "connected: getpeername -> 0 c3 of client 3",
        "connected: getpeername -> ENOTCONN ",
    ),
    line(
        "connected_to_a_stranger",
        "connected: getpeername -> 0 c3 of mapped:client 3",
        "connected: getpeername -> ENOTCONN ",
    ),
    line(
        "connected_to_a_stranger",
        "connected: getsockname -> 0 s1 of mapped:server",
        "connected: getsockname -> 0 s1 of ::",
    ),
    // The same, where the kernel has other reasons to refuse.
    line(
        "ipv6_only",
        "to a mapped address -> ENETUNREACH",
        "to a mapped address -> EHOSTUNREACH",
    ),
];

/// What a case prints where each reply has a header, in place of all that it prints otherwise.
const TAGGED: &[(&str, &[&str])] = &[(
    "segmented_when_put_together",
    &[
        "UDP_SEGMENT -> 0",
        "MSG_MORE -> EIO",
        "UDP_CORK -> 0",
        "corked -> EIO",
        "exit status: 0",
    ],
)];

/// Cases about sockets that are connected to one client each. With tagged replies all
/// clients' datagrams come from one socket of the proxy's, so that the kernel can't tell
/// which of the program's sockets a client's are for.
const NOT_TAGGED: &[&str] = &[
    "corked_for_another_client",
    "refused",
    "refused_while_others_look",
    "refused_with_an_error_queue",
    "socket_for_each_client",
    "transfer_socket_of_an_ephemeral_port",
    "transfer_socket_that_is_not_bound",
];

const fn line(case: &'static str, plain: &'static str, through: &'static str) -> Difference {
    Difference {
        case,
        plain,
        through,
    }
}

/// Whether a case is run this way.
pub(crate) fn is_run(case: &Case, path: Path) -> bool {
    path != Path::Tagged || !NOT_TAGGED.contains(&case.name.as_str())
}

/// Whether the statistics are whole: if a program is executed, they are its own, and a handler
/// that jumps out of the library may do so between two numbers.
pub(crate) fn is_counted(case: &Case) -> bool {
    case.name != "vfork_and_exec" && !case.name.starts_with("jumps_out")
}

/// What a case prints through the library, from what it prints on plain sockets.
pub(crate) fn expected(case: &Case, path: Path, mut lines: Vec<String>) -> Vec<String> {
    let tagged = TAGGED.iter().filter(|_| path == Path::Tagged);
    for (name, lines) in tagged {
        if *name == case.name {
            return lines.iter().map(ToString::to_string).collect();
        }
    }
    for difference in DIFFERENCES {
        for line in &mut lines {
            if difference.case == case.name && difference.plain == line {
                difference.through.clone_into(line);
            }
        }
    }
    lines
}
