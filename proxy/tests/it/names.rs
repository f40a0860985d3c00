//! Servers that are names: what `check` says about them, and lookups with a DNS server
//! whose answers change, fail and stop.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ppv2_lab::dns_server::{Answers, DnsServer};
use ppv2_lab::*;
use ppv2_proxy::config::{Answer, Config, Expanded};
use ppv2_proxy::discovery::{Names, resolve_once};
use prometheus_client::registry::Registry;

/// A configuration whose upstream has these servers, which `resolver` is asked for.
fn config(resolver: &DnsServer, servers: &str) -> String {
    format!(
        "[[listener]]\nname = \"a\"\nbind = [\"127.0.0.1:5353\"]\nupstream = \"u\"\n\
         [upstream.u]\nservers = [{servers}]\n{}",
        resolver.table()
    )
}

/// What `check` prints of a configuration, which must be valid.
#[track_caller]
fn check(content: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder, "proxy.toml", content);
    let (code, stdout, stderr) = output(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "{stdout}");
    stdout
}

#[track_caller]
fn has_lines(text: &str, lines: &[&str]) {
    for line in lines {
        assert!(text.lines().any(|l| l == *line), "no `{line}` in\n{text}");
    }
}

#[test]
fn check_shows_the_servers_behind_names() {
    let resolver = DnsServer::start();
    resolver.set(
        "web.ppv2.test",
        1,
        &["192.0.2.2", "192.0.2.1", "2001:db8::1"],
    );
    resolver.set("alias.ppv2.test", 1, &["web.ppv2.test"]);
    let records = [
        "1 500 53 web.ppv2.test.",
        "2 0 54 b.ppv2.test.",
        "1 5 55 lost.ppv2.test.",
    ];
    resolver.set("_dns._udp.ppv2.test", 1, &records);
    resolver.set("b.ppv2.test", 1, &["192.0.2.9"]);
    let text = check(&config(
        &resolver,
        "\"192.0.2.1:53\", { address = \"dns:Alias.ppv2.test:53\", weight = 3 }, \
         \"srv:_dns._udp.ppv2.test\", \"dns:never.ppv2.test:53\"",
    ));
    has_lines(
        &text,
        &[
            "  -> u 192.0.2.1:53 ppv2",
            "  -> u 192.0.2.2:53 (dns:alias.ppv2.test:53) ppv2, weight 3",
            "  -> u [2001:db8::1]:53 (dns:alias.ppv2.test:53) ppv2, weight 3",
            "  -> u 192.0.2.9:54 (srv:_dns._udp.ppv2.test) ppv2, backup",
            "warning: upstream `u`: `dns:never.ppv2.test:53` does not resolve: there is no such name; `run` goes on asking",
            "warning: upstream `u`: `srv:_dns._udp.ppv2.test` resolves only in part: lost.ppv2.test.: there is no such name; `run` goes on asking",
        ],
    );
    assert_eq!(text.matches("  -> ").count(), 4, "{text}");
}

#[test]
fn check_says_why_a_name_does_not_resolve() {
    let resolver = DnsServer::start();
    resolver.set("empty.ppv2.test", 1, &[]);
    resolver.set("own.ppv2.test", 1, &["127.0.0.1", "192.0.2.1"]);
    resolver.set("_none._udp.ppv2.test", 1, &["0 0 0 ."]);
    resolver.set("loop.ppv2.test", 1, &["pool.ppv2.test"]);
    resolver.set("pool.ppv2.test", 1, &["loop.ppv2.test"]);
    let text = check(&config(
        &resolver,
        "\"dns:empty.ppv2.test:53\", \"dns:own.ppv2.test:5353\", \"srv:_none._udp.ppv2.test\", \
         \"srv:_lost._udp.ppv2.test\", \"dns:loop.ppv2.test:53\", \"dns:x.invalid:53\"",
    ));
    has_lines(
        &text,
        &[
            "  -> u 192.0.2.1:5353 (dns:own.ppv2.test:5353) ppv2",
            "warning: upstream `u`: `dns:empty.ppv2.test:53` does not resolve: it has no addresses; `run` goes on asking",
            "warning: upstream `u`: `srv:_none._udp.ppv2.test` does not resolve: its SRV records say that there is no such service; `run` goes on asking",
            "warning: upstream `u`: `srv:_lost._udp.ppv2.test` does not resolve: there is no such name; `run` goes on asking",
            "warning: upstream `u`: `dns:own.ppv2.test:5353` resolves to 127.0.0.1:5353, not used: listener `a` is there, at 127.0.0.1:5353: datagrams would loop",
            "warning: upstream `u`: `dns:x.invalid:53` does not resolve: there is no such name; `run` goes on asking",
        ],
    );
    assert!(
        text.contains("`dns:loop.ppv2.test:53` does not resolve: "),
        "{text}"
    );
    for (answers, why) in [
        (Answers::ServFail, "DNS server: Server Failure"),
        (Answers::NxDomain, "there is no such name"),
        (Answers::Silence, "no answer within 1s"),
    ] {
        resolver.answer(answers);
        let text = check(&config(&resolver, "\"dns:own.ppv2.test:53\""));
        let line = format!("`dns:own.ppv2.test:53` does not resolve: {why}; `run` goes on asking");
        assert!(text.contains(&line), "no `{line}` in\n{text}");
    }
}

#[test]
fn an_answer_too_long_for_a_datagram_is_read_whole_and_used_in_part() {
    let resolver = DnsServer::start();
    let many: Vec<_> = (0..300)
        .map(|n| format!("10.0.{}.{}", n / 250, n % 250))
        .collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    resolver.set("many.ppv2.test", 1, &many);
    let text = check(&config(&resolver, "\"dns:many.ppv2.test:53\""));
    assert_eq!(text.matches("  -> ").count(), 256, "{text}");
    assert!(
        text.contains("resolves to 10.0.1.6:53 and 43 more, not used: no more than 256"),
        "{text}"
    );
}

#[test]
fn a_closed_port_of_the_dns_server_is_reported() {
    let resolver = DnsServer::start();
    let dead = address("127.0.0.1").to_string();
    let content = config(&resolver, "\"dns:a.ppv2.test:53\"");
    let content = content.replace(&resolver.address().to_string(), &dead);
    let text = check(&content);
    assert!(
        text.contains("`dns:a.ppv2.test:53` does not resolve: "),
        "{text}"
    );
}

#[test]
fn malformed_answers_are_ignored() {
    let server = bind(address("127.0.0.1"));
    let resolver = DnsServer::start();
    let content = config(
        &resolver,
        "\"dns:a.ppv2.test:53\", \"srv:_a._udp.ppv2.test\"",
    );
    let content = content.replace(
        &resolver.address().to_string(),
        &server.local_addr().unwrap().to_string(),
    );
    std::thread::spawn(move || {
        let mut question = [0; 4096];
        for turn in 0.. {
            let Ok((len, from)) = server.recv_from(&mut question) else {
                return;
            };
            // As an answer: cut short, with another id, with counts that lie, or
            // with a name that points to itself.
            let mut answer = question[..len].to_vec();
            answer[2] |= 0x80;
            match turn % 4 {
                0 => answer.truncate(7),
                1 => answer[0] ^= 0xff,
                2 => answer[6..12].fill(0xff),
                _ => {
                    answer[7] = 1;
                    answer.extend([0xc0, u8::try_from(len).unwrap(), 0, 1, 0, 1]);
                }
            }
            let _ = server.send_to(&answer, from);
        }
    });
    let text = check(&content);
    assert_eq!(text.matches(" does not resolve: ").count(), 2, "{text}");
}

#[test]
fn without_names_nothing_is_looked_up() {
    let config = Config::from_toml("x", "[[listener]]\nbind = [\"127.0.0.1:1\"]\nupstream = \"u\"\n[upstream.u]\nservers = [\"192.0.2.1:53\"]\n").unwrap();
    let resolved = resolve_once(&config);
    assert!(resolved.answers.is_empty() && resolved.failures.is_empty());
}

/// Within a runtime of its own.
fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let whole = tokio::time::timeout(3 * TIMEOUT, test);
        whole.await.unwrap();
    });
}

fn servers(config: &Config, names: &Names) -> Vec<String> {
    let Expanded { config, .. } = config.expand(&names.running.status.answers());
    let servers = config.servers.into_iter();
    servers.map(|server| server.name).collect()
}

/// Waits until the names lead to these servers.
async fn lead_to(config: &Config, names: &Names, expected: &[&str]) {
    while servers(config, names) != expected {
        let changed = tokio::time::timeout(TIMEOUT, names.running.status.changed()).await;
        let now = servers(config, names);
        assert!(changed.is_ok(), "{now:?} rather than {expected:?}");
    }
}

fn metric(names: &Names, name: &str) -> u64 {
    let mut registry = Registry::with_prefix("ppv2");
    registry.register_collector(Box::new(Arc::clone(&names.running.status)));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value
        .unwrap_or_else(|| panic!("no {name} in\n{text}"))
        .parse()
        .unwrap()
}

#[test]
fn changed_answers_are_used_and_the_last_one_is_kept_over_failures() {
    let resolver = DnsServer::start();
    resolver.set("a.ppv2.test", 0, &["192.0.2.1"]);
    let text = config(
        &resolver,
        "\"dns:a.ppv2.test:53\", \"dns:late.ppv2.test:53\"",
    );
    let config = Config::from_toml("x", &text).unwrap();
    run(async {
        let names = Names::start(&config, TIMEOUT).await;
        assert_eq!(servers(&config, &names), ["192.0.2.1:53"]);
        let failing = |name| metric(&names, &format!("ppv2_name_failing{{name=\"{name}\"}}"));
        assert_eq!(failing("dns:a.ppv2.test:53"), 0);
        assert_eq!(failing("dns:late.ppv2.test:53"), 1);
        resolver.set("late.ppv2.test", 0, &["2001:db8::1"]);
        lead_to(&config, &names, &["192.0.2.1:53", "[2001:db8::1]:53"]).await;
        resolver.set("a.ppv2.test", 0, &["192.0.2.2", "192.0.2.3"]);
        let moved = ["192.0.2.2:53", "192.0.2.3:53", "[2001:db8::1]:53"];
        lead_to(&config, &names, &moved).await;
        for answers in [Answers::ServFail, Answers::NxDomain, Answers::Silence] {
            resolver.answer(answers);
            let was = metric(
                &names,
                "ppv2_name_changes_total{name=\"dns:a.ppv2.test:53\"}",
            );
            let deadline = Instant::now() + TIMEOUT;
            while failing("dns:a.ppv2.test:53") == 0 {
                assert!(Instant::now() < deadline);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            assert_eq!(servers(&config, &names), moved);
            resolver.answer(Answers::Right);
            while failing("dns:a.ppv2.test:53") == 1 {
                assert!(Instant::now() < deadline);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            assert_eq!(servers(&config, &names), moved);
            assert_eq!(
                metric(
                    &names,
                    "ppv2_name_changes_total{name=\"dns:a.ppv2.test:53\"}"
                ),
                was
            );
        }
        resolver.remove("a.ppv2.test");
        let asked = resolver.asked("a.ppv2.test");
        while resolver.asked("a.ppv2.test") < asked + 4 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(servers(&config, &names), moved);
    });
}

#[test]
fn an_unassigned_response_code_is_a_failure() {
    let resolver = DnsServer::start();
    resolver.set("a.ppv2.test", 0, &["192.0.2.1", "2001:db8::1"]);
    let text = config(&resolver, "\"dns:a.ppv2.test:53\"");
    let config = Config::from_toml("x", &text).unwrap();
    run(async {
        let names = Names::start(&config, TIMEOUT).await;
        let both = ["192.0.2.1:53", "[2001:db8::1]:53"];
        assert_eq!(servers(&config, &names), both);
        resolver.answer(Answers::Unassigned);
        // With records of one kind, and without those of the other.
        resolver.set("a.ppv2.test", 0, &["192.0.2.2"]);
        while metric(&names, "ppv2_name_failing{name=\"dns:a.ppv2.test:53\"}") == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(servers(&config, &names), both);
    });
}

#[test]
fn a_name_is_not_looked_up_before_its_ttl_is_over() {
    let resolver = DnsServer::start();
    resolver.set("slow.ppv2.test", 3600, &["192.0.2.1"]);
    resolver.set("quick.ppv2.test", 0, &["192.0.2.2"]);
    let text = config(
        &resolver,
        "\"dns:slow.ppv2.test:53\", \"dns:quick.ppv2.test:53\"",
    );
    let config = Config::from_toml("x", &text).unwrap();
    run(async {
        let begun = Instant::now();
        let names = Names::start(&config, TIMEOUT).await;
        while resolver.asked("quick.ppv2.test") < 10 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Two questions each time; min_ttl is 100 ms.
        let quick = resolver.asked("quick.ppv2.test");
        let lookups = begun.elapsed().as_millis() as usize / 100 + 1;
        assert!(quick <= 2 * lookups, "{quick} questions");
        assert_eq!(resolver.asked("slow.ppv2.test"), 2);
        let kept = names.running.status.answers().into_values().flatten();
        let kept: Vec<Answer> = kept.collect();
        assert_eq!(kept.len(), 2);
    });
}

#[test]
fn many_names_use_few_descriptors() {
    let (resolver, other, third) = (DnsServer::start(), DnsServer::start(), DnsServer::start());
    resolver.answer(Answers::Silence);
    other.answer(Answers::Silence);
    third.answer(Answers::Silence);
    let names: Vec<_> = (0..300)
        .map(|n| format!("\"dns:n{n}.ppv2.test:53\""))
        .collect();
    let content = config(&resolver, &names.join(", "));
    let servers = [&resolver, &other, &third].map(|one| one.address().to_string());
    let content = content.replace(&servers[0], &servers.join("\", \""));
    let config = Config::from_toml("x", &content).unwrap();
    // At most 128; other tests of this process have some of their own.
    let sockets = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    run(async {
        let before = sockets();
        let _names = Names::start(&config, Duration::ZERO).await;
        let mut most = 0;
        for _ in 0..50 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            most = most.max(sockets());
        }
        assert!(
            most < before + 128 + 70,
            "{before} descriptors, then {most}"
        );
    });
}

#[test]
fn a_name_of_many_silent_hosts_delays_no_other_name() {
    let resolver = DnsServer::start();
    let host = |n| format!("h{n}.ppv2.test");
    let records: Vec<_> = (0..64).map(|n| format!("1 1 53 {}.", host(n))).collect();
    let records: Vec<_> = records.iter().map(String::as_str).collect();
    resolver.set("_dns._udp.ppv2.test", 0, &records);
    (0..64).for_each(|n| resolver.hush(&host(n)));
    resolver.set("a.ppv2.test", 0, &["192.0.2.1"]);
    let text = config(
        &resolver,
        "\"srv:_dns._udp.ppv2.test\", \"dns:a.ppv2.test:53\"",
    );
    let config = Config::from_toml("x", &text).unwrap();
    run(async {
        let begun = Instant::now();
        let _names = Names::start(&config, Duration::ZERO).await;
        let hosts = || (0..64).filter(|n| resolver.asked(&host(*n)) > 0).count();
        // Four hosts at a time, each of which is waited for for a second.
        while hosts() <= 8 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let (hosts, turns) = (hosts(), begun.elapsed().as_secs() + 2);
        assert!(hosts as u64 <= 4 * turns, "{hosts} hosts");
        // Of the other name there are 20 questions in each second.
        let asked = resolver.asked("a.ppv2.test");
        assert!(asked > 10, "{asked} questions");
    });
}

#[test]
fn a_reload_looks_up_only_names_that_it_changes() {
    let resolver = DnsServer::start();
    for name in ["a", "b", "c"] {
        resolver.set(&format!("{name}.ppv2.test"), 3600, &["192.0.2.1"]);
    }
    let load = |servers: &str| Config::from_toml("x", &config(&resolver, servers)).unwrap();
    run(async {
        let before = load("\"dns:a.ppv2.test:1\", \"dns:b.ppv2.test:2\"");
        let mut names = Names::start(&before, TIMEOUT).await;
        let next = load("\"dns:b.ppv2.test:2\", \"dns:c.ppv2.test:3\"");
        let candidate = names.running.prepare(&next, TIMEOUT).await;
        names.adopt(&next, candidate);
        assert_eq!(servers(&next, &names), ["192.0.2.1:2", "192.0.2.1:3"]);
        // What was found out beforehand is not asked for again before it is old.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(resolver.asked("b.ppv2.test"), 2);
        assert_eq!(resolver.asked("c.ppv2.test"), 2);
        // Others are to be asked, who say nothing: what was known stays.
        let silent = DnsServer::start();
        silent.answer(Answers::Silence);
        let elsewhere = config(&silent, "\"dns:b.ppv2.test:2\", \"dns:c.ppv2.test:3\"");
        let elsewhere = Config::from_toml("x", &elsewhere).unwrap();
        let candidate = names.running.prepare(&elsewhere, TIMEOUT).await;
        names.adopt(&elsewhere, candidate);
        assert_eq!(servers(&elsewhere, &names), ["192.0.2.1:2", "192.0.2.1:3"]);
        while silent.asked("c.ppv2.test") == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(resolver.asked("c.ppv2.test"), 2);
    });
}

#[test]
fn rejected_configuration_changes_no_name() {
    let (resolver, other) = (DnsServer::start(), DnsServer::start());
    resolver.set("a.ppv2.test", 0, &["192.0.2.1"]);
    other.set("a.ppv2.test", 0, &["192.0.2.66"]);
    other.set("late.ppv2.test", 0, &["192.0.2.67"]);
    let list = "\"dns:a.ppv2.test:53\", \"dns:late.ppv2.test:53\"";
    let load = |resolver| Config::from_toml("x", &config(resolver, list)).unwrap();
    let (before, after) = (load(&resolver), load(&other));
    run(async {
        let mut names = Names::start(&before, TIMEOUT).await;
        let candidate = names.running.prepare(&after, TIMEOUT).await;
        // Those that lead somewhere are asked of others when it holds.
        assert_eq!(other.asked("a.ppv2.test"), 0);
        let found = |answers| {
            let servers = after.expand(&answers).config.servers.into_iter();
            servers.map(|server| server.name).collect::<Vec<_>>()
        };
        let expected = ["192.0.2.1:53", "192.0.2.67:53"];
        assert_eq!(found(candidate.answers.clone()), expected);
        assert_eq!(servers(&before, &names), ["192.0.2.1:53"]);
        drop(candidate);
        let asked = other.asked("late.ppv2.test");
        let of_running = resolver.asked("a.ppv2.test");
        while resolver.asked("a.ppv2.test") < of_running + 4 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(other.asked("late.ppv2.test"), asked);
        assert_eq!(servers(&before, &names), ["192.0.2.1:53"]);

        let candidate = names.running.prepare(&after, TIMEOUT).await;
        let lookups =
            "ppv2_name_lookups_total{name=\"dns:late.ppv2.test:53\",result=\"no_records\"}";
        let counted = metric(&names, lookups);
        names.adopt(&after, candidate);
        assert!(metric(&names, lookups) >= counted);
        lead_to(&after, &names, &["192.0.2.66:53", "192.0.2.67:53"]).await;
    });
}
