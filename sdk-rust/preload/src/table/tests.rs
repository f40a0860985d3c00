use std::io::{Read as _, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::sync::Barrier;

use super::*;

const PROXY: &str = "192.0.2.1:40000";
const LISTENER: &str = "198.51.100.10:9000";

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// In a network of no number, on all devices.
fn at(address: SocketAddr) -> Local {
    Local {
        address,
        network: 0,
        device: 0,
    }
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
    lock(shared).endpoint(at(addr("0.0.0.0:9000"))).unwrap()
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
    shared.count_delivered(1, 0);
}

fn path_to(shared: &'static Shared, endpoint: Endpoint, client: SocketAddr) -> SocketAddr {
    match lock(shared).path(endpoint, client) {
        Some(Path::Proxied { to, .. }) => to,
        other => panic!("{other:?}"),
    }
}

#[test]
fn separate_tables_are_copied_at_the_fork_and_go_their_own_ways() {
    let shared = shared(&[("PPV2_FORK", "separate")]);
    let endpoint = endpoint(shared);
    hear(shared, endpoint, client(1));
    let status = fork(|| {
        shared.forked();
        hear(shared, endpoint, client(2));
        knows(shared, endpoint, client(1)) && knows(shared, endpoint, client(2))
    });
    assert_eq!(status, 0);
    assert!(knows(shared, endpoint, client(1)));
    assert!(!knows(shared, endpoint, client(2)));
    // What was counted is the family's.
    assert_eq!(shared.counts.get(Cell::Delivered), 2);
    assert_eq!(shared.counts.get(Cell::TableResets), 0);
}

/// Its thread doesn't exist in the child.
#[test]
fn a_child_with_a_table_of_its_own_goes_on_where_the_parents_was_locked() {
    let shared = shared(&[("PPV2_FORK", "separate")]);
    let endpoint = endpoint(shared);
    hear(shared, endpoint, client(1));
    let (locked, wait) = (Barrier::new(2), Barrier::new(2));
    thread::scope(|scope| {
        scope.spawn(|| {
            let table = lock(shared);
            locked.wait();
            wait.wait();
            drop(table);
        });
        locked.wait();
        let status = fork(|| {
            shared.forked();
            let forgotten = !knows(shared, endpoint, client(1));
            hear(shared, endpoint, client(2));
            forgotten && knows(shared, endpoint, client(2))
        });
        wait.wait();
        assert_eq!(status, 0);
    });
    assert!(knows(shared, endpoint, client(1)));
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
                is_direct: false,
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
        table.find(client, 0, 0);
    }
    let during = arena::live();
    assert!(during > before + 2000);
    let entry = &shared.entries()[endpoint.0 as usize];
    let demux = entry.demux.replace(ptr::null_mut());
    let using = table.using_arena();
    // SAFETY: it came from a box, and nothing refers to it.
    drop(unsafe { Box::from_raw(demux) });
    drop(using);
    assert_eq!(arena::live(), before);
    drop(table);
}

/// Processes use the table at once, and are killed wherever they are.
#[test]
fn processes_that_are_killed_leave_a_table_that_works() {
    let shared = shared(&[("PPV2_MAX_CLIENTS", "50")]);
    let endpoint = endpoint(shared);
    let work = |from: u32| {
        let mut number = from;
        loop {
            number += 1;
            hear(shared, endpoint, client(from + number % 99));
            knows(shared, endpoint, client(number));
        }
    };
    for round in 0..12 {
        let children: Vec<_> = (0..3)
            .map(|child| {
                // SAFETY: the child uses the table alone, until it is killed.
                let id = unsafe { libc::fork() };
                if id == 0 {
                    // SAFETY: it only has the child end with its parent.
                    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
                    let _ = catch_unwind(AssertUnwindSafe(|| work(child * 1000)));
                    // SAFETY: the process ends.
                    unsafe { libc::_exit(1) };
                }
                id
            })
            .collect();
        for child in children {
            for number in 0..20 {
                hear(shared, endpoint, client(5000 + number));
            }
            thread::sleep(Duration::from_micros(150 * round % 1000));
            let mut status = 0;
            // SAFETY: it is a child of this process, and `status` can be written to.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, &raw mut status, 0);
            }
            assert!(libc::WIFSIGNALED(status), "the child has failed");
        }
    }
    hear(shared, endpoint, client(1));
    assert!(knows(shared, endpoint, client(1)));
    assert_eq!(shared.counts.get(Cell::Interrupted), 0);
}

#[test]
fn a_process_that_is_stopped_with_the_lock_makes_calls_fail_until_it_goes_on() {
    let shared = shared(&[]);
    let endpoint = endpoint(shared);
    hear(shared, endpoint, client(1));
    // SAFETY: the child uses the table alone, and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let table = shared.lock();
        // SAFETY: the process stops, later goes on, and ends.
        unsafe {
            libc::raise(libc::SIGSTOP);
            drop(table);
            libc::_exit(0);
        }
    }
    let mut status = 0;
    // SAFETY: it is a child of this process, and `status` can be written to.
    unsafe { libc::waitpid(child, &raw mut status, libc::WUNTRACED) };
    assert!(libc::WIFSTOPPED(status));
    for _ in 0..100 {
        assert!(shared.lock().is_none());
    }
    // SAFETY: as above.
    unsafe {
        libc::kill(child, libc::SIGCONT);
        libc::waitpid(child, &raw mut status, 0);
    }
    assert_eq!(status, 0);
    assert!(knows(shared, endpoint, client(1)));
    assert_eq!(shared.counts.get(Cell::TableResets), 0);
}

/// So it is with a copy of a thread that was made without the C library's knowledge. In another
/// PID namespace, any thread may have the number of one of this namespace's.
#[test]
fn a_thread_waits_for_one_of_another_process_with_the_same_number() {
    let shared = shared(&[]);
    let endpoint = endpoint(shared);
    hear(shared, endpoint, client(1));
    let (mut held, mut hold) = io::pipe().unwrap();
    let (mut about, mut tell) = io::pipe().unwrap();
    // SAFETY: the child uses the pipes and the table alone, and ends.
    let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    assert!(child >= 0);
    if child == 0 {
        let waited = catch_unwind(AssertUnwindSafe(|| {
            held.read_exact(&mut [0]).unwrap();
            tell.write_all(b"x").unwrap();
            knows(shared, endpoint, client(1))
        }));
        // SAFETY: the process ends.
        unsafe { libc::_exit(if matches!(waited, Ok(true)) { 0 } else { 1 }) };
    }
    let table = lock(shared);
    hold.write_all(b"x").unwrap();
    about.read_exact(&mut [0]).unwrap();
    // So that the child comes as far as to ask for the lock.
    thread::sleep(Duration::from_millis(50));
    drop(table);
    let mut status = -1;
    let child = libc::pid_t::try_from(child).unwrap();
    // SAFETY: `status` can be written to.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
    assert_eq!(shared.counts.get(Cell::TableResets), 0);
}

#[test]
fn threads_share_the_table() {
    let shared = shared(&[]);
    let endpoint = endpoint(shared);
    thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                for number in 0..500 {
                    let client = client(thread * 1000 + number);
                    hear(shared, endpoint, client);
                    assert!(knows(shared, endpoint, client));
                }
            });
        }
    });
    assert_eq!(shared.counts.get(Cell::Delivered), 2000);
    assert_eq!(shared.counts.get(Cell::TableResets), 0);
}

#[test]
fn a_flood_of_clients_keeps_to_the_bound() {
    let shared = shared(&[("PPV2_MAX_CLIENTS", "1000")]);
    let endpoint = endpoint(shared);
    for number in 0..20_000 {
        hear(shared, endpoint, client(number));
    }
    let stats = shared.entries()[0].demux().unwrap().stats();
    assert_eq!((stats.clients, stats.clients_evicted), (1000, 19_000));
    // SAFETY: nobody else uses this table.
    assert!(unsafe { shared.arena.taken() } < 1000 * 400 + (128 << 10));
    assert_eq!(shared.counts.get(Cell::TableResets), 0);
}

/// As in the SDK: 128 bytes, the allocator's 16, and the hash tables.
#[test]
fn a_hundred_thousand_clients_take_less_than_400_bytes_each() {
    const CLIENTS: u32 = 100_000;
    let shared = shared(&[("PPV2_MAX_CLIENTS", "100000")]);
    let endpoint = endpoint(shared);
    let mut table = lock(shared);
    for number in 0..CLIENTS {
        // Each by a port of the proxy's own.
        let [_, host, high, low] = number.to_be_bytes();
        let peer = SocketAddr::from(([192, 0, 2, host], u16::from_be_bytes([high, low])));
        let judged = table.receive(endpoint, peer, None, &datagram(client(number)));
        assert!(judged.is_some());
    }
    // SAFETY: this thread holds the lock.
    let taken = unsafe { shared.arena.taken() };
    assert!(taken < 400 * CLIENTS as usize, "{taken}");
    assert!((0..CLIENTS).all(|number| table.path(endpoint, client(number)).is_some()));
    assert_eq!(shared.counts.get(Cell::TableResets), 0);
}

#[test]
fn a_full_arena_costs_the_clients_known_so_far() {
    let shared = shared(&[("PPV2_MAX_CLIENTS", "500")]);
    let endpoints: Vec<_> = (1..=2000)
        .map(|port| {
            lock(shared)
                .endpoint(at(SocketAddr::from(([0; 4], port))))
                .unwrap()
        })
        .collect();
    let mut table = lock(shared);
    let mut resets = Vec::new();
    for number in 0..200_000u32 {
        let endpoint = endpoints[number as usize % endpoints.len()];
        let judged = table.receive(endpoint, addr(PROXY), None, &datagram(client(number)));
        assert!(judged.is_some());
        assert!(table.path(endpoint, client(number)).is_some());
        if resets.last() != Some(&shared.counts.get(Cell::TableResets)) {
            resets.push(shared.counts.get(Cell::TableResets));
        }
    }
    assert!(resets.len() > 2, "{resets:?}");
    assert!(
        resets.is_sorted_by(|before, after| before + 1 == *after),
        "{resets:?}"
    );
}

#[test]
fn the_table_is_smaller_where_address_space_is_limited() {
    let shared_in = |bytes: u64| {
        fork(|| {
            let used = std::fs::read_to_string("/proc/self/statm").unwrap();
            let pages: u64 = used.split(' ').next().unwrap().parse().unwrap();
            let limit = pages * 4096 + bytes;
            let limit = libc::rlimit {
                rlim_cur: limit,
                rlim_max: limit,
            };
            // SAFETY: `limit` can be read.
            let result = unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) };
            assert_eq!(result, 0);
            let settings = Settings::of(&[("PPV2_TRUSTED", "192.0.2.0/24")]).unwrap();
            match Shared::make(Box::leak(Box::new(settings)), None) {
                Ok(shared) => {
                    let endpoint = endpoint(shared);
                    hear(shared, endpoint, client(1));
                    knows(shared, endpoint, client(1))
                }
                Err(error) => !error.to_string().contains("lower PPV2_MAX_CLIENTS"),
            }
        })
    };
    assert_eq!(shared_in(120 << 20), 0);
    assert_ne!(shared_in(30 << 20), 0);
}

#[test]
fn peers_are_talked_to_directly() {
    let shared = shared(&[("PPV2_PEERS", "198.51.100.0/24")]);
    let endpoint = endpoint(shared);
    let mut table = lock(shared);
    for peer in ["198.51.100.9:53", "[::ffff:198.51.100.9]:53"] {
        let judged = table.receive(endpoint, addr(peer), None, &datagram(client(1)));
        let expected = Judged {
            client: addr("198.51.100.9:53"),
            destination: None,
            header_len: 0,
            is_direct: true,
        };
        assert_eq!(judged, Some(expected));
        assert!(matches!(
            table.path(endpoint, addr(peer)),
            Some(Path::Direct)
        ));
        assert!(table.find(addr(peer), 0, 0).is_none());
    }
    assert!(table.path(endpoint, client(1)).is_none());
}

#[test]
fn untrusted_senders_are_refused_or_direct_clients() {
    let stranger = addr("203.0.113.99:99");
    let refusing = shared(&[]);
    let endpoint_of_refusing = endpoint(refusing);
    let mut table = lock(refusing);
    assert_eq!(
        table.receive(endpoint_of_refusing, stranger, None, b"x"),
        None
    );
    assert!(table.path(endpoint_of_refusing, stranger).is_none());
    drop(table);
    let counts = &refusing.counts;
    assert_eq!(counts.get(Cell::Dropped(DropReason::Untrusted)), 1);
    assert_eq!(
        (counts.get(Cell::Received), counts.get(Cell::Delivered)),
        (1, 0)
    );

    let accepting = shared(&[("PPV2_UNTRUSTED", "accept")]);
    let endpoint = endpoint(accepting);
    assert!(matches!(
        lock(accepting).path(endpoint, stranger),
        Some(Path::Direct)
    ));
    let judged = lock(accepting)
        .receive(endpoint, stranger, None, b"x")
        .unwrap();
    assert_eq!((judged.client, judged.header_len), (stranger, 0));
    assert_eq!(path_to(accepting, endpoint, stranger), stranger);
    assert!(lock(accepting).find(stranger, 0, 0).is_none());
}

#[test]
fn a_look_is_remembered_and_not_counted() {
    let shared = shared(&[]);
    let endpoint = endpoint(shared);
    let mut table = lock(shared);
    for _ in 0..3 {
        assert!(
            table
                .peek(endpoint, addr(PROXY), None, &datagram(client(1)))
                .is_some()
        );
    }
    assert!(table.path(endpoint, client(1)).is_some());
    assert_eq!(table.peek(endpoint, addr(PROXY), None, b"bare"), None);
    drop(table);
    let counts = &shared.counts;
    assert_eq!(counts.get(Cell::Dropped(DropReason::NoHeader)), 0);
    assert_eq!(
        (counts.get(Cell::Received), counts.get(Cell::Delivered)),
        (0, 0)
    );
}

#[test]
fn what_is_delivered_or_dropped_was_received() {
    let shared = shared(&[]);
    shared.count_delivered(3, 2);
    for (drop, cell) in [
        (Counter::ClientFamily, Cell::DroppedClientFamily),
        (Counter::OtherClient, Cell::DroppedOtherClient),
        (Counter::NoMemory, Cell::DroppedNoMemory),
        (Counter::Interrupted, Cell::DroppedInterrupted),
        (Counter::BadPointer, Cell::DroppedBadPointer),
    ] {
        shared.count(drop, 2);
        assert_eq!(shared.counts.get(cell), 2, "{drop:?}");
    }
    shared.count(Counter::RepliesSent, 1);
    let counted = [Cell::Received, Cell::Delivered, Cell::Direct];
    assert_eq!(counted.map(|cell| shared.counts.get(cell)), [13, 3, 2]);
}

#[test]
fn find_prefers_the_endpoint_that_heard_the_client_latest() {
    let shared = shared(&[]);
    let mut table = lock(shared);
    let locals = ["10.0.0.1:69", "[::]:69", "10.0.0.3:69"].map(addr);
    let endpoints = locals.map(|local| table.endpoint(at(local)).unwrap());
    assert!(table.find(client(1), 0, 0).is_none());
    for (round, index) in [0, 2, 1, 0, 1, 2].into_iter().enumerate() {
        table.now += Duration::from_millis(1);
        let peer = SocketAddr::from(([192, 0, 2, 1], u16::try_from(round + 1).unwrap()));
        table.receive(endpoints[index], peer, None, &datagram(client(1)));
        let (endpoint, local, path) = table.find(client(1), 0, 0).unwrap();
        assert_eq!((endpoint, local.address), (endpoints[index], locals[index]));
        assert!(matches!(path, Path::Proxied { to, .. } if to == peer));
    }
}

#[test]
fn an_address_has_one_number_and_the_directory_a_bound() {
    let shared = shared(&[]);
    let mut table = lock(shared);
    let first = table.endpoint(at(addr("192.0.2.7:53"))).unwrap();
    assert_eq!(
        table.endpoint(at(addr("[::ffff:192.0.2.7]:53"))),
        Some(first)
    );
    for port in 1..u16::try_from(MAX_ENDPOINTS).unwrap() {
        let local = SocketAddr::from(([10, 0, 0, 1], port));
        assert_eq!(table.endpoint(at(local)), Some(Endpoint(port.into())));
    }
    assert_eq!(table.endpoint(at(addr("192.0.2.7:54"))), None);
    assert_eq!(table.endpoint(at(addr("192.0.2.7:53"))), Some(first));
    let none = Endpoint(u32::MAX);
    assert_eq!(
        table.receive(none, addr(PROXY), None, &datagram(client(1))),
        None
    );
    assert!(table.path(none, client(1)).is_none());
}

#[test]
fn tagged_replies_carry_their_header() {
    let shared = shared(&[]);
    let endpoint = endpoint(shared);
    let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
    let tag = ppv2::ReplyTag::new(0, [7; 8]);
    let request = ppv2::encode_udp_tagged(client(1), addr(LISTENER), tag, &mut buffer).unwrap();
    let mut table = lock(shared);
    let judged = table.receive(endpoint, addr(PROXY), None, request).unwrap();
    assert_eq!(judged.header_len, request.len());
    let Some(Path::Proxied { header, .. }) = table.path(endpoint, client(1)) else {
        panic!("no path");
    };
    assert_eq!(&header[..], request);
}

#[test]
fn memory_that_leaves_the_section_is_not_in_the_arena() {
    let shared = shared(&[]);
    let endpoint = endpoint(shared);
    let before = arena::live();
    let mut table = lock(shared);
    let mut mine = vec![1u8; 100];
    table.receive(endpoint, addr(PROXY), None, &datagram(client(1)));
    let more = String::from("mine");
    let with_clients = arena::live();
    mine.resize(100_000, 2);
    assert_eq!(arena::live(), with_clients);
    drop(table);
    shared.arena_is_used_by(|| {
        // As in a handler that has interrupted the section.
        let suspended = arena::suspend();
        let own = vec![3u8; 1000];
        assert_eq!(arena::live(), with_clients);
        drop((own, suspended));
    });
    assert!(with_clients > before);
    assert_eq!((mine[0], mine[99_999], more.as_str()), (1, 2, "mine"));
}

#[test]
fn memory_of_the_arena_is_left_alone_outside_of_the_section() {
    let shared = shared(&[]);
    let table = lock(shared);
    let using = table.using_arena();
    let mut inside = vec![1u8; 100];
    let given_up = vec![2u8; 100];
    drop(using);
    let live = arena::live();
    inside.resize(1000, 3);
    drop(given_up);
    drop(table);
    assert_eq!((inside[99], inside[999]), (1, 3));
    assert_eq!(arena::live(), live);
}

mod properties {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Hear { endpoint: u8, client: u8, port: u8 },
        Bare { endpoint: u8 },
        Forget,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            8 => (0..3u8, 0..20u8, 1..9u8).prop_map(|(endpoint, client, port)| Step::Hear {
                endpoint,
                client,
                port
            }),
            2 => (0..3u8).prop_map(|endpoint| Step::Bare { endpoint }),
            1 => Just(Step::Forget),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Each endpoint answers a client by the port that it was heard from last; a death
        /// under the lock, and only that, forgets all.
        #[test]
        fn paths_are_those_of_the_latest_datagrams(steps in steps()) {
            // The tables of all cases are one: each begins with a reset.
            static SHARED: std::sync::OnceLock<&'static Shared> = std::sync::OnceLock::new();
            static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
            let _one = ONE.lock();
            let shared = *SHARED.get_or_init(|| shared(&[]));
            let die = || {
                let mut table = lock(shared);
                table.shared.spoilt.store(true, Ordering::Relaxed);
                table.now += Duration::from_secs(1);
            };
            die();
            let endpoints = [1, 2, 3].map(|port| {
                lock(shared).endpoint(at(SocketAddr::from(([127, 0, 0, 1], port)))).unwrap()
            });
            let mut model = HashMap::new();
            let (mut received, mut dropped) = (0, 0);
            let counts = || {
                let counts = &shared.counts;
                [Cell::Received, Cell::Delivered, Cell::Dropped(DropReason::NoHeader)]
                    .map(|cell| counts.get(cell))
            };
            let before = counts();
            for step in steps {
                match step {
                    Step::Hear { endpoint, client: number, port } => {
                        let peer = SocketAddr::from(([192, 0, 2, number], port.into()));
                        let bytes = datagram(client(number.into()));
                        let endpoint = endpoints[usize::from(endpoint)];
                        let judged = lock(shared).receive(endpoint, peer, None, &bytes);
                        prop_assert!(judged.is_some());
                        shared.count_delivered(1, 0);
                        model.insert((endpoint.0, number), peer);
                        received += 1;
                    }
                    Step::Bare { endpoint } => {
                        let endpoint = endpoints[usize::from(endpoint)];
                        let judged = lock(shared).receive(endpoint, addr(PROXY), None, b"x");
                        prop_assert_eq!(judged, None);
                        dropped += 1;
                    }
                    Step::Forget => {
                        die();
                        model.clear();
                    }
                }
            }
            for endpoint in endpoints {
                for number in 0..20 {
                    let path = lock(shared).path(endpoint, client(number.into()));
                    let to = path.map(|path| match path {
                        Path::Proxied { to, .. } => to,
                        Path::Direct => addr("0.0.0.0:0"),
                    });
                    prop_assert_eq!(to, model.get(&(endpoint.0, number)).copied());
                }
            }
            let [a, b, c] = before;
            prop_assert_eq!(counts(), [a + received + dropped, b + received, c + dropped]);
        }
    }
}

#[test]
fn the_statistics_follow_in_a_child_too() {
    let file = std::env::temp_dir().join(format!("ppv2-{}-follow", process::id()));
    let text = Text::open(&file).unwrap();
    let settings = Settings::of(&[("PPV2_TRUSTED", "192.0.2.0/24"), ("PPV2_MAX_CLIENTS", "2")]);
    let shared = Shared::make(Box::leak(Box::new(settings.unwrap())), Some(text)).unwrap();
    let endpoint = endpoint(shared);
    let line = |line: &str| {
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.lines().any(|other| other == line), "{line}: {text}");
    };
    let status = fork(|| {
        for number in 0..5 {
            hear(shared, endpoint, client(number));
        }
        lock(shared).receive(endpoint, addr(PROXY), None, b"bare");
        shared.count(Counter::RepliesSent, 3);
        true
    });
    assert_eq!(status, 0);
    line("ppv2_preload_datagrams_received_total 00000000000000000006");
    line("ppv2_preload_datagrams_delivered_total 00000000000000000005");
    line("ppv2_preload_datagrams_dropped_total{reason=\"no_header\"} 00000000000000000001");
    line("ppv2_preload_replies_sent_total 00000000000000000003");
    line("ppv2_preload_clients 00000000000000000002");
    line("ppv2_preload_clients_evicted_total 00000000000000000003");
    shared.spoilt.store(true, Ordering::Relaxed);
    drop(lock(shared));
    line("ppv2_preload_clients 00000000000000000000");
    line("ppv2_preload_table_resets_total 00000000000000000001");
    hear(shared, endpoint, client(7));
    line("ppv2_preload_clients 00000000000000000001");
    std::fs::remove_file(&file).unwrap();
}
