//! Unbound, a server that is not ours, reads clients' addresses from the
//! proxy's headers: it answers those that its access control allows, refuses
//! the others, and logs each by its address and never the proxy's, whatever
//! families the client and the server speak, also where each session has an address of a
//! source network. It ignores the tag in a header.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use ppv2_lab::dig::{answered, clients, for_each, program, server, setup_clients, unanswered};
use ppv2_lab::*;

pub(crate) const ALLOWED4: (&str, usize) = ("127.10.0.", 40);
pub(crate) const REFUSED4: (&str, usize) = ("127.11.0.", 40);
const ALLOWED6: (&str, usize) = ("fd00:10::", 20);
const REFUSED6: (&str, usize) = ("fd00:11::", 20);

/// Source networks of proxies, all of IPv4 and that of IPv6.
const NETWORKS4: &str = "127.64.0.0/10";
const NETWORK6: &str = "fd00:1::/64";

/// Unbound on one port of both loopback addresses. Version 1.17 asks its access
/// control about the proxy too, so that its addresses must be allowed; the rest
/// of 127.0.0.0/8 is allowed by default, so that it must be refused.
pub(crate) fn unbound(folder: &tempfile::TempDir) -> (Process, [SocketAddr; 2]) {
    let port = port();
    let config = format!(
        r#"
server:
    directory: "{folder}"
    chroot: ""
    username: ""
    pidfile: ""
    use-syslog: no
    logfile: ""
    log-queries: yes
    log-replies: yes
    num-threads: 1
    module-config: "iterator"
    interface: 127.0.0.1@{port}
    interface: ::1@{port}
    proxy-protocol-port: {port}
    access-control: 127.0.0.0/8 refuse
    access-control: ::/0 refuse
    access-control: 127.0.0.1/32 allow
    access-control: ::1/128 allow
    access-control: {NETWORKS4} allow
    access-control: {NETWORK6} allow
    access-control: {}0/24 allow
    access-control: {}/64 allow
    local-zone: "ppv2.test." static
    local-data: "answer.ppv2.test. A 192.0.2.1"
    local-data: "answer.ppv2.test. AAAA 2001:db8::1"
remote-control:
    control-enable: no
"#,
        ALLOWED4.0,
        ALLOWED6.0,
        folder = folder.path().display(),
    );
    let file = write(folder, "unbound.conf", &config);
    let mut process = server(
        &program("unbound", "unbound"),
        &["-d", "-c", file.to_str().unwrap()],
    );
    process.wait_for("start of service");
    let addresses = ["127.0.0.1", "::1"].map(|ip| SocketAddr::new(ip.parse().unwrap(), port));
    (process, addresses)
}

#[test]
fn each_client_is_allowed_refused_and_logged_by_its_own_address() {
    if namespace::enter(test_name!(), &setup_clients(&[ALLOWED6, REFUSED6])) {
        each_is_allowed_refused_and_logged(|_| String::new());
    }
}

#[test]
fn each_client_of_a_source_network_is_allowed_refused_and_logged_by_its_own_address() {
    let clients = setup_clients(&[ALLOWED6, REFUSED6]);
    let route = format!("ip -6 route add local {NETWORK6} dev lo\n{clients}");
    if namespace::enter(test_name!(), &route) {
        each_is_allowed_refused_and_logged(|upstream| match upstream.is_ipv4() {
            true => format!("source = [\"{NETWORKS4}\"]"),
            false => format!("source = [\"{NETWORK6}\"]"),
        });
    }
}

#[test]
fn each_client_is_answered_where_headers_carry_a_tag() {
    if namespace::enter(test_name!(), &setup_clients(&[ALLOWED6, REFUSED6])) {
        each_is_allowed_refused_and_logged(|_| "replies = \"auto\"".to_owned());
    }
}

/// `keys` are those of the upstream of a server at an address.
fn each_is_allowed_refused_and_logged(keys: impl Fn(SocketAddr) -> String) {
    let folder = tempfile::tempdir().unwrap();
    let (unbound, upstreams) = unbound(&folder);
    let mut proxies = Vec::new();
    let mut questions = Vec::new();
    for (ip, allowed, refused) in [
        ("127.0.0.1", ALLOWED4, REFUSED4),
        ("::1", ALLOWED6, REFUSED6),
    ] {
        for upstream in upstreams {
            let listener = address(ip);
            let folder = tempfile::tempdir().unwrap();
            let config = format!(
                "[[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n\
                 [upstream.u]\nservers = [\"{upstream}\"]\n{}\n",
                keys(upstream)
            );
            proxies.push((proxy_with(&folder, &config), folder));
            let ask = |(prefix, count), is_allowed| {
                clients(prefix, count, port())
                    .into_iter()
                    .map(move |client| (client, listener, is_allowed))
            };
            // The two kinds take turns, so that an address that stuck to
            // another client's session would show.
            let (allowed, refused) = (ask(allowed, true), ask(refused, false));
            questions.extend(allowed.zip(refused).flat_map(|(a, r)| [a, r]));
        }
    }
    assert_eq!(questions.len(), 2 * (40 + 40) + 2 * (20 + 20));

    for_each(&questions, |&(client, listener, is_allowed)| {
        let answers = answered(client, listener, &["A", "AAAA"]);
        if is_allowed {
            let data: Vec<_> = answers.iter().map(|answer| answer.only()).collect();
            assert_eq!(data, ["192.0.2.1", "2001:db8::1"], "to {client}");
        } else {
            let statuses = answers.iter().all(|answer| answer.status == "REFUSED");
            assert!(statuses, "to {client}: {answers:?}");
        }
    });

    // A refused question is logged with its reply alone, and not with its name.
    let expected: HashSet<_> = questions
        .iter()
        .flat_map(|(client, _, is_allowed)| {
            let ip = client.ip();
            if *is_allowed {
                vec![
                    format!("{ip} answer.ppv2.test. A IN NOERROR"),
                    format!("{ip} answer.ppv2.test. AAAA IN NOERROR"),
                ]
            } else {
                vec![format!("{ip} null TYPE0 CLASS0 REFUSED")]
            }
        })
        .collect();
    eventually("a log of every reply", || {
        replies(&unbound.log()).len() >= 2 * questions.len()
    });
    let log = unbound.log();
    let logged: HashSet<_> = replies(&log).into_iter().collect();
    assert_eq!(logged, expected);
    assert_eq!(replies(&log).len(), 2 * questions.len());
    for proxy in ["127.0.0.1", "::1"] {
        let named = log.lines().find(|l| l.contains(&format!("info: {proxy} ")));
        assert_eq!(named, None, "the proxy was taken for a client");
    }
}

/// The log's lines on replies, from the client's address to the status. Those
/// on questions end before the status.
fn replies(log: &str) -> Vec<String> {
    log.lines()
        .filter_map(|line| Some(line.split_once("info: ")?.1))
        .map(|line| line.split(' ').take(5).collect::<Vec<_>>())
        .filter(|fields| fields.len() == 5 && fields[0].parse::<IpAddr>().is_ok())
        .map(|fields| fields.join(" "))
        .collect()
}

#[test]
fn send_asks_it_in_the_name_of_a_client() {
    if !namespace::enter(test_name!(), "") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (_unbound, servers) = unbound(&folder);
    for (server, name, allowed, refused, record) in [
        (
            servers[0],
            "answer.ppv2.test",
            "127.10.0.1:1",
            "127.11.0.1:1",
            "IN A 192.0.2.1",
        ),
        (
            servers[1],
            "answer.ppv2.test/AAAA",
            "[fd00:10::1]:1",
            "[fd00:11::1]:1",
            "IN AAAA 2001:db8::1",
        ),
    ] {
        let server = server.to_string();
        let send = |more: &[&str]| {
            let arguments = [&["send", &server, "--dns", name, "--count", "3"], more].concat();
            output(&arguments)
        };
        let (status, text, stderr) = send(&["--client", allowed, "--crc32c"]);
        assert_eq!(status, Some(0), "{text}{stderr}");
        assert_eq!(text.matches("\nNoError\n").count(), 3, "{text}");
        assert_eq!(text.matches(record).count(), 3, "{text}");
        let (status, text, _) = send(&["--client", refused]);
        assert_eq!(status, Some(0));
        assert_eq!(text.matches("\nRefused\n").count(), 3, "{text}");
        let (status, text, _) = send(&["--format", "none", "--timeout", "300ms"]);
        assert_eq!(status, Some(1), "{text}");
    }
}

#[test]
fn queries_without_a_header_are_not_answered() {
    if !namespace::enter(test_name!(), "") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (_unbound, upstreams) = unbound(&folder);
    let [with, without] = [address("127.0.0.1"), address("127.0.0.1")];
    let _with = proxy_between(with, upstreams[0], &[]);
    let _without = proxy_between(without, upstreams[0], &["--mode", "plain"]);
    let client = clients(ALLOWED4.0, 1, port())[0];
    unanswered(client, upstreams[0]);
    unanswered(client, without);
    answered(client, with, &["A"])[0].only();
}
