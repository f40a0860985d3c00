//! Which data path to build: that of Linux, or the portable one, on systems that
//! are not Linux and with the feature `portable`. A cfg of its own says so in
//! one word.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let linux = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux");
    let portable = std::env::var_os("CARGO_FEATURE_PORTABLE").is_some();
    if portable || !linux {
        println!("cargo::rustc-cfg=ppv2_portable");
    }
}
