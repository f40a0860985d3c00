//! Reload: what goes on undisturbed, what starts and what ends.

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use ppv2_lab::service::*;
use ppv2_lab::*;

/// Sessions, and datagrams a second, of the reload under load.
const SESSIONS: usize = 10_000;
const TASKS: usize = 100;
const PACE: Duration = Duration::from_millis(5);

/// Asks over and over, from so many sockets in turn, until told to stop. Counts
/// answers, and panics at one that is missing or came by another session.
async fn keep_asking(task: usize, to: SocketAddr, answers: Arc<AtomicU64>, stop: Arc<AtomicBool>) {
    let mut clients = Vec::new();
    for _ in 0..SESSIONS / TASKS {
        // An address of its own has ports of its own.
        let own = format!("127.0.1.{}:0", task + 1);
        let client = tokio::net::UdpSocket::bind(own).await.unwrap();
        client.connect(to).await.unwrap();
        clients.push((client, None));
    }
    let mut pace = tokio::time::interval(PACE);
    let mut answer = [0; 2000];
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        for (client, session) in &mut clients {
            pace.tick().await;
            number += 1;
            let question = format!("{number}");
            client.send(question.as_bytes()).await.unwrap();
            let answered = tokio::time::timeout(TIMEOUT, client.recv(&mut answer)).await;
            let len = answered.expect("a datagram was lost").unwrap();
            let text = std::str::from_utf8(&answer[..len]).unwrap();
            let (by, asked) = text.rsplit_once(' ').unwrap();
            assert_eq!(asked, question);
            let session = session.get_or_insert_with(|| by.to_owned());
            assert_eq!(session, by, "a session was moved");
            answers.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[test]
fn reload_under_load_loses_nothing_and_keeps_sessions() {
    let descriptors = rlimit::increase_nofile_limit(u64::MAX).unwrap();
    assert!(descriptors > 11_000, "{descriptors} open files are too few");
    let servers: Vec<_> = (0..4).map(|_| Server::start()).collect();
    let four: Vec<_> = servers.iter().collect();
    let (main, other) = (address("127.0.0.1"), address("127.0.0.1"));
    let upstream = |keys: &str, servers: &[&Server]| {
        format!("[upstream.u]\n{keys}\nservers = [{}]\n", list(servers))
    };
    let config = listener("main", main, "u") + &upstream("", &four);
    let proxy = Proxy::start(&config);

    let (answers, stop) = (
        Arc::new(AtomicU64::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let load = std::thread::spawn({
        let (answers, stop) = (Arc::clone(&answers), Arc::clone(&stop));
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let mut tasks = tokio::task::JoinSet::new();
                for task in 0..TASKS {
                    let (answers, stop) = (Arc::clone(&answers), Arc::clone(&stop));
                    tasks.spawn(keep_asking(task, main, answers, stop));
                }
                while let Some(ended) = tasks.join_next().await {
                    ended.unwrap();
                }
            });
        }
    });
    let count = || answers.load(Ordering::Relaxed);
    let sessions = "ppv2_sessions{listener=\"main\"}";
    eventually("all sessions", || {
        assert!(!load.is_finished(), "the load ended");
        proxy.metric(sessions) == SESSIONS as u64
    });
    let begun = std::time::Instant::now();
    let before = count();

    let more = [Server::start(), Server::start()];
    let six: Vec<_> = servers.iter().chain(&more).collect();
    let changes = [
        // Another listener, other servers beside the old ones, in another order.
        listener("other", other, "u")
            + &listener("main", main, "u")
            + &upstream("lame_duck = \"1h\"", &six),
        // Gone again: new servers leave, the balancer and the sessions' rules change.
        listener("main", main, "u")
            + "responses = 0\nidle_timeout = \"1h\"\nper_client = { sessions = 1000 }\n"
            + &upstream("balance = \"least_sessions\"\nlame_duck = \"1h\"", &four),
        // One of the old servers leaves, and its sessions may stay.
        listener("main", main, "u") + &upstream("lame_duck = \"1h\"", &four[1..]),
        // It is back.
        listener("main", main, "u") + &upstream("hash_on = \"client_addr\"", &four),
    ];
    for round in 0..3 {
        for (number, change) in changes.iter().enumerate() {
            let mark = count();
            if (round + number) % 2 == 0 {
                proxy.reload(change);
            } else {
                proxy.write(change);
                proxy.process.signal("HUP");
            }
            // Everybody has asked again since.
            eventually("another round", || {
                assert!(!load.is_finished(), "the load ended");
                count() >= mark + SESSIONS as u64
            });
        }
    }
    let (status, why) = proxy.try_reload("[[listener]]\n");
    assert_eq!(status, 422, "{why}");
    let rate = (count() - before) as f64 / begun.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    load.join().unwrap();
    println!("{rate:.0} datagrams a second through 12 reloads");

    assert_eq!(proxy.metric(sessions), SESSIONS as u64);
    let opened = "ppv2_sessions_opened_total{listener=\"main\"}";
    assert_eq!(proxy.metric(opened), SESSIONS as u64);
    let moved = "ppv2_sessions_ended_total{listener=\"main\",reason=\"moved\"}";
    assert_eq!(proxy.metric(moved), 0);
    assert_eq!(proxy.process.log().matches("reloaded: ").count(), 12);
}

#[test]
fn listeners_come_and_go() {
    let (server, of_c) = (Server::start(), Server::start());
    let [a, b, c] = [(); 3].map(|()| address("127.0.0.1"));
    let upstream = format!("[upstream.u]\nservers = [{}]\n", list(&[&server]));
    let upstream_c = format!("[upstream.v]\nservers = [{}]\n", list(&[&of_c]));
    let proxy = Proxy::start(&(listener("a", a, "u") + &listener("b", b, "u") + &upstream));
    let client = socket("127.0.0.1");
    let (at_a, at_b) = (ask(&client, a), ask(&client, b));

    let both = upstream.clone() + &upstream_c;
    let said = proxy.reload(&(listener("c", c, "v") + &listener("a", a, "u") + &both));
    assert_eq!(
        said,
        "2 listeners (1 new, 1 gone), 2 servers (1 new, 0 gone)\n"
    );
    assert_eq!(ask(&client, a), at_a);
    ask(&client, c);
    // Sessions of the one that is gone have the time of a stop to end.
    assert_eq!(ask(&client, b), at_b);
    let late = socket("127.0.0.1");
    late.send_to(b"?", b).unwrap();
    receive_nothing(&late);
    let refused = "ppv2_dropped_datagrams_total{listener=\"b\",reason=\"stopping\"}";
    assert_eq!(proxy.metric(refused), 1);

    // It is back before that time is over, and all is as before.
    proxy.reload(&(listener("a", a, "u") + &listener("b", b, "u") + &upstream));
    assert_eq!(ask(&client, b), at_b);
    ask(&late, b);

    proxy.reload(&(listener("a", a, "u") + &upstream));
    eventually("b and c to close", || {
        UdpSocket::bind(b).is_ok() && UdpSocket::bind(c).is_ok()
    });
    eventually("their metrics to go", || {
        !proxy.has_metric("listener=\"b\"") && !proxy.has_metric("listener=\"c\"")
    });
    assert_eq!(proxy.metric("ppv2_sessions{listener=\"a\"}"), 1);
    assert_eq!(ask(&client, a), at_a);
    // A listener of the same name goes on counting.
    proxy.reload(&(listener("a", a, "u") + &listener("b", b, "u") + &upstream));
    assert_ne!(ask(&client, b), at_b);
    let ended = "ppv2_sessions_ended_total{listener=\"b\",reason=\"stopped\"}";
    assert_eq!(proxy.metric(ended), 2);
}

/// What was dropped shortly before a listener is gone is told, though drops for the same
/// reason have just been.
#[test]
fn drops_of_a_removed_listener_are_reported() {
    let server = Server::start();
    let [a, b] = [(); 2].map(|()| address("127.0.0.1"));
    let upstream = format!("[upstream.u]\nservers = [{}]\n", list(&[&server]));
    let denying = listener("b", b, "u") + "deny = [\"127.0.0.0/8\"]\n";
    let mut proxy = Proxy::start(&(listener("a", a, "u") + &denying + &upstream));
    let client = socket("127.0.0.1");
    client.send_to(b"?", b).unwrap();
    proxy.process.wait_for("reason=\"not_allowed\"");
    for _ in 0..5 {
        client.send_to(b"?", b).unwrap();
    }
    let dropped = || {
        let drops =
            |reason| format!("ppv2_dropped_datagrams_total{{listener=\"b\",reason=\"{reason}\"}}");
        proxy.metric(&drops("not_allowed")) + proxy.metric(&drops("stopping"))
    };
    eventually("six drops", || dropped() == 6);
    proxy.reload(&(listener("a", a, "u") + &upstream));
    // It counts for as long as it has a socket.
    client.send_to(b"?", b).unwrap();
    eventually("the drop of a listener that closes", || dropped() == 7);
    eventually("its metrics to go", || !proxy.has_metric("listener=\"b\""));
    let log = proxy.process.log();
    let drops = |line: &&str| line.contains("datagrams dropped") && line.contains("listener=\"b\"");
    let told = log.lines().filter(drops).map(|line| {
        let (_, count) = line.split_once("count=").unwrap();
        count.split(' ').next().unwrap().parse::<u64>().unwrap()
    });
    assert_eq!(told.sum::<u64>(), 7, "{log}");
}

#[test]
fn a_bad_file_changes_nothing_and_says_why() {
    let server = Server::start();
    let a = address("127.0.0.1");
    let good = listener("a", a, "u") + &format!("[upstream.u]\nservers = [{}]\n", list(&[&server]));
    let mut proxy = Proxy::start(&good);
    let client = socket("127.0.0.1");
    let before = ask(&client, a);
    let taken = bind(address("127.0.0.1"));
    let taken = taken.local_addr().unwrap();
    let bad = [
        ("[[listener", "TOML"),
        ("colour = \"red\"", "unknown key `colour`"),
        (&(listener("b", taken, "u") + &good), "it is in use"),
        (
            &(listener("b", before.1, "u") + &good),
            "by a session of this proxy",
        ),
        (
            &good.replace("127.0.0.1:", "0.0.0.0:").replace(
                &format!("\"0.0.0.0:{}\"", server.address.port()),
                &format!("\"{}\"", server.address),
            ),
            "by this proxy, at 127.0.0.1:",
        ),
        (
            &good.replace("[upstream.u]", "[upstream.v]"),
            "there is no upstream `u`",
        ),
        (&format!("reuse_port = false\n{good}"), "takes a restart"),
        (&format!("user = \"daemon\"\n{good}"), "takes a restart"),
        (
            &format!("upgrade.socket = \"/run/upgrade.sock\"\n{good}"),
            "upgrade.socket is unset and would be /run/upgrade.sock, which takes a restart",
        ),
        (
            &good.replace("servers", "source = [\"192.0.2.1\"]\nservers"),
            "192.0.2.1",
        ),
    ];
    let counted = |result| {
        let name = format!("ppv2_reloads_total{{result=\"{result}\"}}");
        metric(proxy.admin, &name)
    };
    for (number, (config, why)) in (1..).zip(bad) {
        let (status, said) = proxy.try_reload(config);
        assert_eq!(status, 422, "{config}: {said}");
        assert_eq!((counted("applied"), counted("rejected")), (0, number));
        assert_eq!(metric(proxy.admin, "ppv2_reload_rejected"), 1);
        if why != "TOML" {
            assert!(said.contains(why), "{config}: {said}");
        }
        assert_eq!(ask(&client, a), before);
    }
    let (status, said) = http(
        proxy.admin,
        "POST /reload",
        "origin: http://example.org\r\n",
    );
    assert_eq!((status, said.as_str()), (403, "not from a browser\n"));
    std::fs::remove_file(&proxy.file).unwrap();
    proxy.process.signal("HUP");
    proxy.process.wait_for("not reloaded, nothing has changed");
    proxy.process.wait_for("No such file");
    assert_eq!(ask(&client, a), before);
    // And a good one is taken after all that.
    proxy.reload(&good);
    assert_eq!(ask(&client, a), before);
    assert_eq!(counted("applied"), 1);
    assert_eq!(metric(proxy.admin, "ppv2_reload_rejected"), 0);
}

#[test]
fn removed_server_keeps_its_sessions_until_the_drain_timeout() {
    let servers = [Server::start(), Server::start()];
    let a = address("127.0.0.1");
    let config = |servers: &[&Server]| {
        listener("a", a, "u")
            + &format!(
                "[upstream.u]\nbalance = \"round_robin\"\nlame_duck = \"2s\"\nservers = [{}]\n",
                list(servers)
            )
    };
    let proxy = Proxy::start(&config(&[&servers[0], &servers[1]]));
    let clients: Vec<_> = (0..20).map(|_| socket("127.0.0.1")).collect();
    let before: Vec<_> = clients.iter().map(|client| ask(client, a)).collect();
    let of = |number: usize| {
        before
            .iter()
            .filter(|s| s.0 == servers[number].address)
            .count()
    };
    assert!(of(0) > 0 && of(1) > 0);

    proxy.reload(&config(&[&servers[0]]));
    for (client, session) in clients.iter().zip(&before) {
        assert_eq!(ask(client, a), *session);
    }
    let (_, upstreams) = http_get(proxy.admin, "/upstreams");
    assert_eq!(
        upstreams.matches("\"state\":\"leaving\"").count(),
        1,
        "{upstreams}"
    );
    let more: BTreeSet<_> = (0..20).map(|_| ask(&socket("127.0.0.1"), a).0).collect();
    assert_eq!(more, BTreeSet::from([servers[0].address]));

    eventually("its time to be over", || {
        !http_get(proxy.admin, "/upstreams").1.contains("leaving")
    });
    // Those of the server that stays are not touched; the others move with their
    // next datagram, once workers have heard.
    eventually("its sessions to move", || {
        let now = clients.iter().map(|client| ask(client, a));
        let pairs: Vec<_> = now.zip(&before).collect();
        assert!(
            pairs
                .iter()
                .all(|(now, before)| now == *before || before.0 != servers[0].address)
        );
        pairs.iter().all(|(now, _)| now.0 == servers[0].address)
    });
    let moved = "ppv2_sessions_ended_total{listener=\"a\",reason=\"moved\"}";
    assert_eq!(proxy.metric(moved), of(1) as u64);
}

#[test]
fn drained_server_is_still_drained_when_it_returns() {
    let (drained, stays) = (Server::start(), Server::start());
    let a = address("127.0.0.1");
    let config = |servers: &[&Server], drain: &str| {
        listener("a", a, "u")
            + &format!(
                "[upstream.u]\nbalance = \"round_robin\"\nlame_duck = \"0s\"\n\
                 servers = [{}{drain}]\n",
                list(servers)
            )
    };
    let both = config(&[&stays, &drained], "");
    let proxy = Proxy::start(&both);
    let ask_for = |word: &str| {
        let path = format!("POST /{word}?upstream=u&server={}", drained.address);
        assert_eq!(http(proxy.admin, &path, "").0, 200);
    };
    let is_draining = || http_get(proxy.admin, "/upstreams").1.contains("draining");
    let away = || {
        proxy.reload(&config(&[&stays], ""));
        let gone = drained.address.to_string();
        assert!(!http_get(proxy.admin, "/upstreams").1.contains(&gone));
    };
    ask_for("drain");
    for _ in 0..2 {
        away();
        proxy.reload(&both);
        assert!(is_draining());
    }
    // What was asked while it was gone holds as well.
    away();
    ask_for("undrain");
    proxy.reload(&both);
    assert!(!is_draining());
    // The file has the last word.
    ask_for("drain");
    let says_so = format!(", {{ address = \"{}\", drain = true }}", drained.address);
    proxy.reload(&config(&[&stays], &says_so));
    proxy.reload(&both);
    assert!(!is_draining());
}

#[test]
fn changed_listener_settings_apply_after_a_reload() {
    let servers = [Server::start(), Server::start()];
    let a = address("127.0.0.1");
    let upstream = format!(
        "[upstream.u]\nbalance = \"round_robin\"\nservers = [{}]\n",
        list(&[&servers[0], &servers[1]])
    );
    let config = |keys: &str| listener("a", a, "u") + keys + &upstream;
    let proxy = Proxy::start(&config(""));
    let client = socket("127.0.0.1");
    let first = ask(&client, a);

    let other = socket("127.0.0.2");
    ask(&other, a);
    proxy.reload(&config("deny = [\"127.0.0.2/32\"]\n"));
    assert_eq!(ask(&client, a), first);
    let denied = "ppv2_sessions_ended_total{listener=\"a\",reason=\"denied\"}";
    assert_eq!(proxy.metric(denied), 1);
    other.send_to(b"?", a).unwrap();
    receive_nothing(&other);

    proxy.reload(&config("per_client = { sessions = 2 }\n"));
    let second = socket("127.0.0.1");
    ask(&second, a);
    ask(&other, a);
    // The limit counts the sessions that began under it, also after another reload.
    proxy.reload(&config("per_client = { sessions = 1 }\n"));
    let third = socket("127.0.0.1");
    third.send_to(b"?", a).unwrap();
    receive_nothing(&third);
    ask(&second, a);

    // An idle timeout that has become shorter ends sessions that began before.
    proxy.reload(&config("idle_timeout = \"100ms\"\n"));
    eventually("sessions to end", || {
        proxy.metric("ppv2_sessions{listener=\"a\"}") == 0
    });

    // In another mode, servers see other datagrams: sessions are replaced.
    proxy.reload(&config(""));
    let plain = ask(&client, a);
    proxy.reload(&config("").replace("mode = \"plain\"", "mode = \"ppv2\""));
    client.send_to(b"?", a).unwrap();
    let (answer, _) = receive(&client);
    let signature = b"\r\n\r\n\0\r\nQUIT\n";
    assert!(answer.windows(12).any(|window| window == signature));
    assert_ne!(plain, first);

    // A log of ended sessions begins, and goes elsewhere; where the tests are
    // root's, the proxy is nobody.
    let anybody = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(proxy.folder.path(), anybody).unwrap();
    let log = |name: &str| proxy.folder.path().join(name);
    for name in ["first.log", "second.log"] {
        let path = log(name);
        let access = format!("[access_log]\npath = \"{}\"\n", path.display());
        let short = config("idle_timeout = \"100ms\"\n") + &access;
        proxy.reload(&short);
        ask(&client, a);
        eventually("a line", || {
            std::fs::read_to_string(&path).is_ok_and(|text| text.contains("reason=idle"))
        });
    }
    proxy.reload(&config(""));
}

#[test]
fn server_that_returns_in_another_mode_is_served_in_it() {
    let (server, stays) = (Server::start(), Server::start());
    let a = address("127.0.0.1");
    let config = |mode: &str, servers: &[&Server]| {
        (listener("a", a, "u")
            + &format!(
                "[upstream.u]\nbalance = \"round_robin\"\nlame_duck = \"0s\"\nservers = [{}]\n",
                list(servers)
            ))
            .replace("plain", mode)
    };
    let proxy = Proxy::start(&config("plain", &[&server]));
    let client = socket("127.0.0.1");
    ask(&client, a);
    // It is away for a moment, in which its session has no reason to move yet.
    proxy.reload(&config("plain", &[&stays]));
    proxy.reload(&config("ppv2", &[&server]));
    client.send_to(b"?", a).unwrap();
    let (answer, _) = receive(&client);
    let signature = b"\r\n\r\n\0\r\nQUIT\n";
    assert!(answer.windows(12).any(|window| window == signature));
}

#[test]
fn server_that_returns_in_the_same_mode_keeps_its_sessions() {
    let (server, stays) = (socket("127.0.0.1"), Server::start());
    let a = address("127.0.0.1");
    let config = |server: SocketAddr| {
        let upstream = format!("[upstream.u]\nlame_duck = \"0s\"\nservers = [\"{server}\"]\n");
        listener("a", a, "u") + &upstream
    };
    let there = config(server.local_addr().unwrap());
    let proxy = Proxy::start(&there);
    let client = socket("127.0.0.1");
    client.send_to(b"?", a).unwrap();
    let (_, session) = receive(&server);
    // Its client says nothing meanwhile, and gets what the server sends.
    for config in [&config(stays.address), &there] {
        proxy.reload(config);
        server.send_to(b"news", session).unwrap();
        assert_eq!(receive(&client), (b"news".to_vec(), a));
    }
    client.send_to(b"?", a).unwrap();
    assert_eq!(receive(&server).1, session);
    let moved = "ppv2_sessions_ended_total{listener=\"a\",reason=\"moved\"}";
    assert_eq!(proxy.metric(moved), 0);
}

#[test]
fn replies_in_flight_reach_clients_whose_session_is_replaced() {
    let server = socket("127.0.0.1");
    let (a, b) = (address("127.0.0.1"), address("127.0.0.1"));
    let servers = [server.local_addr().unwrap()];
    let upstream = format!("[upstream.u]\nservers = [\"{}\"]\n", servers[0]);
    let of_a = listener("a", a, "u") + &upstream;
    let proxy = Proxy::start(&of_a);
    let client = socket("127.0.0.1");
    client.send_to(b"?", a).unwrap();
    let (_, before) = receive(&server);
    proxy.reload(&of_a.replace("plain", "ppv2"));
    let answer = |session| server.send_to(b"answer", session).unwrap();
    answer(before);
    assert_eq!(receive(&client), (b"answer".to_vec(), a));
    client.send_to(b"?", a).unwrap();
    let (datagram, after) = receive(&server);
    assert_eq!(read_header(&datagram).0, client.local_addr().unwrap());
    for session in [after, before] {
        answer(session);
        assert_eq!(receive(&client), (b"answer".to_vec(), a));
    }

    // Nothing leaves by a listener that is gone.
    proxy.reload(&(listener("b", b, "u") + &upstream));
    eventually("a to close", || UdpSocket::bind(a).is_ok());
    for session in [after, before] {
        answer(session);
    }
    receive_nothing(&client);
    let other = socket("127.0.0.1");
    other.send_to(b"?", b).unwrap();
    answer(receive(&server).1);
    assert_eq!(receive(&other).1, b);
}

#[test]
fn waiting_reload_delays_nothing() {
    // It is asked for a name, and says nothing.
    let resolver = socket("127.0.0.1");
    let asked = resolver.local_addr().unwrap();
    let (a, steady, dying) = (address("127.0.0.1"), Server::start(), Server::start());
    let with = |servers: &str, more: &str| {
        let health = "health = { every = \"100ms\", timeout = \"50ms\", fall = 2 }";
        let upstream = format!("[upstream.u]\nservers = [{servers}]\n{health}\n");
        listener("a", a, "u") + &upstream + more
    };
    let both = list(&[&steady, &dying]);
    let mut proxy = Proxy::start(&with(&both, ""));
    let slow = format!("[resolver]\nservers = [\"{asked}\"]\ntimeout = \"10s\"\n");
    proxy.write(&with(&format!("{both}, \"dns:slow.ppv2.test:53\""), &slow));
    let waiting = std::thread::spawn({
        let admin = proxy.admin;
        move || http(admin, "POST /reload", "").0
    });
    receive(&resolver);

    // A server that dies meanwhile is left, by sessions old and new.
    let gone = dying.address;
    drop(dying);
    let up = format!("ppv2_upstream_up{{upstream=\"u\",server=\"{gone}\"}}");
    eventually("it to be down", || proxy.metric(&up) == 0);
    std::thread::sleep(Duration::from_millis(200));
    for _ in 0..20 {
        assert_eq!(ask(&socket("127.0.0.1"), a).0, steady.address);
    }
    assert!(
        !waiting.is_finished(),
        "the test must be sooner than the reload"
    );

    // What is asked for meanwhile is done then, with the file as it is then.
    proxy.write(&with(&both, ""));
    assert_eq!(http(proxy.admin, "POST /reload", "").0, 200);
    assert_eq!(waiting.join().unwrap(), 200);

    // Nor does it hold up the end.
    proxy.write(&with(&format!("{both}, \"dns:other.ppv2.test:53\""), &slow));
    proxy.process.signal("HUP");
    let mut question = Vec::new();
    while !question.windows(5).any(|label| label == b"other") {
        (question, _) = receive(&resolver);
    }
    proxy.process.signal("TERM");
    let (status, log) = proxy.process.wait();
    assert!(status.success(), "{log}");
    // It ended before that reload did.
    let outcomes = log.matches("reloaded").count();
    assert_eq!(outcomes, 2, "{log}");
}

#[test]
fn pipe_as_configuration_file_is_refused() {
    let (a, server) = (address("127.0.0.1"), Server::start());
    let content = listener("a", a, "u") + "[upstream.u]\nservers = [" + &list(&[&server]) + "]\n";
    let mut proxy = Proxy::start(&content);
    std::fs::remove_file(&proxy.file).unwrap();
    let made = std::process::Command::new("mkfifo")
        .args(["-m", "666"])
        .arg(&proxy.file)
        .status();
    assert!(made.unwrap().success());
    let (status, said) = http(proxy.admin, "POST /reload", "");
    assert_eq!(status, 422, "{said}");
    assert!(said.contains("is not a regular file"), "{said}");

    // Nor is one waited for where the log should be: that nobody reads it is said.
    let log = proxy.folder.path().join("access.log");
    std::fs::rename(&proxy.file, &log).unwrap();
    let with_log = format!("{content}[access_log]\npath = \"{}\"\n", log.display());
    proxy.write(&with_log);
    let (status, said) = http(proxy.admin, "POST /reload", "");
    assert_eq!(status, 422, "{said}");
    assert!(said.contains("it is a pipe that nobody reads"), "{said}");
    // Once somebody does, it is written.
    let reader = std::thread::spawn(move || std::fs::read_to_string(log).unwrap());
    eventually("a reload", || {
        http(proxy.admin, "POST /reload", "").0 == 200
    });
    ask(&socket("127.0.0.1"), a);
    proxy.process.signal("TERM");
    assert!(reader.join().unwrap().contains("reason=stopped"));
    let (status, log) = proxy.process.wait();
    assert!(status.success(), "{log}");
}

#[test]
fn reload_works_with_fewer_cores_and_taken_ports() {
    let setup = "echo 40000 40009 > /proc/sys/net/ipv4/ip_local_port_range";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    let [a, b, admin] = [(); 3].map(|()| address("127.0.0.1"));
    let server = Server::start();
    let with = |more: &str| {
        let upstream = "[upstream.u]\nsource = [\"127.0.0.1\"]\nservers = [";
        let config = listener("a", a, "u") + more + upstream + &list(&[&server]) + "]\n";
        Proxy::whole(admin, &config).replace("workers = 2\n", "")
            + "[limits]\nmax_sessions = 1000\n"
    };
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder, "proxy.toml", &with(""));
    let mut proxy = proxy(&["--config", file.to_str().unwrap()]);
    let one_core = std::process::Command::new("taskset")
        .args([
            "--all-tasks",
            "--pid",
            "--cpu-list",
            "0",
            &proxy.pid().to_string(),
        ])
        .status();
    assert!(one_core.unwrap().success());
    for _ in 0..30 {
        let client = bind(address("127.0.0.1"));
        client.send_to(b"?", a).unwrap();
    }
    eventually("ports to be used up", || {
        let reason = "ppv2_dropped_datagrams_total{listener=\"a\",reason=\"no_ports\"}";
        metric(admin, reason) > 0
    });
    std::fs::write(&file, with(&listener("b", b, "u"))).unwrap();
    let (status, said) = http(admin, "POST /reload", "");
    assert_eq!(status, 200, "{said}");
    assert!(!proxy.has_ended(), "{}", proxy.log());
}

#[test]
fn flags_cannot_be_reloaded() {
    let (a, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let server = Server::start();
    let mut process = proxy_between(a, server.address, &["--admin", &admin.to_string()]);
    let (status, said) = http(admin, "POST /reload", "");
    assert_eq!(status, 422);
    assert!(said.contains("started by flags"), "{said}");
    process.signal("HUP");
    process.wait_for("not reloaded, nothing has changed");
    served_by(&socket("127.0.0.1"), a);
}

fn served_by(client: &UdpSocket, listener: SocketAddr) {
    client.send_to(b"?", listener).unwrap();
    receive(client);
}
