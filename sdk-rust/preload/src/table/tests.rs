use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;

use super::*;

const PROXY: &str = "192.0.2.1:40000";
const LISTENER: &str = "198.51.100.10:9000";

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// The client of a number, and the port of the proxy that speaks for it.
fn client(number: u32) -> SocketAddr {
    let [_, a, b, c] = number.to_be_bytes();
    SocketAddr::from(([203, a, b, c], 5000))
}

fn header(client: SocketAddr) -> Vec<u8> {
    let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
    let header = ppv2::encode_udp(client, addr(LISTENER), &mut buffer);
    header.unwrap().to_vec()
}

fn datagram(client: SocketAddr) -> Vec<u8> {
    let mut bytes = header(client);
    bytes.write_all(b"hello").unwrap();
    bytes
}

/// A table of its own, which lasts as long as the process.
fn shared(variables: &[(&str, &str)]) -> &'static Shared {
    let trusted = [("PPV2_TRUSTED", "192.0.2.0/24")];
    let variables: Vec<_> = trusted.iter().chain(variables).copied().collect();
    let settings = Box::leak(Box::new(Settings::of(&variables).unwrap()));
    install_hook();
    Shared::make(settings, None).unwrap()
}

fn lock(shared: &'static Shared) -> Table {
    shared.lock().unwrap()
}

fn endpoint(shared: &'static Shared) -> Endpoint {
    lock(shared).endpoint(addr("0.0.0.0:9000")).unwrap()
}

/// Runs `work` in a child process; its exit status.
fn fork(work: impl FnOnce() -> bool) -> c_int {
    // SAFETY: the child runs `work` alone, which takes no lock of other threads, and ends.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let result = catch_unwind(AssertUnwindSafe(work));
        // SAFETY: the process ends.
        unsafe { libc::_exit(if matches!(result, Ok(true)) { 0 } else { 1 }) };
    }
    let mut status = -1;
    // SAFETY: `status` can be written to.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    status
}

fn knows(shared: &'static Shared, endpoint: Endpoint, client: SocketAddr) -> bool {
    lock(shared).path(endpoint, client).is_some()
}

fn hear(shared: &'static Shared, endpoint: Endpoint, client: SocketAddr) {
    let judged = lock(shared).receive(endpoint, addr(PROXY), None, &datagram(client));
    assert_eq!(judged.map(|judged| judged.client), Some(client));
}

#[test]
fn a_child_receives_and_its_parent_answers() {
    let shared = shared(&[]);
    let endpoint = endpoint(shared);
    let local = Some(addr("10.0.0.1:0").ip());
    let status = fork(|| {
        let mut table = lock(shared);
        let judged = table.receive(
            endpoint,
            addr("[::ffff:192.0.2.1]:40000"),
            local,
            &datagram(client(1)),
        );
        judged
            == Some(Judged {
                client: client(1),
                destination: Some(addr(LISTENER)),
                header_len: 28,
            })
    });
    assert_eq!(status, 0);
    let Some(Path::Proxied {
        to,
        local: from,
        header,
    }) = lock(shared).path(endpoint, client(1))
    else {
        panic!("no path");
    };
    assert_eq!((to, from, header.len()), (addr(PROXY), local, 0));
    assert_eq!(shared.counts.get(Cell::Delivered), 1);
}

#[test]
fn a_process_that_dies_with_the_lock_costs_the_table_and_nothing_else() {
    let shared = shared(&[]);
    let endpoint = endpoint(shared);
    hear(shared, endpoint, client(1));
    let status = fork(|| {
        let mut table = lock(shared);
        table.receive(endpoint, addr(PROXY), None, &datagram(client(2)));
        // SAFETY: the process ends.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        false
    });
    assert!(libc::WIFSIGNALED(status));
    assert_eq!(
        [1, 2].map(|number| knows(shared, endpoint, client(number))),
        [false; 2]
    );
    assert_eq!(shared.counts.get(Cell::TableResets), 1);
    hear(shared, endpoint, client(3));
    assert!(knows(shared, endpoint, client(3)));
    assert_eq!(shared.counts.get(Cell::TableResets), 1);
    assert_eq!(shared.counts.get(Cell::Interrupted), 0);
}

#[test]
fn a_call_from_a_handler_fails_and_changes_nothing() {
    let shared = shared(&[]);
    let endpoint = endpoint(shared);
    let mut outer = lock(shared);
    for _ in 0..100 {
        assert!(shared.lock().is_none());
    }
    assert!(is_inside());
    outer.receive(endpoint, addr(PROXY), None, &datagram(client(1)));
    drop(outer);
    assert!(!is_inside());
    assert!(knows(shared, endpoint, client(1)));
    assert_eq!(shared.counts.get(Cell::Interrupted), 100);
    assert_eq!(shared.counts.get(Cell::TableResets), 0);
}

#[test]
fn a_section_that_was_left_by_longjmp_is_given_up_after_a_while() {
    let shared = shared(&[]);
    let endpoint = endpoint(shared);
    hear(shared, endpoint, client(1));
    std::mem::forget(lock(shared));
    let table = loop {
        match shared.lock() {
            Some(table) => break table,
            None => thread::sleep(Duration::from_millis(1)),
        }
    };
    assert!(table.path(endpoint, client(1)).is_none());
    drop(table);
    assert!(!is_inside());
    hear(shared, endpoint, client(2));
    assert_eq!(shared.counts.get(Cell::TableResets), 1);
    assert!(shared.counts.get(Cell::Interrupted) >= u64::from(ABANDONED_CALLS));
}

#[test]
fn a_panic_under_the_lock_costs_the_table_and_nothing_else() {
    let shared = shared(&[]);
    let endpoint = endpoint(shared);
    hear(shared, endpoint, client(1));
    let panic = catch_unwind(AssertUnwindSafe(|| {
        let _table = lock(shared);
        let text = format!("{} {}", "on", "purpose");
        panic!("{text}");
    }));
    hear(shared, endpoint, client(2));
    let live = arena::live();
    drop(panic.unwrap_err());
    assert_eq!(arena::live(), live);
    assert!(!knows(shared, endpoint, client(1)));
    assert!(knows(shared, endpoint, client(2)));
    assert_eq!(shared.counts.get(Cell::TableResets), 1);
}

#[test]
fn the_table_alone_is_allocated_in_the_arena() {
    let shared = shared(&[
        ("PPV2_UNTRUSTED", "accept"),
        ("PPV2_REMEMBER", "30s"),
        ("PPV2_PEERS", "198.51.100.1"),
    ]);
    let endpoint = endpoint(shared);
    let before = arena::live();
    let mut table = lock(shared);
    for number in 0..2000 {
        let client = client(number);
        let head = header(client);
        for bytes in [
            &datagram(client),
            &head,
            &head[..20].to_vec(),
            &b"hello".to_vec(),
        ] {
            for peer in [PROXY, "198.51.100.7:7", "198.51.100.1:7", "[2001:db8::1]:7"] {
                table.receive(endpoint, addr(peer), None, bytes);
                table.peek(endpoint, addr(peer), None, bytes);
            }
        }
        table.path(endpoint, client);
        table.find(client);
    }
    let during = arena::live();
    assert!(during > before + 2000);
    let entry = &shared.entries()[endpoint.0 as usize];
    let demux = entry.demux.replace(ptr::null_mut());
    // SAFETY: it came from a box, and nothing refers to it.
    drop(unsafe { Box::from_raw(demux) });
    assert_eq!(arena::live(), before);
    drop(table);
}
