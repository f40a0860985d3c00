//! The page at `/` of the admin API, in a browser, with traffic.

use std::net::UdpSocket;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ppv2_lab::browser::Browser;
use ppv2_lab::namespace::enter;
use ppv2_lab::*;

/// Names a file for a picture of the page, as `make screenshot` does.
const PICTURE: &str = "PPV2_SCREENSHOT";

/// Texts whose contrast to what is behind them is less than WCAG 2.2 asks for (4.5).
const FAINT_TEXTS: &str = r#"(() => {
    const parse = (color) => { const all = color.match(/[\d.]+/g).map(Number); return all.length < 4 ? [...all, 1] : all; };
    const share = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => 0.2126 * share(r / 255) + 0.7152 * share(g / 255) + 0.0722 * share(b / 255);
    const faint = [];
    for (const one of document.querySelectorAll("body *")) {
        const hasText = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!hasText || !one.checkVisibility()) continue;
        let behind = [255, 255, 255, 1];
        for (let outer = one; outer; outer = outer.parentElement) {
            const color = parse(getComputedStyle(outer).backgroundColor);
            if (color[3] > 0) { behind = color; break; }
        }
        const both = [luminance(parse(getComputedStyle(one).color)), luminance(behind)].sort((a, b) => b - a);
        const ratio = (both[0] + 0.05) / (both[1] + 0.05);
        if (ratio < 4.5) faint.push(`${one.tagName} ${one.textContent.slice(0, 40)} ${ratio.toFixed(2)}`);
    }
    return faint.join("\n");
})()"#;

/// What a thread does over and over until the value ends.
struct Repeated {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Repeated {
    fn start(mut task: impl FnMut() + Send + 'static) -> Self {
        let ends = Arc::<AtomicBool>::default();
        let thread = thread::spawn({
            let ends = Arc::clone(&ends);
            move || {
                while !ends.load(Ordering::Relaxed) {
                    task();
                }
            }
        });
        Self {
            ends,
            thread: Some(thread),
        }
    }
}

impl Drop for Repeated {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A server that answers everything.
fn server(address: &str) -> Repeated {
    let socket = UdpSocket::bind(address).unwrap();
    let pause = Duration::from_millis(100);
    socket.set_read_timeout(Some(pause)).unwrap();
    let mut datagram = [0; 2048];
    Repeated::start(move || {
        if let Ok((length, sender)) = socket.recv_from(&mut datagram) {
            let _ = socket.send_to(&datagram[..length], sender);
        }
    })
}

/// Clients that send all the time: the first of them the most.
fn clients(addresses: Vec<String>, listener: &'static str) -> Repeated {
    let sockets: Vec<_> = addresses.iter().map(|address| socket(address)).collect();
    let mut turn = 0;
    Repeated::start(move || {
        for (place, socket) in sockets.iter().enumerate() {
            if turn % (place + 1) == 0 {
                let _ = socket.send_to(b"question", listener);
            }
        }
        turn += 1;
        thread::sleep(Duration::from_millis(5));
    })
}

/// The texts of the cells of a row whose first cell has this text.
fn cells(browser: &mut Browser, table: &str, first: &str) -> Vec<String> {
    let expression = format!(
        "[...document.querySelectorAll('#{table} tr')]\
         .filter((row) => row.cells[0].textContent === {first:?})\
         .flatMap((row) => [...row.cells].map((cell) => cell.textContent))"
    );
    let cells = browser.evaluate(&expression);
    serde_json::from_value(cells).unwrap()
}

/// What the browser complains of: errors, and what the policy forbids.
fn complaints(browser: &mut Browser) -> Vec<serde_json::Value> {
    let mut all = browser.events("Log.entryAdded");
    all.extend(browser.events("Runtime.exceptionThrown"));
    all.extend(browser.events("Runtime.consoleAPICalled"));
    all
}

/// The addresses of all requests.
fn requests(browser: &mut Browser) -> Vec<String> {
    let sent = browser.events("Network.requestWillBeSent");
    let urls = sent
        .iter()
        .map(|sent| sent["request"]["url"].as_str().unwrap());
    urls.map(ToOwned::to_owned).collect()
}

#[test]
fn the_page_shows_live_what_the_proxy_does() {
    let addresses = ["198.51.100.10/32", "192.0.2.10/32", "192.0.2.11/32"];
    let clients_of = |net: &str| (1..=8).map(|n| format!("{net}.{n}")).collect::<Vec<_>>();
    let setup: String = addresses
        .iter()
        .map(ToString::to_string)
        .chain(clients_of("203.0.113"))
        .map(|address| format!("ip addr add {address} dev lo\n"))
        .collect();
    if !enter(test_name!(), &setup) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = r#"
workers = 2
[admin]
listen = "127.0.0.1:9901"
[[listener]]
name = "dns"
bind = ["198.51.100.10:5300"]
upstream = "resolvers"
[[listener]]
name = "game"
bind = ["198.51.100.10:7000-7003"]
upstream = "game"
deny = ["203.0.113.3/32"]
[upstream.resolvers]
servers = ["192.0.2.10:5300", "192.0.2.11:5300"]
health = { every = "100ms", timeout = "80ms", fall = 2, rise = 1, probe = { kind = "udp", send = "?" } }
[upstream.game]
servers = ["192.0.2.10:7000", { address = "192.0.2.11:7000", backup = true }]
"#;
    let _servers = ["192.0.2.10:5300", "192.0.2.10:7000"].map(server);
    let mut proxy = proxy_with(&folder, config);
    proxy.wait_for("server is down");
    let _clients = [
        clients(clients_of("203.0.113"), "198.51.100.10:5300"),
        clients(clients_of("203.0.113"), "198.51.100.10:7001"),
    ];
    let mut browser = Browser::start(1280, 1500);
    browser.open("http://127.0.0.1:9901/");
    browser.wait_for("document.getElementById('state')?.textContent === 'Ready'");
    // Rates need two answers.
    browser.wait_for(
        "[...document.querySelectorAll('#listeners tr')].every((row) => parseFloat(row.cells[8].textContent) > 0)",
    );
    let dns = cells(&mut browser, "listeners", "dns");
    assert_eq!(dns[1..4], ["198.51.100.10:5300", "resolvers", "ppv2"]);
    assert_eq!(dns[4], "8", "{dns:?}");
    assert_eq!(
        cells(&mut browser, "listeners", "game")[1],
        "198.51.100.10:7000-7003"
    );
    let down = cells(&mut browser, "servers", "192.0.2.11:5300");
    assert_eq!(down[2], "down", "{down:?}");
    let backup = cells(&mut browser, "servers", "192.0.2.11:7000");
    assert_eq!(backup[4], "1 (backup)", "{backup:?}");
    browser.wait_for("parseFloat(document.querySelector('#drops td.n')?.textContent) > 0");
    let drops = cells(&mut browser, "drops", "not_allowed");
    assert_eq!(drops[1], "game", "{drops:?}");
    assert!(drops[4].contains("is in \"deny\""), "{drops:?}");
    assert!(drops[5].contains("remove it from"), "{drops:?}");
    let warnings = browser.evaluate("document.getElementById('warnings').innerText");
    assert_eq!(warnings, "Servers down: 1");
    let unseen = browser.evaluate("document.getElementById('stale').checkVisibility()");
    assert_eq!(unseen, false);

    // The first one sends most, and the third one is denied at one of the listeners.
    let busiest = "document.querySelector('#clients th')?.textContent";
    browser.wait_for(&format!("{busiest} === '203.0.113.1'"));
    browser.evaluate(
        "(() => { const by = document.getElementById('by'); by.value = 'drops'; \
         by.dispatchEvent(new Event('change')); })()",
    );
    browser.wait_for(&format!("{busiest} === '203.0.113.3'"));
    browser.evaluate(
        "(() => { const by = document.getElementById('by'); by.value = 'datagrams'; \
         by.dispatchEvent(new Event('change')); })()",
    );
    browser.wait_for(&format!("{busiest} === '203.0.113.1'"));

    for scheme in ["dark", "light"] {
        browser.prefer(scheme);
        assert_eq!(browser.evaluate(FAINT_TEXTS), "", "{scheme}");
    }
    if let Some(file) = std::env::var_os(PICTURE) {
        // A history that shows something.
        let points = "document.getElementById('history-received').points.numberOfItems";
        browser.evaluate("document.getElementById('interval').value = '1000'");
        browser.wait_for(&format!("{points} > 8"));
        let height = browser.evaluate("document.body.scrollHeight");
        browser.resize(1280, u32::try_from(height.as_u64().unwrap()).unwrap());
        browser.screenshot(Path::new(&file));
    }
    for width in [360, 1280] {
        browser.resize(width, 800);
        let whole = browser.evaluate("document.documentElement.scrollWidth");
        assert!(whole.as_u64().unwrap() <= width.into(), "{width}: {whole}");
    }
    let complaints = complaints(&mut browser);
    assert!(complaints.is_empty(), "{complaints:?}");
    for url in requests(&mut browser) {
        assert!(url.starts_with("http://127.0.0.1:9901/"), "{url}");
    }
}

#[test]
fn a_screen_reader_finds_names_for_everything() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let more = ["--workers", "1", "--admin", &admin.to_string()];
    let _proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    let mut browser = Browser::start(1024, 800);
    browser.open(&format!("http://{admin}/"));
    browser.wait_for("document.getElementById('clients-section')?.hidden === false");
    let tree = browser.call("Accessibility.getFullAXTree", serde_json::json!({}));
    let nodes = tree["nodes"].as_array().unwrap();
    let named = |role: &str| -> Vec<&str> {
        let of_role = nodes
            .iter()
            .filter(|node| node["ignored"] == false && node["role"]["value"] == role);
        of_role
            .map(|node| node["name"]["value"].as_str().unwrap_or_default())
            .collect()
    };
    assert_eq!(named("button"), ["Pause"]);
    assert_eq!(named("combobox"), ["Update every", "By"]);
    for region in [
        "Summary",
        "Listeners",
        "Servers",
        "Dropped datagrams",
        "Busiest clients",
    ] {
        assert!(named("region").contains(&region), "{:?}", named("region"));
        assert!(named("heading").contains(&region), "{:?}", named("heading"));
    }
    let tables = named("table");
    assert_eq!(tables.len(), 4, "{tables:?}");
    for role in ["table", "button", "combobox", "link", "region", "image"] {
        let names = named(role);
        assert!(
            names.iter().all(|name| !name.is_empty()),
            "{role}: {names:?}"
        );
    }
    assert!(named("rowheader").contains(&"listener1"));
    assert!(named("columnheader").contains(&"Sessions"));
    assert_eq!(named("status").len(), 1);
    assert_eq!(named("main").len(), 1);
}

#[test]
fn hostile_names_are_shown_as_text() {
    const NAME: &str = "<img src=x onerror=\"document.title='run'\"><script>alert(1)</script>";
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let folder = tempfile::tempdir().unwrap();
    let upstream = format!("</td>{NAME}");
    // Rust escapes quotes as TOML does.
    let config = format!(
        "[admin]\nlisten = \"{admin}\"\n[[listener]]\nname = {NAME:?}\nbind = [\"{listener}\"]\n\
         upstream = {upstream:?}\n[upstream.{upstream:?}]\nservers = [\"{}\"]\n",
        server.local_addr().unwrap()
    );
    let _proxy = proxy_with(&folder, &config);
    let mut browser = Browser::start(1024, 800);
    browser.open(&format!("http://{admin}/"));
    browser.wait_for("document.getElementById('listeners')?.rows.length > 0");
    let listeners = cells(&mut browser, "listeners", NAME);
    assert_eq!(listeners[2], upstream);
    assert_eq!(
        browser.evaluate("document.querySelectorAll('img, td script').length"),
        0
    );
    assert_eq!(browser.evaluate("document.title"), "ppv2-proxy");
    let found = complaints(&mut browser);
    assert!(found.is_empty(), "{found:?}");

    // Even what would get into the page could not run, and the browser would complain.
    let outcome = "(() => { try { document.body.innerHTML = '<p>'; return 'set' } \
         catch (error) { return error.name } })()";
    assert_eq!(browser.evaluate(outcome), "TypeError");
    browser.evaluate(
        "(() => { const one = document.createElement('style'); one.textContent = 'p {}'; \
         document.head.append(one); })()",
    );
    assert!(!complaints(&mut browser).is_empty());
}

#[test]
fn the_keyboard_reaches_everything_and_a_restart_is_survived() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let start = || {
        let more = ["--workers", "1", "--admin", &admin.to_string()];
        proxy_between(listener, server.local_addr().unwrap(), &more)
    };
    let mut proxy = start();
    let mut browser = Browser::start(1024, 800);
    browser.call(
        "Emulation.setFocusEmulationEnabled",
        serde_json::json!({ "enabled": true }),
    );
    browser.open(&format!("http://{admin}/"));
    browser.wait_for("document.getElementById('state')?.textContent === 'Ready'");
    browser.wait_for("!document.getElementById('clients-section').hidden");
    let mut reached = Vec::new();
    for _ in 0..10 {
        browser.press("Tab", 9, "");
        let at = browser.evaluate(
            "(({ activeElement: at }) => at.id || at.getAttribute('aria-labelledby') || at.textContent)(document)",
        );
        let outline = browser.evaluate("getComputedStyle(document.activeElement).outlineStyle");
        assert_eq!(outline, "solid", "{at}");
        reached.push(at.as_str().unwrap().to_owned());
    }
    assert_eq!(
        reached,
        [
            "Skip to the figures",
            "pause",
            "interval",
            "listeners-heading",
            "servers-heading",
            "drops-heading",
            "by",
            "clients-heading",
            "/status",
            "/metrics"
        ]
    );

    browser.evaluate("document.getElementById('pause').focus()");
    browser.press("Enter", 13, "\r");
    let state = |text: &str| format!("document.getElementById('state').textContent === '{text}'");
    browser.wait_for(&state("Paused"));
    browser.wait_for("document.getElementById('stale').innerText.startsWith('Paused.')");
    browser.press("Enter", 13, "\r");
    browser.wait_for(&state("Ready"));

    proxy.signal("KILL");
    proxy.wait();
    browser.wait_for(&state("No answer"));
    browser.wait_for("document.getElementById('stale').innerText.includes('What is shown is')");
    let said = "document.getElementById('announcement').textContent";
    assert_eq!(browser.evaluate(said), "The proxy does not answer");
    assert_eq!(
        cells(&mut browser, "listeners", "listener1")[1],
        listener.to_string()
    );
    let _proxy = start();
    browser.wait_for(&state("Ready"));
    assert_eq!(
        browser.evaluate(said),
        "The proxy answers again. The proxy has been restarted"
    );
    browser.wait_for("!document.getElementById('stale').checkVisibility()");
}
