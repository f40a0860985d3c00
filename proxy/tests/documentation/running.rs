//! A proxy to ask what it shows.

use std::net::{SocketAddr, UdpSocket};

use ppv2_lab::{Process, address, http_get, proxy_with, socket};

/// A proxy with every kind of thing that metrics and the admin API show.
pub struct Running {
    _process: Process,
    pub admin: SocketAddr,
    pub listener: SocketAddr,
    pub server: UdpSocket,
}

impl Running {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = socket("127.0.0.1");
        let [admin, listener, other] = [(); 3].map(|()| address("127.0.0.1"));
        let config = format!(
            "[admin]\nlisten = \"{admin}\"\n\
             [[listener]]\nname = \"dns\"\nbind = [\"{listener}\"]\nupstream = \"resolvers\"\n\
             [upstream.resolvers]\nservers = [\"{}\"]\nhealth = {{ every = \"1h\" }}\n\
             [[listener]]\nname = \"other\"\nbind = [\"{other}\"]\nupstream = \"names\"\n\
             [upstream.names]\nservers = [\"dns:localhost:9\"]\n",
            server.local_addr().unwrap(),
        );
        Self {
            _process: proxy_with(&folder, &config),
            admin,
            listener,
            server,
        }
    }
}

/// All metrics, in the classic text format.
pub fn metrics() -> String {
    http_get(Running::start().admin, "/metrics").1
}
