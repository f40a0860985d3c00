/* Calls that send: what they return, and what arrives at which client. */
#include "harness.h"

#include <netinet/ip.h>
#include <sys/sendfile.h>

/* A server's socket to which all three clients have sent. */
static int acquainted(const char *name) {
    int fd = server(name);
    char buffer[10];
    const char *clients[] = {"c1", "c2", "c3"};
    for (int i = 0; i < 3; i++) {
        client_sends(clients[i], name, "hello");
        must("recv", recv(fd, buffer, 10, 0));
    }
    return fd;
}

static long send_text(int fd, const char *client, const char *text) {
    address to = address_of(client);
    return sendto(fd, text, strlen(text), 0, &to.sa, to.len);
}

CASE(sendto_reaches_the_client) {
    int fd = acquainted("s1");
    outcome("sendto", send_text(fd, "c1", "one"));
    outcome("sendto", send_text(fd, "c3", "three"));
    outcome("sendto", send_text(fd, "c2", ""));
    client_expects("c1");
    client_expects("c2");
    client_expects("c3");
    for (int i = 0; i < 3; i++)
        outcome("sendto", send_text(fd, "c1", i == 0 ? "a" : i == 1 ? "b" : "c"));
    for (int i = 0; i < 3; i++)
        client_expects("c1");
    client_has_nothing("c1");
    client_has_nothing("c2");
}

CASE(replies_in_turn) {
    int fd = server("s1");
    for (int i = 0; i < 10; i++) {
        char buffer[2000];
        address from = {.len = sizeof from.storage};
        const char *client = i % 3 == 0 ? "c1" : i % 3 == 1 ? "c2" : "c3";
        client_sends_bytes(client, "s1", i * 150);
        long len = recvfrom(fd, buffer, sizeof buffer, 0, &from.sa, &from.len);
        row("%ld to %s: %s", len, name_of(&from, from.len),
            result_text(sendto(fd, buffer, len, 0, &from.sa, from.len)));
        client_expects(client);
    }
}

CASE(replies_from_two_sockets) {
    int one = acquainted("s1"), two = acquainted("s2");
    outcome("one", send_text(one, "c1", "from one"));
    client_expects("c1");
    outcome("two", send_text(two, "c1", "from two"));
    client_expects("c1");
}

CASE(large_replies) {
    int fd = acquainted("s1");
    const size_t sizes[] = {1472, 1473, 9000, 65400};
    char *bytes = calloc(1, 70000);
    address to = address_of("c1");
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        outcome("sendto", sendto(fd, bytes, sizes[i], 0, &to.sa, to.len));
        client_expects("c1");
    }
    outcome("too much", sendto(fd, bytes, 65528, 0, &to.sa, to.len));
    outcome("far too much", sendto(fd, bytes, 70000, 0, &to.sa, to.len));
    outcome("absurd", sendto(fd, bytes, (size_t)-1, 0, &to.sa, to.len));
    client_has_nothing("c1");
    outcome("sendto", send_text(fd, "c1", "after"));
    client_expects("c1");
}

CASE(sendmsg_gathers) {
    int fd = acquainted("s1");
    address to = address_of("c2");
    struct iovec iov[5] = {{"abc", 3}, {NULL, 0}, {"de", 2}, {(void *)1, 0}, {"fghij", 5}};
    struct msghdr message = {.msg_name = &to, .msg_namelen = to.len, .msg_iov = iov,
                             .msg_iovlen = 5};
    outcome("sendmsg", sendmsg(fd, &message, 0));
    client_expects("c2");
    message.msg_iovlen = 0;
    outcome("sendmsg of none", sendmsg(fd, &message, 0));
    client_expects("c2");
    message.msg_iovlen = 2;
    message.msg_flags = -1;
    outcome("sendmsg, flags in the message", sendmsg(fd, &message, MSG_NOSIGNAL));
    client_expects("c2");
    message.msg_namelen = 200;
    outcome("name too long", sendmsg(fd, &message, 0));
    message.msg_namelen = -1;
    outcome("name negative", sendmsg(fd, &message, 0));
    message.msg_namelen = 8;
    outcome("name short", sendmsg(fd, &message, 0));
    message.msg_namelen = sizeof to.storage;
    outcome("name of all", sendmsg(fd, &message, 0));
    client_expects("c2");
    message.msg_name = NULL;
    outcome("no name", sendmsg(fd, &message, 0));
    message.msg_name = &to;
    message.msg_namelen = to.len;
    message.msg_iovlen = 1025;
    outcome("1025 parts", sendmsg(fd, &message, 0));
    client_has_nothing("c2");
}

CASE(sendmmsg_reaches_all) {
    int fd = acquainted("s1");
    const char *clients[] = {"c1", "c2", "c3", "c1", "c2"};
    const char *texts[] = {"one", "", "three", "four", "five"};
    address to[5];
    struct iovec iov[5];
    struct mmsghdr messages[5];
    memset(messages, 0, sizeof messages);
    for (int i = 0; i < 5; i++) {
        to[i] = address_of(clients[i]);
        iov[i] = (struct iovec){(void *)texts[i], strlen(texts[i])};
        messages[i].msg_hdr = (struct msghdr){.msg_name = &to[i], .msg_namelen = to[i].len,
                                              .msg_iov = &iov[i], .msg_iovlen = 1};
        messages[i].msg_len = 77;
    }
    outcome("sendmmsg", sendmmsg(fd, messages, 5, 0));
    for (int i = 0; i < 5; i++)
        row("  %u", messages[i].msg_len);
    for (int i = 0; i < 5; i++)
        client_expects(clients[i]);
    outcome("none", sendmmsg(fd, messages, 0, 0));
    iov[2].iov_base = (void *)16;
    messages[2].msg_len = 77;
    outcome("third is bad", sendmmsg(fd, messages, 5, 0));
    row("  %u", messages[2].msg_len);
    outcome("first is bad", sendmmsg(fd, messages + 2, 3, 0));
    if (KERNEL_READS_MESSAGES)
        outcome("vector is bad", sendmmsg(fd, (void *)16, 3, 0));
    client_expects("c1");
    client_expects("c2");
    client_has_nothing("c3");
    messages[1].msg_hdr.msg_name = NULL;
    outcome("second has no name", sendmmsg(fd, messages, 2, 0));
    client_expects("c1");
    client_has_nothing("c2");
}

CASE(send_needs_a_destination) {
    int fd = acquainted("s1");
    struct iovec iov = {"xyz", 3};
    address to = address_of("c1");
    outcome("send", send(fd, "xyz", 3, 0));
    outcome("write", write(fd, "xyz", 3));
    outcome("write of 0", write(fd, "xyz", 0));
    outcome("writev", writev(fd, &iov, 1));
    outcome("writev of 0", writev(fd, &iov, 0));
    outcome("sendto NULL", sendto(fd, "xyz", 3, 0, NULL, 0));
    outcome("sendto NULL with a length", sendto(fd, "xyz", 3, 0, NULL, to.len));
    outcome("sendto of length 0", sendto(fd, "xyz", 3, 0, &to.sa, 0));
    client_has_nothing("c1");
}

CASE(send_errors) {
    int fd = acquainted("s1");
    address to = address_of("c1");
    outcome("short address", sendto(fd, "x", 1, 0, &to.sa, to.len - 1));
    outcome("2 bytes of address", sendto(fd, "x", 1, 0, &to.sa, 2));
    outcome("1 byte of address", sendto(fd, "x", 1, 0, &to.sa, 1));
    outcome("negative length", sendto(fd, "x", 1, 0, &to.sa, -1));
    outcome("length 129", sendto(fd, "x", 1, 0, &to.sa, 129));
    to.sa.sa_family = AF_UNIX;
    outcome("wrong family", sendto(fd, "x", 1, 0, &to.sa, to.len));
    to = address_of("c1");
    outcome("MSG_OOB", sendto(fd, "x", 1, MSG_OOB, &to.sa, to.len));
    outcome("bad buffer", sendto(fd, (void *)16, 1, 0, &to.sa, to.len));
    outcome("NULL of 0", sendto(fd, NULL, 0, 0, &to.sa, to.len));
    client_expects("c1");
    outcome("bad address", sendto(fd, "x", 1, 0, (void *)16, to.len));
    struct iovec iov[2] = {{"good", 4}, {(void *)16, 4}};
    struct msghdr message = {.msg_name = &to, .msg_namelen = to.len, .msg_iov = iov,
                             .msg_iovlen = 2};
    outcome("bad part", sendmsg(fd, &message, 0));
    message.msg_iov = (void *)16;
    outcome("bad vector", sendmsg(fd, &message, 0));
    if (KERNEL_READS_MESSAGES)
        outcome("bad message", sendmsg(fd, (void *)16, 0));
    message.msg_iov = iov;
    message.msg_iovlen = 1;
    message.msg_name = (void *)16;
    outcome("bad name", sendmsg(fd, &message, 0));
    message.msg_name = &to;
    message.msg_control = (void *)16;
    message.msg_controllen = 32;
    if (KERNEL_READS_MESSAGES)
        outcome("bad control", sendmsg(fd, &message, 0));
    if (family == V4)
        to.in.sin_port = 0;
    else
        to.in6.sin6_port = 0;
    outcome("port 0", sendto(fd, "x", 1, 0, &to.sa, to.len));
    client_has_nothing("c1");
}

CASE_IN(send_to_a_broadcast_address, V4) {
    int fd = server("s1"), on = 1;
    address to = address_of("c1");
    to.in.sin_addr.s_addr = INADDR_BROADCAST;
    outcome("not allowed", sendto(fd, "x", 1, 0, &to.sa, to.len));
    setsockopt(fd, SOL_SOCKET, SO_BROADCAST, &on, sizeof on);
}

CASE_IN(family_unspec_means_ipv4, V4) {
    int fd = acquainted("s1");
    address to = address_of("c1");
    to.sa.sa_family = AF_UNSPEC;
    outcome("sendto", sendto(fd, "x", 1, 0, &to.sa, to.len));
    client_expects("c1");
    to.sa.sa_family = AF_INET6;
    outcome("as IPv6", sendto(fd, "x", 1, 0, &to.sa, to.len));
    outcome("as IPv6, long", sendto(fd, "x", 1, 0, &to.sa, 28));
    client_has_nothing("c1");
}

CASE_IN(family_unspec_on_ipv6, V6 | MAPPED) {
    int fd = acquainted("s1");
    address to = address_of("c1");
    to.sa.sa_family = AF_UNSPEC;
    outcome("sendto", sendto(fd, "x", 1, 0, &to.sa, to.len));
    client_has_nothing("c1");
}

CASE_IN(plain_ipv4_address_on_a_dual_stack_socket, MAPPED) {
    int fd = acquainted("s1");
    address to = plain_address_of("c1");
    outcome("sendto", sendto(fd, "x", 1, 0, &to.sa, to.len));
    client_expects("c1");
}

CASE_IN(ipv6_only, MAPPED) {
    int fd = udp_socket(0), on = 1;
    must("setsockopt", setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on));
    bind_to(fd, "s1");
    client_sends("c1", "s1", "x");
    receive("nothing", fd, MSG_DONTWAIT);
    outcome("to a mapped address", send_text(fd, "c1", "x"));
    client_has_nothing("c1");
}

CASE(send_flags) {
    int fd = acquainted("s1");
    address to = address_of("c1");
    const int flags[] = {MSG_NOSIGNAL, MSG_DONTWAIT, MSG_CONFIRM, MSG_DONTROUTE, MSG_EOR};
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        row("%#x -> %s", flags[i], result_text(sendto(fd, "x", 1, flags[i], &to.sa, to.len)));
        client_expects("c1");
    }
    client_has_nothing("c1");
}

CASE(corked) {
    int fd = acquainted("s1"), on = 1, off = 0;
    address to = address_of("c1");
    outcome("MSG_MORE", sendto(fd, "one ", 4, MSG_MORE, &to.sa, to.len));
    client_has_nothing("c1");
    outcome("the rest", sendto(fd, "two", 3, 0, &to.sa, to.len));
    client_expects("c1");
    outcome("UDP_CORK", setsockopt(fd, IPPROTO_UDP, UDP_CORK, &on, sizeof on));
    outcome("first", sendto(fd, "abc", 3, 0, &to.sa, to.len));
    outcome("second", sendto(fd, "def", 3, 0, &to.sa, to.len));
    client_has_nothing("c1");
    outcome("UDP_CORK off", setsockopt(fd, IPPROTO_UDP, UDP_CORK, &off, sizeof off));
    client_expects("c1");
    client_has_nothing("c1");
}

CASE(segmented_by_option) {
    int fd = acquainted("s1"), size = 100, got = 0;
    socklen_t len = sizeof got;
    char bytes[250];
    memset(bytes, 'x', sizeof bytes);
    address to = address_of("c1");
    outcome("setsockopt", setsockopt(fd, IPPROTO_UDP, UDP_SEGMENT, &size, sizeof size));
    outcome("getsockopt", getsockopt(fd, IPPROTO_UDP, UDP_SEGMENT, &got, &len));
    row("  %d (%u)", got, len);
    outcome("sendto", sendto(fd, bytes, sizeof bytes, 0, &to.sa, to.len));
    for (int i = 0; i < 3; i++)
        client_expects("c1");
    outcome("sendto of one", sendto(fd, bytes, 100, 0, &to.sa, to.len));
    client_expects("c1");
    outcome("sendto of 0", sendto(fd, bytes, 0, 0, &to.sa, to.len));
    client_expects("c1");
    client_has_nothing("c1");
    size = 0;
    outcome("off", setsockopt(fd, IPPROTO_UDP, UDP_SEGMENT, &size, sizeof size));
    outcome("sendto", sendto(fd, bytes, sizeof bytes, 0, &to.sa, to.len));
    client_expects("c1");
    client_has_nothing("c1");
}

/* A header can't be in front of what the kernel puts together and cuts. */
CASE(segmented_when_put_together) {
    int fd = acquainted("s1"), size = 100, on = 1, off = 0;
    char bytes[250];
    memset(bytes, 'x', sizeof bytes);
    address to = address_of("c1");
    outcome("UDP_SEGMENT", setsockopt(fd, IPPROTO_UDP, UDP_SEGMENT, &size, sizeof size));
    long result = sendto(fd, bytes, 50, MSG_MORE, &to.sa, to.len);
    outcome("MSG_MORE", result);
    outcome("UDP_CORK", setsockopt(fd, IPPROTO_UDP, UDP_CORK, &on, sizeof on));
    outcome("corked", sendto(fd, bytes, 200, 0, &to.sa, to.len));
    if (result < 0)
        return;
    outcome("UDP_CORK off", setsockopt(fd, IPPROTO_UDP, UDP_CORK, &off, sizeof off));
    for (int i = 0; i < 3; i++)
        client_expects("c1");
    client_has_nothing("c1");
}

/* Sends with one control message. */
static long send_control(int fd, address to, const void *bytes, size_t len, int level, int type,
                         const void *value, size_t value_len) {
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(64)];
    memset(control, 0, sizeof control);
    struct iovec iov = {(void *)bytes, len};
    struct msghdr message = {.msg_name = &to, .msg_namelen = to.len, .msg_iov = &iov,
                             .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = CMSG_SPACE(value_len)};
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&message);
    *cmsg = (struct cmsghdr){.cmsg_len = CMSG_LEN(value_len), .cmsg_level = level,
                             .cmsg_type = type};
    memcpy(CMSG_DATA(cmsg), value, value_len);
    return sendmsg(fd, &message, 0);
}

CASE(segmented_by_control_data) {
    int fd = acquainted("s1");
    char bytes[250];
    memset(bytes, 'y', sizeof bytes);
    uint16_t size = 120;
    address to = address_of("c2");
    outcome("sendmsg", send_control(fd, to, bytes, 250, IPPROTO_UDP, UDP_SEGMENT, &size, 2));
    for (int i = 0; i < 3; i++)
        client_expects("c2");
    client_has_nothing("c2");
    outcome("bad size", send_control(fd, to, bytes, 250, IPPROTO_UDP, UDP_SEGMENT, &size, 1));
}

CASE(control_data_of_sends) {
    int fd = acquainted("s1");
    address to = address_of("c1");
    int number = 0x2e;
    uint8_t byte = 1;
    if (family == V4) {
        outcome("IP_TOS", send_control(fd, to, "tos", 3, IPPROTO_IP, IP_TOS, &number, 4));
        outcome("IP_TOS of 1", send_control(fd, to, "tos1", 4, IPPROTO_IP, IP_TOS, &byte, 1));
        outcome("IP_TTL", send_control(fd, to, "ttl", 3, IPPROTO_IP, IP_TTL, &number, 4));
        number = 0;
        outcome("IP_TTL of 0", send_control(fd, to, "ttl", 3, IPPROTO_IP, IP_TTL, &number, 4));
    } else {
        outcome("IPV6_TCLASS", send_control(fd, to, "tos", 3, IPPROTO_IPV6, IPV6_TCLASS, &number, 4));
        outcome("IPV6_HOPLIMIT",
                send_control(fd, to, "tos1", 4, IPPROTO_IPV6, IPV6_HOPLIMIT, &number, 4));
        outcome("IPV6_TCLASS of 1",
                send_control(fd, to, "ttl", 3, IPPROTO_IPV6, IPV6_TCLASS, &byte, 1));
    }
    outcome("unknown", send_control(fd, to, "x", 1, IPPROTO_IP, 999, &number, 4));
    outcome("other level", send_control(fd, to, "other", 5, 999, 999, &number, 4));
    for (int i = 0; i < 6; i++)
        client_has_nothing("c1");
    struct cmsghdr broken = {.cmsg_len = 3, .cmsg_level = IPPROTO_IP, .cmsg_type = IP_TOS};
    struct iovec iov = {"x", 1};
    struct msghdr message = {.msg_name = &to, .msg_namelen = to.len, .msg_iov = &iov,
                             .msg_iovlen = 1, .msg_control = &broken,
                             .msg_controllen = sizeof broken};
    outcome("length of control too short", sendmsg(fd, &message, 0));
    broken.cmsg_len = 100;
    outcome("length of control too long", sendmsg(fd, &message, 0));
    message.msg_controllen = 3;
    outcome("control too short", sendmsg(fd, &message, 0));
    client_has_nothing("c1");
    client_has_nothing("c1");
}

/* Replies to one datagram with the packet info that came with it. */
static void reply_with_packet_info(int fd, const char *client, const char *to, const char *text) {
    client_sends(client, to, text);
    char bytes[100];
    _Alignas(struct cmsghdr) char control[256];
    address from;
    struct iovec iov = {bytes, sizeof bytes};
    struct msghdr message = {.msg_name = &from, .msg_namelen = sizeof from.storage,
                             .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    long len = must("recvmsg", recvmsg(fd, &message, 0));
    show_control(&message);
    iov.iov_len = len;
    outcome("sendmsg", sendmsg(fd, &message, 0));
    client_expects(client);
}

CASE(replies_with_packet_info) {
    int fd = udp_socket(0), on = 1;
    address any = any_address("s1");
    must("bind", bind(fd, &any.sa, any.len));
    must("setsockopt", family == V4 ? setsockopt(fd, IPPROTO_IP, IP_PKTINFO, &on, sizeof on)
                                    : setsockopt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof on));
    reply_with_packet_info(fd, "c1", "s1", "to the first address");
    reply_with_packet_info(fd, "c1", "s1b", "to the second address");
    reply_with_packet_info(fd, "c2", "s1b", "another client");
    reply_with_packet_info(fd, "c1", "s1", "to the first again");
}

CASE_IN(replies_with_broken_packet_info, V4 | V6) {
    int fd = acquainted("s1");
    address to = address_of("c1");
    char zeros[32] = {0};
    int level = family == V4 ? IPPROTO_IP : IPPROTO_IPV6;
    int type = family == V4 ? IP_PKTINFO : IPV6_PKTINFO;
    size_t size = family == V4 ? sizeof(struct in_pktinfo) : sizeof(struct in6_pktinfo);
    outcome("of zeros", send_control(fd, to, "zeros", 5, level, type, zeros, size));
    client_expects("c1");
    outcome("short", send_control(fd, to, "short", 5, level, type, zeros, size - 4));
    client_has_nothing("c1");
}

CASE(sends_to_strangers) {
    int fd = server("s1");
    outcome("never seen", send_text(fd, "c3", "push"));
    client_has_nothing("c3");
}

CASE(sends_after_the_latest_datagram) {
    int fd = acquainted("s1");
    for (int i = 0; i < 3; i++) {
        client_sends("c1", "s1", "again");
        receive("recvfrom", fd, 0);
        outcome("sendto", send_text(fd, "c1", "reply"));
        outcome("sendto", send_text(fd, "c1", "more"));
        client_expects("c1");
        client_expects("c1");
    }
}

CASE(send_timeout) {
    int fd = acquainted("s1");
    struct timeval timeout = {0, 20000}, got = {9, 9};
    socklen_t len = sizeof got;
    outcome("setsockopt", setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout));
    outcome("getsockopt", getsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &got, &len));
    row("  %ld.%06ld (%u)", (long)got.tv_sec, (long)got.tv_usec, len);
    outcome("sendto", send_text(fd, "c1", "x"));
    client_expects("c1");
}

CASE(shut_down_for_sending) {
    int fd = acquainted("s1");
    outcome("shutdown", shutdown(fd, SHUT_WR));
    outcome("sendto", send_text(fd, "c1", "x"));
    client_has_nothing("c1");
    client_sends("c1", "s1", "still received");
    receive("recvfrom", fd, 0);
}
