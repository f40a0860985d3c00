//! Tests that need addresses which a machine doesn't have, in a network
//! namespace of their own.

use std::process::Command;

const INSIDE: &str = "PPV2_TEST_NAMESPACE";

/// Waits for the routes to IPv6 addresses of this host. The kernel adds them after `ip`
/// has returned, and what is sent there before is lost.
const AWAIT_ROUTES: &str = r#"ip -6 -o addr show dev lo | while read -r _ _ _ address _; do
    until ip -6 route show table local | grep -q "^local ${address%/*} "; do sleep 0.01; done
done"#;

/// The rights that a test has in its namespace.
#[derive(Clone, Copy, PartialEq)]
#[allow(dead_code, reason = "each test crate uses its part of it")]
pub(crate) enum Rights {
    All,
    /// As an ordinary user.
    None,
}

/// Whether the calling test runs inside its namespace. If not, the test is run
/// again inside a new one, after the shell commands `setup`, and its success is
/// asserted; the caller then has nothing left to do.
pub(crate) fn enter(test: &str, setup: &str, rights: Rights) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let drop = match rights {
        Rights::All => "",
        Rights::None => "setpriv --bounding-set=-all --inh-caps=-all",
    };
    let script = format!(
        "ip link set lo up\n{setup}\n{AWAIT_ROUTES}\n\
         exec {drop} \"$0\" --exact {test} --nocapture"
    );
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "sh", "-ec", &script])
        .arg(std::env::current_exe().unwrap())
        .env(INSIDE, test)
        .output()
        .expect("unshare(1) and setpriv(1) are in the Debian package util-linux");
    let told = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && told.contains("1 passed"),
        "{test} failed in its namespace; if none can be made, allow user namespaces \
         (sysctl kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)\
         \n{told}{errors}"
    );
    false
}
