/* The functions that glibc puts in place of the usual ones with -D_FORTIFY_SOURCE=2, when
 * a buffer's size is known and the length that is asked for is not. */
#include "harness.h"

/* A number that the compiler doesn't know. */
static size_t unknown(size_t number) {
    volatile size_t copy = number;
    return copy;
}

CASE(fortified_receives) {
    int fd = server("s1");
    char buffer[64];
    address from = {.len = sizeof from.storage};
    client_sends("c1", "s1", "by recv");
    long result = recv(fd, buffer, unknown(64), 0);
    row("recv -> %s %s", result_text(result), bytes_text(buffer, 7));
    client_sends("c2", "s1", "by recvfrom");
    result = recvfrom(fd, buffer, unknown(64), 0, &from.sa, &from.len);
    row("recvfrom -> %s %s from %s", result_text(result), bytes_text(buffer, 11),
        name_of(&from.storage, from.len));
    client_sends("c1", "s1", "by read");
    result = read(fd, buffer, unknown(64));
    row("read -> %s %s", result_text(result), bytes_text(buffer, 7));
    client_sends("c1", "s1", "by read, truncated");
    result = read(fd, buffer, unknown(7));
    row("read -> %s %s", result_text(result), bytes_text(buffer, 7));
    outcome("recv of nothing", recv(fd, buffer, unknown(64), MSG_DONTWAIT));
    outcome("recvfrom of nothing", recvfrom(fd, buffer, unknown(64), MSG_DONTWAIT, NULL, NULL));
}

CASE(fortified_waits) {
    int fd = server("s1");
    struct pollfd fds[2] = {{.fd = fd, .events = POLLIN}, {.fd = -1}};
    struct timespec zero = {0, 0};
    junk("s1", 3);
    outcome("poll", poll(fds, unknown(2), 0));
    outcome("ppoll", ppoll(fds, unknown(2), &zero, NULL));
    client_sends("c1", "s1", "x");
    outcome("poll", poll(fds, unknown(2), 5000));
    outcome("ppoll", ppoll(fds, unknown(2), NULL, NULL));
    fd_set reads;
    FD_ZERO(&reads);
    FD_SET((int)unknown(fd), &reads);
    outcome("select", select(fd + 1, &reads, NULL, NULL, NULL));
    receive("recvfrom", fd, 0);
}

#ifdef __GLIBC__
/* The process is ended before it writes past the end of the buffer. musl has no such functions. */
CASE(fortified_overflows) {
    int fd = server("s1");
    client_sends("c1", "s1", "x");
    for (int i = 0; i < 4; i++) {
        pid_t child = fork_child();
        if (child == 0) {
            char buffer[16];
            struct pollfd fds[1] = {{.fd = fd, .events = POLLIN}};
            /* What is said of it on standard error is no result. */
            close(2);
            if (i == 0)
                recv(fd, buffer, unknown(17), 0);
            if (i == 1)
                recvfrom(fd, buffer, unknown(17), 0, NULL, NULL);
            if (i == 2)
                read(fd, buffer, unknown(17));
            if (i == 3)
                poll(fds, unknown(2), 0);
            _exit(0);
        }
        wait_child("overflow", child);
    }
    receive("recvfrom", fd, 0);
}
#endif
