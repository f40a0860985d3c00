/* Calls that wait for a socket to be readable. A socket in blocking mode is not called
 * readable for what will be dropped. One in non-blocking mode may be, as by Linux itself. */
#include "harness.h"

static void show_poll(const char *label, struct pollfd *fds, int count, int timeout) {
    int result = poll(fds, count, timeout);
    row("%s -> %s", label, result_text(result));
    for (int i = 0; i < count; i++)
        row("  %#x", fds[i].revents);
}

CASE(poll_one) {
    int fd = server("s1");
    struct pollfd fds = {.fd = fd, .events = POLLIN};
    junk("s1", 3);
    show_poll("nothing", &fds, 1, 0);
    show_poll("nothing for a while", &fds, 1, 20);
    client_sends("c1", "s1", "one");
    show_poll("one", &fds, 1, 0);
    show_poll("still one", &fds, 1, -1);
    fds.events = POLLIN | POLLOUT | POLLPRI | POLLRDNORM | POLLRDBAND;
    show_poll("all events", &fds, 1, -1);
    receive("recvfrom", fd, 0);
    show_poll("only to write", &fds, 1, -1);
    fds.events = POLLIN;
    show_poll("nothing", &fds, 1, 0);
    client_sends_later("c1", "s1", "late");
    show_poll("waits", &fds, 1, 5000);
    receive("recvfrom", fd, 0);
    client_sends("c1", "s1", "");
    show_poll("an empty one", &fds, 1, 5000);
    receive("recvfrom", fd, 0);
    show_poll("nothing", &fds, 1, 0);
}

CASE(poll_many) {
    int one = server("s1"), two = server("s2"), three = server("s3"), pipes[2];
    must("pipe", pipe(pipes));
    struct pollfd fds[] = {{.fd = one, .events = POLLIN},     {.fd = -1, .events = POLLIN},
                           {.fd = two, .events = POLLIN},     {.fd = pipes[0], .events = POLLIN},
                           {.fd = three, .events = POLLOUT},  {.fd = 999, .events = POLLIN},
                           {.fd = -one, .events = POLLIN},    {.fd = two, .events = POLLIN}};
    junk("s1", 2);
    junk("s2", 2);
    show_poll("to write", fds, 8, 0);
    fds[4].events = 0;
    fds[5].fd = -1;
    show_poll("nothing", fds, 8, 0);
    client_sends("c1", "s2", "x");
    show_poll("two", fds, 8, -1);
    must("write", write(pipes[1], "x", 1));
    show_poll("two and pipe", fds, 8, -1);
    receive("recvfrom", two, 0);
    show_poll("pipe", fds, 8, -1);
    client_sends("c1", "s1", "x");
    client_sends("c1", "s3", "x");
    show_poll("one and pipe", fds, 8, -1);
    close(pipes[1]);
    char byte;
    must("read", read(pipes[0], &byte, 1));
    receive("recvfrom", one, 0);
    show_poll("pipe hung up", fds, 8, -1);
    fds[3].fd = -1;
    client_sends_later("c2", "s2", "late");
    show_poll("waits", fds, 8, 5000);
}

CASE(poll_errors) {
    int fd = server("s1");
    struct pollfd fds = {.fd = fd, .events = POLLIN};
    outcome("no descriptors", poll(NULL, 0, 0));
    outcome("no descriptors for a while", poll(NULL, 0, 5));
    outcome("bad pointer", poll((void *)16, 1, 0));
    outcome("too many", poll(&fds, 100000000, 0));
    struct timespec bad = {0, 1000000000};
    outcome("bad timeout", ppoll(&fds, 1, &bad, NULL));
    close(fd);
    show_poll("closed", &fds, 1, 0);
}

CASE(ppoll_one) {
    int fd = server("s1");
    struct pollfd fds = {.fd = fd, .events = POLLIN};
    struct timespec zero = {0, 0}, short_time = {0, 10000000}, long_time = {5, 0};
    junk("s1", 3);
    outcome("nothing", ppoll(&fds, 1, &zero, NULL));
    outcome("nothing for a while", ppoll(&fds, 1, &short_time, NULL));
    row("timeouts %s", short_time.tv_nsec == 10000000 ? "unchanged" : "written");
    client_sends_later("c1", "s1", "late");
    outcome("waits", ppoll(&fds, 1, &long_time, NULL));
    row("  %#x", fds.revents);
    outcome("without a timeout", ppoll(&fds, 1, NULL, NULL));
    receive("recvfrom", fd, 0);
}

CASE(polls_end_in_a_stream_of_junk) {
    int fd = server("s1");
    struct pollfd fds = {.fd = fd, .events = POLLIN};
    junk_stream("s1");
    outcome("poll at once", poll(&fds, 1, 0));
    outcome("poll", poll(&fds, 1, 30));
    struct timeval timeout = {0, 30000};
    fd_set reads;
    FD_ZERO(&reads);
    FD_SET(fd, &reads);
    outcome("select", select(fd + 1, &reads, NULL, NULL, &timeout));
    int epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN};
    must("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
    outcome("epoll_wait", epoll_wait(epoll, &event, 1, 30));
    client_sends("c1", "s1", "x");
    receive("one", fd, 0);
}

static void show_select(const char *label, int count, const int *fds, struct timeval *timeout) {
    fd_set reads, writes, excepts;
    FD_ZERO(&reads);
    FD_ZERO(&writes);
    FD_ZERO(&excepts);
    int most = 0;
    for (int i = 0; i < count; i++) {
        FD_SET(fds[i], &reads);
        FD_SET(fds[i], &excepts);
        if (fds[i] > most)
            most = fds[i];
    }
    int result = select(most + 1, &reads, NULL, &excepts, timeout);
    row("%s -> %s", label, result_text(result));
    if (result >= 0)
        for (int i = 0; i < count; i++)
            row("  %d %d", FD_ISSET(fds[i], &reads), FD_ISSET(fds[i], &excepts));
}

CASE(select_sockets) {
    int fds[2] = {server("s1"), server("s2")};
    struct timeval zero = {0, 0}, short_time = {0, 10000}, long_time = {5, 0};
    junk("s1", 2);
    show_select("nothing", 2, fds, &zero);
    show_select("nothing for a while", 2, fds, &short_time);
    row("%ld.%06ld left", (long)short_time.tv_sec, (long)short_time.tv_usec);
    client_sends("c1", "s2", "x");
    show_select("second", 2, fds, &long_time);
    row("%s left", long_time.tv_sec >= 3 ? "more" : "less");
    show_select("second", 2, fds, NULL);
    receive("recvfrom", fds[1], 0);
    client_sends_later("c1", "s1", "late");
    show_select("waits", 2, fds, NULL);
    client_sends("c1", "s2", "x");
    show_select("both", 2, fds, NULL);
    show_select("only the first", 1, fds, NULL);
    receive("recvfrom", fds[0], 0);
    receive("recvfrom", fds[1], 0);
    junk("s1", 3);
    show_select("nothing", 2, fds, &zero);

    fd_set reads, writes;
    FD_ZERO(&reads);
    FD_ZERO(&writes);
    FD_SET(fds[0], &reads);
    FD_SET(fds[1], &writes);
    outcome("to write", select(fds[1] + 1, &reads, &writes, NULL, NULL));
    row("  %d %d", FD_ISSET(fds[0], &reads), FD_ISSET(fds[1], &writes));
    outcome("no sets", select(0, NULL, NULL, NULL, &zero));
    outcome("negative", select(-1, NULL, NULL, NULL, &zero));
    must("dup2", dup2(fds[0], 500));
    FD_ZERO(&reads);
    FD_SET(500, &reads);
    close(499);
    FD_SET(499, &reads);
    outcome("closed", select(501, &reads, NULL, NULL, &zero));
    outcome("bad pointer", select(10, (void *)16, NULL, NULL, &zero));
    struct timeval bad = {-1, 0};
    outcome("bad timeout", select(0, NULL, NULL, NULL, &bad));
}

CASE(pselect_sockets) {
    int fd = server("s1");
    fd_set reads;
    struct timespec zero = {0, 0}, long_time = {5, 0};
    FD_ZERO(&reads);
    FD_SET(fd, &reads);
    junk("s1", 2);
    outcome("nothing", pselect(fd + 1, &reads, NULL, NULL, &zero, NULL));
    row("  %d", FD_ISSET(fd, &reads));
    FD_SET(fd, &reads);
    client_sends_later("c1", "s1", "late");
    outcome("waits", pselect(fd + 1, &reads, NULL, NULL, &long_time, NULL));
    row("  %d timeout %ld", FD_ISSET(fd, &reads), (long)long_time.tv_sec);
    outcome("without a timeout", pselect(fd + 1, &reads, NULL, NULL, NULL, NULL));
    receive("recvfrom", fd, 0);
}

static int epoll_with(int fd, unsigned events, uint64_t data) {
    int epoll = must("epoll_create1", epoll_create1(EPOLL_CLOEXEC));
    struct epoll_event event = {.events = events, .data.u64 = data};
    must("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
    return epoll;
}

static void show_epoll(const char *label, int epoll, int timeout) {
    struct epoll_event events[4];
    int result = epoll_wait(epoll, events, 4, timeout);
    row("%s -> %s", label, result_text(result));
    for (int i = 0; i < result; i++)
        row("  %#x %llu", events[i].events, (unsigned long long)events[i].data.u64);
}

CASE(epoll_by_level) {
    int fd = server("s1"), epoll = epoll_with(fd, EPOLLIN, 7);
    junk("s1", 3);
    show_epoll("nothing", epoll, 0);
    show_epoll("nothing for a while", epoll, 10);
    client_sends("c1", "s1", "one");
    show_epoll("one", epoll, -1);
    show_epoll("still", epoll, 0);
    receive("recvfrom", fd, 0);
    show_epoll("nothing", epoll, 0);
    client_sends_later("c1", "s1", "late");
    show_epoll("waits", epoll, 5000);
    receive("recvfrom", fd, 0);
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.u64 = 8};
    outcome("EPOLL_CTL_MOD", epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event));
    junk("s1", 2);
    show_epoll("to write", epoll, -1);
    client_sends("c1", "s1", "x");
    show_epoll("both", epoll, -1);
    outcome("EPOLL_CTL_DEL", epoll_ctl(epoll, EPOLL_CTL_DEL, fd, NULL));
    show_epoll("removed", epoll, 0);
    receive("recvfrom", fd, 0);
}

CASE(epoll_of_several) {
    int one = server("s1"), two = server("s2"), pipes[2];
    int epoll = epoll_with(one, EPOLLIN, 1);
    must("pipe", pipe(pipes));
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 2};
    must("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_ADD, two, &event));
    event.data.u64 = 3;
    must("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_ADD, pipes[0], &event));
    junk("s1", 1);
    junk("s2", 1);
    show_epoll("nothing", epoll, 0);
    client_sends("c1", "s2", "x");
    show_epoll("two", epoll, -1);
    must("write", write(pipes[1], "x", 1));
    receive("recvfrom", two, 0);
    show_epoll("pipe", epoll, -1);
    char byte;
    must("read", read(pipes[0], &byte, 1));
    client_sends("c1", "s1", "x");
    show_epoll("one", epoll, -1);
    close(one);
    show_epoll("closed", epoll, 0);
}

/* Programs that use EPOLLET have non-blocking sockets and read until EAGAIN. */
static int drain(int fd, int *bytes) {
    char buffer[2000];
    int count = 0;
    ssize_t len;
    while ((len = recv(fd, buffer, sizeof buffer, 0)) >= 0) {
        count++;
        *bytes += len;
    }
    if (errno != EAGAIN)
        fail("recv: %s", strerror(errno));
    return count;
}

static void drain_until(int epoll, int fd, int wanted) {
    int count = 0, bytes = 0;
    struct epoll_event event;
    while (count < wanted && epoll_wait(epoll, &event, 1, 5000) == 1)
        count += drain(fd, &bytes);
    row("%d datagrams, %d bytes", count, bytes);
}

CASE(epoll_by_edge) {
    int fd = server_with("s1", SOCK_NONBLOCK), epoll = epoll_with(fd, EPOLLIN | EPOLLET, 7);
    client_sends("c1", "s1", "one");
    drain_until(epoll, fd, 1);
    client_sends("c1", "s1", "two");
    client_sends("c2", "s1", "three");
    drain_until(epoll, fd, 2);
    client_sends_later("c2", "s1", "four");
    drain_until(epoll, fd, 1);
    junk("s1", 150);
    client_sends("c3", "s1", "after junk");
    drain_until(epoll, fd, 1);
    for (int i = 0; i < 5; i++) {
        junk("s1", 100);
        client_sends_later("c3", "s1", "after a hundred");
        drain_until(epoll, fd, 1);
    }
}

CASE(epoll_by_edge_with_two_sockets) {
    int one = server_with("s1", SOCK_NONBLOCK), two = server_with("s2", SOCK_NONBLOCK);
    int epoll = epoll_with(one, EPOLLIN | EPOLLET | EPOLLOUT, one);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET | EPOLLOUT, .data.u64 = two};
    must("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_ADD, two, &event));
    junk("s1", 150);
    junk("s2", 150);
    client_sends("c1", "s1", "one");
    client_sends("c2", "s2", "two");
    int count = 0, bytes = 0;
    while (count < 2 && epoll_wait(epoll, &event, 1, 5000) == 1)
        count += drain(event.data.u64, &bytes);
    row("%d datagrams, %d bytes", count, bytes);
}

/* Two descriptors of one socket, each in an epoll set of its own. */
CASE(epoll_by_edge_of_a_copy) {
    int fd = server_with("s1", SOCK_NONBLOCK), copy = must("dup", dup(fd));
    int epoll = epoll_with(copy, EPOLLIN | EPOLLET, 7);
    junk("s1", 150);
    client_sends("c1", "s1", "one");
    drain_until(epoll, copy, 1);
    junk("s1", 150);
    client_sends("c1", "s1", "two");
    drain_until(epoll, fd, 1);
    close(fd);
    junk("s1", 150);
    client_sends("c1", "s1", "three");
    drain_until(epoll, copy, 1);
}

CASE(epoll_by_edge_in_blocking_mode) {
    int fd = server("s1"), epoll = epoll_with(fd, EPOLLIN | EPOLLET, 7);
    junk("s1", 2);
    show_epoll("nothing", epoll, 0);
    client_sends("c1", "s1", "one");
    show_epoll("one", epoll, 5000);
    receive("recvfrom", fd, 0);
    junk("s1", 2);
    show_epoll("nothing", epoll, 0);
    client_sends_later("c1", "s1", "two");
    show_epoll("two", epoll, 5000);
    receive("recvfrom", fd, 0);
    junk("s1", 150);
    client_sends("c1", "s1", "after junk");
    show_epoll("three", epoll, 5000);
    receive("recvfrom", fd, MSG_DONTWAIT);
}

/* Linux refuses EPOLL_CTL_MOD then. */
CASE(epoll_by_edge_alone) {
    int fd = server_with("s1", SOCK_NONBLOCK);
    int epoll = epoll_with(fd, EPOLLIN | EPOLLET | EPOLLEXCLUSIVE, 7);
    client_sends("c1", "s1", "one");
    drain_until(epoll, fd, 1);
    junk("s1", 150);
    client_sends("c1", "s1", "after junk");
    drain_until(epoll, fd, 1);
}

CASE(epoll_once) {
    int fd = server("s1"), epoll = epoll_with(fd, EPOLLIN | EPOLLONESHOT, 7);
    junk("s1", 3);
    show_epoll("nothing", epoll, 0);
    client_sends("c1", "s1", "one");
    show_epoll("one", epoll, 5000);
    show_epoll("once", epoll, 0);
    struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = 9};
    outcome("EPOLL_CTL_MOD", epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event));
    show_epoll("again", epoll, 5000);
    receive("recvfrom", fd, 0);
    outcome("EPOLL_CTL_MOD", epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event));
    junk("s1", 3);
    show_epoll("nothing", epoll, 0);
    client_sends_later("c1", "s1", "late");
    show_epoll("late", epoll, 5000);
    receive("recvfrom", fd, 0);
}

/* As several threads do that each receive one datagram for one event. */
CASE(epoll_once_without_blocking) {
    int fd = server_with("s1", SOCK_NONBLOCK), epoll = epoll_with(fd, EPOLLIN | EPOLLONESHOT, 7);
    int count = 0, bytes = 0;
    for (int i = 0; i < 3; i++) {
        junk("s1", 60);
        client_sends("c1", "s1", "x");
    }
    struct epoll_event event;
    while (count < 3 && epoll_wait(epoll, &event, 1, 5000) == 1) {
        count += drain(fd, &bytes);
        event = (struct epoll_event){.events = EPOLLIN | EPOLLONESHOT};
        must("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event));
    }
    row("%d datagrams, %d bytes", count, bytes);
}

CASE(epoll_errors) {
    int fd = server("s1"), epoll = epoll_with(fd, EPOLLIN, 7);
    struct epoll_event event = {.events = EPOLLIN};
    outcome("ADD twice", epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
    outcome("ADD of a closed one", epoll_ctl(epoll, EPOLL_CTL_ADD, 999, &event));
    outcome("ADD of itself", epoll_ctl(epoll, EPOLL_CTL_ADD, epoll, &event));
    outcome("ADD to no epoll", epoll_ctl(fd, EPOLL_CTL_ADD, fd, &event));
    outcome("bad operation", epoll_ctl(epoll, 99, fd, &event));
    outcome("bad pointer", epoll_ctl(epoll, EPOLL_CTL_MOD, fd, (void *)16));
    outcome("DEL", epoll_ctl(epoll, EPOLL_CTL_DEL, fd, NULL));
    outcome("DEL twice", epoll_ctl(epoll, EPOLL_CTL_DEL, fd, NULL));
    outcome("MOD without ADD", epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event));
    outcome("wait for none", epoll_wait(epoll, &event, 0, 0));
    outcome("wait for -1", epoll_wait(epoll, &event, -1, 0));
    outcome("wait on a socket", epoll_wait(fd, &event, 1, 0));
    outcome("wait on a closed one", epoll_wait(999, &event, 1, 0));
    must("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
    client_sends("c1", "s1", "x");
    outcome("bad pointer", epoll_wait(epoll, (void *)16, 1, 0));
}

CASE(epoll_pwait_variants) {
    int fd = server("s1"), epoll = epoll_with(fd, EPOLLIN, 7);
    struct epoll_event event = {0};
    struct timespec zero = {0, 0}, long_time = {5, 0};
    sigset_t none;
    sigemptyset(&none);
    junk("s1", 2);
    outcome("epoll_pwait of nothing", epoll_pwait(epoll, &event, 1, 0, &none));
    outcome("epoll_pwait2 of nothing", epoll_pwait2(epoll, &event, 1, &zero, NULL));
    client_sends_later("c1", "s1", "late");
    outcome("epoll_pwait", epoll_pwait(epoll, &event, 1, 5000, &none));
    outcome("epoll_pwait2", epoll_pwait2(epoll, &event, 1, &long_time, &none));
    row("  %#x %llu", event.events, (unsigned long long)event.data.u64);
    receive("recvfrom", fd, 0);
}

/* An epoll set in another one, or in poll: what it says is checked by the inner one. */
CASE(epoll_in_epoll) {
    int fd = server("s1"), inner = epoll_with(fd, EPOLLIN, 1), outer = epoll_with(inner, EPOLLIN, 2);
    client_sends("c1", "s1", "x");
    show_epoll("outer", outer, 5000);
    struct pollfd poll_fd = {.fd = inner, .events = POLLIN};
    show_poll("inner by poll", &poll_fd, 1, 5000);
    show_epoll("inner", inner, 0);
    receive("recvfrom", fd, 0);
    show_epoll("inner", inner, 0);
}

CASE(poll_loop_without_blocking) {
    int fd = server_with("s1", SOCK_NONBLOCK), count = 0, bytes = 0;
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
    junk("s1", 100);
    for (int i = 0; i < 3; i++)
        client_sends("c1", "s1", "x");
    junk("s1", 70);
    client_sends("c2", "s1", "x");
    while (count < 4 && poll(&poll_fd, 1, 5000) == 1)
        count += drain(fd, &bytes);
    row("%d datagrams, %d bytes", count, bytes);
}

CASE(blocking_after_much_junk) {
    int fd = server("s1");
    junk("s1", 180);
    client_sends("c1", "s1", "after much");
    receive("recvfrom", fd, 0);
    junk("s1", 180);
    client_sends("c1", "s1", "after more");
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
    show_poll("poll", &poll_fd, 1, 5000);
    receive("recvfrom", fd, 0);
    show_poll("nothing", &poll_fd, 1, 0);
}

/* The workers of a server that each have an epoll set with the same socket. */
CASE(epoll_of_forked_workers) {
    int fd = server_with("s1", SOCK_NONBLOCK), pipes[2];
    must("pipe", pipe(pipes));
    pid_t children[3];
    for (int i = 0; i < 3; i++) {
        children[i] = fork_child();
        if (children[i] != 0)
            continue;
        int epoll = epoll_with(fd, EPOLLIN | EPOLLEXCLUSIVE, 7);
        for (;;) {
            struct epoll_event event;
            if (epoll_wait(epoll, &event, 1, -1) != 1)
                _exit(1);
            char buffer[2000];
            address from = {.len = sizeof from.storage};
            long len = recvfrom(fd, buffer, sizeof buffer, 0, &from.sa, &from.len);
            if (len == 0)
                _exit(0);
            if (len > 0 && sendto(fd, buffer, len, 0, &from.sa, from.len) == len)
                must("write", write(pipes[1], &len, sizeof len));
        }
    }
    long sum = 0;
    for (int i = 1; i <= 40; i++) {
        long len;
        client_sends_bytes("c1", "s1", i);
        must("read", read(pipes[0], &len, sizeof len));
        sum += len;
        client_expects("c1");
    }
    row("%ld bytes", sum);
    for (int i = 0; i < 3; i++)
        client_sends("c1", "s1", "");
    for (int i = 0; i < 3; i++)
        wait_child("child", children[i]);
}

/* O_NONBLOCK belongs to the socket, whichever process sets it. */
CASE(blocking_mode_set_by_another_process) {
    int fd = server("s1");
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
    for (int i = 0; i < 2; i++) {
        pid_t child = fork_child();
        if (child == 0)
            _exit(fcntl(fd, F_SETFL, i == 0 ? O_NONBLOCK : 0) ? 1 : 0);
        wait_child("child", child);
        if (i == 0) {
            junk("s1", 20);
            client_sends("c1", "s1", "in non-blocking mode");
            receive("recvfrom", fd, 0);
            receive("nothing", fd, 0);
        } else {
            junk("s1", 3);
            show_poll("nothing", &poll_fd, 1, 0);
            client_sends_later("c1", "s1", "in blocking mode");
            receive("recvfrom", fd, 0);
        }
    }
}

/* Each descriptor of a socket is told of by an event of its own. */
CASE(epoll_of_two_descriptors_of_a_socket) {
    int fd = server("s1"), other = must("dup", dup(fd));
    int epoll = must("epoll_create1", epoll_create1(0));
    struct epoll_event events[4], event = {.events = EPOLLIN, .data.fd = fd};
    must("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
    event = (struct epoll_event){.events = EPOLLIN | EPOLLET, .data.fd = other};
    must("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_ADD, other, &event));
    junk("s1", 3);
    outcome("nothing", epoll_wait(epoll, events, 4, 20));
    client_sends("c1", "s1", "x");
    outcome("both", epoll_wait(epoll, events, 4, -1));
    receive("one", fd, 0);
    junk("s1", 3);
    outcome("nothing", epoll_wait(epoll, events, 4, 20));
}

CASE(epoll_once_for_reading_and_writing) {
    int fd = server("s1"), epoll = must("epoll_create1", epoll_create1(0));
    struct epoll_event events[2], event = {.events = EPOLLIN | EPOLLOUT | EPOLLONESHOT};
    junk("s1", 3);
    must("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
    outcome("writable", epoll_wait(epoll, events, 2, -1));
    row("  %#x", events[0].events);
    outcome("no more", epoll_wait(epoll, events, 2, 0));
    client_sends("c1", "s1", "x");
    outcome("still not", epoll_wait(epoll, events, 2, 0));
    must("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event));
    outcome("both", epoll_wait(epoll, events, 2, -1));
    row("  %#x", events[0].events);
}
