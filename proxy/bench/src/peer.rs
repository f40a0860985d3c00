//! What is measured, and how each is set up so that none is at a disadvantage:
//! one worker, no access log, sessions that stay for a minute, and as many of
//! them as this host's descriptors allow.

use std::fs;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

/// A proxy, with the settings that make it another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Peer {
    Ours,
    OursBusyPoll,
    OursCoalesce,
    OursTwice,
    OursTransparent,
    OursDsr,
    OursDsrSdk,
    Bare,
    BareCareful,
    Nginx,
    NginxTransparent,
    Envoy,
    Sozu,
    Udppp,
    Dnsdist,
}

/// Where a proxy finds what it needs.
pub(crate) struct Setup<'a> {
    /// For its configuration and logs; its own.
    pub(crate) folder: &'a Path,
    pub(crate) listen: SocketAddrV4,
    pub(crate) server: SocketAddrV4,
    /// A session ends with its first reply.
    pub(crate) one_reply: bool,
}

impl Peer {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ours => "ppv2-proxy",
            Self::OursBusyPoll => "ppv2-proxy --busy-poll 50us",
            Self::OursCoalesce => "ppv2-proxy --coalesce 200us",
            Self::OursTwice => "ppv2-proxy --workers 2",
            Self::OursTransparent => "ppv2-proxy --mode transparent",
            Self::OursDsr => "ppv2-proxy --mode dsr",
            Self::OursDsrSdk => "ppv2-proxy --mode dsr, by the SDK",
            Self::Bare => "bare loop",
            Self::BareCareful => "bare loop --careful",
            Self::Nginx => "nginx",
            Self::NginxTransparent => "nginx, transparent",
            Self::Envoy => "Envoy",
            Self::Sozu => "sozu",
            Self::Udppp => "udppp",
            Self::Dnsdist => "dnsdist",
        }
    }

    /// Whether it puts a PROXY v2 header in front of each datagram.
    pub(crate) fn header(self) -> bool {
        !matches!(self, Self::Nginx | Self::Envoy) && !self.is_spoofing()
    }

    /// Whether it writes to the server from clients' addresses.
    pub(crate) fn is_spoofing(self) -> bool {
        matches!(
            self,
            Self::OursTransparent | Self::OursDsr | Self::NginxTransparent
        )
    }

    /// Whether the server's replies don't come to it: its host, or the server
    /// itself, makes them come from the listener.
    pub(crate) fn is_returned(self) -> bool {
        matches!(self, Self::OursDsr | Self::OursDsrSdk)
    }

    /// Whether it is ppv2-proxy, however set.
    pub(crate) fn is_ours(self) -> bool {
        matches!(
            self,
            Self::Ours
                | Self::OursBusyPoll
                | Self::OursCoalesce
                | Self::OursTwice
                | Self::OursTransparent
                | Self::OursDsr
                | Self::OursDsrSdk
        )
    }

    /// Whether it may run on every core, which leaves it and the clients in each
    /// other's way.
    pub(crate) fn everywhere(self) -> bool {
        self == Self::OursTwice
    }

    /// Why it can't be measured, if it can't.
    pub(crate) fn missing(self, proxy: &Path, peers: &Path) -> Option<String> {
        let option = match self {
            Self::OursBusyPoll => "--busy-poll",
            Self::OursCoalesce => "--coalesce",
            Self::OursTransparent | Self::OursDsr | Self::OursDsrSdk => "--rewrite-on",
            Self::Ours
            | Self::OursTwice
            | Self::Bare
            | Self::BareCareful
            | Self::Nginx
            | Self::NginxTransparent
            | Self::Envoy
            | Self::Sozu
            | Self::Udppp
            | Self::Dnsdist => {
                let file = self.program(proxy, peers);
                return (!file.is_file()).then(|| why_missing(peers, &file));
            }
        };
        let help = Command::new(proxy).args(["run", "--help"]).output().ok()?;
        let known = String::from_utf8_lossy(&help.stdout).contains(option);
        (!known).then(|| format!("ppv2-proxy run has no {option}"))
    }

    pub(crate) fn program(self, proxy: &Path, peers: &Path) -> PathBuf {
        match self {
            Self::Ours
            | Self::OursBusyPoll
            | Self::OursCoalesce
            | Self::OursTwice
            | Self::OursTransparent
            | Self::OursDsr
            | Self::OursDsrSdk => proxy.to_owned(),
            Self::Bare | Self::BareCareful => std::env::current_exe().unwrap_or_default(),
            Self::Nginx | Self::NginxTransparent => "/usr/sbin/nginx".into(),
            Self::Envoy => peers.join("envoy/envoy/_bin/envoy"),
            Self::Sozu => peers.join("bin/sozu"),
            Self::Udppp => peers.join("bin/udppp"),
            Self::Dnsdist => "/usr/bin/dnsdist".into(),
        }
    }

    /// Its arguments, and what it reads from files.
    pub(crate) fn configure(self, setup: &Setup<'_>, command: &mut Command) -> Result<()> {
        let (listen, server) = (setup.listen, setup.server);
        let file = setup.folder.join("config");
        match self {
            Self::Ours
            | Self::OursBusyPoll
            | Self::OursCoalesce
            | Self::OursTwice
            | Self::OursTransparent
            | Self::OursDsr
            | Self::OursDsrSdk => {
                let workers = if self == Self::OursTwice { "2" } else { "1" };
                command
                    .args(["--log-level", "warn", "run", "--workers", workers])
                    .args(["--idle-timeout", "60s", "--listen", &listen.to_string()])
                    .args(["--upstream", &server.to_string()]);
                if setup.one_reply {
                    command.args(["--responses", "1"]);
                }
                if self == Self::OursTransparent {
                    command.args(["--mode", "transparent"]);
                }
                if self.is_returned() {
                    command.args(["--mode", "dsr"]);
                }
                if self == Self::OursDsrSdk {
                    command.args(["--rewrite-on", "sdk"]);
                }
                if self == Self::OursBusyPoll {
                    command.args(["--busy-poll", "50us"]);
                }
                if self == Self::OursCoalesce {
                    command.args(["--coalesce", "200us"]);
                }
            }
            Self::Bare | Self::BareCareful => {
                command
                    .args(["bare", "--listen", &listen.to_string()])
                    .args(["--server", &server.to_string()])
                    .args((self == Self::BareCareful).then_some("--careful"));
            }
            Self::Nginx | Self::NginxTransparent => {
                fs::write(&file, nginx(setup, self == Self::NginxTransparent))?;
                command.arg("-c").arg(&file).arg("-p").arg(setup.folder);
                command.arg("-e").arg(setup.folder.join("error.log"));
            }
            Self::Envoy => {
                fs::write(&file, envoy(setup).to_string())?;
                command
                    .args(["--config-yaml", &fs::read_to_string(&file)?])
                    .args(["--concurrency", "1", "--disable-hot-restart"])
                    .args(["--log-level", "error"]);
            }
            Self::Sozu => {
                let file = file.with_extension("toml");
                fs::write(&file, sozu(setup))?;
                command.arg("start").arg("-c").arg(&file);
            }
            Self::Udppp => {
                // One thread for each core that it may run on, which is one.
                command.args(["-m", "1", "-s", "-p", "-b", &listen.ip().to_string()]);
                command.args(["-l", &listen.port().to_string()]);
                command.args(["-h", &server.ip().to_string()]);
                command.args(["-r", &server.port().to_string()]);
            }
            Self::Dnsdist => {
                fs::write(&file, dnsdist(setup))?;
                command.arg("-C").arg(&file);
                command.args(["--supervised", "--disable-syslog"]);
            }
        }
        Ok(())
    }
}

/// `peers.sh` says why it could not install something.
fn why_missing(peers: &Path, program: &Path) -> String {
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    fs::read_to_string(peers.join(format!("{name}.missing")))
        .map(|reason| format!("could not be installed: {}", reason.trim()))
        .unwrap_or_else(|_| format!("there is no {}", program.display()))
}

fn nginx(setup: &Setup<'_>, transparent: bool) -> String {
    let bind = if transparent {
        "proxy_bind $remote_addr transparent;"
    } else {
        ""
    };
    let responses = if setup.one_reply {
        "proxy_responses 1;"
    } else {
        ""
    };
    format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off;
user root;
pid nginx.pid;
worker_processes 1;
worker_rlimit_nofile 20000;
events {{ worker_connections 40000; multi_accept on; }}
stream {{
    access_log off;
    server {{
        listen {} udp rcvbuf=4m;
        proxy_pass {};
        proxy_timeout 60s;
        {responses}
        {bind}
    }}
}}
",
        setup.listen, setup.server
    )
}

fn envoy(setup: &Setup<'_>) -> serde_json::Value {
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

fn sozu(setup: &Setup<'_>) -> String {
    format!(
        "command_socket = \"{folder}/sozu.sock\"
saved_state = \"{folder}/state.json\"
log_level = \"error\"
log_target = \"file://{folder}/sozu.log\"
max_connections = 9000
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
        listen = setup.listen,
        server = setup.server,
        responses = u8::from(setup.one_reply),
    )
}

fn dnsdist(setup: &Setup<'_>) -> String {
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
