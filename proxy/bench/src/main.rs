//! Measures ppv2-proxy side by side with what users would pick instead: `run`
//! measures everything in turn, `micro` the parts alone; `load`, `echo` and `bare` are the programs
//! that it does so with.

mod balance;
mod bare;
mod echo;
mod host;
mod hosts;
mod kernel_memory;
mod load;
mod measure;
mod micro;
mod outcome;
mod output;
mod peer;
mod picture;
mod preload;
mod process;
mod report;
mod run;
mod stage;
mod tag;
mod target;
mod unprivileged;
mod upgrade;
mod wire;
mod work;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(version, about, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure ppv2-proxy and its peers in turn, and print the ratios
    Run(run::Run),
    /// Measure the codec, the session table and the balancers alone
    Micro(micro::Arguments),
    /// Have one proxy process take over from another under load, again and again, and fail if a
    /// datagram is lost or a session moves
    Upgrade(upgrade::Upgrade),
    /// Measure what the preload library costs a server that nobody changes
    Preload(preload::Preload),
    /// Be the clients, and check every reply
    Load(load::Load),
    /// Be the server
    Echo(echo::Echo),
    /// Be the least that a proxy with a header can be
    Bare(bare::Bare),
}

fn main() -> ExitCode {
    match execute(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::progress(&format!("ppv2-bench: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> Result<()> {
    match command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Micro(arguments) => micro::print(&arguments),
        Command::Upgrade(upgrade) => upgrade::run(&upgrade),
        Command::Preload(preload) => preload::run(&preload),
        Command::Load(load) => load::run(&load),
        Command::Echo(echo) => echo::run(&echo),
        Command::Bare(bare) => bare::run(&bare),
    }
}
