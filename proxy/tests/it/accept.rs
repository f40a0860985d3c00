//! `accept` as the operator sees it: what `check`, the log, metrics, `/sessions` and the access
//! log say, and what a reload changes for those who are being served.

use std::fs;
use std::net::{SocketAddr, UdpSocket};

use ppv2_lab::fake_proxy::{LISTENER, addr, from_client, from_client_at};
use ppv2_lab::namespace::enter;
use ppv2_lab::service::Proxy;
use ppv2_lab::two_hosts::{Host, SETUP};
use ppv2_lab::*;
use serde_json::Value;

const ALICE: &str = "203.0.113.11:54321";
const BOB: &str = "203.0.113.12:54321";

/// Where another proxy is, on this host.
const IN_FRONT: &str = "127.0.0.2";

/// A server, and the configuration of a listener with it.
struct Setup {
    listener: SocketAddr,
    server: UdpSocket,
}

impl Setup {
    fn new() -> Self {
        Self {
            listener: address("127.0.0.1"),
            server: socket("127.0.0.1"),
        }
    }

    /// The listener has these keys besides. One worker, so that it alone counts senders.
    fn config(&self, of_listener: &str) -> String {
        format!(
            "[[listener]]\nname = \"dns\"\nbind = [\"{}\"]\nupstream = \"u\"\n{of_listener}\n\
             [upstream.u]\nservers = [\"{}\"]\n",
            self.listener,
            self.server.local_addr().unwrap()
        )
    }

    /// Asks for `client` by `sender`, and sees that the server gets one header, which names the
    /// client, and that the answer comes back.
    #[track_caller]
    fn served(&self, sender: &UdpSocket, client: &str) {
        let question = from_client(client, client.as_bytes());
        sender.send_to(&question, self.listener).unwrap();
        let (datagram, proxy) = receive(&self.server);
        let expected = (addr(client), addr(LISTENER), client.into());
        assert_eq!(read_header(&datagram), expected);
        self.server.send_to(b"answer", proxy).unwrap();
        assert_eq!(receive(sender), (b"answer".to_vec(), self.listener));
    }

    /// Asks directly, and sees that all bytes are payload of the asking client's.
    #[track_caller]
    fn served_directly(&self, client: &UdpSocket, question: &[u8]) {
        client.send_to(question, self.listener).unwrap();
        let (datagram, proxy) = receive(&self.server);
        let (read, _, payload) = read_header(&datagram);
        assert_eq!(read, client.local_addr().unwrap());
        assert_eq!(payload, question);
        self.server.send_to(b"answer", proxy).unwrap();
        assert_eq!(receive(client), (b"answer".to_vec(), self.listener));
    }

    /// Sends what must be dropped for `reason`.
    #[track_caller]
    fn dropped(&self, proxy: &Proxy, sender: &UdpSocket, datagram: &[u8], reason: &str) {
        let before = drops(proxy, reason);
        sender.send_to(datagram, self.listener).unwrap();
        eventually(reason, || drops(proxy, reason) == before + 1);
    }
}

fn accept(of_accept: &str) -> String {
    format!("accept = {{ from = [\"{IN_FRONT}\"]{of_accept} }}\n")
}

fn drops(proxy: &Proxy, reason: &str) -> u64 {
    proxy.metric(&format!(
        "ppv2_dropped_datagrams_total{{listener=\"dns\",reason=\"{reason}\"}}"
    ))
}

fn counted(proxy: &Proxy, what: &str) -> u64 {
    proxy.metric(&format!("ppv2_{what}{{listener=\"dns\"}}"))
}

fn ended(proxy: &Proxy, reason: &str) -> u64 {
    proxy.metric(&format!(
        "ppv2_sessions_ended_total{{listener=\"dns\",reason=\"{reason}\"}}"
    ))
}

fn sessions(proxy: &Proxy) -> Vec<Value> {
    let (_, text) = http_get(proxy.admin, "/sessions");
    let mut page: Value = serde_json::from_str(&text).unwrap();
    page["sessions"].as_array_mut().unwrap().split_off(0)
}

#[test]
fn check_and_the_log_name_what_is_accepted() {
    let setup = Setup::new();
    let config = setup.config(&accept(", tlvs = \"pass\", remember = { max = 5 }"));
    let line = "headers (v2) from 127.0.0.2/32, remembered for 30s, of at most 5 senders; TLVs pass; \
                other sources are dropped";
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder, "proxy.toml", &config);
    let (status, stdout, stderr) = output(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!(status, Some(0), "{stderr}");
    assert!(
        stdout.lines().any(|one| one.trim() == line),
        "{line} is missing in\n{stdout}"
    );
    let proxy = Proxy::start(&config);
    let log = proxy.process.log();
    assert!(log.contains(&format!("accept={line}")), "{log}");
}

#[test]
fn the_flag_reads_headers_of_these_networks_alone() {
    let setup = Setup::new();
    let server = setup.server.local_addr().unwrap();
    let flags = ["--accept-from", IN_FRONT, "--accept-from", "127.0.0.3"];
    let _proxy = proxy_between(setup.listener, server, &flags);
    for sender in [IN_FRONT, "127.0.0.3"] {
        setup.served(&socket(sender), ALICE);
    }
    let stranger = socket("127.0.0.4");
    let forged = from_client(ALICE, b"x");
    stranger.send_to(&forged, setup.listener).unwrap();
    receive_nothing(&setup.server);
}

#[test]
fn sessions_and_the_access_log_name_the_proxy_in_front() {
    for format in ["json", "text"] {
        let setup = Setup::new();
        let folder = tempfile::tempdir().unwrap();
        let status = std::process::Command::new("chmod")
            .arg("777")
            .arg(folder.path())
            .status();
        assert!(status.unwrap().success());
        let file = folder.path().join("access.log");
        let mut proxy = Proxy::start(&format!(
            "access_log = {{ path = \"{}\", format = \"{format}\" }}\n{}",
            file.display(),
            setup.config(&accept(", direct = \"accept\""))
        ));
        let (sender, direct) = (socket(IN_FRONT), socket("127.0.0.3"));
        let by = sender.local_addr().unwrap().to_string();
        setup.served(&sender, ALICE);
        setup.served_directly(&direct, b"question");

        let of = |client: &str| {
            let mut all = sessions(&proxy).into_iter();
            all.find(|session| session["client"] == client).unwrap()
        };
        let session = of(ALICE);
        assert_eq!(session["proxy"], *by);
        assert_eq!(session["local"], LISTENER);
        let session = of(&direct.local_addr().unwrap().to_string());
        assert_eq!(session["proxy"], Value::Null);
        assert_eq!(session["local"], setup.listener.to_string());

        proxy.process.signal("TERM");
        assert!(proxy.process.wait().0.success());
        let log = fs::read_to_string(&file).unwrap();
        let line = |client: &str| {
            let mut lines = log.lines();
            lines.find(|line| line.contains(client)).unwrap()
        };
        let (read, bare) = (line(ALICE), line("127.0.0.3:"));
        if format == "json" {
            let read: Value = serde_json::from_str(read).unwrap();
            assert_eq!(read["proxy"], *by, "{read}");
            assert_eq!(read["local"], LISTENER, "{read}");
        } else {
            assert!(read.contains(&format!(" proxy={by}")), "{read}");
        }
        assert!(!bare.contains("proxy"), "{bare}");
    }
}

#[test]
fn what_remembered_senders_do_is_counted() {
    let setup = Setup::new();
    let of_listener = accept(", remember = { max = 1 }");
    let proxy = Proxy::start(
        &setup
            .config(&of_listener)
            .replace("[[", "reuse_port = false\n[["),
    );
    let (first, second) = (socket(IN_FRONT), socket(IN_FRONT));
    setup.served(&first, ALICE);
    first.send_to(b"bare", setup.listener).unwrap();
    let (datagram, _) = receive(&setup.server);
    assert_eq!(read_header(&datagram).0, addr(ALICE));
    assert_eq!(counted(&proxy, "datagrams_without_header_total"), 1);
    // There is room for one.
    assert_eq!(counted(&proxy, "senders_unremembered_total"), 0);
    setup.served(&second, BOB);
    assert_eq!(counted(&proxy, "senders_unremembered_total"), 1);
    setup.dropped(&proxy, &second, b"bare", "no_header");
    // A header behind the header is payload.
    let nested = from_client(ALICE, &from_client(BOB, b"inner"));
    first.send_to(&nested, setup.listener).unwrap();
    let (client, _, payload) = read_header(&receive(&setup.server).0);
    assert_eq!((client, payload), (addr(ALICE), from_client(BOB, b"inner")));
    assert_eq!(counted(&proxy, "nested_headers_total"), 1);
}

#[test]
fn the_log_explains_the_mistakes_of_senders() {
    let setup = Setup::new();
    let of_listener = accept(", local = \"drop\", remember = {}");
    let proxy = Proxy::start(&setup.config(&of_listener));
    let (sender, stranger) = (socket(IN_FRONT), socket("127.0.0.9"));
    let v1 = b"PROXY UDP4 203.0.113.11 198.51.100.10 54321 9000\r\nquestion";
    let mut local = from_client(ALICE, b"probe");
    local[12] = 0x20;
    let mut explained = Vec::new();
    for (from, datagram, reason, fix) in [
        (
            &sender,
            &b"bare"[..],
            "no_header",
            "if it does so once per session, set `accept.remember`",
        ),
        (
            &sender,
            v1,
            "v1_header",
            "nginx needs 1.31.4 and `proxy_protocol v2`",
        ),
        (
            &stranger,
            b"bare",
            "untrusted",
            "add the address to `accept.from` if it is a proxy that writes headers",
        ),
    ] {
        setup.dropped(&proxy, from, datagram, reason);
        explained.push((reason, fix));
    }
    // Such is what the configuration asks for.
    setup.dropped(&proxy, &sender, &local, "local_header");
    setup.dropped(&proxy, &sender, &from_client(ALICE, b""), "header_alone");

    let line_of = |log: &str, reason: &str| {
        let mut lines = log.lines();
        let is_it = |line: &&str| line.contains(&format!("reason=\"{reason}\""));
        lines.find(is_it).map(str::to_owned)
    };
    for (reason, fix) in explained {
        eventually(reason, || line_of(&proxy.process.log(), reason).is_some());
        let line = line_of(&proxy.process.log(), reason).unwrap();
        assert!(line.contains("WARN") && line.contains(fix), "{line}");
        // A proxy is named, a stranger may be a client.
        let named = line.contains("proxy=127.0.0.2");
        assert_eq!(named, reason != "untrusted", "{line}");
    }
    let log = proxy.process.log();
    for reason in ["local_header", "header_alone"] {
        assert_eq!(line_of(&log, reason), None);
    }
    for client in ["203.0.113.11", "127.0.0.9"] {
        assert!(!log.contains(client), "{log}");
    }
}

#[test]
fn reload_adds_and_removes_accept() {
    let setup = Setup::new();
    let proxy = Proxy::start(&setup.config(""));
    let (sender, client) = (socket(IN_FRONT), socket("127.0.0.3"));
    setup.served_directly(&client, b"question");
    // Without `accept`, a header is payload, and who sent it the client.
    let question = from_client(ALICE, b"question");
    setup.served_directly(&sender, &question);
    assert_eq!(sessions(&proxy).len(), 2);

    // Neither of them is a client now.
    proxy.reload(&setup.config(&accept("")));
    eventually("their end", || ended(&proxy, "denied") == 2);
    setup.dropped(&proxy, &client, b"question", "untrusted");
    setup.dropped(&proxy, &sender, b"question", "no_header");
    setup.served(&sender, ALICE);

    // Clients may write here directly again.
    proxy.reload(&setup.config(&accept(", direct = \"accept\"")));
    setup.served_directly(&client, b"question");
    setup.served(&sender, ALICE);
    assert_eq!(ended(&proxy, "denied"), 2, "Alice's goes on");

    // The header's client can't be reached without the proxy in front.
    proxy.reload(&setup.config(""));
    eventually("its end", || ended(&proxy, "denied") == 3);
    setup.served_directly(&client, b"question");
    setup.served_directly(&sender, &question);
    assert_eq!(ended(&proxy, "denied"), 3, "the direct client's goes on");
}

#[test]
fn reload_ends_sessions_of_senders_that_are_no_longer_trusted() {
    let setup = Setup::new();
    let of =
        |from: &str, more: &str| setup.config(&format!("accept = {{ from = [{from}]{more} }}\n"));
    let both = "\"127.0.0.2\", \"127.0.0.5\"";
    let proxy = Proxy::start(&of(both, ""));
    let (stays, goes) = (socket(IN_FRONT), socket("127.0.0.5"));
    // One client behind two proxies has two ways back.
    setup.served(&stays, ALICE);
    setup.served(&goes, ALICE);
    let by = |sender: &UdpSocket| {
        let sender = sender.local_addr().unwrap().to_string();
        let all = sessions(&proxy);
        let mut all = all.into_iter();
        all.find(|session| session["proxy"] == *sender)
    };
    assert!(by(&stays).is_some() && by(&goes).is_some());
    let (_, before) = {
        let question = from_client(ALICE, b"?");
        stays.send_to(&question, setup.listener).unwrap();
        receive(&setup.server)
    };

    // What says nothing of who is trusted ends nothing.
    proxy.reload(&of(
        both,
        ", tlvs = \"pass\", local = \"drop\", remember = {}",
    ));
    setup.served(&stays, ALICE);
    setup.served(&goes, ALICE);
    assert_eq!(counted(&proxy, "sessions_opened_total"), 2);

    proxy.reload(&of("\"127.0.0.2\"", ""));
    eventually("the end", || ended(&proxy, "denied") == 1);
    assert!(by(&stays).is_some() && by(&goes).is_none());
    setup.dropped(&proxy, &goes, &from_client(ALICE, b"?"), "untrusted");
    // The other one's session is the same.
    let question = from_client(ALICE, b"?");
    stays.send_to(&question, setup.listener).unwrap();
    assert_eq!(receive(&setup.server).1, before);
    assert_eq!(counted(&proxy, "sessions_opened_total"), 2);

    // What it had said is no longer enough.
    setup.dropped(&proxy, &stays, b"bare", "no_header");
}

#[test]
fn a_reload_that_accept_can_not_go_with_changes_nothing() {
    let setup = Setup::new();
    let good = setup.config(&accept(""));
    let proxy = Proxy::start(&good);
    let sender = socket(IN_FRONT);
    setup.served(&sender, ALICE);
    for (bad, why) in [
        (
            setup.config("accept = { from = [] }\n"),
            "`accept` without networks in `from`",
        ),
        (
            format!("{good}replies = \"auto\"\n"),
            "`accept` with replies = \"auto\"",
        ),
    ] {
        let (status, said) = proxy.try_reload(&bad);
        assert_eq!(status, 422, "{said}");
        assert!(said.contains(why), "{said}");
    }
    setup.served(&sender, ALICE);
    assert_eq!(counted(&proxy, "sessions_opened_total"), 1);
}

#[test]
fn one_process_can_be_a_chain_of_listeners() {
    let setup = Setup::new();
    let first = address("127.0.0.1");
    let _proxy = Proxy::start(&format!(
        "[[listener]]\nname = \"first\"\nbind = [\"{first}\"]\nupstream = \"second\"\n\
         [upstream.second]\nservers = [\"{}\"]\n{}",
        setup.listener,
        setup.config("accept = { from = [\"127.0.0.1\"] }\n")
    ));
    let client = socket("127.0.0.3");
    client.send_to(b"question", first).unwrap();
    let (datagram, proxy) = receive(&setup.server);
    let read = read_header(&datagram);
    let expected = (client.local_addr().unwrap(), first, b"question".to_vec());
    assert_eq!(read, expected);
    setup.server.send_to(b"answer", proxy).unwrap();
    assert_eq!(receive(&client), (b"answer".to_vec(), first));
}

/// Clients of either family come through a listener of IPv4 alone, to a server that nothing but
/// this host reaches.
#[test]
fn an_unwrapper_beside_its_server_is_set_up_by_host_setup() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let servers = ["127.0.0.1:9001", "[::1]:9001"].map(|at| bind(addr(at)));
    let listener = addr("10.0.0.1:5300");
    let config = "[[listener]]\nname = \"dns\"\nbind = [\"10.0.0.1:5300\"]\nupstream = \"u\"\n\
                  mode = \"transparent\"\naccept = { from = [\"10.0.0.1\"] }\n\
                  [upstream.u]\nservers = [\"127.0.0.1:9001\", \"[::1]:9001\"]\n";
    let file = write(&folder, "proxy.toml", config);
    let run = |command: &[&str]| {
        let arguments = [command, &["--config", file.to_str().unwrap()]].concat();
        Host::Proxy.proxy(&arguments)
    };
    let (status, found, _) = run(&["doctor"]);
    assert_eq!(status, Some(1), "{found}");
    // Both, though the listener has clients of IPv4 alone otherwise.
    for server in ["127.0.0.1:9001", "[::1]:9001"] {
        let missing = format!("FATAL   replies of server {server} (mode transparent)");
        assert!(found.contains(&missing), "no {missing} in\n{found}");
    }
    let (status, _, stderr) = run(&["run"]);
    assert_eq!(status, Some(1), "{stderr}");
    let (status, script, stderr) = run(&["host-setup", "--role", "proxy"]);
    assert_eq!(status, Some(0), "{stderr}");
    Host::Proxy.shell(&script);
    let (status, found, _) = run(&["doctor"]);
    assert_eq!(status, Some(0), "{found}");

    let _proxy = proxy(&["--config", file.to_str().unwrap()]);
    let sender = bind(addr("10.0.0.1:0"));
    for (server, client, at) in [
        (&servers[0], ALICE, LISTENER),
        (
            &servers[1],
            "[2001:db8:c::7]:54321",
            "[2001:db8:a::99]:9000",
        ),
    ] {
        let (client, at) = (addr(client), addr(at));
        let question = from_client_at(client, at, b"question");
        sender.send_to(&question, listener).unwrap();
        let (datagram, from) = receive(server);
        assert_eq!((datagram, from.ip()), (b"question".to_vec(), client.ip()));
        server.send_to(b"answer", from).unwrap();
        assert_eq!(receive(&sender), (b"answer".to_vec(), listener));
    }
}
