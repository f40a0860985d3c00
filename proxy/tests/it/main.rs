//! Tests with the real binary and real sockets: one binary, since each would link the whole
//! proxy. `cargo test -p ppv2-proxy --test it reload::` runs one file.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]
#![allow(clippy::print_stderr, reason = "what a failed test shows")]
#![allow(clippy::print_stdout, reason = "what was measured")]

mod accept;
mod access_log;
mod activation;
mod admin;
mod admin_socket;
mod balance;
mod bursts;
mod busiest;
mod capture;
mod container;
mod dns_servers;
mod dnsdist;
mod doctor;
mod dsr;
mod emit_first;
mod end_to_end;
mod examples;
mod faults;
mod guards;
mod header_tlvs;
mod headers_in;
mod health;
mod healthcheck;
mod host_setup;
mod limited;
mod log;
mod names;
mod network;
mod package;
mod page;
mod path_mtu;
mod peers;
mod port_ranges;
mod preload;
mod quic;
mod reload;
mod resolving;
mod send;
mod senders;
mod sessions;
mod several_proxies;
mod source_network_hosts;
mod source_networks;
mod spp;
mod stop;
mod store;
mod systemd;
mod tagged_replies;
mod takeover;
mod terminal;
mod top;
mod transparent;
mod unbound;
mod usage;
mod wrap;
