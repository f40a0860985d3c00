//! How each proxy is set up so that none is at a disadvantage: one worker, no access
//! log, sessions that stay for a minute, and as many of them as this host's descriptors
//! allow.

use std::net::SocketAddrV4;

use serde_json::json;

use super::{Peer, Setup};

/// Where sessions of their own address send from: on this host without any setup, and
/// beyond the addresses of clients.
const NETWORK: &str = "127.64.0.0/10";

/// Every sender of the bench writes a header.
const ACCEPT: &str = "accept = { from = [\"127.0.0.0/8\"] }";

pub(super) fn ours(peer: Peer, setup: &Setup<'_>) -> String {
    let settings = [
        (Peer::BusyPoll, "busy_poll = \"50us\""),
        (Peer::Coalesce, "coalesce = \"200us\""),
        (Peer::Transparent, "mode = \"transparent\""),
        (Peer::Dsr, "mode = \"dsr\""),
        (Peer::DsrSdk, "mode = \"dsr\"\nrewrite_on = \"sdk\""),
        (Peer::Stateless, "sessions = false"),
        (Peer::Accept, ACCEPT),
        (Peer::AcceptShared, ACCEPT),
    ];
    let mut listener: Vec<_> = settings
        .iter()
        .filter(|(of, _)| *of == peer)
        .map(|(_, setting)| *setting)
        .collect();
    if setup.one_reply {
        listener.push("responses = 1");
    }
    let upstream = if peer == Peer::Network {
        format!("source = [\"{NETWORK}\"]")
    } else if peer.tags() {
        "replies = \"tagged\"".to_owned()
    } else {
        String::new()
    };
    // The default is what descriptors and ports allow, of which session sockets alone
    // take one each.
    let limits = if upstream.is_empty() || peer == Peer::Stateless {
        String::new()
    } else {
        let sessions = setup.clients + setup.clients / 4 + 1_000;
        format!("[limits]\nmax_sessions = {sessions}\n")
    };
    format!(
        "workers = {workers}
{limits}
[[listener]]
bind = [\"{listen}\"]
upstream = \"server\"
idle_timeout = \"60s\"
{listener}

[upstream.server]
servers = [\"{server}\"]
{upstream}
",
        listener = listener.join("\n"),
        workers = if peer == Peer::TwoWorkers { 2 } else { 1 },
        listen = setup.listen,
        server = setup.server,
    )
}

pub(super) fn nginx(peer: Peer, setup: &Setup<'_>) -> String {
    let own = if peer == Peer::NginxTransparent {
        "proxy_bind $remote_addr transparent;"
    } else if peer == Peer::NginxHeader {
        "proxy_protocol on;"
    } else {
        ""
    };
    let responses = if setup.one_reply {
        "proxy_responses 1;"
    } else {
        ""
    };
    // A session has a connection for each of its sides, and one descriptor.
    format!(
        "daemon off;
user root;
pid nginx.pid;
worker_processes 1;
worker_rlimit_nofile {descriptors};
events {{ worker_connections {connections}; multi_accept on; }}
stream {{
    access_log off;
    server {{
        listen {listen} udp rcvbuf=4m;
        proxy_pass {server};
        proxy_timeout 60s;
        {responses}
        {own}
    }}
}}
",
        descriptors = setup.descriptors,
        connections = 2 * setup.descriptors,
        listen = setup.listen,
        server = setup.server,
    )
}

pub(super) fn envoy(setup: &Setup<'_>) -> serde_json::Value {
    let address = |address: SocketAddrV4| {
        json!({"socket_address": {
            "protocol": "UDP",
            "address": address.ip(),
            "port_value": address.port(),
        }})
    };
    // Without prefer_gro, Envoy takes a burst for one datagram and loses it.
    let socket = json!({"max_rx_datagram_size": 1500, "prefer_gro": true});
    let api = "type.googleapis.com/envoy.extensions.filters.udp.udp_proxy.v3";
    json!({"static_resources": {
        "listeners": [{
            "name": "listener",
            "address": address(setup.listen),
            "udp_listener_config": {"downstream_socket_config": socket},
            "listener_filters": [{
                "name": "envoy.filters.udp_listener.udp_proxy",
                "typed_config": {
                    "@type": format!("{api}.UdpProxyConfig"),
                    "stat_prefix": "bench",
                    "matcher": {"on_no_match": {"action": {
                        "name": "route",
                        "typed_config": {"@type": format!("{api}.Route"), "cluster": "c"},
                    }}},
                    "idle_timeout": "60s",
                    "upstream_socket_config": socket,
                },
            }],
        }],
        "clusters": [{
            "name": "c",
            "type": "STATIC",
            "circuit_breakers": {"thresholds": [{"max_connections": 100_000}]},
            "load_assignment": {
                "cluster_name": "c",
                "endpoints": [{"lb_endpoints": [
                    {"endpoint": {"address": address(setup.server)}},
                ]}],
            },
        }],
    }})
}

pub(super) fn sozu(setup: &Setup<'_>) -> String {
    format!(
        "command_socket = \"{folder}/sozu.sock\"
saved_state = \"{folder}/state.json\"
log_level = \"error\"
log_target = \"file://{folder}/sozu.log\"
max_connections = {connections}
worker_count = 1
worker_automatic_restart = false
activate_listeners = true

[[listeners]]
protocol = \"udp\"
address = \"{listen}\"
front_timeout = 60
back_timeout = 60

[clusters.c]
protocol = \"tcp\"
frontends = [{{ address = \"{listen}\" }}]
backends = [{{ address = \"{server}\" }}]

[clusters.c.udp]
affinity_key = \"SOURCE_IP_PORT\"
responses = {responses}
send_proxy_protocol = true
proxy_protocol_every_datagram = true
",
        folder = setup.folder.display(),
        // It wants two descriptors for each, and some for itself.
        connections = setup.descriptors * 9 / 20,
        listen = setup.listen,
        server = setup.server,
        responses = u8::from(setup.one_reply),
    )
}

pub(super) fn dnsdist(setup: &Setup<'_>) -> String {
    format!(
        "setLocal('{}')
setACL({{'127.0.0.0/8'}})
setMaxUDPOutstanding(65535)
setSecurityPollSuffix('')
newServer{{address='{}', useProxyProtocol=true, sockets=1}}:setUp()
",
        setup.listen, setup.server
    )
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::load::Senders;

    fn setup() -> Setup<'static> {
        Setup {
            folder: Path::new("/nowhere"),
            listen: SocketAddrV4::new([127, 0, 0, 1].into(), 7_000),
            server: SocketAddrV4::new([127, 0, 0, 1].into(), 12_000),
            one_reply: false,
            clients: 200_000,
            descriptors: 20_000,
        }
    }

    #[test]
    fn sessions_without_a_socket_are_not_bounded_by_descriptors() {
        let network = ours(Peer::Network, &setup());
        assert!(network.contains("max_sessions = 251000\n"), "{network}");
        assert!(
            network.contains("source = [\"127.64.0.0/10\"]\n"),
            "{network}"
        );
        let sockets = ours(Peer::Ours, &setup());
        assert!(!sockets.contains("max_sessions"), "{sockets}");
        assert!(!sockets.contains("source"), "{sockets}");
    }

    #[test]
    fn tags_are_asked_for_where_servers_send_them() {
        for peer in [Peer::Tagged, Peer::TaggedBatch, Peer::Stateless] {
            let text = ours(peer, &setup());
            assert!(text.contains("replies = \"tagged\"\n"), "{text}");
            let is_stateless = text.contains("sessions = false\n");
            assert_eq!(is_stateless, peer == Peer::Stateless, "{text}");
        }
    }

    #[test]
    fn headers_are_accepted_where_senders_write_them() {
        for peer in [Peer::Ours, Peer::Accept, Peer::AcceptShared] {
            let text = ours(peer, &setup());
            let accepts = text.contains("\naccept = { from = [\"127.0.0.0/8\"] }\n");
            let writes = peer.senders() != Senders::Clients;
            assert_eq!(accepts, writes, "{text}");
        }
    }

    #[test]
    fn sessions_end_with_their_reply_if_that_is_asked_for() {
        let setup = Setup {
            one_reply: true,
            ..setup()
        };
        assert!(ours(Peer::Ours, &setup).contains("responses = 1\n"));
        assert!(nginx(Peer::Nginx, &setup).contains("proxy_responses 1;"));
        assert!(nginx(Peer::NginxHeader, &setup).contains("proxy_protocol on;"));
        assert!(!nginx(Peer::Nginx, &setup).contains("proxy_protocol on;"));
    }
}
