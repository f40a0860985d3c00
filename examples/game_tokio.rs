//! A game server that pushes to its clients: a client that sends `join` gets the state
//! of the world twenty times a second until it sends `leave` or is silent for too long.
//! Any other datagram moves the player.
//!
//!     cargo run -p ppv2-examples --bin game_tokio -- --listen 127.0.0.1:9001 --trusted 127.0.0.0/8
#![expect(clippy::print_stderr, reason = "a program for people to look at")]

use std::collections::HashMap;
use std::error::Error;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use std::{env, process};

use ppv2_sdk::{Trust, tokio::UdpSocket};
use tokio::time::{MissedTickBehavior, interval};

/// Between two states of the world.
const TICK: Duration = Duration::from_millis(50);

/// A client that is silent for so long is gone. It must be shorter than the SDK
/// remembers a client, 120 seconds.
const SILENCE: Duration = Duration::from_secs(30);

/// One sender can pretend to be many clients, and each costs datagrams and memory.
const MOST_PLAYERS: usize = 1000;

struct Player {
    moves: u64,
    heard: Instant,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    if let Err(error) = serve().await {
        eprintln!("game_tokio: {error}");
        process::exit(1);
    }
}

async fn serve() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let ["--listen", listen, "--trusted", trusted @ ..] = args.as_slice() else {
        return Err("usage: game_tokio --listen ADDR --trusted NET [NET ...]".into());
    };

    let socket = UdpSocket::bind(*listen, Trust::networks(trusted).build()?).await?;
    eprintln!("ready on {}", socket.local_addr()?);
    let mut players = HashMap::new();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut buffer = [0; 1500];
    loop {
        tokio::select! {
            received = socket.recv_from(&mut buffer) => {
                let (len, client) = received?;
                take(&mut players, client, &buffer[..len]);
            }
            _ = ticks.tick() => push(&socket, &mut players).await,
        }
    }
}

fn take(players: &mut HashMap<SocketAddr, Player>, client: SocketAddr, message: &[u8]) {
    let heard = Instant::now();
    match message {
        b"leave" => {
            players.remove(&client);
        }
        b"join" if players.len() < MOST_PLAYERS => {
            players.entry(client).or_insert(Player { moves: 0, heard });
        }
        _ => {
            if let Some(player) = players.get_mut(&client) {
                player.moves += 1;
                player.heard = heard;
            }
        }
    }
}

/// Sends the state of the world to all players, with few calls to the kernel. The SDK
/// knows the proxy of each.
async fn push(socket: &UdpSocket, players: &mut HashMap<SocketAddr, Player>) {
    players.retain(|_, player| player.heard.elapsed() < SILENCE);
    let moves: u64 = players.values().map(|player| player.moves).sum();
    let state = format!("{} players, {moves} moves", players.len());
    let all: Vec<_> = players.keys().map(|client| (&state, *client)).collect();
    let mut left = &all[..];
    while !left.is_empty() {
        match socket.send_batch(left).await {
            Ok(sent) => left = &left[sent..],
            Err(error) => {
                eprintln!("nothing sent to {}: {error}", left[0].1);
                left = &left[1..];
            }
        }
    }
}
