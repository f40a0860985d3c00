//! Measures everything in turn, and tells what came of it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::host::{self, Cores, Machine, Priority};
use crate::outcome::{Measured, Outcome, Series};
use crate::output;
use crate::peer::Peer;
use crate::stage::{Ground, Sample, Stage};
use crate::work::{Work, works};
use crate::{micro, picture, report};

#[derive(Args, Clone, Debug)]
pub(crate) struct Run {
    /// Rounds; in each, every proxy has its turn
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Milliseconds of one turn
    #[arg(long, default_value_t = 2_000)]
    time: u64,
    /// Before every ordinary program of this machine: steadier figures where
    /// others work too, who then have to wait
    #[arg(long)]
    real_time: bool,
    /// Two minutes: nginx and the bare loop alone, three short rounds
    #[arg(long)]
    quick: bool,
    /// Work to measure; repeatable [default: all]
    #[arg(long, value_name = "WORK")]
    only: Vec<String>,
    /// The proxy [default: ppv2-proxy beside this program]
    #[arg(long, value_name = "FILE")]
    proxy: Option<PathBuf>,
    /// Where peers.sh put the peers
    #[arg(long, value_name = "FOLDER", default_value = "target/peers")]
    peers: PathBuf,
    /// Where result.json, logs and configurations go
    #[arg(long, value_name = "FOLDER", default_value = "target/bench")]
    out: PathBuf,
    /// Where the picture goes [default: result.svg beside result.json]
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Run) -> Result<()> {
    host::enter_namespace(arguments.real_time)?;
    let machine = Machine::describe()?;
    let (rounds, time) = if arguments.quick {
        (3, 800)
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
    let outcome = Outcome {
        machine,
        rounds,
        priority,
        receive_buffers: "4 MiB for every UDP socket of every program, by a preloaded \
                          socket() that sets SO_RCVBUFFORCE",
        works: measured,
        micro,
    };
    let json = arguments.out.join("result.json");
    fs::write(&json, serde_json::to_string_pretty(&outcome)?)
        .with_context(|| format!("writing {}", json.display()))?;
    let svg = match &arguments.svg {
        Some(svg) => svg.clone(),
        None => arguments.out.join("result.svg"),
    };
    fs::write(&svg, picture::draw(&outcome))
        .with_context(|| format!("writing {}", svg.display()))?;
    output::line(&report::text(&outcome))?;
    output::line(&format!("{} and {} hold it", json.display(), svg.display()))?;
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
    if arguments.quick {
        for work in &mut works {
            work.peers.retain(|peer| {
                peer.is_ours() || matches!(peer, Peer::Bare | Peer::BareCareful | Peer::Nginx)
            });
        }
        works.retain(|work| work.peers.len() > 1);
    }
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
        proxy: fs::canonicalize(&proxy).with_context(|| format!("finding {}", proxy.display()))?,
        peers: absolute(&arguments.peers)?,
        folder,
        real_time: arguments.real_time,
        used: 0,
    })
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
            failure: peer.missing(&ground.proxy, &ground.peers),
        })
        .collect();
    let mut stages: Vec<Option<Stage>> = all.iter().map(|_| None).collect();
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
        None => stage.insert(Stage::set(
            ground,
            peer,
            work.shape,
            work.one_reply,
            work.hosts,
        )?),
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
        "  {} {}: {:.0} replies/s, {:.2} µs/datagram, core {:.0} %, lost {}+{}, wrong {}+{}, \
         {:.1} MB{latency}",
        round + 1,
        peer.name(),
        load.received as f64 / load.seconds,
        sample.cpu / 1_000.0,
        sample.busy * 100.0,
        load.lost_before,
        load.lost,
        load.wrong,
        sample.wrong_headers,
        sample.memory / 1e6,
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
