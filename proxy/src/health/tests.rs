//! Servers as a whole configuration has them.

use std::collections::HashSet;

use super::*;
use crate::config::Config;
use crate::metrics::Counted;
use crate::roster::Roster;
use crate::session::Budget;
use crate::upstream::State;

fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new(Counted::default(), Budget::new(1, 1)))
}

#[test]
fn servers_of_one_name_are_told_apart_and_drained_together() {
    let text = "[[listener]]\nbind = [\"127.0.0.1:5300\"]\nupstream = \"u\"\n\
                [upstream.u]\nservers = [\"192.0.2.1:53\", \"192.0.2.2:53\", \"192.0.2.3:53\"]\n";
    let mut config = Config::from_toml("test.toml", text).unwrap();
    for server in &mut config.servers[1..] {
        server.name = "srv.lan:53".to_owned();
    }
    // It stands before the one that the name leads to now.
    config.servers[1].leaving = true;
    let roll = Roster::default().enroll(config);
    let board = Arc::new(Board::default());
    board.follow(&roll, Instant::now());
    let text = metrics().text([Box::new(Arc::clone(&board)) as _]).unwrap();
    let series: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("ppv2_upstream_up{"))
        .collect();
    assert_eq!(series.len(), 3);
    assert_eq!(series.iter().collect::<HashSet<_>>().len(), 3, "{text}");
    let leaving = "ppv2_upstream_up{upstream=\"u\",server=\"srv.lan:53 (192.0.2.2:53)\"} 1";
    assert!(series.contains(&leaving), "{text}");

    let states = || -> Vec<_> {
        let standings = board.standings(&roll, Instant::now());
        standings.iter().map(|standing| standing.state).collect()
    };
    assert!(board.drain("u", "srv.lan:53", true));
    assert_eq!(states(), [State::Up, State::Draining, State::Draining]);
    assert!(board.drain("u", "192.0.2.3:53", false));
    assert_eq!(states(), [State::Up, State::Draining, State::Up]);
    assert!(!board.drain("u", "192.0.2.4:53", true));
}
