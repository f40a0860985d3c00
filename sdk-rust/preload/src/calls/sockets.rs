//! bind, connect, getpeername, getsockname, setsockopt, getsockopt.
