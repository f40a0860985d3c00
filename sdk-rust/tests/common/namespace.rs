//! Tests that need addresses which a machine doesn't have, in a network
//! namespace of their own.

use std::process::Command;

const INSIDE: &str = "PPV2_TEST_NAMESPACE";

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
    let script =
        format!("ip link set lo up\n{setup}\nexec {drop} \"$0\" --exact {test} --nocapture");
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
