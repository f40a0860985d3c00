//! `/clients`: the busiest clients of about the last minute, of all workers together.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use super::Admin;
use ppv2_engine::busiest::{Client, Counted, Counts, Measure, Report};
use ppv2_engine::client_limits::Network;
use ppv2_engine::worker::Command;

/// The most clients in an answer, and the number unless the request names one.
const MAX_TOP: usize = 500;
const DEFAULT_TOP: usize = 20;

#[derive(Deserialize)]
pub(super) struct Wanted {
    top: Option<usize>,
    by: Option<String>,
}

#[derive(Serialize)]
struct Busiest {
    window_seconds: f64,
    by: &'static str,
    clients: Vec<Entry>,
    /// How much more each figure can be in truth, for clients that are not shown, too.
    error: Figures,
}

#[derive(Serialize)]
struct Entry {
    /// An IPv4 address or an IPv6 network.
    address: String,
    /// That of its latest datagram; null once a reload has removed it.
    listener: Option<String>,
    #[serde(flatten)]
    figures: Figures,
}

/// What was counted, by [`Measure`].
#[derive(Clone, Copy, Default, Serialize)]
struct Figures {
    datagrams: u64,
    bytes: u64,
    new_sessions: u64,
    drops: u64,
}

impl Figures {
    fn of(figure: impl Fn(Measure) -> u64) -> Self {
        Self {
            datagrams: figure(Measure::Datagrams),
            bytes: figure(Measure::Bytes),
            new_sessions: figure(Measure::Sessions),
            drops: figure(Measure::Drops),
        }
    }
}

/// Its name in `by`.
fn name(measure: Measure) -> &'static str {
    match measure {
        Measure::Datagrams => "datagrams",
        Measure::Bytes => "bytes",
        Measure::Sessions => "sessions",
        Measure::Drops => "drops",
    }
}

pub(super) async fn clients(
    State(admin): State<Arc<Admin>>,
    Query(wanted): Query<Wanted>,
) -> Response {
    let by = wanted.by.as_deref().unwrap_or("datagrams");
    let Some(by) = Measure::ALL.into_iter().find(|one| name(*one) == by) else {
        let message = "by: expected datagrams, bytes, sessions or drops\n";
        return (StatusCode::BAD_REQUEST, message).into_response();
    };
    let top = wanted.top.unwrap_or(DEFAULT_TOP).min(MAX_TOP);
    let asked = admin
        .workers
        .iter()
        .map(|worker| worker.ask_by(|reply| Command::Busiest { reply }));
    let mut reports = Vec::new();
    for (worker, answer) in join_all(asked).await.into_iter().enumerate() {
        let Ok(report) = answer else {
            let message = format!("worker {worker} does not answer\n");
            return (StatusCode::SERVICE_UNAVAILABLE, message).into_response();
        };
        reports.push(report);
    }
    let counted = admin.metrics.counted();
    let name_of = move |id: u64| {
        let mut listeners = counted.listeners.iter();
        let listener = listeners.find(|listener| listener.id() == id);
        listener.map(|listener| listener.name.clone())
    };
    // Many workers have tens of thousands of clients together.
    match spawn_blocking(move || busiest(&reports, by, top, name_of)).await {
        Ok(busiest) => Json(busiest).into_response(),
        // The process is ending.
        Err(_) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

fn busiest(
    reports: &[Report],
    by: Measure,
    top: usize,
    name_of: impl Fn(u64) -> Option<String>,
) -> Busiest {
    let sums = Measure::ALL.map(|measure| {
        let reports = reports.iter();
        Counts::sum(reports.flat_map(|report| &report.by[measure as usize]))
    });
    let mut ranked = sums[by as usize].clients.clone();
    ranked.retain(|counted| counted.at_least > 0);
    ranked.sort_by_key(|counted| (Reverse(counted.at_least), counted.client.network.address()));
    ranked.truncate(top);
    let figures: [HashMap<Network, u64>; Measure::ALL.len()] = sums.each_ref().map(|sum| {
        let counted = |one: &Counted| (one.client.network, one.at_least);
        sum.clients.iter().map(counted).collect()
    });
    let entry = |counted: &Counted| {
        let figure = |measure: Measure| {
            let network = &counted.client.network;
            let figure = figures[measure as usize].get(network);
            figure.copied().unwrap_or(0)
        };
        Entry {
            address: shown(&counted.client),
            listener: name_of(counted.client.listener),
            figures: Figures::of(figure),
        }
    };
    let windows = reports.iter().map(|report| report.window);
    Busiest {
        window_seconds: windows.max().unwrap_or(Duration::ZERO).as_secs_f64(),
        by: name(by),
        clients: ranked.iter().map(entry).collect(),
        error: Figures::of(|measure| sums[measure as usize].floor),
    }
}

fn shown(client: &Client) -> String {
    let address = client.network.address();
    if address.is_ipv4() || client.ipv6_prefix >= 128 {
        address.to_string()
    } else {
        format!("{address}/{}", client.ipv6_prefix)
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    const NAMES: [&str; 2] = ["dns", "game"];

    fn counted(address: &str, at_least: u64) -> Counted {
        let ip: IpAddr = address.parse().unwrap();
        Counted {
            client: Client {
                network: Network::of(ip, 64),
                ipv6_prefix: 64,
                listener: u64::from(ip.is_ipv6()),
            },
            at_least,
            uncertain: 0,
        }
    }

    fn report(window: u64, datagrams: &[(&str, u64)], drops: &[(&str, u64)]) -> Report {
        let counts = |of: &[(&str, u64)], floor| {
            let clients = of.iter().map(|(address, count)| counted(address, *count));
            vec![Counts {
                clients: clients.collect(),
                floor,
            }]
        };
        Report {
            window: Duration::from_secs(window),
            by: [
                counts(datagrams, 3),
                Vec::new(),
                Vec::new(),
                counts(drops, 0),
            ],
        }
    }

    #[test]
    fn clients_of_all_workers_are_ranked_by_their_sums() {
        let reports = [
            report(
                31,
                &[("192.0.2.1", 10), ("2001:db8::1", 7)],
                &[("192.0.2.9", 4)],
            ),
            report(
                32,
                &[("192.0.2.2", 9), ("2001:db8::2", 7)],
                &[("192.0.2.1", 2)],
            ),
        ];
        let name_of = |id| Some(NAMES[usize::try_from(id).unwrap()].to_owned());
        let by = |measure, top| {
            let busiest = busiest(&reports, measure, top, name_of);
            serde_json::to_value(busiest).unwrap()
        };
        assert_eq!(
            by(Measure::Datagrams, 2),
            serde_json::json!({
                "window_seconds": 32.0,
                "by": "datagrams",
                "clients": [
                    {
                        "address": "2001:db8::/64", "listener": "game",
                        "datagrams": 14, "bytes": 0, "new_sessions": 0, "drops": 0,
                    },
                    {
                        "address": "192.0.2.1", "listener": "dns",
                        "datagrams": 10, "bytes": 0, "new_sessions": 0, "drops": 2,
                    },
                ],
                "error": { "datagrams": 6, "bytes": 0, "new_sessions": 0, "drops": 0 },
            })
        );
        let drops = by(Measure::Drops, 9);
        let addresses: Vec<_> = drops["clients"].as_array().unwrap().iter().collect();
        assert_eq!(addresses.len(), 2);
        assert_eq!(addresses[0]["address"], "192.0.2.9");
    }
}
