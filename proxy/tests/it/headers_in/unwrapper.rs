//! Mode `transparent` behind a proxy that writes headers: a server that can't read headers sees
//! each client as the source, so that its own access list works.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use ppv2_lab::dig::{ask, program};
use ppv2_lab::network::*;
use ppv2_lab::*;

/// Where clients write to: the router's, which has the proxy that writes headers.
fn front(family: Family) -> SocketAddr {
    match family {
        Family::V4 => "198.51.100.1:5300".parse().unwrap(),
        Family::V6 => "[2001:db8:a::1]:5300".parse().unwrap(),
    }
}

/// The proxy beside the server, which accepts headers of the router alone.
fn unwrapper(family: Family) -> String {
    let accept = format!("accept = {{ from = [\"{}\"] }}", front(family).ip());
    listener(family, &format!("mode = \"transparent\"\n{accept}"))
}

/// nsd, unmodified, which answers client 1 and refuses all others by their addresses.
fn nsd(lab: &Lab, folder: &tempfile::TempDir) -> Process {
    let path = folder.path().display();
    let mut config = format!(
        "server:\n  zonesdir: \"{path}\"\n  username: \"\"\n  database: \"\"\n  pidfile: \"\"\n  \
         xfrdfile: \"{path}/xfrd\"\n  zonelistfile: \"{path}/zones\"\n  xfrdir: \"{path}\"\n  \
         server-count: 1\n  verbosity: 2\n"
    );
    for family in Family::BOTH {
        let server = family.server();
        config += &format!("  ip-address: {}@{}\n", server.ip(), server.port());
    }
    config += "remote-control:\n  control-enable: no\n\
               zone:\n  name: \"ppv2.test\"\n  zonefile: \"zone\"\n";
    for family in Family::BOTH {
        config += &format!("  allow-query: {} NOKEY\n", family.client(1));
    }
    let zone = "$ORIGIN ppv2.test.\n@ 3600 SOA ns admin 1 3600 3600 3600 3600\n@ 3600 NS ns\n\
                ns 3600 A 192.0.2.53\nanswer 3600 TXT \"from nsd\"\n";
    write(folder, "zone", zone);
    let file = write(folder, "nsd.conf", &config);
    let arguments = ["-d", "-c", file.to_str().unwrap()];
    let mut process = lab.at("server", || dig::server(&program("nsd", "nsd"), &arguments));
    process.wait_for("nsd started");
    process
}

/// Status and text of the answer that nsd gives a client by the proxies.
fn answer(lab: &Lab, family: Family, client: usize) -> (String, String) {
    let from = SocketAddr::new(family.client(client), 0);
    let host = format!("client{client}");
    let mut answers = None;
    eventually("an answer", || {
        answers = lab.at(&host, || ask(from, front(family), &["TXT"], 1));
        answers.is_some()
    });
    let answer = answers.unwrap().remove(0);
    (answer.status, answer.data.join(""))
}

fn each_is_allowed_or_refused(lab: &Lab, families: &[Family]) {
    for &family in families {
        let allowed = ("NOERROR".to_owned(), "\"from nsd\"".to_owned());
        let refused = ("REFUSED".to_owned(), String::new());
        for _ in 0..3 {
            assert_eq!(answer(lab, family, 1), allowed);
            assert_eq!(answer(lab, family, 2), refused);
        }
    }
}

/// The proxy that writes headers, on the router.
fn in_front(lab: &Lab, folder: &tempfile::TempDir) -> Process {
    let config: String = Family::BOTH
        .map(|family| {
            let (bind, to) = (front(family), family.listener());
            format!(
                "[[listener]]\nname = \"{family:?}\"\nbind = [\"{bind}\"]\nupstream = \"{family:?}\"\n\
                 [upstream.{family:?}]\nservers = [\"{to}\"]\n"
            )
        })
        .concat();
    let file = write(folder, "front.toml", &config);
    let mut command = Command::new(binary());
    command.args(["run", "--config", file.to_str().unwrap()]);
    let mut process = lab.at("router", || Process::start(&mut command));
    process.wait_for("ready");
    process
}

#[test]
fn nsd_allows_and_refuses_each_client_by_its_own_address() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    let setup = lab.set_up(Scheme::Transparent);
    let folder = world_readable();
    let _nsd = nsd(&lab, &folder);
    let _front = in_front(&lab, &folder);

    // Over IPv4 it needs one capability, and keeps no other.
    let proxy = lab.proxy_with(&Family::BOTH.map(unwrapper).concat());
    proxy.assert_standing(NET_RAW);
    each_is_allowed_or_refused(&lab, &Family::BOTH);
    for family in Family::BOTH {
        for reason in ["untrusted", "no_header", "bad_source", "no_privilege"] {
            assert_eq!(proxy.dropped(family, reason), 0, "{reason}");
        }
    }
    let sessions = proxy.sessions();
    for family in Family::BOTH {
        for client in [1, 2].map(|number| family.client(number)) {
            assert!(sessions.contains(&client.to_string()), "{sessions}");
        }
    }

    // Clients that write to it directly are not served: they could name any client.
    for family in Family::BOTH {
        let client = Client::new(&lab, family, 1, 0);
        let header = fake_proxy::from_client_at(client.address, front(family), b"forged");
        client.send(&header);
        eventually("the drop", || proxy.dropped(family, "untrusted") == 1);
    }
    drop(proxy);

    // Over IPv6 it needs none: root's is dropped, and an ordinary user has none from the start.
    let without: &[&str] = match lab.rights {
        Rights::Root => &[],
        Rights::Ordinary => &["setpriv", "--bounding-set=-all", "--no-new-privs"],
    };
    let proxy = lab.proxy_by(without, &unwrapper(Family::V6));
    proxy.assert_standing(0);
    each_is_allowed_or_refused(&lab, &[Family::V6]);
    drop(proxy);
    setup.undo();
}

/// The client's port, too, which a server may log.
#[test]
fn the_server_sees_the_clients_port_on_request() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    let setup = lab.set_up(Scheme::Transparent);
    let folder = world_readable();
    let _front = in_front(&lab, &folder);
    let own_port = |family| {
        unwrapper(family).replace("transparent\"", "transparent\"\nsource_port = \"client\"")
    };
    let proxy = lab.proxy_with(&Family::BOTH.map(own_port).concat());
    for family in Family::BOTH {
        let server = Echo::new(&lab, family, Answering::Back);
        let mut client = Client::new(&lab, family, 1, 0);
        client.listener = front(family);
        for number in 0..5 {
            assert_eq!(client.ask(&[number]), client.address);
        }
        let mut other = Client::new(&lab, family, 2, 0);
        other.listener = front(family);
        assert_eq!(other.ask(b"another"), other.address);
        // By another port of a sender, the same client is a second session, which can't have
        // the client's port as well.
        let sender = lab.at("router", || bind(SocketAddr::new(front(family).ip(), 0)));
        let datagram = fake_proxy::from_client_at(client.address, front(family), b"again");
        sender.send_to(&datagram, family.listener()).unwrap();
        eventually("the drop", || {
            proxy.dropped(family, "client_port_in_use") == 1
        });
        assert_eq!(client.ask(b"still"), client.address);
        assert_eq!(server.seen().len(), 7);
    }
    drop(proxy);
    setup.undo();
}

/// A sender that is trusted can't have the proxy write from its own address or the server's.
#[test]
fn clients_that_nobody_can_be_are_dropped() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    let setup = lab.set_up(Scheme::Transparent);
    let proxy = lab.proxy_with(&Family::BOTH.map(unwrapper).concat());
    for (family, clients) in [
        (
            Family::V4,
            ["127.0.0.1", "198.51.100.10", "10.0.0.1", "10.0.0.2"],
        ),
        (
            Family::V6,
            ["::1", "2001:db8:a::10", "fd00:a::1", "fd00:a::2"],
        ),
    ] {
        let server = Echo::new(&lab, family, Answering::Back);
        let sender = lab.at("router", || bind(SocketAddr::new(front(family).ip(), 0)));
        let named = |ip: IpAddr| {
            let client = SocketAddr::new(ip, 5353);
            let datagram = fake_proxy::from_client_at(client, front(family), b"whose?");
            sender.send_to(&datagram, family.listener()).unwrap();
        };
        for client in clients {
            named(client.parse().unwrap());
        }
        eventually("the drops", || proxy.dropped(family, "bad_source") == 4);
        named(family.client(1));
        let (answer, from) = receive(&sender);
        assert_eq!(from, family.listener());
        assert!(answer.ends_with(b" whose?"));
        assert!(
            server
                .seen()
                .iter()
                .all(|source| source.ip() == family.client(1))
        );
    }
    drop(proxy);
    setup.undo();
}

/// Mode `dsr`: the server answers the client that the header names from the address that this
/// wrote to, past all proxies.
#[test]
fn a_server_with_the_sdk_answers_the_headers_client() {
    let Some(lab) = Lab::enter(test_name!(), Side::Public) else {
        return;
    };
    let setup = lab.set_up(Scheme::Sdk);
    let of_listener = |family| {
        let accept = format!("accept = {{ from = [\"{}\"] }}", front(family).ip());
        listener(
            family,
            &format!("mode = \"dsr\"\nrewrite_on = \"sdk\"\n{accept}"),
        )
    };
    let proxy = lab.proxy_with(&Family::BOTH.map(of_listener).concat());
    for family in Family::BOTH {
        let server = Echo::new(&lab, family, Answering::ByHeader);
        let sender = lab.at("router", || bind(SocketAddr::new(front(family).ip(), 0)));
        let clients = [1, 2].map(|number| Client::new(&lab, family, number, 0));
        for round in 0..3u8 {
            for client in &clients {
                let datagram =
                    fake_proxy::from_client_at(client.address, client.listener, &[round]);
                sender.send_to(&datagram, family.listener()).unwrap();
            }
            for client in &clients {
                assert_eq!(client.answered(&[round]), client.address);
            }
        }
        receive_nothing(&sender);
        assert_eq!(server.seen().len(), 6);
        assert!(
            server
                .seen()
                .iter()
                .all(|source| source.ip() == family.proxy())
        );
    }
    drop(proxy);
    setup.undo();
}

/// A folder that servers of another user can read.
fn world_readable() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;

    let folder = tempfile::tempdir().unwrap();
    let mode = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(folder.path(), mode).unwrap();
    folder
}
