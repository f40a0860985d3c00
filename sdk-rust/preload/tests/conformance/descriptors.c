/* Copies of descriptors, closed and reused ones, processes that inherit or receive them,
 * options, and bind. */
#include "harness.h"

#include <spawn.h>

extern char **environ;

static void exchange(const char *label, int fd, const char *name) {
    char buffer[100];
    address from = {.len = sizeof from.storage};
    client_sends("c1", name, label);
    long len = recvfrom(fd, buffer, sizeof buffer, 0, &from.sa, &from.len);
    row("%s: recvfrom -> %s %s", label, result_text(len), bytes_text(buffer, len > 0 ? len : 0));
    if (len < 0)
        return;
    row("%s: from %s, sendto -> %s", label, name_of(&from, from.len),
        result_text(sendto(fd, buffer, len, 0, &from.sa, from.len)));
    client_expects("c1");
}

CASE(copies) {
    int fd = server("s1");
    int copies[6];
    copies[0] = dup(fd);
    copies[1] = dup2(fd, 100);
    copies[2] = dup3(fd, 101, O_CLOEXEC);
    copies[3] = fcntl(fd, F_DUPFD, 102);
    copies[4] = fcntl(fd, F_DUPFD_CLOEXEC, 102);
    copies[5] = dup2(fd, fd) == fd ? fd : -1;
    for (int i = 0; i < 6; i++) {
        row("copy %d: %s %s", i, copies[i] >= 100 || copies[i] == fd ? result_text(copies[i] - fd) : "new",
            fcntl(copies[i], F_GETFD) & FD_CLOEXEC ? "cloexec" : "kept");
        exchange("copy", copies[i], "s1");
    }
    outcome("dup3 onto itself", dup3(fd, fd, 0));
    outcome("dup3 with bad flags", dup3(fd, 100, O_APPEND));
    outcome("dup2 onto -1", dup2(fd, -1));
    outcome("F_DUPFD of -1", fcntl(fd, F_DUPFD, -1));
    close(fd);
    exchange("after the close", copies[0], "s1");
    for (int i = 0; i < 4; i++)
        close(copies[i]);
    exchange("the last", copies[4], "s1");
}

CASE(copies_share_what_is_peeked_and_set) {
    int fd = server("s1"), copy = dup(fd);
    client_sends("c1", "s1", "one");
    receive("peek", fd, MSG_PEEK);
    receive("by the copy", copy, 0);
    receive("nothing", fd, MSG_DONTWAIT);
    must("fcntl", fcntl(copy, F_SETFL, O_NONBLOCK));
    receive("without blocking", fd, 0);
    must("fcntl", fcntl(fd, F_SETFL, 0));
    struct timeval timeout = {0, 10000};
    must("setsockopt", setsockopt(copy, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout));
    receive("with a timeout", fd, 0);
}

CASE(copies_replace_others) {
    int one = server("s1"), two = server("s2");
    outcome("dup2", dup2(one, two) == two ? 0 : -1);
    exchange("first twice", two, "s1");
    int null = open("/dev/null", O_RDWR);
    char buffer[10];
    outcome("dup2", dup2(null, two) == two ? 0 : -1);
    outcome("read of /dev/null", read(two, buffer, 10));
    outcome("recv of /dev/null", recv(two, buffer, 10, 0));
    outcome("write to /dev/null", write(two, buffer, 10));
    exchange("first still", one, "s1");
    outcome("dup2 onto a file", dup2(one, null) == null ? 0 : -1);
    close(one);
    exchange("by the file's number", null, "s1");
}

CASE(numbers_are_reused) {
    char buffer[10];
    int fd = server("s1");
    exchange("first", fd, "s1");
    close(fd);
    int pipes[2];
    must("pipe", pipe(pipes));
    row("pipe has the number: %d", pipes[0] == fd);
    must("write", write(pipes[1], "in a pipe", 9));
    row("read -> %s %s", result_text(read(pipes[0], buffer, 10)), bytes_text(buffer, 9));
    close(pipes[0]);
    int again = server("s2");
    row("socket has the number: %d", again == fd);
    exchange("second", again, "s2");
    close(again);
    int other = udp_socket(0);
    row("unbound socket has the number: %d", other == fd);
    outcome("recv", recv(other, buffer, 10, MSG_DONTWAIT));
    close(other);
    int file = open("/proc/self/stat", O_RDONLY);
    row("read of a file: %d", read(file, buffer, 10) == 10);
}

CASE(close_and_bind_again) {
    for (int i = 0; i < 3; i++) {
        int fd = server("s1");
        exchange("round", fd, "s1");
        outcome("close", close(fd));
        outcome("close again", close(fd));
    }
}

CASE(close_ranges) {
    int one = server("s1"), two = server("s2"), three = server("s3");
    char buffer[10];
    must("dup2", dup2(one, 200));
    must("dup2", dup2(two, 201));
    must("dup2", dup2(three, 202));
    outcome("close_range", close_range(200, 201, 0));
    outcome("recv", recv(200, buffer, 10, MSG_DONTWAIT));
    outcome("recv", recv(201, buffer, 10, MSG_DONTWAIT));
    exchange("beyond the range", 202, "s3");
    exchange("one", one, "s1");
    outcome("bad range", close_range(10, 5, 0));
    outcome("bad flags", close_range(200, 205, 99));
    outcome("cloexec", close_range(202, 202, CLOSE_RANGE_CLOEXEC));
    row("  %d", fcntl(202, F_GETFD));
    exchange("cloexec", 202, "s3");
    closefrom(200);
    outcome("recv", recv(202, buffer, 10, MSG_DONTWAIT));
    exchange("three", three, "s3");
    must("pipe", pipe2((int *)buffer, 0));
    outcome("to the end", close_range(one, ~0U, 0));
    outcome("recv", recv(one, buffer, 10, MSG_DONTWAIT));
    outcome("recv", recv(three, buffer, 10, MSG_DONTWAIT));
}

/* ---- processes ---- */

CASE(fork_child_answers) {
    int fd = server("s1");
    exchange("before", fd, "s1");
    pid_t child = fork_child();
    if (child == 0) {
        exchange("child", fd, "s1");
        _exit(0);
    }
    wait_child("child", child);
    exchange("parent", fd, "s1");
}

CASE(fork_shares_what_is_known_of_clients) {
    int fd = server("s1"), pipes[2];
    address c1 = address_of("c1"), c2 = address_of("c2");
    char buffer[10];
    must("pipe", pipe(pipes));
    client_sends("c1", "s1", "before");
    receive("parent", fd, 0);
    pid_t child = fork_child();
    if (child == 0) {
        outcome("child: sendto", sendto(fd, "child", 5, 0, &c1.sa, c1.len));
        client_expects("c1");
        client_sends("c2", "s1", "to the child");
        receive("child", fd, 0);
        must("write", write(pipes[1], "x", 1));
        _exit(0);
    }
    must("read", read(pipes[0], buffer, 1));
    wait_child("child", child);
    outcome("parent: sendto", sendto(fd, "parent", 6, 0, &c2.sa, c2.len));
    client_expects("c2");
}

CASE(fork_child_closes) {
    int fd = server("s1");
    pid_t child = fork_child();
    if (child == 0) {
        outcome("child: close", close(fd));
        char buffer[10];
        outcome("child: recv", recv(fd, buffer, 10, 0));
        _exit(0);
    }
    wait_child("child", child);
    exchange("parent", fd, "s1");
    child = fork_child();
    if (child == 0) {
        exchange("child", fd, "s1");
        _exit(0);
    }
    close(fd);
    wait_child("child", child);
}

CASE(fork_of_many_that_receive) {
    int fd = server("s1"), pipes[2];
    must("pipe", pipe(pipes));
    pid_t children[4];
    for (int i = 0; i < 4; i++) {
        children[i] = fork_child();
        if (children[i] == 0) {
            char buffer[2000];
            for (;;) {
                address from = {.len = sizeof from.storage};
                long len = recvfrom(fd, buffer, sizeof buffer, 0, &from.sa, &from.len);
                if (len == 0)
                    _exit(0);
                must("sendto", sendto(fd, buffer, len, 0, &from.sa, from.len));
                must("write", write(pipes[1], &len, sizeof len));
            }
        }
    }
    long sum = 0;
    for (int i = 1; i <= 60; i++)
        client_sends_bytes(i % 2 ? "c1" : "c2", "s1", i);
    for (int i = 0; i < 60; i++) {
        long len;
        must("read", read(pipes[0], &len, sizeof len));
        sum += len;
    }
    row("%ld bytes", sum);
    for (int i = 0; i < 4; i++)
        client_sends("c1", "s1", "");
    for (int i = 0; i < 4; i++)
        wait_child("child", children[i]);
}

CASE(fork_then_bind) {
    pid_t child = fork_child();
    if (child == 0) {
        int fd = server("s1");
        exchange("child", fd, "s1");
        _exit(0);
    }
    wait_child("child", child);
    int fd = server("s1");
    exchange("parent", fd, "s1");
}

CASE(fork_of_fork) {
    int fd = server("s1");
    exchange("parent", fd, "s1");
    pid_t child = fork_child();
    if (child == 0) {
        pid_t grandchild = fork_child();
        if (grandchild == 0) {
            exchange("grandchild", fd, "s1");
            _exit(0);
        }
        wait_child("grandchild", grandchild);
        exchange("child", fd, "s1");
        _exit(0);
    }
    wait_child("child", child);
    exchange("parent", fd, "s1");
}

/* The arguments with which this program is run again to do `what` with `fd`. */
static char **arguments_after_exec(const char *what, int fd) {
    static char *arguments[64];
    static char text[4096], number[16];
    int file = open("/proc/self/cmdline", O_RDONLY);
    ssize_t len = must("read", read(file, text, sizeof text - 1)), count = 0, at = 0;
    close(file);
    snprintf(number, sizeof number, "%d", fd);
    for (; at < len && count < 60; at += strlen(text + at) + 1) {
        arguments[count++] = text + at;
        if (count == 3) {
            arguments[count++] = (char *)what;
            arguments[count++] = number;
        }
    }
    arguments[1] = "after_exec";
    arguments[count] = NULL;
    return arguments;
}

int after_exec(int argc, char **argv) {
    const char *what = argv[3];
    int fd = atoi(argv[4]);
    (void)argc;
    if (strcmp(what, "exchange") == 0) {
        exchange("after exec", fd, "s1");
        exchange("after exec again", fd, "s1");
    } else if (strcmp(what, "closed") == 0) {
        char buffer[10];
        outcome("after exec: recv", recv(fd, buffer, 10, MSG_DONTWAIT));
        outcome("after exec: read", read(fd, buffer, 10));
        outcome("after exec: close", close(fd));
    } else {
        return 9;
    }
    return 0;
}

CASE(exec_keeps_sockets) {
    int fd = server("s1");
    char **arguments = arguments_after_exec("exchange", fd);
    exchange("before exec", fd, "s1");
    pid_t child = fork_child();
    if (child == 0) {
        execv("/proc/self/exe", arguments);
        _exit(8);
    }
    wait_child("exec", child);
    exchange("parent", fd, "s1");
}

CASE(exec_closes_sockets) {
    int fd = server_with("s1", SOCK_CLOEXEC);
    char **arguments = arguments_after_exec("closed", fd);
    pid_t child = fork_child();
    if (child == 0) {
        execve("/proc/self/exe", arguments, environ);
        _exit(8);
    }
    wait_child("exec", child);
    exchange("parent", fd, "s1");
}

CASE(vfork_and_exec) {
    int fd = server("s1");
    char **arguments = arguments_after_exec("exchange", fd);
    exchange("before", fd, "s1");
    pid_t child = vfork();
    if (child == 0) {
        execv("/proc/self/exe", arguments);
        _exit(8);
    }
    wait_child("exec", child);
    exchange("parent", fd, "s1");
}

CASE(vfork_child_closes) {
    int fd = server("s1");
    char **arguments = arguments_after_exec("closed", fd);
    pid_t child = vfork();
    if (child == 0) {
        close(fd);
        execv("/proc/self/exe", arguments);
        _exit(8);
    }
    wait_child("exec", child);
    exchange("parent", fd, "s1");
    child = vfork();
    if (child == 0) {
        dup2(2, fd);
        close_range(fd, fd, 0);
        _exit(7);
    }
    wait_child("vfork", child);
    exchange("parent", fd, "s1");
}

CASE(spawned_program) {
    int fd = server_with("s1", SOCK_CLOEXEC);
    char **arguments = arguments_after_exec("exchange", 150);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, fd, 150);
    posix_spawn_file_actions_addclose(&actions, fd);
    pid_t child;
    int error = posix_spawn(&child, "/proc/self/exe", &actions, NULL, arguments, environ);
    wait_child("spawned", child);
    row("posix_spawn -> %d", error);
    exchange("parent", fd, "s1");
}

static void pass_descriptor(int through, int fd) {
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof fd)];
    memset(control, 0, sizeof control);
    struct iovec iov = {"fd", 2};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&message);
    *cmsg = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET,
                             .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(cmsg), &fd, sizeof fd);
    must("sendmsg", sendmsg(through, &message, 0));
}

static int take_descriptor(int through, int flags) {
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    char text[10];
    struct iovec iov = {text, 10};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    long result = recvmsg(through, &message, flags);
    row("recvmsg of a descriptor -> %s %s control %zu flags %#x", result_text(result),
        bytes_text(text, 2), (size_t)message.msg_controllen, (unsigned)message.msg_flags);
    int fd = -1;
    if (CMSG_FIRSTHDR(&message))
        memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

CASE(passed_descriptor) {
    int fd = server("s1"), pair[2];
    must("socketpair", socketpair(AF_UNIX, SOCK_DGRAM, 0, pair));
    exchange("first", fd, "s1");
    pass_descriptor(pair[0], fd);
    int taken = take_descriptor(pair[1], MSG_CMSG_CLOEXEC);
    exchange("taken", taken, "s1");
    close(fd);
    exchange("taken alone", taken, "s1");
}

CASE(descriptor_passed_to_another_process) {
    int pair[2];
    must("socketpair", socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    pid_t child = fork_child();
    if (child == 0) {
        int taken = take_descriptor(pair[1], 0);
        exchange("child", taken, "s1");
        _exit(0);
    }
    int fd = server("s1");
    pass_descriptor(pair[0], fd);
    wait_child("child", child);
    exchange("parent", fd, "s1");
}

/* ---- other descriptors ---- */

CASE_IN(other_descriptors_are_untouched, V4) {
    int pair[2], pipes[2];
    char buffer[20];
    must("socketpair", socketpair(AF_UNIX, SOCK_DGRAM, 0, pair));
    must("pipe", pipe(pipes));
    outcome("send", send(pair[0], "unix", 4, 0));
    outcome("recv", recv(pair[1], buffer, 20, 0));
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    socklen_t len = sizeof name;
    outcome("write", write(pair[1], "back", 4));
    row("recvfrom -> %s length %u", result_text(recvfrom(pair[0], buffer, 20, 0, (void *)&name, &len)), len);
    outcome("getpeername", getpeername(pair[0], (void *)&name, &len));
    struct iovec iov[2] = {{buffer, 2}, {buffer + 2, 18}};
    outcome("writev", writev(pipes[1], iov, 1));
    outcome("readv", readv(pipes[0], iov, 2));

    int listener = must("socket", socket(AF_INET, SOCK_STREAM, 0));
    address at = address_of("s1");
    int on = 1;
    must("setsockopt", setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on));
    must("bind", bind(listener, &at.sa, at.len));
    outcome("listen", listen(listener, 5));
    int client = must("socket", socket(AF_INET, SOCK_STREAM, 0));
    outcome("connect", connect(client, &at.sa, at.len));
    int accepted = accept(listener, NULL, NULL);
    outcome("write", write(client, "over TCP", 8));
    row("read -> %s %s", result_text(read(accepted, buffer, 20)), bytes_text(buffer, 8));
    outcome("send", send(accepted, "answer", 6, 0));
    row("recv -> %s %s", result_text(recv(client, buffer, 20, 0)), bytes_text(buffer, 6));
    at = (address){.len = sizeof at.storage};
    outcome("getpeername", getpeername(client, &at.sa, &at.len));
    row("  %s", name_of(&at, at.len));
    int udp = server("s1");
    outcome("listen on UDP", listen(udp, 5));
    outcome("accept on UDP", accept(udp, NULL, NULL));
}

/* What the program sends of its own accord, to servers, is no business of the library's. */
CASE(ephemeral_sockets_are_untouched) {
    int fd = udp_socket(0);
    address at = {.len = sizeof at.storage}, c1 = address_of("c1");
    outcome("sendto", sendto(fd, "question", 8, 0, &c1.sa, c1.len));
    client_expects_directly("c1");
    outcome("getsockname", getsockname(fd, &at.sa, &at.len));
    row("port %s", (family == V4 ? at.in.sin_port : at.in6.sin6_port) ? "chosen" : "none");
}

CASE(options) {
    int fd = udp_socket(0), value = 1;
    socklen_t len = sizeof value;
    outcome("SO_REUSEADDR", setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &value, len));
    outcome("SO_REUSEPORT", setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &value, len));
    bind_to(fd, "s1");
    const struct {
        const char *name;
        int level, option;
    } gets[] = {{"SO_TYPE", SOL_SOCKET, SO_TYPE},         {"SO_DOMAIN", SOL_SOCKET, SO_DOMAIN},
                {"SO_PROTOCOL", SOL_SOCKET, SO_PROTOCOL}, {"SO_ACCEPTCONN", SOL_SOCKET, SO_ACCEPTCONN},
                {"SO_ERROR", SOL_SOCKET, SO_ERROR},       {"SO_REUSEADDR", SOL_SOCKET, SO_REUSEADDR},
                {"SO_REUSEPORT", SOL_SOCKET, SO_REUSEPORT}, {"SO_BROADCAST", SOL_SOCKET, SO_BROADCAST},
                {"UDP_CORK", IPPROTO_UDP, UDP_CORK},      {"UDP_SEGMENT", IPPROTO_UDP, UDP_SEGMENT},
                {"UDP_GRO", IPPROTO_UDP, UDP_GRO},        {"IP_TOS", IPPROTO_IP, IP_TOS},
                {"IP_TTL", IPPROTO_IP, IP_TTL},           {"IP_RECVTOS", IPPROTO_IP, IP_RECVTOS},
                {"IP_MTU", IPPROTO_IP, IP_MTU},           {"no option", SOL_SOCKET, 9999},
                {"no level", 9999, 1}};
    for (size_t i = 0; i < sizeof gets / sizeof *gets; i++) {
        value = -7;
        len = sizeof value;
        long result = getsockopt(fd, gets[i].level, gets[i].option, &value, &len);
        row("%s -> %s %d (%u)", gets[i].name, result_text(result), value, len);
    }
    value = 1;
    len = sizeof value;
    outcome("set no option", setsockopt(fd, SOL_SOCKET, 9999, &value, len));
    outcome("set no level", setsockopt(fd, 9999, 1, &value, len));
    outcome("short", setsockopt(fd, SOL_SOCKET, SO_BROADCAST, &value, 1));
    outcome("bad pointer", setsockopt(fd, SOL_SOCKET, SO_BROADCAST, (void *)16, 4));
    outcome("get, bad pointer", getsockopt(fd, SOL_SOCKET, SO_BROADCAST, (void *)16, &len));
    outcome("get, no length", getsockopt(fd, SOL_SOCKET, SO_BROADCAST, &value, NULL));
    len = -1;
    outcome("get, negative length", getsockopt(fd, SOL_SOCKET, SO_BROADCAST, &value, &len));
    len = 2;
    value = 0;
    outcome("get, 2 bytes", getsockopt(fd, SOL_SOCKET, SO_TYPE, &value, &len));
    row("  %d (%u)", value, len);
    exchange("after all", fd, "s1");
}

CASE(receive_offload_option) {
    int fd = server("s1"), value = 1;
    socklen_t len = sizeof value;
    outcome("set", setsockopt(fd, IPPROTO_UDP, UDP_GRO, &value, len));
    value = 9;
    outcome("get", getsockopt(fd, IPPROTO_UDP, UDP_GRO, &value, &len));
    row("  %d (%u)", value, len);
    client_sends_bytes("c1", "s1", 1000);
    client_sends_bytes("c1", "s1", 1000);
    client_sends_bytes("c1", "s1", 500);
    for (int i = 0; i < 3; i++)
        receive("recvfrom", fd, MSG_DONTWAIT);
    value = 0;
    outcome("off", setsockopt(fd, IPPROTO_UDP, UDP_GRO, &value, sizeof value));
    value = 9;
    outcome("get", getsockopt(fd, IPPROTO_UDP, UDP_GRO, &value, &len));
    row("  %d", value);
    len = 2;
    value = 0;
    outcome("get, 2 bytes", getsockopt(fd, IPPROTO_UDP, UDP_GRO, &value, &len));
    row("  %d (%u)", value, len);
    len = -1;
    outcome("get, negative", getsockopt(fd, IPPROTO_UDP, UDP_GRO, &value, &len));
    outcome("get, no length", getsockopt(fd, IPPROTO_UDP, UDP_GRO, &value, NULL));
    outcome("set, 1 byte", setsockopt(fd, IPPROTO_UDP, UDP_GRO, &value, 1));
    outcome("set, bad pointer", setsockopt(fd, IPPROTO_UDP, UDP_GRO, (void *)16, 4));
}

CASE(bind_errors) {
    int fd = server("s1"), other = udp_socket(0);
    address at = bind_address("s1");
    outcome("bound already", bind(fd, &at.sa, at.len));
    outcome("in use", bind(other, &at.sa, at.len));
    outcome("short", bind(other, &at.sa, at.len - 1));
    outcome("1 byte", bind(other, &at.sa, 1));
    outcome("negative", bind(other, &at.sa, -1));
    outcome("bad pointer", bind(other, (void *)16, at.len));
    address none = at;
    if (family == V4)
        none.in.sin_addr.s_addr = htonl(0x01020304);
    else
        none.in6.sin6_addr.s6_addr[0] = 0x12;
    outcome("no such address", bind(other, &none.sa, none.len));
    none = at;
    none.sa.sa_family = AF_UNIX;
    outcome("wrong family", bind(other, &none.sa, none.len));
    bind_to(other, "s2");
    exchange("after all", other, "s2");
    exchange("first", fd, "s1");
}

CASE_IN(bind_by_family_unspec, V4) {
    int fd = udp_socket(0);
    address any = any_address("s1");
    any.sa.sa_family = AF_UNSPEC;
    outcome("bind", bind(fd, &any.sa, any.len));
    exchange("exchange", fd, "s1");
}

CASE(shared_ports) {
    int fds[2], on = 1;
    for (int i = 0; i < 2; i++) {
        fds[i] = udp_socket(0);
        must("setsockopt", setsockopt(fds[i], SOL_SOCKET, SO_REUSEPORT, &on, sizeof on));
        bind_to(fds[i], "s1");
    }
    address c1 = address_of("c1");
    client_sends("c1", "s1", "x");
    struct pollfd poll_fds[2] = {{.fd = fds[0], .events = POLLIN}, {.fd = fds[1], .events = POLLIN}};
    outcome("poll", poll(poll_fds, 2, 5000));
    int got = poll_fds[0].revents ? 0 : 1;
    receive("the one that has it", fds[got], 0);
    outcome("sendto by the other", sendto(fds[1 - got], "reply", 5, 0, &c1.sa, c1.len));
    client_expects("c1");
}
