//! What hosts need so that `ppv2-proxy` works: [`doctor`] finds what is missing, and
//! [`host_setup`] prints the commands that set a host up. Neither changes anything.
//!
//! Of the proxy's configuration this crate knows only a [`Topology`]. The proxy also
//! uses [`kernel`] and [`route`], which ask this host's kernel about itself.
#![expect(missing_docs, reason = "a crate of the binary's own")]

pub mod doctor;
pub mod host_setup;
pub mod kernel;
mod nft;
pub mod reply_path;
mod role;
pub mod route;
pub mod topology;

pub use topology::Topology;
