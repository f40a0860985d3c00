//! Chromium without a window, driven by the DevTools protocol over a pair of named pipes, as
//! `--remote-debugging-pipe` has it: messages of JSON, with a zero byte behind each.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use serde_json::{Value, json};

use crate::{Process, TIMEOUT};

/// Has the browser's descriptors 3 and 4 be the pipes.
const START: &str = "exec \"$@\" 3<\"$IN\" 4>\"$OUT\"";

/// What a browser without a window, a bus, a profile and the Internet needs.
const FLAGS: [&str; 12] = [
    "--headless",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-pings",
    "--hide-scrollbars",
];

/// A browser with one page. It ends with the value.
pub struct Browser {
    commands: File,
    messages: Receiver<Value>,
    session: Option<Value>,
    number: u64,
    events: Vec<Value>,
    process: Process,
    _folder: tempfile::TempDir,
}

impl Browser {
    /// Starts it, with a page of so many pixels that is still empty.
    pub fn start(width: u32, height: u32) -> Self {
        const CHROMIUM: &str = "/usr/bin/chromium";
        assert!(
            Path::new(CHROMIUM).exists(),
            "the Debian package chromium is missing: run .ci/debian-packages"
        );
        let folder = tempfile::tempdir().unwrap();
        let pipes = ["in", "out"].map(|name| folder.path().join(name));
        let made = Command::new("mkfifo").args(&pipes).status().unwrap();
        assert!(made.success());
        let profile = folder.path().join("profile");
        let process = Process::start(
            Command::new("sh")
                .args(["-c", START, "sh", CHROMIUM])
                .args(FLAGS)
                .arg(format!("--user-data-dir={}", profile.display()))
                .arg("about:blank")
                .env("IN", &pipes[0])
                .env("OUT", &pipes[1])
                .env("HOME", folder.path()),
        );
        let commands = File::options().write(true).open(&pipes[0]).unwrap();
        let answers = BufReader::new(File::open(&pipes[1]).unwrap());
        let (sender, messages) = channel();
        std::thread::spawn(move || {
            for message in answers.split(0) {
                let Ok(message) = message else { return };
                if sender
                    .send(serde_json::from_slice(&message).unwrap())
                    .is_err()
                {
                    return;
                }
            }
        });
        let mut browser = Self {
            commands,
            messages,
            session: None,
            number: 0,
            events: Vec::new(),
            process,
            _folder: folder,
        };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let session = browser.call("Target.attachToTarget", attach);
        browser.session = Some(session["sessionId"].clone());
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser.resize(width, height);
        browser
    }

    /// Calls a method of the DevTools protocol, and returns its result.
    #[track_caller]
    pub fn call(&mut self, method: &str, params: Value) -> Value {
        self.number += 1;
        let mut message = json!({ "id": self.number, "method": method, "params": params });
        if let Some(session) = &self.session {
            message["sessionId"] = session.clone();
        }
        write!(self.commands, "{message}\0").unwrap();
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(mut message) = self.messages.recv_timeout(left) else {
                panic!(
                    "the browser does not answer {method}: {}",
                    self.process.log()
                );
            };
            if message["id"] == self.number {
                assert_eq!(message["error"], Value::Null, "{method}");
                return message["result"].take();
            }
            self.events.push(message);
        }
    }

    /// What has happened so far by the name of its event: its parameters.
    pub fn events(&mut self, method: &str) -> Vec<Value> {
        // Events that came before this answer are there once it is.
        self.call("Runtime.evaluate", json!({ "expression": "0" }));
        let events = self.events.iter().filter(|one| one["method"] == method);
        events.map(|one| one["params"].clone()).collect()
    }

    /// Forgets what has happened.
    pub fn forget_events(&mut self) {
        self.events("");
        self.events.clear();
    }

    /// Goes to this address.
    #[track_caller]
    pub fn open(&mut self, url: &str) {
        let opened = self.call("Page.navigate", json!({ "url": url }));
        assert_eq!(opened["errorText"], Value::Null, "{url}");
    }

    /// The value of an expression in the page.
    #[track_caller]
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let params = json!({ "expression": expression, "returnByValue": true });
        let mut result = self.call("Runtime.evaluate", params);
        assert_eq!(result["exceptionDetails"], Value::Null, "{expression}");
        result["result"]["value"].take()
    }

    /// Waits until an expression is true in the page.
    #[track_caller]
    pub fn wait_for(&mut self, expression: &str) {
        let deadline = Instant::now() + TIMEOUT;
        while self.evaluate(expression) != true {
            if Instant::now() > deadline {
                let text = self.evaluate("document.body.innerText");
                panic!("never true: {expression}\n{}", text.as_str().unwrap_or(""));
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// Presses a key: its name, and the text that it types, if it types any.
    pub fn press(&mut self, key: &str, code: u32, text: &str) {
        let mut params = json!({
            "type": "keyDown", "key": key, "code": key, "windowsVirtualKeyCode": code,
        });
        if !text.is_empty() {
            params["text"] = text.into();
        }
        self.call("Input.dispatchKeyEvent", params.clone());
        params["type"] = "keyUp".into();
        self.call("Input.dispatchKeyEvent", params);
    }

    /// Gives the page another size.
    pub fn resize(&mut self, width: u32, height: u32) {
        let params = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false,
        });
        self.call("Emulation.setDeviceMetricsOverride", params);
    }

    /// Has the reader prefer `light` or `dark`.
    pub fn prefer(&mut self, scheme: &str) {
        let feature = json!({ "name": "prefers-color-scheme", "value": scheme });
        self.call(
            "Emulation.setEmulatedMedia",
            json!({ "features": [feature] }),
        );
    }

    /// Writes what the page shows as WebP into a file.
    pub fn screenshot(&mut self, file: &Path) {
        let params = json!({ "format": "webp", "quality": 70 });
        let picture = self.call("Page.captureScreenshot", params);
        let folder = tempfile::tempdir().unwrap();
        let encoded = folder.path().join("picture");
        std::fs::write(&encoded, picture["data"].as_str().unwrap()).unwrap();
        let decoded = Command::new("base64")
            .arg("-d")
            .arg(encoded)
            .output()
            .unwrap();
        assert!(decoded.status.success());
        std::fs::write(file, decoded.stdout).unwrap();
    }
}
