//! Commands beside `run`: what an operator uses to look at a configuration, a
//! header or a setup. What they print on standard output is their result.

pub mod capture;
pub mod check;
pub mod decode;
pub mod demo;
pub mod healthcheck;
pub mod manual;
pub mod send;
pub mod top;
pub mod whoami;
pub mod wrap;
