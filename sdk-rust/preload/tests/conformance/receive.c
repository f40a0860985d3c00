/* Calls that receive: what they return, and what they write where. */
#include "harness.h"

#include <linux/sockios.h>

CASE(recv_returns_the_payload) {
    int fd = server("s1");
    client_sends("c1", "s1", "hello");
    unsigned char *buffer = fresh(100);
    received("recv", recv(fd, buffer, 100, 0), buffer, 100, NULL, 0);
    received("recv of nothing", recv(fd, buffer, 100, MSG_DONTWAIT), buffer, 0, NULL, 0);
}

CASE(recvfrom_names_the_client) {
    int fd = server("s1");
    client_sends("c1", "s1", "one");
    client_sends("c2", "s1", "two");
    client_sends("c3", "s1", "three");
    for (int i = 0; i < 3; i++)
        receive("recvfrom", fd, 0);
    receive("recvfrom of nothing", fd, MSG_DONTWAIT);
}

CASE(recvfrom_by_many_datagrams) {
    int fd = server("s1");
    const char *clients[] = {"c1", "c2", "c3"};
    for (int i = 0; i < 30; i++)
        client_sends_bytes(clients[i * 7 % 3], "s1", i * i);
    for (int i = 0; i < 30; i++)
        receive("recvfrom", fd, MSG_DONTWAIT);
    receive("recvfrom of nothing", fd, MSG_DONTWAIT);
}

CASE(recvfrom_waits) {
    int fd = server("s1");
    client_sends_later("c1", "s1", "late");
    receive("recvfrom", fd, 0);
    junk("s1", 5);
    client_sends_later("c2", "s1", "later");
    receive("recvfrom", fd, 0);
}

CASE(two_sockets_are_two) {
    int one = server("s1"), two = server("s2");
    client_sends("c1", "s1", "to one");
    client_sends("c1", "s2", "to two");
    receive("two", two, 0);
    receive("one", one, 0);
    receive("two", two, MSG_DONTWAIT);
    receive("one", one, MSG_DONTWAIT);
}

CASE(address_buffers_too_small) {
    int fd = server("s1");
    const socklen_t sizes[] = {0, 1, 2, 4, 15, 16, 20, 27, 28, 100};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        client_sends("c1", "s1", "x");
        char buffer[10];
        unsigned char *from = fresh(128), *whole = fresh(128);
        socklen_t len = sizes[i];
        long result = recvfrom(fd, buffer, 10, 0, (struct sockaddr *)from, &len);
        address c1 = address_of("c1");
        memcpy(whole, &c1.storage, c1.len);
        size_t used = sizes[i] < c1.len ? sizes[i] : c1.len;
        row("of %u -> %s length %s %s%s", sizes[i], result_text(result),
            len == c1.len ? "whole" : "other", memcmp(from, whole, used) ? "differs" : "equal",
            overwritten(from, 128, used));
    }
}

CASE(address_without_length) {
    int fd = server("s1");
    char buffer[10];
    address from = {.len = sizeof from.storage};
    client_sends("c1", "s1", "one");
    outcome("no length", recvfrom(fd, buffer, 10, 0, &from.sa, NULL));
    client_sends("c1", "s1", "two");
    outcome("no address", recvfrom(fd, buffer, 10, 0, NULL, &from.len));
    row("length %u", from.len);
    client_sends("c1", "s1", "three");
    outcome("neither", recvfrom(fd, buffer, 10, 0, NULL, NULL));
    client_sends("c1", "s1", "four");
    from.len = -1;
    outcome("negative", recvfrom(fd, buffer, 10, 0, &from.sa, &from.len));
    receive("what is left", fd, MSG_DONTWAIT);
}

CASE(empty_datagrams) {
    int fd = server("s1");
    unsigned char *buffer = fresh(10);
    client_sends("c1", "s1", "");
    receive("recvfrom", fd, 0);
    client_sends("c1", "s1", "");
    received("read", read(fd, buffer, 10), buffer, 10, NULL, 0);
    client_sends("c1", "s1", "");
    received("recv", recv(fd, buffer, 10, MSG_TRUNC), buffer, 10, NULL, 0);
    client_sends("c2", "s1", "");
    receive("peek", fd, MSG_PEEK);
    struct iovec iov = {buffer, 10};
    address from;
    struct msghdr message = {.msg_name = &from, .msg_namelen = sizeof from.storage,
                             .msg_iov = &iov, .msg_iovlen = 1};
    show_message("recvmsg", recvmsg(fd, &message, 0), &message);
    receive("nothing", fd, MSG_DONTWAIT);
}

CASE(buffers_too_small) {
    int fd = server("s1");
    unsigned char *buffer = fresh(4);
    for (int i = 0; i < 6; i++)
        client_sends("c1", "s1", i % 2 ? "0123456789" : "abcdefghij");
    received("recv", recv(fd, buffer, 4, 0), buffer, 4, NULL, 0);
    received("recv MSG_TRUNC", recv(fd, buffer, 4, MSG_TRUNC), buffer, 4, NULL, 0);
    received("read", read(fd, buffer, 4), buffer, 4, NULL, 0);
    address from = {.len = sizeof from.storage};
    long result = recvfrom(fd, buffer, 4, MSG_TRUNC, &from.sa, &from.len);
    received("recvfrom MSG_TRUNC", result, buffer, 4, &from, from.len);
    received("peek MSG_TRUNC", recv(fd, buffer, 4, MSG_PEEK | MSG_TRUNC), buffer, 4, NULL, 0);
    received("peek MSG_TRUNC of 0", recv(fd, NULL, 0, MSG_PEEK | MSG_TRUNC), buffer, 0, NULL, 0);
    receive("recvfrom", fd, 0);
    receive("last", fd, 0);
    receive("nothing", fd, MSG_DONTWAIT);
}

CASE(buffers_of_no_size) {
    int fd = server("s1");
    char byte;
    for (int i = 0; i < 3; i++)
        client_sends("c1", "s1", i == 0 ? "first" : i == 1 ? "second" : "third");
    outcome("read of 0", read(fd, &byte, 0));
    outcome("readv of 0", readv(fd, NULL, 0));
    struct iovec empty[2] = {{NULL, 0}, {NULL, 0}};
    outcome("readv of 2 empty", readv(fd, empty, 2));
    outcome("recv of 0", recv(fd, &byte, 0, 0));
    struct msghdr message = {.msg_iov = empty, .msg_iovlen = 2};
    show_message("recvmsg of 2 empty", recvmsg(fd, &message, 0), &message);
    struct msghdr none = {0};
    show_message("recvmsg of none", recvmsg(fd, &none, MSG_TRUNC), &none);
    receive("nothing", fd, MSG_DONTWAIT);
    outcome("read of 0 of nothing", read(fd, &byte, 0));
}

CASE(peek) {
    int fd = server("s1");
    unsigned char *buffer = fresh(100);
    client_sends("c1", "s1", "first");
    client_sends("c2", "s1", "second");
    receive("peek", fd, MSG_PEEK);
    receive("peek again", fd, MSG_PEEK);
    received("peek by recv", recv(fd, buffer, 3, MSG_PEEK), buffer, 3, NULL, 0);
    receive("recvfrom", fd, 0);
    address from;
    struct iovec iov = {buffer, 100};
    struct msghdr message = {.msg_name = &from, .msg_namelen = sizeof from.storage,
                             .msg_iov = &iov, .msg_iovlen = 1};
    show_message("peek by recvmsg", recvmsg(fd, &message, MSG_PEEK), &message);
    struct mmsghdr batch[2] = {{.msg_hdr = message}, {.msg_hdr = message}};
    long result = recvmmsg(fd, batch, 2, MSG_PEEK | MSG_DONTWAIT, NULL);
    row("peek by recvmmsg -> %s", result_text(result));
    for (int i = 0; i < result; i++)
        show_message("  each", batch[i].msg_len, &batch[i].msg_hdr);
    receive("recvfrom", fd, 0);
    receive("peek of nothing", fd, MSG_PEEK | MSG_DONTWAIT);
}

CASE(read_and_readv) {
    int fd = server("s1");
    unsigned char *a = fresh(3), *b = fresh(5), *c = fresh(100);
    struct iovec iov[5] = {{a, 3}, {NULL, 0}, {b, 5}, {c, 0}, {c, 100}};
    client_sends("c1", "s1", "0123456789");
    received("read", read(fd, c, 100), c, 100, NULL, 0);
    free(c);
    c = fresh(100);
    iov[3].iov_base = iov[4].iov_base = c;
    client_sends("c1", "s1", "abcdefghijklmnopqrstuvwxyz");
    outcome("readv", readv(fd, iov, 5));
    row("  %s%s %s%s %s%s", bytes_text(a, 3), overwritten(a, 3, 3), bytes_text(b, 5),
        overwritten(b, 5, 5), bytes_text(c, 18), overwritten(c, 100, 18));
    client_sends("c1", "s1", "ABCDEFGHIJ");
    outcome("readv too small", readv(fd, iov, 3));
    row("  %s%s %s%s", bytes_text(a, 3), overwritten(a, 3, 3), bytes_text(b, 5),
        overwritten(b, 5, 5));
    client_sends("c1", "s1", "xy");
    outcome("readv of 2 bytes", readv(fd, iov, 5));
    row("  %s %s", bytes_text(a, 3), bytes_text(b, 5));
    outcome("readv of -1", readv(fd, iov, -1));
    outcome("readv of 1025", readv(fd, iov, 1025));
    struct iovec negative = {a, (size_t)-1};
    outcome("readv of a negative length", readv(fd, &negative, 1));
    receive("nothing", fd, MSG_DONTWAIT);
}

CASE(recvmsg_scatters) {
    int fd = server("s1");
    unsigned char *a = fresh(3), *b = fresh(4), *c = fresh(100);
    struct iovec iov[4] = {{a, 3}, {NULL, 0}, {b, 4}, {c, 100}};
    address from;
    client_sends("c1", "s1", "0123456789");
    client_sends("c2", "s1", "0123456789");
    client_sends("c3", "s1", "0123456789");
    struct msghdr message = {.msg_name = &from, .msg_namelen = sizeof from.storage,
                             .msg_iov = iov, .msg_iovlen = 4};
    show_message("recvmsg", recvmsg(fd, &message, 0), &message);
    row("  %s%s %s%s %s%s", bytes_text(a, 3), overwritten(a, 3, 3), bytes_text(b, 4),
        overwritten(b, 4, 4), bytes_text(c, 3), overwritten(c, 100, 3));
    message.msg_iovlen = 3;
    message.msg_namelen = sizeof from.storage;
    show_message("too small", recvmsg(fd, &message, 0), &message);
    message.msg_namelen = sizeof from.storage;
    message.msg_iovlen = 1;
    long result = recvmsg(fd, &message, MSG_TRUNC);
    row("too small, MSG_TRUNC -> %s flags %#x %s", result_text(result),
        (unsigned)message.msg_flags, bytes_text(a, 3));
    show_message("nothing", recvmsg(fd, &message, MSG_DONTWAIT), &message);
    row("namelen %u control %zu flags %#x", message.msg_namelen, (size_t)message.msg_controllen,
        (unsigned)message.msg_flags);
}

CASE(recvmsg_names) {
    int fd = server("s1");
    unsigned char *buffer = fresh(10), *name = fresh(128);
    struct iovec iov = {buffer, 10};
    for (int i = 0; i < 6; i++)
        client_sends("c1", "s1", "x");
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_namelen = 99};
    show_message("no name", recvmsg(fd, &message, 0), &message);
    message.msg_name = name;
    message.msg_namelen = 0;
    long result = recvmsg(fd, &message, 0);
    row("name of 0 -> %s namelen %u%s", result_text(result), message.msg_namelen,
        overwritten(name, 128, 0));
    message.msg_namelen = 4;
    result = recvmsg(fd, &message, 0);
    address c1 = address_of("c1");
    row("name of 4 -> %s namelen %u %s%s", result_text(result), message.msg_namelen,
        memcmp(name, &c1.storage, 4) ? "differs" : "equal",
        overwritten(name, 128, 4));
    message.msg_namelen = 4000;
    show_message("name of 4000", recvmsg(fd, &message, 0), &message);
    message.msg_namelen = -1;
    result = recvmsg(fd, &message, 0);
    row("name of -1 -> %s", result_text(result));
    message.msg_namelen = 128;
    message.msg_flags = -1;
    show_message("flags before", recvmsg(fd, &message, MSG_DONTWAIT), &message);
    receive("what is left", fd, MSG_DONTWAIT);
}

CASE(recvmsg_flags) {
    int fd = server("s1");
    unsigned char *buffer = fresh(10);
    struct iovec iov = {buffer, 10};
    const int flags[] = {MSG_CMSG_CLOEXEC, MSG_TRUNC, MSG_WAITALL, MSG_NOSIGNAL,
                         MSG_PEEK | MSG_TRUNC, MSG_WAITFORONE, MSG_EOR};
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        client_sends("c1", "s1", i % 2 ? "0123456789abcdef" : "short");
        struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
        long result = recvmsg(fd, &message, flags[i]);
        row("%#x -> %s flags %#x", flags[i], result_text(result), (unsigned)message.msg_flags);
    }
    receive("what is left", fd, MSG_DONTWAIT);
    receive("nothing", fd, MSG_DONTWAIT);
}

/* Receives by recvmsg with so much room for control data. */
static void with_control(int fd, size_t room) {
    unsigned char *buffer = fresh(100), *control = fresh(512);
    address from;
    struct iovec iov = {buffer, 100};
    struct msghdr message = {.msg_name = &from, .msg_namelen = sizeof from.storage,
                             .msg_iov = &iov, .msg_iovlen = 1,
                             .msg_control = room ? control : NULL, .msg_controllen = room};
    char label[40];
    snprintf(label, sizeof label, "recvmsg, %zu for control", room);
    show_message(label, recvmsg(fd, &message, MSG_DONTWAIT), &message);
    show_control(&message);
    if (*overwritten(control, 512, room))
        row("  control OVERWRITTEN");
}

static void turn_on(int fd, int level, int option) {
    int on = 1;
    must("setsockopt", setsockopt(fd, level, option, &on, sizeof on));
}

static void turn_on_packet_info(int fd) {
    if (family == V4)
        turn_on(fd, IPPROTO_IP, IP_PKTINFO);
    else
        turn_on(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO);
}

CASE(control_of_nothing_asked) {
    int fd = server("s1");
    client_sends("c1", "s1", "x");
    with_control(fd, 256);
    client_sends("c1", "s1", "x");
    with_control(fd, 0);
}

CASE(packet_info) {
    int fd = server("s1");
    turn_on_packet_info(fd);
    client_sends("c1", "s1", "x");
    with_control(fd, 256);
    const size_t rooms[] = {0, 1, 15, 16, 17, 27, 28, 31, 32, 35, 36, 39, 40, 56};
    for (size_t i = 0; i < sizeof rooms / sizeof *rooms; i++) {
        client_sends("c2", "s1", "y");
        with_control(fd, rooms[i]);
    }
}

CASE(packet_info_of_a_wildcard_socket) {
    int fd = udp_socket(0);
    address any = any_address("s1");
    must("bind", bind(fd, &any.sa, any.len));
    turn_on_packet_info(fd);
    client_sends("c1", "s1", "to the first address");
    with_control(fd, 256);
    client_sends("c1", "s1b", "to the second address");
    with_control(fd, 256);
    client_sends("c2", "s1b", "more");
    unsigned char *buffer = fresh(100);
    received("without", recv(fd, buffer, 100, 0), buffer, 100, NULL, 0);
}

CASE(packet_info_turned_off_again) {
    int fd = server("s1");
    int level = family == V4 ? IPPROTO_IP : IPPROTO_IPV6;
    int option = family == V4 ? IP_PKTINFO : IPV6_RECVPKTINFO;
    int value = -1;
    socklen_t len = sizeof value;
    outcome("getsockopt", getsockopt(fd, level, option, &value, &len));
    row("  %d (%u)", value, len);
    turn_on_packet_info(fd);
    outcome("getsockopt", getsockopt(fd, level, option, &value, &len));
    row("  %d (%u)", value, len);
    client_sends("c1", "s1", "on");
    with_control(fd, 100);
    value = 0;
    outcome("setsockopt", setsockopt(fd, level, option, &value, sizeof value));
    outcome("getsockopt", getsockopt(fd, level, option, &value, &len));
    row("  %d (%u)", value, len);
    client_sends("c1", "s1", "off");
    with_control(fd, 100);
    outcome("empty", setsockopt(fd, level, option, &value, 0));
    outcome("NULL", setsockopt(fd, level, option, NULL, sizeof value));
    char byte = 1;
    outcome("one byte", setsockopt(fd, level, option, &byte, 1));
    client_sends("c1", "s1", "again?");
    with_control(fd, 100);
}

CASE(packet_info_before_bind) {
    int fd = udp_socket(0);
    turn_on_packet_info(fd);
    bind_to(fd, "s1");
    client_sends("c1", "s1", "x");
    with_control(fd, 100);
}

CASE(all_control_data) {
    int fd = server("s1");
    turn_on_packet_info(fd);
    if (family == V4) {
        turn_on(fd, IPPROTO_IP, IP_RECVTOS);
        turn_on(fd, IPPROTO_IP, IP_RECVTTL);
        turn_on(fd, IPPROTO_IP, IP_RECVORIGDSTADDR);
    } else {
        turn_on(fd, IPPROTO_IPV6, IPV6_RECVTCLASS);
        turn_on(fd, IPPROTO_IPV6, IPV6_RECVHOPLIMIT);
        turn_on(fd, IPPROTO_IPV6, IPV6_RECVORIGDSTADDR);
    }
    turn_on(fd, SOL_SOCKET, SO_TIMESTAMP);
    client_sends_tos("c1", "s1", 0x2e, "x");
    with_control(fd, 512);
    for (size_t room = 16; room < 200; room += 24) {
        client_sends_tos("c1", "s1", 1, "y");
        with_control(fd, room);
    }
}

CASE(traffic_class_alone) {
    int fd = server("s1");
    turn_on(fd, family == V4 ? IPPROTO_IP : IPPROTO_IPV6, family == V4 ? IP_RECVTOS : IPV6_RECVTCLASS);
    if (family == MAPPED)
        turn_on(fd, IPPROTO_IP, IP_RECVTOS);
    client_sends_tos("c1", "s1", 3, "x");
    with_control(fd, 100);
    client_sends_tos("c1", "s1", 3, "x");
    with_control(fd, 17);
    client_sends_tos("c1", "s1", 3, "x");
    with_control(fd, 16);
}

CASE(timestamps_alone) {
    int fd = server("s1");
    turn_on(fd, SOL_SOCKET, SO_TIMESTAMPNS);
    client_sends("c1", "s1", "x");
    with_control(fd, 100);
}

/* Prints a batch of messages with buffers of `size` bytes. */
static void batch(const char *label, int fd, unsigned vlen, int flags, struct timespec *timeout) {
    enum { MOST = 16, SIZE = 8 };
    struct mmsghdr messages[MOST];
    struct iovec iov[MOST];
    address from[MOST];
    unsigned char *buffers[MOST];
    memset(messages, 0, sizeof messages);
    for (int i = 0; i < MOST; i++) {
        buffers[i] = fresh(SIZE);
        iov[i] = (struct iovec){buffers[i], SIZE};
        messages[i].msg_hdr = (struct msghdr){.msg_name = &from[i],
                                              .msg_namelen = sizeof from[i].storage,
                                              .msg_iov = &iov[i], .msg_iovlen = 1};
        messages[i].msg_len = 77;
    }
    long result = recvmmsg(fd, messages, vlen, flags, timeout);
    row("%s -> %s", label, result_text(result));
    for (int i = 0; i < MOST; i++) {
        if (i < result)
            show_message("  each", messages[i].msg_len, &messages[i].msg_hdr);
        else if (messages[i].msg_len != 77)
            row("  length of %d written", i);
        free(buffers[i]);
    }
}

CASE(recvmmsg_fills_what_it_can) {
    int fd = server("s1");
    client_sends("c1", "s1", "one");
    client_sends("c2", "s1", "two");
    client_sends("c3", "s1", "");
    client_sends("c1", "s1", "longer than the buffer");
    client_sends("c2", "s1", "five");
    batch("3 of 5", fd, 3, 0, NULL);
    batch("the others", fd, 8, MSG_DONTWAIT, NULL);
    batch("nothing", fd, 8, MSG_DONTWAIT, NULL);
    batch("none", fd, 0, 0, NULL);
}

CASE(recvmmsg_waits_for_one) {
    int fd = server("s1");
    client_sends("c1", "s1", "one");
    client_sends("c2", "s1", "two");
    batch("there", fd, 8, MSG_WAITFORONE, NULL);
    client_sends_later("c3", "s1", "three");
    batch("late", fd, 8, MSG_WAITFORONE, NULL);
}

CASE(recvmmsg_waits_for_all) {
    int fd = server("s1");
    client_sends("c1", "s1", "one");
    client_sends("c2", "s1", "two");
    client_sends_later("c3", "s1", "three");
    batch("three", fd, 3, 0, NULL);
}

CASE(recvmmsg_timeouts) {
    int fd = server("s1");
    struct timespec bad = {0, 1000000000}, negative = {-1, 0}, zero = {0, 0}, long_time = {10, 0};
    batch("bad", fd, 2, 0, &bad);
    batch("negative", fd, 2, 0, &negative);
    client_sends("c1", "s1", "one");
    client_sends("c2", "s1", "two");
    batch("zero", fd, 2, 0, &zero);
    batch("long", fd, 1, 0, &long_time);
    row("%s", long_time.tv_sec < 10 && long_time.tv_sec >= 0 ? "time left" : "unchanged");
    receive("nothing", fd, MSG_DONTWAIT);
    client_sends("c1", "s1", "three");
    if (KERNEL_READS_MESSAGES)
        outcome("bad pointer", recvmmsg(fd, NULL, 1, MSG_DONTWAIT, NULL));
    batch("bad timeout", fd, 1, MSG_DONTWAIT, (struct timespec *)1);
    receive("what is left", fd, MSG_DONTWAIT);
}

CASE(recvmmsg_stops_at_an_error) {
    int fd = server("s1");
    char first[10];
    struct iovec iov[2] = {{first, 10}, {(void *)8, 10}};
    struct mmsghdr messages[2];
    memset(messages, 0, sizeof messages);
    for (int i = 0; i < 2; i++)
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &iov[i], .msg_iovlen = 1};
    client_sends("c1", "s1", "one");
    client_sends("c1", "s1", "two");
    outcome("second is bad", recvmmsg(fd, messages, 2, MSG_DONTWAIT, NULL));
    row("  %u %s", messages[0].msg_len, bytes_text(first, 3));
    int other = server("s2");
    client_sends("c1", "s2", "three");
    outcome("first is bad", recvmmsg(other, messages + 1, 1, MSG_DONTWAIT, NULL));
    receive("what is left", other, MSG_DONTWAIT);
}

/* What was received for messages behind one with a bad pointer is not lost. */
CASE(recvmmsg_keeps_what_is_behind_an_error) {
    const char *texts[] = {"zero", "one", "two", "three", "four", "five"};
    for (int bad = 0; bad < 4; bad++) {
        int fd = server("s1");
        char buffers[4][10];
        struct iovec iov[4];
        struct mmsghdr messages[4];
        memset(messages, 0, sizeof messages);
        for (int i = 0; i < 4; i++) {
            iov[i] = (struct iovec){i == bad ? (void *)8 : buffers[i], 10};
            messages[i].msg_hdr = (struct msghdr){.msg_iov = &iov[i], .msg_iovlen = 1};
        }
        for (int i = 0; i < 6; i++)
            client_sends("c1", "s1", texts[i]);
        row("message %d is bad -> %s", bad, result_text(recvmmsg(fd, messages, 4, 0, NULL)));
        for (int i = 0; i < bad; i++)
            row("  %u %s", messages[i].msg_len, bytes_text(buffers[i], messages[i].msg_len));
        /* The kernel has received one for the message, and tells of the error by the next
         * call, which the library doesn't. */
        bool seen[6] = {false};
        for (int i = 0; i < 7; i++) {
            char text[10] = "";
            recv(fd, text, sizeof text - 1, MSG_DONTWAIT);
            for (int n = 0; n < 6; n++)
                seen[n] |= strcmp(text, texts[n]) == 0;
        }
        for (int i = bad + 1; i < 6; i++)
            row("  %s %s", texts[i], seen[i] ? "comes after" : "is lost");
        close(fd);
    }
}

CASE(large_datagrams) {
    int fd = server("s1");
    const size_t sizes[] = {1, 1471, 1472, 1473, 9000, 32768, 65400};
    unsigned char *buffer = fresh(65536);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        client_sends_bytes("c1", "s1", sizes[i]);
        received("recv", recv(fd, buffer, 65536, 0), buffer, 65536, NULL, 0);
        free(buffer);
        buffer = fresh(65536);
    }
    client_sends_bytes("c1", "s1", 65400);
    client_sends_bytes("c1", "s1", 65400);
    outcome("too small", recv(fd, buffer, 1000, MSG_TRUNC));
    received("  ", recv(fd, buffer, 1000, 0), buffer, 1000, NULL, 0);
}

CASE(nonblocking_calls_do_not_wait) {
    int fd = server("s1"), on = 1;
    char buffer[10];
    struct iovec iov = {buffer, 10};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    struct mmsghdr batch = {.msg_hdr = message};
    for (int i = 0; i < 4; i++) {
        int flags = i == 0 ? MSG_DONTWAIT : 0;
        if (i == 1)
            must("fcntl", fcntl(fd, F_SETFL, O_NONBLOCK));
        if (i == 2) {
            must("fcntl", fcntl(fd, F_SETFL, 0));
            must("ioctl", ioctl(fd, FIONBIO, &on));
        }
        if (i == 3) {
            close(fd);
            fd = server_with("s1", SOCK_NONBLOCK);
        }
        junk("s1", 3);
        row("O_NONBLOCK %d", !!(fcntl(fd, F_GETFL) & O_NONBLOCK));
        outcome("recv", recv(fd, buffer, 10, flags));
        outcome("recvfrom", recvfrom(fd, buffer, 10, flags, NULL, NULL));
        outcome("recvmsg", recvmsg(fd, &message, flags));
        outcome("recvmmsg", recvmmsg(fd, &batch, 1, flags, NULL));
        outcome("recvmmsg for one", recvmmsg(fd, &batch, 1, flags | MSG_WAITFORONE, NULL));
        outcome("peek", recv(fd, buffer, 10, flags | MSG_PEEK));
        if (i > 0) {
            outcome("read", read(fd, buffer, 10));
            outcome("readv", readv(fd, &iov, 1));
        }
        client_sends("c1", "s1", "x");
        receive("one", fd, flags);
    }
}

CASE(nonblocking_calls_do_not_wait_in_a_stream_of_junk) {
    int fd = server("s1");
    char buffer[10];
    junk_stream("s1");
    int wrong = 0;
    for (int i = 0; i < 2000; i++)
        if (recv(fd, buffer, 10, MSG_DONTWAIT) != -1 || errno != EAGAIN)
            wrong++;
    row("%d wrong", wrong);
    client_sends("c1", "s1", "x");
    receive("one", fd, 0);
}

CASE(receive_timeouts) {
    int fd = server("s1");
    char buffer[10];
    struct iovec iov = {buffer, 10};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    struct mmsghdr batch = {.msg_hdr = message};
    struct timeval timeout = {0, 20000}, got = {9, 9};
    socklen_t len = sizeof got;
    outcome("setsockopt", setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout));
    outcome("getsockopt", getsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &got, &len));
    row("  %ld.%06ld (%u)", (long)got.tv_sec, (long)got.tv_usec, len);
    junk("s1", 2);
    outcome("recvfrom", recvfrom(fd, buffer, 10, 0, NULL, NULL));
    outcome("recv", recv(fd, buffer, 10, MSG_PEEK));
    outcome("recvmsg", recvmsg(fd, &message, 0));
    outcome("recvmmsg", recvmmsg(fd, &batch, 1, 0, NULL));
    outcome("read", read(fd, buffer, 10));
    outcome("readv", readv(fd, &iov, 1));
    client_sends("c1", "s1", "x");
    receive("one", fd, 0);
    client_sends("c1", "s1", "y");
    struct mmsghdr two[2] = {{.msg_hdr = message}, {.msg_hdr = message}};
    outcome("recvmmsg of two", recvmmsg(fd, two, 2, 0, NULL));
    outcome("negative", setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){0, -1}, sizeof timeout));
    outcome("short", setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, 4));
    timeout.tv_usec = 0;
    outcome("off", setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout));
    client_sends_later("c1", "s1", "late");
    receive("waits", fd, 0);
}

CASE(receive_timeouts_in_a_stream_of_junk) {
    int fd = server("s1");
    char buffer[10];
    struct timeval timeout = {0, 50000};
    must("setsockopt", setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout));
    junk_stream("s1");
    outcome("recv", recv(fd, buffer, 10, 0));
    client_sends("c1", "s1", "x");
    receive("one", fd, 0);
}

CASE(error_queue_of_nothing) {
    int fd = server("s1"), on = 1;
    char buffer[10], control[100];
    struct iovec iov = {buffer, 10};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    outcome("recvmsg", recvmsg(fd, &message, MSG_ERRQUEUE));
    client_sends("c1", "s1", "x");
    outcome("recvmsg", recvmsg(fd, &message, MSG_ERRQUEUE));
    outcome("recv", recv(fd, buffer, 10, MSG_ERRQUEUE | MSG_DONTWAIT));
    must("setsockopt", family == V4 ? setsockopt(fd, IPPROTO_IP, IP_RECVERR, &on, sizeof on)
                                    : setsockopt(fd, IPPROTO_IPV6, IPV6_RECVERR, &on, sizeof on));
    outcome("recvmsg", recvmsg(fd, &message, MSG_ERRQUEUE));
    receive("one", fd, 0);
}

CASE(readable_bytes) {
    int fd = server("s1"), bytes = -1;
    junk("s1", 2);
    outcome("FIONREAD of nothing", ioctl(fd, FIONREAD, &bytes));
    row("  %d", bytes);
    client_sends("c1", "s1", "12345");
    client_sends("c1", "s1", "");
    client_sends("c1", "s1", "123");
    for (int i = 0; i < 4; i++) {
        outcome("FIONREAD", ioctl(fd, FIONREAD, &bytes));
        row("  %d", bytes);
        receive("recvfrom", fd, MSG_DONTWAIT);
    }
    outcome("SIOCOUTQ", ioctl(fd, SIOCOUTQ, &bytes));
    row("  %d", bytes);
    client_sends("c1", "s1", "last");
    outcome("FIONREAD to nowhere", ioctl(fd, FIONREAD, NULL));
    receive("recvfrom", fd, MSG_DONTWAIT);
}

static void *shut_down_when_blocked(void *thread) {
    const int *arguments = thread;
    await_sleep(arguments[0]);
    outcome("shutdown", shutdown(arguments[1], SHUT_RD));
    return NULL;
}

CASE(shutdown_wakes_the_receiver) {
    int fd = server("s1");
    unsigned char *buffer = fresh(100);
    address from = {.len = sizeof from.storage};
    memset(&from.storage, 0x55, sizeof from.storage);
    pthread_t thread;
    int arguments[] = {thread_id(), fd};
    pthread_create(&thread, NULL, shut_down_when_blocked, arguments);
    long result = recvfrom(fd, buffer, 100, 0, &from.sa, &from.len);
    pthread_join(thread, NULL);
    row("recvfrom -> %s length %u", result_text(result), from.len);
    outcome("read", read(fd, buffer, 100));
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN | POLLRDHUP};
    outcome("poll", poll(&poll_fd, 1, 0));
    row("  %#x", poll_fd.revents);
    client_sends("c1", "s1", "x");
    receive("what comes after", fd, MSG_DONTWAIT);
    receive("nothing", fd, 0);
    outcome("again", shutdown(fd, SHUT_RDWR));
    outcome("bad", shutdown(fd, 7));
}

/* The socket has nothing, and waits for nothing; what comes is received as before. */
static void receive_shut_down(int fd) {
    char buffer[10];
    address from = {.len = sizeof from.storage};
    junk("s1", 3);
    outcome("recvfrom", recvfrom(fd, buffer, 10, 0, &from.sa, &from.len));
    row("length %u", from.len);
    junk("s1", 3);
    outcome("peek", recv(fd, buffer, 10, MSG_PEEK));
    junk("s1", 3);
    batch("recvmmsg", fd, 3, 0, NULL);
    batch("recvmmsg for one", fd, 3, MSG_WAITFORONE, NULL);
    batch("peek by recvmmsg", fd, 3, MSG_PEEK, NULL);
    batch("recvmmsg, not waiting", fd, 3, MSG_DONTWAIT, NULL);
    client_sends("c1", "s1", "one");
    client_sends("c2", "s1", "two");
    junk("s1", 3);
    batch("recvmmsg of two", fd, 4, 0, NULL);
    client_sends("c3", "s1", "three");
    receive("what comes after", fd, 0);
    receive("nothing", fd, MSG_DONTWAIT);
}

CASE(shut_down_for_receiving) {
    int fd = server("s1");
    outcome("shutdown", shutdown(fd, SHUT_RD));
    receive_shut_down(fd);
}

/* The timeout is longer than a case may take. */
CASE(shut_down_for_receiving_with_a_timeout) {
    int fd = server("s1");
    struct timeval timeout = {60, 0};
    must("setsockopt", setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout));
    outcome("shutdown", shutdown(fd, SHUT_RD));
    receive_shut_down(fd);
}

CASE(bad_descriptors) {
    char buffer[10];
    struct iovec iov = {buffer, 10};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    struct mmsghdr batch = {.msg_hdr = message};
    int pipes[2], closed = server("s1");
    must("pipe", pipe(pipes));
    close(closed);
    const int fds[] = {-1, closed, 100000, 2147483647, -2147483647, pipes[0]};
    for (size_t i = 0; i < sizeof fds / sizeof *fds; i++) {
        int fd = fds[i];
        row("%s", fd == closed ? "closed" : fd == pipes[0] ? "pipe" : "never open");
        outcome("recv", recv(fd, buffer, 10, MSG_DONTWAIT));
        outcome("recvfrom", recvfrom(fd, buffer, 10, MSG_DONTWAIT, NULL, NULL));
        outcome("recvmsg", recvmsg(fd, &message, MSG_DONTWAIT));
        outcome("recvmmsg", recvmmsg(fd, &batch, 1, MSG_DONTWAIT, NULL));
        outcome("send", send(fd, buffer, 10, MSG_DONTWAIT));
        outcome("sendto", sendto(fd, buffer, 10, MSG_DONTWAIT, NULL, 0));
        outcome("sendmsg", sendmsg(fd, &message, MSG_DONTWAIT));
        outcome("sendmmsg", sendmmsg(fd, &batch, 1, MSG_DONTWAIT));
        address c1 = address_of("c1");
        outcome("bind", bind(fd, &c1.sa, c1.len));
        outcome("connect", connect(fd, &c1.sa, c1.len));
        outcome("getsockname", getsockname(fd, &c1.sa, &c1.len));
        outcome("getpeername", getpeername(fd, &c1.sa, &c1.len));
        int value = 1;
        socklen_t len = sizeof value;
        outcome("setsockopt", setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &value, sizeof value));
        outcome("getsockopt", getsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &value, &len));
        if (fd == pipes[0])
            continue;
        outcome("read", read(fd, buffer, 10));
        outcome("readv", readv(fd, &iov, 1));
        outcome("write", write(fd, buffer, 10));
        outcome("writev", writev(fd, &iov, 1));
        outcome("dup", dup(fd));
        outcome("dup2", dup2(fd, 200));
        outcome("dup3", dup3(fd, 200, 0));
        outcome("F_DUPFD", fcntl(fd, F_DUPFD, 0));
        outcome("F_GETFL", fcntl(fd, F_GETFL));
        outcome("close", close(fd));
        outcome("FIONREAD", ioctl(fd, FIONREAD, &value));
    }
}

CASE(bad_pointers) {
    int fd = server("s1");
    void *bad = (void *)16;
    char good[10];
    address from = {.len = sizeof from.storage};
    struct iovec bad_iov = {bad, 10}, half[2] = {{good, 2}, {bad, 10}}, iov = {good, 10};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    struct msghdr broken;

    for (int i = 0; i < 20; i++)
        client_sends_bytes("c1", "s1", i + 5);
    outcome("recv", recv(fd, bad, 10, 0));
    outcome("recv of NULL", recv(fd, NULL, 10, 0));
    outcome("recvfrom, buffer", recvfrom(fd, bad, 10, 0, &from.sa, &from.len));
    outcome("recvfrom, address", recvfrom(fd, good, 10, 0, bad, &from.len));
    outcome("recvfrom, length", recvfrom(fd, good, 10, 0, &from.sa, bad));
    outcome("peek", recv(fd, bad, 10, MSG_PEEK));
    outcome("read", read(fd, bad, 10));
    outcome("readv, buffer", readv(fd, &bad_iov, 1));
    outcome("readv, half", readv(fd, half, 2));
    outcome("readv, vector", readv(fd, bad, 1));
    if (KERNEL_READS_MESSAGES)
        outcome("recvmsg", recvmsg(fd, bad, 0));
    broken = message;
    broken.msg_iov = bad;
    outcome("recvmsg, vector", recvmsg(fd, &broken, 0));
    broken.msg_iov = &bad_iov;
    outcome("recvmsg, buffer", recvmsg(fd, &broken, 0));
    broken = message;
    broken.msg_name = bad;
    broken.msg_namelen = 28;
    outcome("recvmsg, name", recvmsg(fd, &broken, 0));
    broken = message;
    broken.msg_control = bad;
    broken.msg_controllen = 100;
    outcome("recvmsg, control", recvmsg(fd, &broken, 0));
    turn_on_packet_info(fd);
    broken.msg_control = bad;
    broken.msg_controllen = 100;
    long result = recvmsg(fd, &broken, 0);
    row("recvmsg, control used -> %s flags %#x", result_text(result), (unsigned)broken.msg_flags);
    broken = message;
    broken.msg_iovlen = 1025;
    outcome("recvmsg, iovlen", recvmsg(fd, &broken, 0));
    char *large = malloc(100);
    outcome("recv of too much", recv(fd, large, (size_t)-1, 0));
    receive("what is left", fd, MSG_DONTWAIT);
}

/* A buffer may be longer than what is mapped, as long as the datagram is not. (If it is,
 * the kernel says EFAULT and the library crashes: it sees bad pointers only where there is
 * never memory, about 0.) */
CASE(buffers_longer_than_their_memory) {
    int fd = server("s1");
    char *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must("munmap", munmap(page + 4096, 4096));
    char *end = page + 4096 - 10;
    client_sends("c1", "s1", "0123456789");
    long result = recv(fd, end, 5000, 0);
    row("fits -> %s %s", result_text(result), bytes_text(end, 10));
    struct iovec iov[2] = {{end, 10}, {end + 10, 5000}};
    client_sends("c1", "s1", "ABCDEFGHIJ");
    result = readv(fd, iov, 2);
    row("fits the first part -> %s %s", result_text(result), bytes_text(end, 10));
    receive("what is left", fd, MSG_DONTWAIT);
}

CASE(unusual_flags) {
    int fd = server("s1");
    const int flags[] = {MSG_WAITALL, MSG_NOSIGNAL, MSG_OOB, MSG_EOR, MSG_CMSG_CLOEXEC,
                         MSG_CONFIRM, 1 << 20};
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        client_sends("c1", "s1", "0123456789");
        char label[20];
        snprintf(label, sizeof label, "%#x", flags[i]);
        receive(label, fd, flags[i] | MSG_DONTWAIT);
    }
    receive("nothing", fd, MSG_DONTWAIT);
}
