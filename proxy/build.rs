//! Which data path to build: Linux's, or the portable one, on systems that are
//! not Linux and under `--cfg ppv2_portable`. A cfg of its own says so in one
//! word.

fn main() {
    let linux = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux");
    let portable = std::env::var_os("CARGO_CFG_PPV2_PORTABLE").is_some();
    if portable || !linux {
        println!("cargo::rustc-cfg=ppv2_fallback");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
