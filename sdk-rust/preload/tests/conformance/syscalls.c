/* System calls by number, as libuv, quinn and Netty make some of them. */
#include "harness.h"

CASE(receive_by_number) {
    int fd = server("s1");
    char bytes[2][10];
    struct iovec iov[2] = {{bytes[0], 10}, {bytes[1], 10}};
    address from[2] = {{.len = sizeof from->storage}, {.len = sizeof from->storage}};
    struct mmsghdr batch[2];
    memset(batch, 0, sizeof batch);
    for (int i = 0; i < 2; i++)
        batch[i].msg_hdr = (struct msghdr){.msg_name = &from[i].storage,
                                           .msg_namelen = sizeof from[i].storage,
                                           .msg_iov = &iov[i], .msg_iovlen = 1};
    client_sends("c1", "s1", "one");
    client_sends("c2", "s1", "two");
    long result = syscall(SYS_recvmmsg, fd, batch, 2, MSG_DONTWAIT, NULL);
    row("recvmmsg -> %s", result_text(result));
    for (int i = 0; i < result; i++)
        show_message("  each", batch[i].msg_len, &batch[i].msg_hdr);
    outcome("recvmmsg of nothing", syscall(SYS_recvmmsg, fd, batch, 2, MSG_DONTWAIT, NULL));
    client_sends("c1", "s1", "three");
    batch[0].msg_hdr.msg_namelen = sizeof from[0].storage;
    result = syscall(SYS_recvmsg, fd, &batch[0].msg_hdr, 0);
    show_message("recvmsg", result, &batch[0].msg_hdr);
    client_sends("c2", "s1", "four");
    from[0].len = sizeof from[0].storage;
    result = syscall(SYS_recvfrom, fd, bytes[0], 10, 0, &from[0].sa, &from[0].len);
    row("recvfrom -> %s %s from %s", result_text(result), bytes_text(bytes[0], 4),
        name_of(&from[0].storage, from[0].len));
    outcome("recvfrom of nothing",
            syscall(SYS_recvfrom, fd, bytes[0], 10, MSG_DONTWAIT, NULL, NULL));
    outcome("recvmsg of nothing", syscall(SYS_recvmsg, fd, &batch[0].msg_hdr, MSG_DONTWAIT));
    outcome("recvfrom of a closed one", syscall(SYS_recvfrom, 999, bytes[0], 10, 0, NULL, NULL));
}

CASE(send_by_number) {
    int fd = server("s1");
    const char *clients[] = {"c1", "c2"};
    address to[2];
    struct iovec iov[2] = {{"one", 3}, {"two", 3}};
    struct mmsghdr batch[2];
    memset(batch, 0, sizeof batch);
    for (int i = 0; i < 2; i++) {
        client_sends(clients[i], "s1", "hello");
        receive("recvfrom", fd, 0);
        to[i] = address_of(clients[i]);
        batch[i].msg_hdr = (struct msghdr){.msg_name = &to[i], .msg_namelen = to[i].len,
                                           .msg_iov = &iov[i], .msg_iovlen = 1};
    }
    outcome("sendmmsg", syscall(SYS_sendmmsg, fd, batch, 2, 0));
    row("  %u %u", batch[0].msg_len, batch[1].msg_len);
    outcome("sendmsg", syscall(SYS_sendmsg, fd, &batch[0].msg_hdr, 0));
    outcome("sendto", syscall(SYS_sendto, fd, "three", 5, 0, &to[1].sa, to[1].len));
    for (int i = 0; i < 4; i++)
        client_expects(clients[i % 2]);
    outcome("sendto without a destination", syscall(SYS_sendto, fd, "x", 1, 0, NULL, 0));
}

CASE_IN(other_calls_by_number, V4) {
    outcome("getpid", syscall(SYS_getpid) == getpid() ? 0 : -2);
    outcome("no such call", syscall(99999));
    outcome("negative", syscall(-1));
    char *page = (char *)syscall(SYS_mmap, NULL, 4096, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    page[0] = 'x';
    outcome("munmap", syscall(SYS_munmap, page, 4096));
    int pipes[2];
    char bytes[4];
    outcome("pipe2", syscall(SYS_pipe2, pipes, O_CLOEXEC));
    outcome("write", syscall(SYS_write, pipes[1], "four", 4));
    outcome("read", syscall(SYS_read, pipes[0], bytes, 4));
    outcome("close", syscall(SYS_close, pipes[0]));
    errno = 7;
    outcome("errno is kept", syscall(SYS_getuid) >= 0 && errno == 7 ? 0 : -2);
}

#ifdef __GLIBC__
/* Names that glibc has besides the usual ones. */
ssize_t __read(int fd, void *bytes, size_t len);
ssize_t __write(int fd, const void *bytes, size_t len);
ssize_t __send(int fd, const void *bytes, size_t len, int flags);
int __connect(int fd, const struct sockaddr *name, socklen_t len);
int __poll(struct pollfd *fds, nfds_t count, int timeout);
int __select(int count, fd_set *reads, fd_set *writes, fd_set *excepts, struct timeval *timeout);
int __dup2(int from, int to);
int __fcntl(int fd, int command, ...);
int __close(int fd);

CASE(other_names_of_calls) {
    int fd = server("s1");
    unsigned char *buffer = fresh(100);
    client_sends("c1", "s1", "hello");
    receive("recvfrom", fd, 0);
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
    junk("s1", 2);
    outcome("__poll of nothing", __poll(&poll_fd, 1, 0));
    client_sends("c1", "s1", "by __read");
    fd_set reads;
    FD_ZERO(&reads);
    FD_SET(fd, &reads);
    outcome("__select", __select(fd + 1, &reads, NULL, NULL, NULL));
    received("__read", __read(fd, buffer, 100), buffer, 100, NULL, 0);
    address c1 = address_of("c1");
    outcome("__connect", __connect(fd, &c1.sa, c1.len));
    outcome("__send", __send(fd, "by __send", 9, 0));
    outcome("__write", __write(fd, "by __write", 10));
    client_expects("c1");
    client_expects("c1");
    outcome("__dup2", __dup2(fd, 100));
    outcome("__fcntl", __fcntl(100, F_DUPFD, 200));
    outcome("__close", __close(fd));
    client_sends("c1", "s1", "to a copy");
    receive("copy", 100, 0);
    client_sends("c1", "s1", "to another copy");
    receive("copy", 200, 0);
}
#endif

CASE(reads_and_writes_without_an_offset) {
    int fd = server("s1");
    char bytes[2][10];
    struct iovec iov[2] = {{bytes[0], 3}, {bytes[1], 10}};
    client_sends("c1", "s1", "abcdef");
    long result = preadv2(fd, iov, 2, -1, 0);
    row("preadv2 -> %s %s %s", result_text(result), bytes_text(bytes[0], 3), bytes_text(bytes[1], 3));
    client_sends("c1", "s1", "left");
    outcome("preadv2 at 0", preadv2(fd, iov, 2, 0, 0));
    outcome("preadv", preadv(fd, iov, 2, 0));
    outcome("pread", pread(fd, bytes[0], 3, 0));
    outcome("pwrite", pwrite(fd, "x", 1, 0));
    receive("what is left", fd, MSG_DONTWAIT);
    address c1 = address_of("c1");
    must("connect", connect(fd, &c1.sa, c1.len));
    outcome("pwritev2", pwritev2(fd, iov, 1, -1, 0));
    client_expects("c1");
}
