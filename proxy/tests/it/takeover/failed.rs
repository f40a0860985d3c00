//! Whichever of the two processes fails, and whenever, the other one serves as if nothing had
//! happened.

use super::hostile::{Message, connect};
use super::relay::Relay;
use super::*;
use crate::activation::watched;

#[test]
fn a_process_that_has_all_goes_on_when_the_old_one_is_killed() {
    let setup = Setup::new(all_kinds());
    let mut proxy = setup.start(2);
    let load = setup.load(RATE / 4);
    let config = setup.config(2);
    let relay = Relay::start(&setup.socket(), "Ready");
    let mut new = Process::start(&mut setup.taking_from(&relay.socket, &config));
    relay.wait();
    proxy.signal("KILL");
    proxy.wait();
    relay.go_on();
    new.wait_for("the other process has ended");
    new.wait_for("ready");
    load.wait_for_a_round();
    // It is as any other.
    setup.upgrade(&mut new, &config);
    clean(load);
}

#[test]
fn a_process_that_ends_before_it_sent_all_is_not_taken_over() {
    let setup = Setup::simple();
    let mut proxy = setup.start(2);
    let relay = Relay::start(&setup.socket(), "Freeze");
    let mut new = Process::start(&mut setup.taking_from(&relay.socket, &setup.config(2)));
    relay.wait();
    proxy.signal("KILL");
    proxy.wait();
    relay.go_on();
    let (status, said) = new.wait();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("has closed the connection"), "{said}");
}

#[test]
fn a_reload_meanwhile_is_not_undone_by_a_takeover() {
    let setup = Setup::simple();
    let mut proxy = setup.start(2);
    let load = setup.load(RATE / 4);
    let config = setup.config(2);
    for word in ["Begin", "Freeze"] {
        let relay = Relay::start(&setup.socket(), word);
        let mut new = Process::start(&mut setup.taking_from(&relay.socket, &config));
        relay.wait();
        let (status, said) = http(setup.admin, "POST /reload", "");
        assert_eq!(status, 200, "{said}");
        relay.go_on();
        let (status, said) = new.wait();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains("a reload has come in between"), "{said}");
        load.wait_for_a_round();
    }
    // The other way round, the reload is refused.
    let relay = Relay::start(&setup.socket(), "Ready");
    let mut new = Process::start(&mut setup.taking_from(&relay.socket, &config));
    relay.wait();
    let (status, said) = http(setup.admin, "POST /reload", "");
    assert_eq!(status, 422, "{said}");
    assert!(said.contains("another process is taking over"), "{said}");
    relay.go_on();
    new.wait_for("ready");
    assert!(proxy.wait().0.success());
    clean(load);
}

/// Its configuration has no use for addresses that the old one goes on with.
#[test]
fn a_failed_takeover_changes_no_socket() {
    let network = |name, source| Service::new(name, "127.0.0.1", ["", source]);
    let setup = Setup::new(vec![
        network("stays", "source = [\"127.64.0.0/16\"]"),
        network("goes", "source = [\"127.65.0.0/16\"]"),
    ]);
    let proxy = setup.start(2);
    let load = setup.load(RATE / 4);
    let mut next = Setup::new(Vec::new());
    (next.admin, next.socket) = (setup.admin, setup.socket);
    let config = setup.config(2);
    let without = &config[..config.find("[[listener]]\nname = \"goes\"").unwrap()];
    let relay = Relay::start(&setup.socket(), "Ready");
    let new = Process::start(&mut setup.taking_from(&relay.socket, without));
    relay.wait();
    new.signal("KILL");
    drop(new);
    relay.go_on();
    eventually("the old process to go on", || {
        proxy.log().contains("no upgrade, this process goes on")
    });
    load.wait_for_a_round();
    clean(load);
    clean(setup.load(RATE / 4));
}

/// The other one has descriptors of all sockets: those that are closed stay open there.
#[test]
fn a_process_that_went_on_watches_no_closed_socket() {
    let service = |name| Service::new(name, "127.0.0.1", ["responses = 1", ""]);
    let setup = Setup::new(vec![service("first"), service("second")]);
    let file = write(&setup.folder, "proxy.toml", &setup.config(1));
    // Few descriptors, so that few sessions are many.
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 256; exec \"$@\"", "sh"]);
    command.arg(binary()).args(["run", "--config"]).arg(file);
    let mut proxy = Process::start(&mut command);
    proxy.wait_for(" ready ");
    let ask = |service: &Service| {
        let clients: Vec<_> = (0..60).map(|_| socket("127.0.0.1")).collect();
        for client in &clients {
            client.send_to(b"1 ", service.bind).unwrap();
        }
        for client in &clients {
            receive(client);
        }
    };
    ask(&setup.services[0]);
    let before = open_sockets(&proxy);
    // It reads nothing, and so has all descriptors.
    let mut other = connect(&setup);
    let words = [
        Message::hello(1),
        Message::Begin,
        Message::Freeze,
        Message::Refused("no more".to_owned()),
    ];
    let words: Vec<_> = words.iter().flat_map(Message::bytes).collect();
    std::io::Write::write_all(&mut other, &words).unwrap();
    proxy.wait_for("no upgrade, this process goes on");
    // They need the room of those that have ended.
    eventually("sockets to be closed", || {
        ask(&setup.services[1]);
        let open = open_sockets(&proxy);
        before.difference(&open).count() > 10
    });
    eventually("none of them to be watched", || {
        let watched = watched(proxy.pid());
        let number = |inode: &String| u64::from_str_radix(inode, 16).unwrap();
        let watched: BTreeSet<_> = watched.iter().map(number).collect();
        let open = open_sockets(&proxy);
        before.difference(&open).all(|one| !watched.contains(one))
    });
    drop(other);
}
