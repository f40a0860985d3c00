//! The memory that forked processes share, and the allocator that uses it while the
//! [`table`](crate::table) is locked.
