/* Sockets that are connected to a client, and the names of sockets. */
#include "harness.h"

#include <linux/errqueue.h>

static void show_names(const char *label, int fd) {
    address at = {.len = sizeof at.storage};
    long result = getsockname(fd, &at.sa, &at.len);
    row("%s: getsockname -> %s %s", label, result_text(result), name_of(&at, at.len));
    at = (address){.len = sizeof at.storage};
    result = getpeername(fd, &at.sa, &at.len);
    row("%s: getpeername -> %s %s", label, result_text(result),
        result < 0 ? "" : name_of(&at, at.len));
}

static long connect_to(int fd, const char *client) {
    address to = address_of(client);
    return connect(fd, &to.sa, to.len);
}

static int acquainted_with(const char *name, int flags) {
    int fd = udp_socket(flags), on = 1;
    must("setsockopt", setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on));
    bind_to(fd, name);
    const char *clients[] = {"c1", "c2"};
    for (int i = 0; i < 2; i++) {
        client_sends(clients[i], name, "hello");
        receive("recvfrom", fd, 0);
    }
    return fd;
}

CASE(names_of_sockets) {
    int fd = udp_socket(0);
    show_names("new", fd);
    bind_to(fd, "s1");
    show_names("bound", fd);
    client_sends("c1", "s1", "x");
    receive("recvfrom", fd, 0);
    show_names("used", fd);
    const socklen_t sizes[] = {0, 4, 16, 28, 128};
    for (int i = 0; i < 5; i++) {
        unsigned char *name = fresh(128);
        socklen_t len = sizes[i];
        long result = getsockname(fd, (struct sockaddr *)name, &len);
        row("of %u -> %s length %u%s", sizes[i], result_text(result), len,
            overwritten(name, 128, sizes[i] < len ? sizes[i] : len));
    }
    address at;
    socklen_t len = -1;
    outcome("negative length", getsockname(fd, &at.sa, &len));
    outcome("no length", getsockname(fd, &at.sa, NULL));
    len = 128;
    outcome("no address", getsockname(fd, NULL, &len));
    outcome("peer, no length", getpeername(fd, &at.sa, NULL));
    int any = udp_socket(0);
    address everywhere = any_address("s2");
    outcome("bind", bind(any, &everywhere.sa, everywhere.len));
    show_names("any", any);
}

CASE(connected_socket) {
    int fd = acquainted_with("s1", 0);
    outcome("connect", connect_to(fd, "c1"));
    show_names("connected", fd);
    outcome("send", send(fd, "by send", 7, 0));
    outcome("write", write(fd, "by write", 8));
    struct iovec iov[2] = {{"by ", 3}, {"writev", 6}};
    outcome("writev", writev(fd, iov, 2));
    outcome("sendto NULL", sendto(fd, "by sendto", 9, 0, NULL, 0));
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = 2};
    outcome("sendmsg", sendmsg(fd, &message, 0));
    struct mmsghdr batch[2] = {{.msg_hdr = message}, {.msg_hdr = message}};
    outcome("sendmmsg", sendmmsg(fd, batch, 2, 0));
    outcome("write of 0", write(fd, "", 0));
    for (int i = 0; i < 8; i++)
        client_expects("c1");
    outcome("writev of 0", writev(fd, iov, 0));
    client_has_nothing("c1");
    client_sends("c2", "s1", "not for this socket");
    client_sends("c1", "s1", "for this socket");
    receive("recvfrom", fd, 0);
    receive("nothing", fd, MSG_DONTWAIT);
    client_sends("c1", "s1", "by recv");
    unsigned char *buffer = fresh(100);
    received("recv", recv(fd, buffer, 100, 0), buffer, 100, NULL, 0);
    client_sends("c1", "s1", "by read");
    received("read", read(fd, buffer, 100), buffer, 100, NULL, 0);
    client_sends_later("c1", "s1", "late");
    receive("recvfrom", fd, 0);
}

CASE(connected_socket_sends_elsewhere) {
    int fd = acquainted_with("s1", 0);
    outcome("connect", connect_to(fd, "c1"));
    address c1 = address_of("c1"), c2 = address_of("c2");
    outcome("to the peer", sendto(fd, "to c1", 5, 0, &c1.sa, c1.len));
    client_expects("c1");
    outcome("to another", sendto(fd, "to c2", 5, 0, &c2.sa, c2.len));
    client_expects("c2");
}

CASE(connected_again) {
    int fd = acquainted_with("s1", 0);
    outcome("connect", connect_to(fd, "c1"));
    outcome("connect", connect_to(fd, "c2"));
    show_names("second", fd);
    outcome("send", send(fd, "to c2", 5, 0));
    client_expects("c2");
    client_sends("c1", "s1", "not for this socket");
    client_sends("c2", "s1", "for this socket");
    receive("recvfrom", fd, 0);
    receive("nothing", fd, MSG_DONTWAIT);
}

CASE(disconnected) {
    int fd = acquainted_with("s1", 0);
    outcome("connect", connect_to(fd, "c1"));
    address none = {.sa.sa_family = AF_UNSPEC};
    outcome("connect to nothing", connect(fd, &none.sa, sizeof none.sa));
    show_names("disconnected", fd);
    outcome("send", send(fd, "x", 1, 0));
    /* Linux goes on to drop what comes from other IPv6 addresses than the former peer's. */
    if (family != V6)
        client_sends("c2", "s1", "from c2");
    client_sends("c1", "s1", "from c1");
    receive("recvfrom", fd, MSG_DONTWAIT);
    receive("recvfrom", fd, MSG_DONTWAIT);
    address c1 = address_of("c1");
    outcome("sendto", sendto(fd, "reply", 5, 0, &c1.sa, c1.len));
    client_expects("c1");
    outcome("once more", connect(fd, &none.sa, sizeof none.sa));
    outcome("connect", connect_to(fd, "c2"));
    show_names("connected", fd);
    outcome("send", send(fd, "to c2", 5, 0));
    client_expects("c2");
}

CASE(connect_errors) {
    int fd = acquainted_with("s1", 0);
    address c1 = address_of("c1");
    outcome("short", connect(fd, &c1.sa, c1.len - 1));
    outcome("1 byte", connect(fd, &c1.sa, 1));
    outcome("0 bytes", connect(fd, &c1.sa, 0));
    outcome("negative", connect(fd, &c1.sa, -1));
    outcome("too long", connect(fd, &c1.sa, 200));
    outcome("bad pointer", connect(fd, (void *)16, c1.len));
    outcome("NULL", connect(fd, NULL, c1.len));
    c1.sa.sa_family = AF_UNIX;
    outcome("wrong family", connect(fd, &c1.sa, c1.len));
    show_names("still", fd);
    client_sends("c2", "s1", "x");
    receive("recvfrom", fd, MSG_DONTWAIT);
}

/* DTLS servers give each client a socket of its own, bound to the listener's address. */
CASE(socket_for_each_client) {
    int listener = acquainted_with("s1", 0), on = 1;
    int fds[2];
    const char *clients[] = {"c1", "c2"};
    for (int i = 0; i < 2; i++) {
        fds[i] = udp_socket(0);
        must("setsockopt", setsockopt(fds[i], SOL_SOCKET, SO_REUSEADDR, &on, sizeof on));
        bind_to(fds[i], "s1");
        outcome("connect", connect_to(fds[i], clients[i]));
        show_names(clients[i], fds[i]);
    }
    client_sends("c2", "s1", "from c2");
    client_sends("c1", "s1", "from c1");
    client_sends("c3", "s1", "from c3");
    receive("socket of c1", fds[0], 0);
    receive("socket of c1", fds[0], MSG_DONTWAIT);
    receive("socket of c2", fds[1], 0);
    receive("socket of c2", fds[1], MSG_DONTWAIT);
    receive("listener", listener, 0);
    receive("listener", listener, MSG_DONTWAIT);
    outcome("send", send(fds[0], "to c1", 5, 0));
    outcome("send", send(fds[1], "to c2", 5, 0));
    client_expects("c1");
    client_expects("c2");
    close(fds[0]);
    client_sends("c1", "s1", "after the close");
    receive("listener", listener, 0);
}

/* TFTP servers answer from another port, to which the client then sends. */
static void transfer_socket(bool is_bound) {
    int listener = acquainted_with("s1", 0);
    int fd = udp_socket(0);
    if (is_bound) {
        address any = bind_address("s1");
        if (family == V4)
            any.in.sin_port = 0;
        else
            any.in6.sin6_port = 0;
        must("bind", bind(fd, &any.sa, any.len));
    }
    outcome("connect", connect_to(fd, "c1"));
    address peer = {.len = sizeof peer.storage};
    outcome("getpeername", getpeername(fd, &peer.sa, &peer.len));
    row("  %s", name_of(&peer, peer.len));
    outcome("send", send(fd, "block 1", 7, 0));
    client_expects_from_anywhere("c1");
    client_replies("c1", "ack 1");
    receive("recvfrom", fd, 0);
    outcome("send", send(fd, "block 2", 7, 0));
    client_expects_from_anywhere("c1");
    client_replies("c1", "ack 2");
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
    outcome("poll", poll(&poll_fd, 1, 5000));
    receive("recvfrom", fd, 0);
    client_sends("c2", "s1", "another");
    receive("transfer", fd, MSG_DONTWAIT);
    receive("listener", listener, 0);
    close(fd);
    client_sends("c1", "s1", "after the transfer");
    receive("listener", listener, 0);
}

CASE(transfer_socket_that_is_not_bound) { transfer_socket(false); }

CASE(transfer_socket_of_an_ephemeral_port) { transfer_socket(true); }

CASE(connected_to_a_stranger) {
    int fd = server("s1");
    outcome("connect", connect_to(fd, "c3"));
    show_names("connected", fd);
}

/* The kernel tells a connected socket that nobody listens at the other end. */
CASE(refused) {
    int fd = acquainted_with("s1", 0);
    char buffer[10];
    outcome("connect", connect_to(fd, "c1"));
    client_closes("c1");
    outcome("send", send(fd, "x", 1, 0));
    outcome("recv", recv(fd, buffer, 10, MSG_DONTWAIT));
    outcome("recv", recv(fd, buffer, 10, MSG_DONTWAIT));
    outcome("send", send(fd, "x", 1, 0));
    outcome("send", send(fd, "x", 1, 0));
    outcome("send", send(fd, "x", 1, 0));
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN | POLLOUT};
    outcome("poll", poll(&poll_fd, 1, 0));
    row("  %#x", poll_fd.revents);
    int error = -1;
    socklen_t len = sizeof error;
    outcome("SO_ERROR", getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len));
    row("  %s", error ? error_name(error) : "none");
    outcome("SO_ERROR", getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len));
    row("  %s", error ? error_name(error) : "none");
}

/* Afterwards, Linux sends to the other client what has no address. */
CASE(corked_for_another_client) {
    int fd = acquainted_with("s1", 0), cork = 1;
    client_sends("c2", "s1", "x");
    receive("recvfrom", fd, 0);
    outcome("connect", connect_to(fd, "c1"));
    outcome("send", send(fd, "first", 5, 0));
    client_expects("c1");
    address c1 = address_of("c1"), c2 = address_of("c2");
    for (int way = 0; way < 2; way++) {
        if (way == 0)
            must("setsockopt", setsockopt(fd, IPPROTO_UDP, UDP_CORK, &cork, sizeof cork));
        outcome("begin", sendto(fd, "for ", 4, way == 0 ? 0 : MSG_MORE, &c2.sa, c2.len));
        outcome("go on", sendto(fd, "two", 3, 0, &c2.sa, c2.len));
        cork = 0;
        must("setsockopt", setsockopt(fd, IPPROTO_UDP, UDP_CORK, &cork, sizeof cork));
        client_expects("c2");
        outcome("sendto", sendto(fd, "for one", 7, 0, &c1.sa, c1.len));
        client_expects("c1");
    }
}

/* A call that looks whether something is there leaves the error for the next call. */
CASE(refused_while_others_look) {
    int fd = acquainted_with("s1", 0), bytes, epoll = must("epoll", epoll_create1(0));
    char buffer[10];
    struct iovec iov[2] = {{buffer, 5}, {buffer, 5}};
    struct mmsghdr messages[2];
    memset(messages, 0, sizeof messages);
    for (int i = 0; i < 2; i++)
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &iov[i], .msg_iovlen = 1};
    struct epoll_event event = {.events = EPOLLIN};
    must("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
    outcome("connect", connect_to(fd, "c1"));
    client_closes("c1");
    for (int by = 0; by < 5; by++) {
        fd_set reads;
        FD_ZERO(&reads);
        FD_SET(fd, &reads);
        struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
        outcome("send", send(fd, "x", 1, 0));
        junk("s1", 3);
        if (by == 0)
            outcome("poll", poll(&poll_fd, 1, -1));
        else if (by == 1)
            outcome("select", select(fd + 1, &reads, NULL, NULL, NULL));
        else if (by == 2)
            outcome("epoll_wait", epoll_wait(epoll, &event, 1, -1));
        else if (by == 3)
            outcome("FIONREAD", ioctl(fd, FIONREAD, &bytes));
        if (by < 4)
            outcome("recv", recv(fd, buffer, 10, 0));
        else
            outcome("sendmmsg", sendmmsg(fd, messages, 2, 0));
        outcome("again", recv(fd, buffer, 10, MSG_DONTWAIT));
    }
    outcome("sendmmsg to nobody", sendmmsg(fd, messages, 2, 0));
}

CASE(refused_with_an_error_queue) {
    int fd = acquainted_with("s1", 0), on = 1;
    must("setsockopt", family == V6 ? setsockopt(fd, IPPROTO_IPV6, IPV6_RECVERR, &on, sizeof on)
                                    : setsockopt(fd, IPPROTO_IP, IP_RECVERR, &on, sizeof on));
    outcome("connect", connect_to(fd, "c1"));
    client_closes("c1");
    outcome("send", send(fd, "payload", 7, 0));
    char bytes[200];
    _Alignas(struct cmsghdr) char control[512];
    struct iovec iov = {bytes, sizeof bytes};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
    outcome("poll", poll(&poll_fd, 1, 5000));
    /* Nothing is received to find out more, since the error would be gone then. */
    row("  %#x", poll_fd.revents & POLLERR);
    long result = recvmsg(fd, &message, MSG_ERRQUEUE);
    row("recvmsg -> %s flags %#x", result_text(result), (unsigned)message.msg_flags);
    for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(&message); result >= 0 && cmsg;
         cmsg = CMSG_NXTHDR(&message, cmsg)) {
        /* The same number is IP_RECVERR's at another level than IPV6_RECVERR's. */
        if (cmsg->cmsg_type != (cmsg->cmsg_level == IPPROTO_IP ? IP_RECVERR : IPV6_RECVERR))
            continue;
        struct sock_extended_err error;
        memcpy(&error, CMSG_DATA(cmsg), sizeof error);
        row("  %s origin %d type %d code %d", error_name(error.ee_errno), error.ee_origin,
            error.ee_type, error.ee_code);
    }
    outcome("recvmsg", recvmsg(fd, &message, MSG_ERRQUEUE));
    outcome("recvmsg", recvmsg(fd, &message, MSG_DONTWAIT));
    outcome("recvmsg", recvmsg(fd, &message, MSG_DONTWAIT));
}
