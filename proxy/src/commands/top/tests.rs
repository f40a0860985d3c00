use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::style::{Color, Modifier};
use serde_json::{Value, json};

use super::answer::Text;
use super::rates::Rates;
use super::*;

/// A proxy after `uptime` seconds, with counters that stand at `count`.
fn json(uptime: f64, count: u64) -> Value {
    json!({
        "version": "1.2.3", "unix_seconds": 1_796_000_000.5 + uptime,
        "started_unix_seconds": 1_796_000_000.5, "uptime_seconds": uptime, "ready": true,
        "workers": 2, "workers_not_responding": [], "sessions": 12, "sessions_max": 100_000,
        "session_sockets": 11, "session_sockets_max": 65_000,
        "reloads": {"applied": 1, "rejected": 0, "latest_is_rejected": false},
        "listeners": [
            {"listener": "dns", "bind": ["0.0.0.0:5353", "[::]:5353"], "upstream": "resolvers",
             "mode": "ppv2", "client_datagrams": count, "client_bytes": 100 * count,
             "reply_datagrams": count / 2, "reply_bytes": 7 * count, "receive_overflows": 0,
             "sessions": 12, "sessions_opened": 9, "drops": {"not_allowed": count / 10}},
            {"listener": "quiet", "bind": ["127.0.0.1:1"], "upstream": "games", "mode": "plain",
             "client_datagrams": 5, "client_bytes": 5, "reply_datagrams": 0, "reply_bytes": 0,
             "receive_overflows": 7, "sessions": 99, "sessions_opened": 1, "drops": {}},
        ],
        "listeners_left_out": 0,
        "upstreams": [
            {"upstream": "resolvers", "servers": [
                {"server": "a", "label": "192.0.2.10:5353", "address": "192.0.2.10:5353",
                 "found_by": null, "state": "up", "checked": true, "weight": 1, "backup": false,
                 "drain": false, "why": "answers", "since_unix_seconds": 1_796_000_000,
                 "sessions": 12, "datagrams": count, "bytes": 128 * count,
                 "reply_datagrams": count / 2, "reply_bytes": 7 * count, "receive_overflows": 0,
                 "icmp_errors": 0, "sessions_opened": 9},
                {"server": "b", "label": "192.0.2.11:5353", "address": "192.0.2.11:5353",
                 "found_by": "dns:resolvers.internal:5353", "state": "down", "checked": true,
                 "weight": 2, "backup": true, "drain": false, "why": "no reply within 500ms",
                 "since_unix_seconds": 1_796_000_000, "sessions": 0, "datagrams": 0, "bytes": 0,
                 "reply_datagrams": 0, "reply_bytes": 0, "receive_overflows": 0,
                 "icmp_errors": 3, "sessions_opened": 0}]},
            {"upstream": "games", "servers": []},
        ],
        "servers_left_out": 0,
        "drop_reasons": {"not_allowed": {
            "description": "the client's address is in none of the allowed networks",
            "fix": "add it to allow"}},
        "a_field_of_a_later_release": [1, 2],
    })
}

fn status(value: Value) -> Status {
    serde_json::from_value(value).unwrap()
}

fn boxed(value: Value) -> Box<Status> {
    Box::new(status(value))
}

/// A state after two answers, a second and `count` datagrams apart.
fn state(count: u64) -> State {
    let mut state = State::new("127.0.0.1:9901".to_owned());
    let now = Instant::now();
    state.take(Ok(boxed(json(10.0, 1000))), now);
    state.take(Ok(boxed(json(11.0, 1000 + count))), now);
    state
}

/// What is drawn for a state on a terminal of this size.
fn buffer(state: &mut State, width: u16, height: u16) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    let theme = Theme { has_colours: true };
    let draw = |frame: &mut ratatui::Frame<'_>| screen::draw(frame, state, theme, Instant::now());
    terminal.draw(draw).unwrap();
    terminal.backend().buffer().clone()
}

/// The lines of it, without space at their ends.
fn lines(state: &mut State, width: u16, height: u16) -> Vec<String> {
    let buffer = buffer(state, width, height);
    let line = |y| {
        let cells = (0..width).map(|x| buffer[(x, y)].symbol());
        cells.collect::<String>().trim_end().to_owned()
    };
    (0..height).map(line).collect()
}

fn press(state: &mut State, code: KeyCode) -> Action {
    state.press(KeyEvent::new(code, KeyModifiers::NONE))
}

fn press_all(state: &mut State, keys: &str) {
    for key in keys.chars() {
        press(state, KeyCode::Char(key));
    }
}

#[test]
fn a_usual_terminal_shows_listeners_with_rates() {
    let mut state = state(2000);
    let lines = lines(&mut state, 80, 24);
    assert_eq!(
        lines[..8],
        [
            "ppv2-proxy 1.2.3 at 127.0.0.1:9901                                 ready, up 11s",
            "sessions 12/100000  sockets 11/65000  workers 2  reloads 1",
            "in 2.00k/s 200kB/s  out 1.00k/s 14.0kB/s  new sessions 0/s  drops 200/s",
            " 1 Listeners  2 Servers  3 Drops  4 Clients              sorted by configuration",
            "LISTENER        UPSTREAM         SESS  NEW/s   IN/s IN B/s  OUT/s OUT B/s DROP/s",
            "dns             resolvers          12      0  2.00k   200k  1.00k   14.0k    200",
            "quiet           games              99      0      0      0      0       0      0",
            "",
        ]
    );
    assert_eq!(
        lines[20..],
        [
            "dns: 0.0.0.0:5353, [::]:5353 -> resolvers, mode ppv2. Since the start: 3000 in,",
            "1500 out, 300 dropped",
            "",
            "q quit  ? help  tab view  j/k move  s sort  p pause",
        ]
    );
}

#[test]
fn servers_stand_below_their_upstream() {
    let mut state = state(2000);
    press_all(&mut state, "2jj");
    let lines = lines(&mut state, 80, 24);
    assert_eq!(
        lines[4..9],
        [
            "UPSTREAM, SERVER     STATE      SESS  NEW/s   TO/s TO B/s FROM/s FROM B/s LOST/s",
            "resolvers            1/2 up       12      0  2.00k   256k  1.00k    14.0k      0",
            "  192.0.2.10:5353    up           12      0  2.00k   256k  1.00k    14.0k      0",
            "  192.0.2.11:5353    down          0      0      0      0      0        0      0",
            "games                0/0 up        0      0      0      0      0        0      0",
        ]
    );
    assert_eq!(
        lines[20..22],
        [
            "192.0.2.11:5353: found by dns:resolvers.internal:5353, weight 2, backup, down",
            "for 11s: no reply within 500ms. Since the start: 3 ICMP errors, 0 lost replies",
        ]
    );
}

#[test]
fn drops_are_explained() {
    let mut state = state(2000);
    press_all(&mut state, "3");
    let first = lines(&mut state, 80, 24);
    assert_eq!(
        first[4..7],
        [
            "REASON                                   LISTENER       DROP/s        TOTAL",
            "not_allowed                              dns               200          300",
            "receive_overflows                        quiet               0            7",
        ]
    );
    let details = first[20..23].join(" ");
    assert!(
        details.contains("allowed networks. Fix: add it to allow"),
        "{details}"
    );
    press_all(&mut state, "j");
    let details = lines(&mut state, 80, 24)[20..23].join(" ");
    assert!(details.contains("a receive buffer was full"), "{details}");

    let mut value = json(12.0, 0);
    value["listeners"].as_array_mut().unwrap().truncate(1);
    value["started_unix_seconds"] = json!(1_796_000_009.0);
    value["listeners"][0]["drops"] = json!({});
    state.take(Ok(boxed(value)), Instant::now());
    assert_eq!(lines(&mut state, 80, 24)[5], "nothing has been dropped");
}

#[test]
fn busiest_clients_are_asked_for_while_they_are_shown() {
    let mut state = state(0);
    assert_eq!(state.wants_clients(), None);
    assert_eq!(press(&mut state, KeyCode::Char('4')), Action::Ask);
    assert_eq!(state.wants_clients(), Some("datagrams"));
    assert!(lines(&mut state, 80, 24)[5].contains("has not said yet"));
    let clients = json!({"window_seconds": 10.0, "clients": [
        {"address": "2001:db8::1", "listener": "dns", "datagrams": 50, "bytes": 5000,
         "new_sessions": 0, "drops": 2},
        {"address": "192.0.2.1", "datagrams": 70, "bytes": 700, "new_sessions": 1, "drops": 0}]});
    state.take_clients(Ok(serde_json::from_value(clients).unwrap()));
    let by_datagrams = lines(&mut state, 80, 24);
    assert_eq!(
        by_datagrams[3..7],
        [
            " 1 Listeners  2 Servers  3 Drops  4 Clients                    sorted by DGRAM/s",
            "CLIENT                               LISTENER       DGRAM/s    B/s  NEW/s DROP/s",
            "192.0.2.1                            -                  7.0     70    0.1      0",
            "2001:db8::1                          dns                5.0    500      0    0.2",
        ]
    );
    assert_eq!(by_datagrams[7], "averages of the last 10s");
    assert_eq!(press(&mut state, KeyCode::Char('s')), Action::Ask);
    assert_eq!(state.wants_clients(), Some("bytes"));
    assert!(lines(&mut state, 80, 24)[5].starts_with("2001:db8::1"));
    state.take_clients(Err("127.0.0.1:9901 has no /clients".to_owned()));
    assert_eq!(
        lines(&mut state, 80, 24)[5],
        "127.0.0.1:9901 has no /clients"
    );
    press_all(&mut state, "1");
    assert_eq!(state.wants_clients(), None);
}

#[test]
fn a_small_terminal_shows_the_columns_that_matter() {
    let mut state = state(2000);
    assert_eq!(
        lines(&mut state, 40, 10),
        [
            "ppv2-proxy 1.2.3 at 127.0… ready, up 11s",
            "sessions 12/100000  sockets 11/65000  …",
            "in 2.00k/s 200kB/s  out 1.00k/s 14.0kB/…",
            " 1 Listeners  2  3  4",
            "LISTENER              SESS   IN/s DROP/s",
            "dns                     12  2.00k    200",
            "quiet                   99      0      0",
            "",
            "",
            "q quit  ? help  tab view  j/k move  s s…",
        ]
    );
}

#[test]
fn a_large_terminal_shows_long_names_whole() {
    let long = "a-listener-with-a-name-of-quite-some-length-as-they-occur-in-large-companies";
    let mut value = json(10.0, 1);
    value["listeners"][0]["listener"] = json!(long);
    let mut state = State::new("unix:/run/ppv2/admin.sock".to_owned());
    state.take(Ok(boxed(value)), Instant::now());
    let large = lines(&mut state, 200, 60);
    assert!(large[5].starts_with(long), "{large:?}");
    let usual = lines(&mut state, 80, 24);
    assert!(usual[5].starts_with("a-listener-wit… "), "{usual:?}");
}

/// Nothing panics, whatever the size, and there is something to see if there is room.
#[test]
fn every_size_is_drawn() {
    let mut states = [State::new("[2001:db8::1]:9901".to_owned()), state(7)];
    for state in &mut states {
        for failure in [false, true] {
            if failure {
                state.take(Err("gone".to_owned()), Instant::now());
            }
            for keys in ["1", "2", "3", "4", "?"] {
                press_all(state, keys);
                for width in (0..10).chain([39, 81]) {
                    for height in (0..12).chain([30]) {
                        press(state, KeyCode::PageDown);
                        let buffer = buffer(state, width, height);
                        if width > 0 && height > 0 {
                            let mut first = (0..width).map(|x| buffer[(x, 0)].symbol());
                            assert!(first.any(|symbol| symbol != " "), "{width} x {height}");
                        }
                    }
                }
            }
            press_all(state, "?");
        }
    }
}

/// Names come from the configuration, or from another program that has the port.
#[test]
fn hostile_names_do_not_move_the_cursor_or_the_columns() {
    let names = [
        "\u{1b}[2J\u{1b}]0;title\u{7}",
        "a\r\nb\tc",
        "\u{202e}reversed\u{2066}",
        "zero\u{200b}width\u{feff}",
        "漢字のとても長い名前です漢字",
        "👩‍👩‍👧‍👦 family 🇩🇪",
        "e\u{301}\u{302}\u{303}\u{304}\u{305}",
        "\u{9b}31m",
        "",
    ];
    let long = "🦀".repeat(10_000);
    for name in names.into_iter().chain([long.as_str()]) {
        let mut value = json(10.0, 100);
        value["listeners"][0]["listener"] = json!(name);
        value["listeners"][0]["upstream"] = json!(name);
        value["listeners"][0]["drops"] = json!({name: 5});
        value["upstreams"][0]["upstream"] = json!(name);
        value["upstreams"][0]["servers"][0]["label"] = json!(name);
        value["upstreams"][0]["servers"][0]["why"] = json!(name);
        value["version"] = json!(name);
        value["drop_reasons"] = json!({name: {"description": name, "fix": name}});
        let mut state = State::new(name.to_owned());
        state.take(Ok(boxed(value)), Instant::now());
        for keys in ["1", "2", "3", "?"] {
            press_all(&mut state, keys);
            for (width, height) in [(80, 24), (40, 10), (13, 20)] {
                let buffer = buffer(&mut state, width, height);
                for cell in buffer.content() {
                    let is_control =
                        |c: char| c.is_control() || ('\u{200b}'..='\u{200c}').contains(&c);
                    assert!(!cell.symbol().contains(is_control), "{name:?}: {cell:?}");
                    assert!(cell.symbol().len() < 100, "{name:?}");
                }
            }
        }
        state.shows_help = false;
        press_all(&mut state, "1");
        // The numbers stand where those of other rows stand.
        let buffer = buffer(&mut state, 80, 24);
        for y in [5, 6] {
            assert_eq!(
                buffer[(36, y)].symbol(),
                ["2", "9"][usize::from(y - 5)],
                "{name:?}"
            );
            assert_eq!(buffer[(37, y)].symbol(), " ");
        }
        let plain = state.table().unwrap().plain();
        assert!(
            !plain.contains(|c: char| c.is_control() && c != '\n'),
            "{plain:?}"
        );
    }
    assert_eq!(&*Text::from("\u{1b}[2J"), "\\u{1b}[2J");
}

#[test]
fn another_process_has_no_rates_at_first() {
    let rates = |old: &Value, new: &Value| {
        Rates::between(&status(old.clone()), &status(new.clone()))
            .map(|rates| rates.total().datagrams)
    };
    let (old, new) = (json(10.0, 1000), json(12.0, 5000));
    assert_eq!(rates(&old, &new), Some(2000.0));
    // Another start, an uptime that is smaller, and no time at all.
    let mut other = new.clone();
    other["started_unix_seconds"] = json!(1_796_000_001.5);
    assert_eq!(rates(&old, &other), None);
    assert_eq!(rates(&new, &old), None);
    assert_eq!(rates(&old, &json(10.0, 5000)), None);
    // Any counter that is smaller.
    for path in [
        "/listeners/0/client_datagrams",
        "/listeners/0/drops/not_allowed",
        "/listeners/1/receive_overflows",
        "/upstreams/0/servers/0/bytes",
        "/upstreams/0/servers/1/icmp_errors",
    ] {
        let mut other = new.clone();
        *other.pointer_mut(path).unwrap() = json!(0);
        assert_eq!(rates(&old, &other), None, "{path}");
    }
}

#[test]
fn a_restarted_proxy_shows_no_rate_until_the_second_answer() {
    let mut state = state(2000);
    let now = Instant::now();
    let restarted = |uptime: f64, count| {
        let mut value = json(uptime, count);
        value["started_unix_seconds"] = json!(1_796_000_099.0);
        boxed(value)
    };
    state.take(Ok(restarted(0.5, 10)), now);
    let first = lines(&mut state, 80, 24);
    assert_eq!(first[2], "rates with the next answer");
    assert!(
        first[5].ends_with("12      -      -      -      -       -      -"),
        "{first:?}"
    );
    state.take(Ok(restarted(1.5, 40)), now);
    assert!(lines(&mut state, 80, 24)[2].starts_with("in 30/s "));
}

#[test]
fn what_a_reload_brings_has_no_rate_at_first() {
    let mut old = json(10.0, 1000);
    old["listeners"].as_array_mut().unwrap().remove(0);
    let servers = old["upstreams"][0]["servers"].as_array_mut().unwrap();
    servers.remove(0);
    let (old, new) = (status(old), status(json(11.0, 1_000_000)));
    let rates = Rates::between(&old, &new).unwrap();
    assert_eq!(rates.listener(&"dns".into()), None);
    assert_eq!(rates.drops(&"dns".into(), &"not_allowed".into()), None);
    assert_eq!(
        rates.server(&"resolvers".into(), &"192.0.2.10:5353".into()),
        None
    );
    assert!(rates.listener(&"quiet".into()).is_some());
    // What it takes out is no sudden fall.
    let rates = Rates::between(&new, &status(json(12.0, 1_000_010))).unwrap();
    assert_eq!(rates.listener(&"dns".into()).unwrap().datagrams, 10.0);
}

#[test]
fn a_proxy_that_is_away_is_said_to_be_and_comes_back() {
    let mut state = State::new("127.0.0.1:9901".to_owned());
    let refused = || Err("127.0.0.1:9901 can't be asked: Connection refused".to_owned());
    assert!(lines(&mut state, 80, 24)[0].ends_with("connecting"));
    state.take(refused(), Instant::now());
    let first = lines(&mut state, 80, 24);
    assert!(first[0].ends_with("UNREACHABLE for 0s"), "{first:?}");
    assert_eq!(
        first[1],
        "127.0.0.1:9901 can't be asked: Connection refused"
    );
    assert_eq!(first[4], "There is nothing to show yet.");
    state.take(Ok(boxed(json(10.0, 1000))), Instant::now());
    assert!(lines(&mut state, 80, 24)[0].ends_with("ready, up 10s"));

    let long_ago = Instant::now().checked_sub(Duration::from_secs(75)).unwrap();
    state.take(refused(), long_ago);
    state.take(refused(), Instant::now());
    let away = lines(&mut state, 80, 24);
    assert!(away[0].ends_with("UNREACHABLE for 1m 15s"), "{away:?}");
    assert!(away[5].starts_with("dns "), "{away:?}");
    // The same process has an answer again: the rate is that of the whole time.
    state.take(Ok(boxed(json(20.0, 2000))), Instant::now());
    let back = lines(&mut state, 80, 24);
    assert!(back[0].ends_with("ready, up 20s"), "{back:?}");
    assert!(back[2].starts_with("in 100/s "), "{back:?}");
}

#[test]
fn what_is_wrong_is_said() {
    let mut value = json(10.0, 0);
    value["ready"] = json!(false);
    value["workers_not_responding"] = json!([1, 3]);
    value["reloads"]["latest_is_rejected"] = json!(true);
    value["listeners_left_out"] = json!(17);
    value["listeners"][0]["upstream"] = Value::Null;
    let mut state = State::new("127.0.0.1:9901".to_owned());
    state.take(Ok(boxed(value)), Instant::now());
    let lines = lines(&mut state, 100, 24);
    assert!(lines[0].ends_with("NOT READY, up 10s"), "{lines:?}");
    assert!(
        lines[1].ends_with("NOT RESPONDING: worker 1, 3, LATEST RELOAD REJECTED"),
        "{lines:?}"
    );
    assert_eq!(
        lines[7],
        "and 17 more listeners, which the proxy leaves out"
    );
    assert!(
        lines[20].contains("taken out of the configuration"),
        "{lines:?}"
    );
}

#[test]
fn a_paused_screen_stands_still() {
    let mut state = state(2000);
    press_all(&mut state, "p");
    state.take(Ok(boxed(json(12.0, 9_000))), Instant::now());
    state.take(Ok(boxed(json(13.0, 9_500))), Instant::now());
    let paused = lines(&mut state, 80, 24);
    assert!(paused[0].ends_with("PAUSED, ready, up 11s"), "{paused:?}");
    assert!(paused[2].starts_with("in 2.00k/s"), "{paused:?}");
    assert_eq!(press(&mut state, KeyCode::Char('p')), Action::Ask);
    let goes_on = lines(&mut state, 80, 24);
    assert!(goes_on[0].ends_with("ready, up 13s"), "{goes_on:?}");
    assert!(goes_on[2].starts_with("in 500/s"), "{goes_on:?}");
}

#[test]
fn a_row_stays_selected_when_rows_move() {
    let selected = |state: &mut State| {
        let buffer = buffer(state, 80, 24);
        let is_selected = |y: &u16| buffer[(0, *y)].modifier.contains(Modifier::REVERSED);
        let y = (5..20).find(is_selected).unwrap();
        (0..9).map(|x| buffer[(x, y)].symbol()).collect::<String>()
    };
    let mut state = state(2000);
    assert!(selected(&mut state).starts_with("dns "));
    // By name, then on to sessions, of which `quiet` has more.
    press_all(&mut state, "sss");
    assert!(lines(&mut state, 80, 24)[3].ends_with("sorted by SESS"));
    assert!(lines(&mut state, 80, 24)[5].starts_with("quiet "));
    press(&mut state, KeyCode::Down);
    assert!(selected(&mut state).starts_with("dns "));
    press_all(&mut state, "SSS");
    assert!(lines(&mut state, 80, 24)[5].starts_with("dns "));
    assert!(selected(&mut state).starts_with("dns "));
    press(&mut state, KeyCode::End);
    assert!(selected(&mut state).starts_with("quiet "));
    // Once it is gone, another row is selected.
    let mut value = json(12.0, 4000);
    value["listeners"].as_array_mut().unwrap().truncate(1);
    state.take(Ok(boxed(value)), Instant::now());
    assert!(selected(&mut state).starts_with("dns "));
}

#[test]
fn long_lists_scroll() {
    let mut value = json(10.0, 0);
    let listener = value["listeners"][0].clone();
    let listeners = (0..100).map(|i| {
        let mut listener = listener.clone();
        listener["listener"] = json!(format!("listener{i}"));
        listener
    });
    value["listeners"] = listeners.collect();
    let mut state = State::new("127.0.0.1:9901".to_owned());
    state.take(Ok(boxed(value)), Instant::now());
    assert!(lines(&mut state, 80, 24)[5].starts_with("listener0 "));
    press_all(&mut state, "G");
    let last = lines(&mut state, 80, 24);
    assert!(last[18].starts_with("listener99 "), "{last:?}");
    press(&mut state, KeyCode::PageUp);
    assert!(lines(&mut state, 80, 24)[5].starts_with("listener85 "));
    // The selected row stays on a screen that becomes smaller.
    let small = lines(&mut state, 80, 8);
    assert!(
        small.iter().any(|line| line.starts_with("listener85 ")),
        "{small:?}"
    );
    press_all(&mut state, "gk");
    assert!(lines(&mut state, 80, 24)[5].starts_with("listener0 "));
}

#[test]
fn keys_change_views_and_end() {
    let mut state = state(0);
    for (code, view) in [
        (KeyCode::Tab, View::Servers),
        (KeyCode::Right, View::Drops),
        (KeyCode::BackTab, View::Servers),
        (KeyCode::Left, View::Listeners),
        (KeyCode::BackTab, View::Clients),
        (KeyCode::Tab, View::Listeners),
        (KeyCode::Char('3'), View::Drops),
    ] {
        press(&mut state, code);
        assert_eq!(state.view, view);
    }
    press_all(&mut state, "?");
    assert!(
        lines(&mut state, 80, 24)
            .iter()
            .any(|line| line.contains("sort by the next"))
    );
    press(&mut state, KeyCode::Esc);
    assert!(
        !lines(&mut state, 80, 24)
            .iter()
            .any(|line| line.contains("sort by the next"))
    );
    assert_eq!(press(&mut state, KeyCode::Char('q')), Action::Quit);
    let control = |c| KeyEvent::new(KeyCode::Char(c), KeyModifiers::CONTROL);
    assert_eq!(state.press(control('c')), Action::Quit);
    assert_eq!(state.press(control('z')), Action::Suspend);
    assert_eq!(state.press(control('l')), Action::Redraw);
    assert_eq!(state.press(control('q')), Action::None);
}

#[test]
fn no_colour_is_used_where_none_is_wanted() {
    let mut state = state(2000);
    state.take(Err("gone".to_owned()), Instant::now());
    for view in View::ALL {
        state.view = view;
        for has_colours in [true, false] {
            let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
            let theme = Theme { has_colours };
            terminal
                .draw(|frame| screen::draw(frame, &mut state, theme, Instant::now()))
                .unwrap();
            let cells = terminal.backend().buffer().content().iter();
            let mut cells = cells.filter(|cell| (cell.fg, cell.bg) != (Color::Reset, Color::Reset));
            assert_eq!(cells.next().is_some(), has_colours);
        }
    }
}

#[test]
fn numbers_are_short() {
    for (value, text) in [
        (0.0, "0"),
        (0.04, "0"),
        (0.06, "0.1"),
        (9.94, "9.9"),
        (9.96, "10"),
        (123.4, "123"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (12_345.0, "12.3k"),
        (999_499.0, "999k"),
        (999_501.0, "1.00M"),
        (1.5e9, "1.50G"),
        (1.5e12, "1.50T"),
        (2e15, "2.00P"),
        (2e19, "20E"),
        (f64::MAX, "MANY"),
    ] {
        let short = table::short(value);
        assert_eq!(short, text, "{value}");
        assert!(short.len() <= 6);
    }
    for (seconds, text) in [
        (-5.0, "0s"),
        (59.9, "59s"),
        (60.0, "1m 0s"),
        (3_725.0, "1h 2m"),
        (90_000.0, "1d 1h"),
        (f64::NAN, "0s"),
    ] {
        assert_eq!(table::span(seconds), text);
    }
}

#[test]
fn plain_text_has_everything() {
    let mut state = state(2000);
    let text = screen::plain_summary(&state);
    assert_eq!(
        text,
        "ppv2-proxy 1.2.3 at 127.0.0.1:9901: ready, up 11s\n\
         sessions 12/100000  sockets 11/65000  workers 2  reloads 1\n\
         in 2.00k/s 200kB/s  out 1.00k/s 14.0kB/s  new sessions 0/s  drops 200/s\n"
    );
    state.view = View::Servers;
    let table = state.table().unwrap().plain();
    assert!(
        table.contains(
            "\n  192.0.2.10:5353 up       12     0 2.00k   256k  1.00k    14.0k      0\n"
        ),
        "{table}"
    );
}

/// Another program may have the port. What it sends must not cost much memory.
#[test]
fn endless_answers_are_refused() {
    let parse = |value: &Value| ask::parse::<Status>(value.to_string().as_bytes());
    let usual = json(10.0, 0);
    assert!(parse(&usual).is_some());
    let mut large = usual.clone();
    let many = |key: &str, of: &Value| json!(vec![of[key][0].clone(); 1000]);
    large["listeners"] = many("listeners", &usual);
    large["upstreams"][0]["servers"] = many("servers", &usual["upstreams"][0]);
    assert!(parse(&large).is_some());
    for (list, entry) in [("listeners", "{}"), ("workers_not_responding", "1")] {
        let mut endless = usual.clone();
        endless[list] = json!("ENDLESS");
        let entries = format!("[{entry}{}]", format!(",{entry}").repeat(600_000));
        let endless = endless.to_string().replace("\"ENDLESS\"", &entries);
        assert!(ask::parse::<Status>(endless.as_bytes()).is_none(), "{list}");
    }
    for other in [
        json!({}),
        json!([]),
        json!({"listeners": []}),
        json!("x"),
        json!(1),
    ] {
        assert!(parse(&other).is_none());
    }
}
