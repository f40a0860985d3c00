//! send, sendto, sendmsg, sendmmsg, write, writev, and syscall().
