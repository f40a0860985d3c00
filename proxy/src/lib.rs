//! tmp
pub mod address;
pub mod counters;
pub mod mode;
pub mod net;
pub mod session;
pub mod upstream;
pub mod worker;
