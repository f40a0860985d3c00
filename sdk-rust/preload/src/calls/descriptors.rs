//! close, dup, fcntl, ioctl and their like.
