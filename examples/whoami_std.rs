//! Answers every client with its own address and port as text.
//!
//!     cargo run -p ppv2-examples --bin whoami_std -- --listen 127.0.0.1:9001 --trusted 127.0.0.0/8
#![expect(clippy::print_stderr, reason = "a program for people to look at")]

use std::error::Error;
use std::{env, process};

use ppv2_sdk::{Trust, UdpSocket};

fn main() {
    if let Err(error) = serve() {
        eprintln!("whoami_std: {error}");
        process::exit(1);
    }
}

fn serve() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let ["--listen", listen, "--trusted", trusted @ ..] = args.as_slice() else {
        return Err("usage: whoami_std --listen ADDR --trusted NET [NET ...]".into());
    };

    let socket = UdpSocket::bind(*listen, Trust::networks(trusted).build()?)?;
    eprintln!("ready on {}", socket.local_addr()?);
    loop {
        let datagram = socket.recv_datagram()?;
        let client = datagram.client;
        // One client that can't be answered is no reason to leave the others.
        if let Err(error) = socket.reply(&datagram, client.to_string().as_bytes()) {
            eprintln!("no reply to {client}: {error}");
        }
    }
}
