//! Which server a client gets, seen from outside: the same one for the same
//! client, wherever and whenever it asks, and none that it must not.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use ppv2_lab::*;

/// Clients at addresses of their own, more than chance leaves a server without.
const CLIENTS: u8 = 60;

/// Which server each client was given.
type Given = BTreeMap<IpAddr, usize>;

fn ip(number: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(127, 20, number, number))
}

fn servers() -> [UdpSocket; 3] {
    [(); 3].map(|()| socket("127.0.0.1"))
}

/// Sends a datagram from a new port of each client, and finds where it arrives.
fn ask(listener: SocketAddr, servers: &[UdpSocket]) -> Given {
    for number in 0..CLIENTS {
        let client = bind(SocketAddr::new(ip(number), 0));
        client.send_to(b"hi", listener).unwrap();
    }
    let mut given = Given::new();
    for server in servers {
        server.set_nonblocking(true).unwrap();
    }
    let mut datagram = [0; 2000];
    eventually("all clients' datagrams", || {
        for (number, server) in servers.iter().enumerate() {
            while let Ok(len) = server.recv(&mut datagram) {
                let (client, _, _) = read_header(&datagram[..len]);
                let other = given.insert(client.ip(), number);
                assert_eq!(other, None, "{client} was served twice");
            }
        }
        given.len() == usize::from(CLIENTS)
    });
    given
}

fn used(given: &Given) -> Vec<usize> {
    let mut used: Vec<_> = given.values().copied().collect();
    used.sort_unstable();
    used.dedup();
    used
}

/// A proxy whose upstream has these keys and servers, in this order.
fn start(listener: SocketAddr, keys: &str, servers: &[String]) -> (Process, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "workers = 2\n[[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n\
         [upstream.u]\n{keys}\nservers = [{}]\n",
        servers.join(", ")
    );
    (proxy_with(&folder, &config), folder)
}

fn listed(servers: &[UdpSocket], more: [&str; 3]) -> Vec<String> {
    let entry = |(server, more): (&UdpSocket, &str)| {
        let address = server.local_addr().unwrap();
        format!("{{ address = \"{address}\"{more} }}")
    };
    servers.iter().zip(more).map(entry).collect()
}

#[test]
fn a_client_keeps_its_server_over_ports_proxies_and_restarts() {
    let servers = servers();
    let (one, other) = (address("127.0.0.1"), address("127.0.0.1"));
    let mut entries = listed(&servers, ["", ", weight = 2", ""]);
    let (mut proxy, folder) = start(one, "", &entries);
    let first = ask(one, &servers);
    assert_eq!(used(&first), [0, 1, 2]);
    assert_eq!(ask(one, &servers), first, "from other ports");

    // Another proxy, whose configuration lists them otherwise.
    entries.reverse();
    let (_other, _folder) = start(other, "balance = \"maglev\"", &entries);
    assert_eq!(ask(other, &servers), first, "by another proxy");

    proxy.signal("TERM");
    assert!(proxy.wait().0.success());
    let _proxy = proxy_with_file(&folder);
    assert_eq!(ask(one, &servers), first, "after a restart");
}

fn proxy_with_file(folder: &tempfile::TempDir) -> Process {
    let file = folder.path().join("proxy.toml");
    proxy(&["--config", file.to_str().unwrap()])
}

#[test]
fn removing_a_server_moves_its_clients_alone() {
    let servers = servers();
    let (all, fewer) = (address("127.0.0.1"), address("127.0.0.1"));
    let entries = listed(&servers, [""; 3]);
    let (_all, _folder) = start(all, "", &entries);
    let (_fewer, _other) = start(fewer, "", &entries[..2]);
    let (before, after) = (ask(all, &servers), ask(fewer, &servers));
    assert_eq!(used(&before), [0, 1, 2]);
    assert_eq!(used(&after), [0, 1]);
    let moved = before
        .iter()
        .filter(|(ip, server)| **server != 2 && after[*ip] != **server);
    // One in a hundred, by chance some more of these few.
    assert!(moved.count() <= 5, "{before:?} {after:?}");
}

#[test]
fn hashing_the_port_spreads_one_client() {
    let servers = servers();
    let listener = address("127.0.0.1");
    let entries = listed(&servers, [""; 3]);
    let (_proxy, _folder) = start(listener, "hash_on = \"client_addr\"", &entries);
    let clients: Vec<_> = (0..CLIENTS).map(|_| socket("127.0.0.1")).collect();
    for client in &clients {
        client.send_to(b"hi", listener).unwrap();
    }
    for server in &servers {
        let (datagram, _) = receive(server);
        let client = read_header(&datagram).0;
        assert!(clients.iter().any(|c| c.local_addr().unwrap() == client));
    }
}

#[test]
fn drained_servers_and_backups_get_sessions_only_when_they_should() {
    for balance in ["maglev", "round_robin", "least_sessions", "random_two"] {
        let servers = servers();
        let keys = format!("balance = \"{balance}\"");
        for (more, expected) in [
            (["", "", ", backup = true"], &[0, 1][..]),
            (["", ", drain = true", ""], &[0, 2]),
            (
                [", drain = true", ", drain = true", ", backup = true"],
                &[2],
            ),
            (["", ", drain = true", ", backup = true"], &[0]),
        ] {
            let listener = address("127.0.0.1");
            let (_proxy, _folder) = start(listener, &keys, &listed(&servers, more));
            let given = ask(listener, &servers);
            assert_eq!(used(&given), expected, "{balance} {more:?}");
        }
    }
}

#[test]
fn least_sessions_evens_out_after_sessions_end() {
    let servers = servers();
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let addresses: Vec<_> = servers
        .iter()
        .map(|s| s.local_addr().unwrap().to_string())
        .collect();
    let _proxy = proxy(&[
        "--workers",
        "1",
        "--balance",
        "least_sessions",
        "--responses",
        "1",
        "--listen",
        &listener.to_string(),
        "--admin",
        &admin.to_string(),
        "--upstream",
        &addresses[0],
        "--upstream",
        &addresses[1],
        "--upstream",
        &addresses[2],
    ]);
    let sessions = |server: usize| {
        let name = format!(
            "ppv2_upstream_sessions{{upstream=\"upstream\",server=\"{}\"}}",
            addresses[server]
        );
        metric(admin, &name)
    };
    let clients: Vec<_> = (0..30).map(|_| socket("127.0.0.1")).collect();
    for client in &clients {
        client.send_to(b"question", listener).unwrap();
    }
    eventually("30 sessions", || (0..3).map(sessions).sum::<u64>() == 30);
    assert_eq!([0, 1, 2].map(sessions), [10; 3]);
    // One server answers, and its sessions end; it gets the next ones, all of them.
    for _ in 0..10 {
        let (_, session) = receive(&servers[1]);
        servers[1].send_to(b"answer", session).unwrap();
    }
    eventually("10 sessions to end", || sessions(1) == 0);
    let more: Vec<_> = (0..10).map(|_| socket("127.0.0.1")).collect();
    for client in &more {
        client.send_to(b"question", listener).unwrap();
    }
    eventually("10 sessions more", || {
        (0..3).map(sessions).sum::<u64>() == 30
    });
    assert_eq!([0, 1, 2].map(sessions), [10; 3]);
}

#[test]
fn ipv6_clients_of_one_network_share_a_server() {
    let setup = "for n in 1 2 3 4 5 6 7 8 9 a b c; do
                   ip -6 addr add 2001:db8:0:$n::1/64 dev lo nodad
                   ip -6 addr add 2001:db8:0:$n::2/64 dev lo nodad
                 done";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    let servers = servers();
    let server_of = |listener: SocketAddr, client: &str| {
        socket(client).send_to(b"hi", listener).unwrap();
        let mut from = None;
        eventually("the datagram", || {
            let arrived = |server: &UdpSocket| server.recv(&mut [0; 100]).is_ok();
            from = servers.iter().position(arrived);
            from.is_some()
        });
        from.unwrap()
    };
    for server in &servers {
        server.set_nonblocking(true).unwrap();
    }
    let entries = listed(&servers, [""; 3]);
    let pairs = |prefix: u8| -> Vec<[usize; 2]> {
        let listener = address("::1");
        let (_proxy, _folder) = start(listener, &format!("hash_ipv6_prefix = {prefix}"), &entries);
        let networks = "123456789abc".chars();
        let pair = |n| [1, 2].map(|host| server_of(listener, &format!("2001:db8:0:{n}::{host}")));
        networks.map(pair).collect()
    };
    let by_network = pairs(64);
    assert!(
        by_network.iter().all(|[one, two]| one == two),
        "{by_network:?}"
    );
    assert!(
        by_network.iter().any(|pair| *pair != by_network[0]),
        "{by_network:?}"
    );
    let by_host = pairs(128);
    assert!(by_host.iter().any(|[one, two]| one != two), "{by_host:?}");
    let by_site = pairs(60);
    assert!(
        by_site.iter().all(|pair| *pair == by_site[0]),
        "{by_site:?}"
    );
}

#[test]
fn an_operator_drains_a_server_and_its_sessions_stay() {
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let servers = [socket("127.0.0.1"), socket("127.0.0.1")];
    let [first, second] = [0, 1].map(|index: usize| servers[index].local_addr().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let _proxy = proxy_with(
        &folder,
        &format!(
            "[admin]\nlisten = \"{admin}\"\n[[listener]]\nbind = [\"{listener}\"]\n\
             upstream = \"u\"\n[upstream.u]\nbalance = \"round_robin\"\n\
             servers = [\"{first}\", \"{second}\"]\n"
        ),
    );
    let sent = || -> u64 {
        let of = |server| {
            let labels = format!("upstream=\"u\",server=\"{server}\"");
            metric(admin, &format!("ppv2_upstream_datagrams_total{{{labels}}}"))
        };
        of(first) + of(second)
    };
    servers[0].set_nonblocking(true).unwrap();
    let received = || {
        let mut datagram = [0; 100];
        let received = || servers[0].recv_from(&mut datagram).ok();
        std::iter::from_fn(received).count()
    };
    // What the first server gets of 20 new clients. None gets the port of an earlier one,
    // whose session could be there.
    let clients = RefCell::new(Vec::new());
    let at_first = || {
        let before = sent();
        for _ in 0..20 {
            let client = socket("127.0.0.1");
            client.send_to(b"question", listener).unwrap();
            clients.borrow_mut().push(client);
        }
        eventually("all to be sent", || sent() == before + 20);
        received()
    };
    let seen = at_first();
    assert!(seen > 0);
    let ask = |word: &str| format!("POST /{word}?upstream=u&server={first}");
    assert_eq!(http(admin, &ask("drain"), "").0, 200);
    assert!(http_get(admin, "/upstreams").1.contains("\"draining\""));
    // Workers are told within a moment.
    eventually("no new sessions there", || at_first() == 0);
    assert_eq!(at_first(), 0);
    let before = sent();
    for client in &clients.borrow()[..20] {
        client.send_to(b"again", listener).unwrap();
    }
    eventually("all to be sent", || sent() == before + 20);
    assert_eq!(received(), seen);
    assert_eq!(http(admin, &ask("undrain"), "").0, 200);
    eventually("new sessions", || at_first() > 0);

    let (status, body) = http(admin, "POST /drain?upstream=u&server=nobody", "");
    assert_eq!(status, 404);
    assert!(body.contains("no server `nobody`"), "{body}");
    let from_a_page = "origin: http://example.com\r\n";
    assert_eq!(http(admin, &ask("drain"), from_a_page).0, 403);
    assert_eq!(
        http_get(admin, &format!("/drain?upstream=u&server={first}")).0,
        405
    );
}

#[test]
fn datagrams_for_which_there_is_no_session_are_spread_over_servers() {
    for host in ["127.0.0.1", "::1"] {
        let (listener, admin) = (address(host), address(host));
        let servers = [(); 2].map(|()| socket(host));
        let folder = tempfile::tempdir().unwrap();
        let config = format!(
            "workers = 1\n[limits]\nmax_sessions = 6\n[admin]\nlisten = \"{admin}\"\n\
             [[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\nrequests = 1\n\
             [upstream.u]\nbalance = \"round_robin\"\nservers = [\"{}\", \"{}\"]\n",
            servers[0].local_addr().unwrap(),
            servers[1].local_addr().unwrap()
        );
        let _proxy = proxy_with(&folder, &config);
        let client = socket(host);
        const LINES: u64 = 100;
        for _ in 0..LINES {
            client.send_to(b"line", listener).unwrap();
        }
        let of_listener = |name: &str| metric(admin, &format!("{name}{{listener=\"listener1\"}}"));
        eventually("all lines to be counted", || {
            let opened = of_listener("ppv2_sessions_opened_total");
            opened + of_listener("ppv2_requests_exceeded_datagrams_total") == LINES
        });
        assert!(of_listener("ppv2_requests_exceeded_datagrams_total") > 50);
        let passed = servers.map(|server| {
            server.set_nonblocking(true).unwrap();
            let mut datagram = [0; 2000];
            std::iter::from_fn(|| server.recv(&mut datagram).ok()).count()
        });
        assert!(passed.iter().all(|passed| *passed > 40), "{passed:?}");
        assert_eq!(passed.iter().sum::<usize>(), 100);
    }
}
