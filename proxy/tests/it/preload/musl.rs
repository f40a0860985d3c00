//! A server of a few lines of C that is linked with musl, as Alpine's programs are. It answers
//! with the address that it saw.

use std::net::SocketAddr;

use ppv2_lab::wrapped::{Scene, at, setup, wrapped_for_musl};
use ppv2_lab::*;

const SOURCE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/it/preload/servers/whoami.c"
);

#[test]
fn threads_and_processes_with_musl_see_each_client() {
    if !namespace::enter(test_name!(), &setup()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("whoami");
    let mut cc = musl_gcc();
    cc.args([
        "-std=c11", "-Wall", "-Wextra", "-Werror", "-pthread", SOURCE,
    ]);
    let (code, _, error) = output_of(cc.arg("-o").arg(&program));
    assert_eq!(code, Some(0), "{error}");
    for family in [0, 1] {
        let address = at(family, port());
        let (ip, port) = (address.ip().to_string(), address.port().to_string());
        let mut process = wrapped_for_musl(&[], &program, &[&ip, &port]);
        process.wait_for("ready");
        let scene = Scene::new(address);
        let question = |client: SocketAddr, round| format!("{round} of {client}").into_bytes();
        scene.strangers(b"stranger");
        scene.exchange(question, |client, round, answer| {
            let question = String::from_utf8(question(client, round)).unwrap();
            let expected = format!("{client} {question}");
            assert_eq!(String::from_utf8_lossy(answer), expected);
        });
    }
}
