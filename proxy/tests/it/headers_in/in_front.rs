//! Programs that are not ours in front: what they really send, and what becomes of it.

use ppv2_lab::dig::{answered, clients};
use ppv2_lab::nginx::nginx;
use ppv2_lab::*;

use super::*;
use crate::dnsdist::{PROXIES, dnsdist, is_told_its_address, writing_headers};
use crate::unbound::{ALLOWED4, REFUSED4, unbound};

/// nginx 1.31.3 with `proxy_protocol on`: the text of version 1 in front of the first datagram
/// of each session, and the rest bare.
#[test]
fn nginx_that_writes_text_is_explained_and_never_believed() {
    for keys in ["", "remember = {}"] {
        let it = In::start(keys);
        let (folder, front) = (tempfile::tempdir().unwrap(), address("127.0.0.1"));
        let _nginx = nginx(&folder, front, SENDER, it.listener, "proxy_protocol on;");
        let client = socket("127.0.0.9");
        client.send_to(b"first", front).unwrap();
        it.eventually_dropped("v1_header", 1);
        client.send_to(b"second", front).unwrap();
        it.eventually_dropped("no_header", 1);
        receive_nothing(&it.server);
        receive_nothing(&client);
        eventually("the explanation", || {
            let log = it.proxy.process.log();
            log.contains("v1_header") && log.contains("1.31.4")
        });
    }
}

/// nginx that writes no header, with an address of its own: its clients are strangers.
#[test]
fn nginx_without_headers_is_not_served_as_a_trusted_sender() {
    let it = In::start("");
    let (folder, front) = (tempfile::tempdir().unwrap(), address("127.0.0.1"));
    let _nginx = nginx(&folder, front, SENDER, it.listener, "");
    socket("127.0.0.9").send_to(b"question", front).unwrap();
    it.eventually_dropped("no_header", 1);
    receive_nothing(&it.server);
}

const CLIENTS: (&str, usize) = ("127.10.0.", 10);

/// dnsdist → our proxy → servers that read headers.
#[test]
fn clients_of_dnsdist_are_read_behind_our_proxy() {
    if !namespace::enter(test_name!(), "") {
        return;
    }
    let folders = [(); 4].map(|()| tempfile::tempdir().unwrap());
    let (_reader, [upstream, _]) = dnsdist(&folders[0], PROXIES);
    let (listener, front) = (address("127.0.0.1"), address("127.0.0.1"));
    let proxy = Proxy::start(&config(listener, upstream, &accept("127.0.0.1", ""), ""));
    let _front = writing_headers(&folders[1], front, listener);
    for client in clients(CLIENTS.0, CLIENTS.1, port()) {
        is_told_its_address(client, front, "");
    }
    assert_eq!(all_dropped(&proxy), []);

    // By its access list.
    let (_unbound, [upstream, _]) = unbound(&folders[2]);
    let (listener, front) = (address("127.0.0.1"), address("127.0.0.1"));
    let proxy = Proxy::start(&config(listener, upstream, &accept("127.0.0.1", ""), ""));
    let _front = writing_headers(&folders[3], front, listener);
    for (prefix, status) in [(ALLOWED4.0, "NOERROR"), (REFUSED4.0, "REFUSED")] {
        for client in clients(prefix, 5, port()) {
            assert_eq!(answered(client, front, &["A"])[0].status, status);
        }
    }
    assert_eq!(all_dropped(&proxy), []);
}

/// Our proxy → dnsdist, which reads headers and writes them → our proxy → a server that reads.
#[test]
fn clients_are_read_behind_dnsdist_and_two_of_our_proxies() {
    if !namespace::enter(test_name!(), "") {
        return;
    }
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (_reader, [upstream, _]) = dnsdist(&folders[0], PROXIES);
    let [first, middle, last] = [(); 3].map(|()| address("127.0.0.1"));
    let last_proxy = Proxy::start(&config(last, upstream, &accept("127.0.0.1", ""), ""));
    let _middle = writing_headers(&folders[1], middle, last);
    let first_proxy = Proxy::start(&config(first, middle, "", ""));
    for client in clients(CLIENTS.0, CLIENTS.1, port()) {
        is_told_its_address(client, first, "");
    }
    for proxy in [&first_proxy, &last_proxy] {
        assert_eq!(all_dropped(proxy), []);
    }
}
