//! Programs that know nothing of headers, with the preload library: each sees its clients'
//! own addresses and answers them through the proxy, and none sees what comes past it.

mod dns;
mod dtls;
mod musl;
mod ntp;
mod radius;
mod runtimes;
mod snmp;
mod socat;
mod syslog;
mod tftp;
mod turn;
