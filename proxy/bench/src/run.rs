//! Measures everything in turn, and tells what came of it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::host::{self, Cores, Machine, Priority};
use crate::outcome::{Measured, Outcome, Series};
use crate::output;
use crate::peer::{Peer, Programs};
use crate::stage::{Ground, Sample, Stage};
use crate::work::{Work, works};
use crate::{micro, picture, report, target};

#[derive(Args, Clone, Debug)]
pub(crate) struct Run {
    /// Rounds; in each, every proxy has its turn
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Milliseconds of one turn
    #[arg(long, default_value_t = 2_000)]
    time: u64,
    /// Before every ordinary program of this machine: steadier figures where
    /// others work too, who then have to wait
    #[arg(long)]
    real_time: bool,
    /// Two to three minutes: nginx and the bare loop alone, three short rounds
    #[arg(long)]
    quick: bool,
    /// Work to measure; repeatable [default: all]
    #[arg(long, value_name = "WORK")]
    only: Vec<String>,
    /// Proxy to measure, as the tables name it; repeatable [default: all]
    #[arg(long, value_name = "NAME")]
    peer: Vec<String>,
    /// The proxy [default: ppv2-proxy beside this program]
    #[arg(long, value_name = "FILE")]
    proxy: Option<PathBuf>,
    /// Another build of the proxy, to compare with under some works
    #[arg(long, value_name = "FILE")]
    reference: Option<PathBuf>,
    /// Where peers.sh put the peers
    #[arg(long, value_name = "FOLDER", default_value = "target/peers")]
    peers: PathBuf,
    /// Where result.json, result.md, logs and configurations go
    #[arg(long, value_name = "FOLDER", default_value = "target/bench")]
    out: PathBuf,
    /// Where the picture goes [default: result.svg beside result.json]
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Run) -> Result<()> {
    host::enter_namespace()?;
    let machine = Machine::describe()?;
    let (rounds, time) = if arguments.quick {
        (3, 700)
    } else {
        (arguments.rounds.max(1), arguments.time)
    };
    let works = chosen(arguments, time)?;
    let mut ground = ground(arguments)?;
    let priority = Priority::raise(arguments.real_time);
    // Measured before anything else runs, and on the proxy's core.
    host::stay_on(&[ground.cores.proxy])?;
    let micro = micro::run(rounds.max(5) * 2)?;
    host::stay_on(&[ground.cores.around])?;
    let mut measured = Vec::new();
    for work in &works {
        measured.push(measure(&mut ground, work, rounds)?);
    }
    let mut outcome = Outcome {
        machine,
        rounds,
        priority,
        receive_buffers: "4 MiB for every UDP socket of every program, by a preloaded \
                          socket() that sets SO_RCVBUFFORCE, or at most net.core.rmem_max for \
                          those that have given up CAP_NET_ADMIN",
        whole: "that of proxy, server and load generator for each round trip; the kernel works on \
                loopback in the name of the sender, so it is in there",
        works: measured,
        micro,
        targets: Vec::new(),
    };
    outcome.targets = target::verdicts(&outcome);
    let json = arguments.out.join("result.json");
    fs::write(&json, serde_json::to_string_pretty(&outcome)?)
        .with_context(|| format!("writing {}", json.display()))?;
    let markdown = arguments.out.join("result.md");
    fs::write(&markdown, report::markdown(&outcome))
        .with_context(|| format!("writing {}", markdown.display()))?;
    let svg = match &arguments.svg {
        Some(svg) => svg.clone(),
        None => arguments.out.join("result.svg"),
    };
    fs::write(&svg, picture::draw(&outcome))
        .with_context(|| format!("writing {}", svg.display()))?;
    output::line(&report::text(&outcome))?;
    output::line(&format!(
        "{}, {} and {} hold it",
        json.display(),
        markdown.display(),
        svg.display()
    ))?;
    if let Some(count) = wrong(&outcome) {
        bail!("ppv2-proxy delivered {count} datagrams or headers wrongly");
    }
    Ok(())
}

fn chosen(arguments: &Run, time: u64) -> Result<Vec<Work>> {
    let mut works = works(time);
    for name in &arguments.only {
        if !works.iter().any(|work| work.name == name) {
            let known: Vec<_> = works.iter().map(|work| work.name).collect();
            bail!("there is no work `{name}`; there are: {}", known.join(", "));
        }
    }
    works.retain(|work| {
        arguments.only.is_empty() || arguments.only.iter().any(|name| name == work.name)
    });
    for work in &mut works {
        // What is asked for by name is measured in full.
        if arguments.quick && arguments.only.is_empty() {
            let slow = std::mem::take(&mut work.slow);
            work.peers.retain(|peer| !slow.contains(peer));
        }
        if arguments.reference.is_none() {
            work.peers.retain(|peer| *peer != Peer::Reference);
        }
        work.peers.retain(|peer| {
            arguments.peer.is_empty() || arguments.peer.iter().any(|p| p == peer.name())
        });
    }
    works.retain(|work| !work.peers.is_empty());
    Ok(works)
}

fn ground(arguments: &Run) -> Result<Ground> {
    fs::create_dir_all(&arguments.out)
        .with_context(|| format!("making {}", arguments.out.display()))?;
    let folder = fs::canonicalize(&arguments.out)?;
    let proxy = match &arguments.proxy {
        Some(proxy) => proxy.clone(),
        None => std::env::current_exe()?.with_file_name("ppv2-proxy"),
    };
    Ok(Ground {
        cores: Cores::find()?,
        preload: host::preload(&folder)?,
        programs: Programs {
            proxy: existing(&proxy)?,
            reference: arguments.reference.as_deref().map(existing).transpose()?,
            peers: absolute(&arguments.peers)?,
        },
        folder,
        real_time: arguments.real_time,
        descriptors: host::allow_descriptors(),
        used: 0,
    })
}

fn existing(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).with_context(|| format!("finding {}", path.display()))
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("finding {}", path.display()))
}

fn measure(ground: &mut Ground, work: &Work, rounds: usize) -> Result<Measured> {
    output::progress(&format!("{}: {}", work.name, work.title));
    let mut all: Vec<_> = work
        .peers
        .iter()
        .map(|&peer| Series {
            peer,
            samples: Vec::new(),
            failure: peer.missing(&ground.programs),
        })
        .collect();
    let mut stages: Vec<Option<Stage>> = all.iter().map(|_| None).collect();
    let rounds = if work.counted { 1 } else { rounds };
    for round in 0..rounds {
        for turn in 0..all.len() {
            // Another one begins each round.
            let number = (turn + round) % all.len();
            let series = &mut all[number];
            if series.failure.is_some() {
                continue;
            }
            match take_turn(ground, work, series.peer, &mut stages[number]) {
                Ok(sample) => {
                    output::progress(&told(round, series.peer, &sample));
                    series.samples.push(sample);
                }
                Err(error) if series.peer == Peer::Ours => return Err(error),
                Err(error) => series.failure = Some(format!("{error:#}")),
            }
            if let Some(failure) = &series.failure {
                output::progress(&format!("  {}: {failure}", series.peer.name()));
            }
            if work.own_process {
                stages[number] = None;
            }
        }
    }
    Ok(Measured {
        name: work.name,
        title: work.title,
        figures: work.figures(),
        peers: all,
    })
}

fn take_turn(
    ground: &mut Ground,
    work: &Work,
    peer: Peer,
    stage: &mut Option<Stage>,
) -> Result<Sample> {
    let stage = match stage {
        Some(stage) => stage,
        None => stage.insert(Stage::set(ground, peer, work.terms)?),
    };
    if work.search {
        stage.search(ground, &work.load)
    } else {
        stage.measure(ground, &work.load)
    }
}

/// A line of progress, which is no part of the report.
fn told(round: usize, peer: Peer, sample: &Sample) -> String {
    let load = &sample.load;
    let latency = load.latency.map_or(String::new(), |latency| {
        format!(
            ", p50 {:.0} p99 {:.0} p99.9 {:.0} µs (generator late {:.0})",
            latency.p50, latency.p99, latency.p999, latency.lag_p99
        )
    });
    format!(
        "  {} {}: {:.0} replies/s, {:.2} µs/datagram, {:.2} µs/round trip of all, core {:.0} %, \
         lost {}+{}, wrong {}+{}+{}, {:.1} MB, {:.0}+{:.0} B/session, {} descriptors{latency}",
        round + 1,
        peer.name(),
        load.received as f64 / load.seconds,
        sample.cpu / 1_000.0,
        sample.whole / 1_000.0,
        sample.busy * 100.0,
        load.lost_before,
        load.lost,
        load.wrong,
        load.reordered,
        sample.wrong_headers,
        sample.memory / 1e6,
        sample.session_memory,
        sample.kernel_memory.unwrap_or(0.0),
        sample.descriptors,
    )
}

fn wrong(outcome: &Outcome) -> Option<u64> {
    let count = outcome
        .works
        .iter()
        .flat_map(|work| &work.peers)
        .filter(|series| series.peer.is_ours())
        .map(Series::wrong)
        .sum();
    (count > 0).then_some(count)
}
