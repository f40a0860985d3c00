//! The codec and the session table alone: nanoseconds of 28 bytes read or
//! written, beside the crates that one could use instead, and of a lookup
//! beside a plain hash map. In turn, so that the ratios survive a busy machine.

use std::collections::HashMap;
use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use ppv2_engine::address::{ClientAddr, ListenerAddr, ServerAddr};
use ppv2_engine::capacity::Capacity;
use ppv2_engine::listener::{Listener, ListenerSettings, Rules};
use ppv2_engine::server::Server;
use ppv2_engine::session::{AfterEnd, Amount, Key, Table};

use crate::measure::{Ratio, Spread, time};
use crate::{balance, output, report};

/// Sessions in the table.
const SESSIONS: u16 = 10_000;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Rounds of which the median is taken
    #[arg(long, default_value_t = 11)]
    rounds: usize,
}

pub(crate) fn print(arguments: &Arguments) -> Result<()> {
    for micro in run(arguments.rounds)? {
        output::line(&report::micro_row(&micro))?;
    }
    for figure in balance::run(arguments.rounds)? {
        output::line(&report::figure_row(&figure))?;
    }
    Ok(())
}

pub(crate) fn run(rounds: usize) -> Result<Vec<Ratio>> {
    let client: SocketAddr = "203.0.113.11:54321".parse()?;
    let listener: SocketAddr = "198.51.100.10:9000".parse()?;
    let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
    let header = ppv2::encode_udp(client, listener, &mut buffer)?.to_vec();

    let decode = || {
        let (header, payload) = ppv2::decode(black_box(&header)).ok()?;
        Some((header.client()?, payload.len()))
    };
    let decode_ppp = || {
        let header = ppp::v2::Header::try_from(black_box(header.as_slice())).ok()?;
        let ppp::v2::Addresses::IPv4(addresses) = header.addresses else {
            return None;
        };
        let client = SocketAddr::from((addresses.source_address, addresses.source_port));
        Some((client, header.len()))
    };
    let decode_proxy_header = || {
        let config = proxy_header::ParseConfig {
            include_tlvs: false,
            allow_v1: false,
            allow_v2: true,
        };
        let (header, len) = proxy_header::ProxyHeader::parse(black_box(&header), config).ok()?;
        Some((header.proxied_address()?.source, len))
    };
    let encode = || {
        let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
        let written = ppv2::encode_udp(black_box(client), black_box(listener), &mut buffer);
        let len = written.ok()?.len();
        Some((buffer, len))
    };
    let encode_ppp = || {
        ppp::v2::Builder::with_addresses(
            ppp::v2::Version::Two | ppp::v2::Command::Proxy,
            ppp::v2::Protocol::Datagram,
            (black_box(client), black_box(listener)),
        )
        .build()
        .ok()
    };
    let encode_proxy_header = || {
        let address =
            proxy_header::ProxiedAddress::datagram(black_box(client), black_box(listener));
        let mut written = Vec::with_capacity(ppv2::IPV4_HEADER_LEN);
        proxy_header::ProxyHeader::with_address(address)
            .encode_v2(&mut written)
            .ok()?;
        Some(written)
    };

    let now = Instant::now();
    let keys: Vec<_> = (0..SESSIONS).map(key).collect();
    let mut table = sessions(now, &keys)?;
    let map: HashMap<Key, u16> = keys.iter().copied().zip(0..).collect();
    let (mut i, mut j) = (0, 0);
    let find = || {
        // A prime step: neighbours in the table don't follow each other.
        i = (i + 7_919) % keys.len();
        table.request(now, black_box(&keys[i]), ONE)
    };
    let find_in_map = || {
        j = (j + 7_919) % keys.len();
        map.get(black_box(&keys[j])).copied()
    };

    Ok(vec![
        compare(
            "codec: decode",
            "ppp parse",
            Some(1.0),
            rounds,
            decode,
            decode_ppp,
        )?,
        compare(
            "codec: encode",
            "ppp build",
            Some(0.5),
            rounds,
            encode,
            encode_ppp,
        )?,
        compare(
            "codec: decode",
            "proxy-header",
            None,
            rounds,
            decode,
            decode_proxy_header,
        )?,
        compare(
            "codec: encode",
            "proxy-header",
            None,
            rounds,
            encode,
            encode_proxy_header,
        )?,
        compare(
            "session: find",
            "std HashMap",
            None,
            rounds,
            find,
            find_in_map,
        )?,
    ])
}

fn key(number: u16) -> Key {
    Key::direct(
        ClientAddr((Ipv4Addr::new(127, 1, 0, 1), number).into()),
        ListenerAddr((Ipv4Addr::LOCALHOST, 9_000).into()),
    )
}

const ONE: Amount = Amount {
    datagrams: 1,
    bytes: 64,
};

fn sessions(now: Instant, keys: &[Key]) -> Result<Table<()>> {
    let rules = Rules {
        idle_timeout: Duration::from_secs(30),
        responses: 0,
        requests: 0,
        amplification: None,
    };
    let settings = ListenerSettings::new(Listener::new("listener", 1), rules);
    let settings = Arc::new(settings);
    let address = ServerAddr((Ipv4Addr::LOCALHOST, 9_001).into());
    let server = Server::new("upstream", "server", address, 1);
    let capacity = Capacity::new(keys.len(), keys.len());
    let mut table = Table::new(now, 0, &capacity, |()| AfterEnd::RestForReuse);
    for key in keys {
        let permit = capacity.take().context("a permit for each session")?;
        table.open(now, *key, &settings, &server, permit, ());
    }
    Ok(table)
}

fn compare<A, B>(
    ours: &'static str,
    other: &'static str,
    at_most: Option<f64>,
    rounds: usize,
    mut one: impl FnMut() -> Option<A>,
    mut two: impl FnMut() -> Option<B>,
) -> Result<Ratio> {
    one().with_context(|| format!("{ours} failed"))?;
    two().with_context(|| format!("{other} failed"))?;
    let ratios = (0..=rounds)
        .map(|_| time(&mut one).as_secs_f64() / time(&mut two).as_secs_f64())
        // The first warms up.
        .skip(1)
        .collect();
    let ratio = Spread::of(ratios).context("no rounds")?;
    Ok(Ratio {
        ours,
        other,
        ratio,
        at_most,
    })
}
