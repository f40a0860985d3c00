//! The start of the library, and the life of sockets: bound, duplicated, closed, forked.

/// Reads the settings, makes the shared memory, and takes over what was inherited.
pub(crate) fn start() {}
