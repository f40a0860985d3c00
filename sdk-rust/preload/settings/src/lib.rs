//! What `ppv2-proxy wrap` and the preload library share: the variables of the environment in
//! which the one gives the other its options, the sockets that PPV2_ONLY names, and the file
//! of PPV2_STATS. How each option is read, and what for, is the library's own.

mod sockets;
pub mod stats_file;

pub use self::sockets::{Sockets, SocketsError};

/// Every variable of the library, in the order in which `wrap` prints them.
pub const VARIABLES: [&str; 12] = [
    "PPV2_TRUSTED",
    "PPV2_ONLY",
    "PPV2_UNTRUSTED",
    "PPV2_PEERS",
    "PPV2_FORMATS",
    "PPV2_REMEMBER",
    "PPV2_FORGET_AFTER",
    "PPV2_MAX_CLIENTS",
    "PPV2_PKTINFO",
    "PPV2_NEW_SOCKETS",
    "PPV2_FORK",
    "PPV2_STATS",
];

/// Which statistics file the library has opened. It notes this for programs that the program
/// starts.
pub const STATS_OPENED: &str = "PPV2_STATS_OPENED";
