//! Sockets that the program connects to one client each.
