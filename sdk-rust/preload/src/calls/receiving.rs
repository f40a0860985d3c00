//! recv, recvfrom, recvmsg, recvmmsg, read, readv.
