/* Random sequences of calls. What is drawn depends on the seed alone, and on what the
 * program knows of its sockets by the results so far: so the same calls are made on plain
 * sockets and through the library, until a result differs.
 *
 * A model says what is in each socket's queue, so that no call waits for ever, and which
 * clients a socket has heard: through the library, others can't be sent to. */
#include "harness.h"

#include <linux/sockios.h>

enum {
    SERVERS = 3,
    SOCKETS = 6,
    DESCRIPTORS = 8,
    QUEUE = 8,
    /* Bytes in a queue: with what must be dropped between them, they fit its memory. */
    QUEUED_BYTES = 70000,
    LONGEST = 66000,
    CLIENTS = 3,
    /* Registrations are told apart by the descriptor's place. */
    ROOM = 16,
};

static const char *const client_names[] = {"c1", "c2", "c3"};
static const char *const server_names[] = {"s1", "s2", "s3"};
static const struct timeval short_time = {0, 2000};

/* A socket, as the kernel has it: descriptors share it. */
struct socket_model {
    bool is_open;
    int server;
    /* Beside a listener with the same address, and connected to one client. */
    bool is_beside;
    bool nonblocking;
    bool has_timeout;
    bool shut_read;
    bool has_edges; /* epoll has it with EPOLLET */
    bool is_cut; /* epoll has it with EPOLLONESHOT, which junk must not use up */
    bool may_fail; /* a client has refused what was sent to it */
    int connected; /* a client and 1 */
    bool heard[CLIENTS];
    int queued;
    struct {
        int client;
        size_t len;
    } queue[QUEUE];
};

struct descriptor {
    int fd; /* -1: none */
    int socket;
    bool registered;
};

/* Shared with child processes. */
static struct world {
    uint64_t state;
    int step;
    /* All clients' datagrams come from one socket of the proxy's: none is connected. */
    bool is_tagged;
    bool is_closed[CLIENTS];
    struct socket_model sockets[SOCKETS];
    struct descriptor descriptors[DESCRIPTORS];
    int epoll;
} *world;

static uint64_t draw(void) {
    uint64_t z = world->state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static unsigned below(unsigned limit) { return draw() % limit; }

static bool chance(unsigned percent) { return below(100) < percent; }

static long one_of(const long *some, size_t count) { return some[below(count)]; }

#define ONE_OF(...)                                                               \
    one_of((const long[]){__VA_ARGS__}, sizeof((const long[]){__VA_ARGS__}) / sizeof(long))

static size_t draw_len(void) {
    if (chance(60))
        return below(30);
    static const size_t lens[] = {0, 1, 1472, 1473, 1996, 2019, 2020, 2021, 2048, 2049, 9000};
    return chance(90) ? lens[below(sizeof lens / sizeof *lens)] : 20000 + below(45400);
}

/* ---- the model ---- */

static struct socket_model *socket_of(int at) {
    return &world->sockets[world->descriptors[at].socket];
}

static int draw_open(void) {
    int open[DESCRIPTORS], count = 0;
    for (int at = 0; at < DESCRIPTORS; at++)
        if (world->descriptors[at].fd >= 0)
            open[count++] = at;
    return count ? open[below(count)] : -1;
}

static int free_descriptor(void) {
    for (int at = 0; at < DESCRIPTORS; at++)
        if (world->descriptors[at].fd < 0)
            return at;
    return -1;
}

static int draw_heard(const struct socket_model *model) {
    int heard[CLIENTS], count = 0;
    for (int client = 0; client < CLIENTS; client++)
        if (model->heard[client])
            heard[count++] = client;
    return count ? heard[below(count)] : -1;
}

/* The socket that a client's datagrams reach; NULL: none. */
static struct socket_model *socket_for(int server, int client) {
    struct socket_model *found = NULL;
    for (int i = 0; i < SOCKETS; i++) {
        struct socket_model *model = &world->sockets[i];
        if (!model->is_open || model->server != server)
            continue;
        if (model->connected == client + 1)
            return model;
        if (!model->connected)
            found = model;
    }
    return found;
}

static bool is_connected(int server, int client) {
    const struct socket_model *model = socket_for(server, client);
    return model && model->connected;
}

static void peeked(struct socket_model *model) {
    if (model->queued > 0)
        model->heard[model->queue[0].client] = true;
}

static void taken(struct socket_model *model) {
    peeked(model);
    if (model->queued > 0)
        memmove(model->queue, model->queue + 1, --model->queued * sizeof *model->queue);
}

/* Whether a call that receives `count` datagrams would wait for good. */
static bool waits_for_good(const struct socket_model *model, int count) {
    return model->queued < count && !model->nonblocking && !model->has_timeout &&
           !model->shut_read;
}

/* A socket in non-blocking mode may be readable for what must be dropped, and one in blocking
 * mode if the next call fails. */
static bool may_seem_readable(const struct socket_model *model) {
    return (model->nonblocking || model->may_fail) && model->queued == 0 && !model->shut_read;
}

/* What was sent has reached the client, unless nobody is there: then a socket that is
 * connected is told by its next call. */
static void sent_to(struct socket_model *model, int client) {
    if (!world->is_closed[client])
        client_expects(client_names[client]);
    else if (model->connected)
        model->may_fail = true;
}

static const char *label(const char *format, ...) {
    static char text[200];
    int len = snprintf(text, sizeof text, "%d ", world->step);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text + len, sizeof text - len, format, arguments);
    va_end(arguments);
    return text;
}

/* ---- receiving ---- */

struct parts {
    struct iovec iov[4];
    unsigned char *buffers[4];
    int count;
    size_t len;
};

static struct parts draw_parts(bool can_be_none) {
    static const size_t sizes[] = {0, 1, 3, 8, 20, 100, 1472, 2019, 2048, 2049, 9000, 65536};
    struct parts parts = {.count = (can_be_none ? 0 : 1) + below(can_be_none ? 5 : 4)};
    for (int i = 0; i < parts.count; i++) {
        size_t size = sizes[below(sizeof sizes / sizeof *sizes)];
        parts.buffers[i] = fresh(size);
        parts.iov[i] = (struct iovec){parts.buffers[i], size};
        parts.len += size;
    }
    return parts;
}

static void free_parts(struct parts *parts) {
    for (int i = 0; i < parts->count; i++)
        free(parts->buffers[i]);
}

/* What was written to the parts, of which `len` bytes should have been. */
static const char *check_parts(const struct parts *parts, long len) {
    size_t left = len < 0 ? 0 : len;
    for (int i = 0; i < parts->count; i++) {
        size_t size = parts->iov[i].iov_len, used = left < size ? left : size;
        if (*overwritten(parts->buffers[i], size, used))
            return " OVERWRITTEN";
        left -= used;
    }
    return "";
}

static int draw_receive_flags(const struct socket_model *model, int count) {
    int flags = 0;
    if (chance(20))
        flags |= MSG_PEEK;
    if (chance(20))
        flags |= MSG_TRUNC;
    if (chance(30))
        flags |= MSG_DONTWAIT;
    if (chance(10))
        flags |= ONE_OF(MSG_WAITALL, MSG_NOSIGNAL, MSG_OOB, MSG_CMSG_CLOEXEC, MSG_ERRQUEUE);
    if (waits_for_good(model, flags & MSG_PEEK ? 1 : count))
        flags |= MSG_DONTWAIT;
    return flags;
}

/* The model follows a call that has succeeded. */
static void received_one(struct socket_model *model, int flags) {
    if (flags & MSG_ERRQUEUE)
        return;
    if (flags & MSG_PEEK)
        peeked(model);
    else
        taken(model);
}

static void receive_plain(int fd, struct socket_model *model) {
    struct parts parts = draw_parts(false);
    unsigned char *buffer = parts.buffers[0];
    size_t size = parts.iov[0].iov_len;
    int kind = below(6), flags = draw_receive_flags(model, 1);
    address from = {.len = chance(80) ? sizeof from.storage : below(30)};
    socklen_t room = from.len;
    bool waits = waits_for_good(model, 1);
    long result;
    memset(&from.storage, 0, sizeof from.storage);
    switch (kind) {
    case 0:
        result = recv(fd, buffer, size, flags);
        break;
    case 1:
    case 2:
        result = recvfrom(fd, buffer, size, flags, &from.sa, &from.len);
        break;
    case 3:
        result = syscall(SYS_recvfrom, fd, buffer, size, flags, &from.sa, &from.len);
        break;
    case 4:
        if (waits)
            goto skipped;
        flags = 0;
        result = read(fd, buffer, size);
        break;
    default:
        if (waits)
            goto skipped;
        flags = 0;
        result = readv(fd, parts.iov, parts.count);
    }
    const char *call = label("receive %d of %zu flags %#x", kind, size, flags);
    if (kind == 5) {
        struct msghdr message = {.msg_iov = parts.iov, .msg_iovlen = parts.count};
        show_message(call, result, &message);
        row("  %s", check_parts(&parts, result));
        if (result >= 0 && parts.len > 0)
            received_one(model, flags);
    } else {
        bool named = kind >= 1 && kind <= 3 && room >= sizeof from.in6;
        received(call, result, buffer, size, named ? &from : NULL, from.len);
        if (result >= 0 && kind >= 1 && kind <= 3)
            row("  length %u", from.len);
        /* read(2) of nothing receives nothing. */
        if (result >= 0 && !(kind == 4 && size == 0))
            received_one(model, flags);
    }
skipped:
    free_parts(&parts);
}

static void receive_message(int fd, struct socket_model *model) {
    struct parts parts = draw_parts(true);
    int flags = draw_receive_flags(model, 1);
    char control[200];
    address from;
    memset(&from.storage, 0, sizeof from.storage);
    struct msghdr message = {.msg_name = chance(80) ? &from : NULL,
                             .msg_namelen = sizeof from.storage,
                             .msg_iov = parts.iov,
                             .msg_iovlen = parts.count,
                             .msg_control = control,
                             .msg_controllen = chance(60) ? sizeof control : below(80),
                             .msg_flags = chance(50) ? -1 : 0};
    if (chance(20))
        message.msg_control = NULL, message.msg_controllen = 0;
    long result = chance(70) ? recvmsg(fd, &message, flags)
                             : syscall(SYS_recvmsg, fd, &message, flags);
    show_message(label("recvmsg %d parts flags %#x", parts.count, flags), result, &message);
    if (result >= 0) {
        row("  %s", check_parts(&parts, result));
        show_control(&message);
        received_one(model, flags);
    }
    free_parts(&parts);
}

static void receive_messages(int fd, struct socket_model *model) {
    enum { MOST = 5 };
    struct mmsghdr messages[MOST];
    struct parts parts[MOST];
    address from[MOST];
    unsigned vlen = 1 + below(MOST);
    memset(messages, 0, sizeof messages);
    for (unsigned i = 0; i < vlen; i++) {
        parts[i] = draw_parts(true);
        memset(&from[i].storage, 0, sizeof from[i].storage);
        messages[i].msg_hdr = (struct msghdr){.msg_name = &from[i],
                                              .msg_namelen = sizeof from[i].storage,
                                              .msg_iov = parts[i].iov,
                                              .msg_iovlen = parts[i].count};
        messages[i].msg_len = 77;
    }
    bool for_one = chance(40);
    int flags = draw_receive_flags(model, for_one ? 1 : vlen);
    if (for_one)
        flags |= MSG_WAITFORONE;
    struct timespec timeout = {chance(50) ? 0 : 9, 0};
    bool timed = chance(20);
    long result = recvmmsg(fd, messages, vlen, flags, timed ? &timeout : NULL);
    row("%s -> %s", label("recvmmsg %u flags %#x%s", vlen, flags,
                          !timed ? "" : timeout.tv_sec ? " timed" : " no time"),
        result_text(result));
    for (unsigned i = 0; i < vlen; i++) {
        if ((long)i < result) {
            show_message("  each", messages[i].msg_len, &messages[i].msg_hdr);
            row("  %s", check_parts(&parts[i], messages[i].msg_len));
            received_one(model, flags);
        } else if (messages[i].msg_len != 77) {
            row("  length of %u written", i);
        }
        free_parts(&parts[i]);
    }
}

/* Into memory that is not there: the datagram is gone, unless it was peeked at. */
static void receive_nowhere(int fd, struct socket_model *model) {
    int flags = draw_receive_flags(model, 1) & ~MSG_ERRQUEUE, kind = below(3);
    char buffer[10];
    address from = {.len = sizeof from.storage};
    struct iovec iov[2] = {{buffer, 10}, {NULL, 10}};
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = 2};
    long result = kind == 0   ? recv(fd, NULL, 10, flags)
                  : kind == 1 ? recvfrom(fd, buffer, 10, flags, &from.sa, NULL)
                              : recvmsg(fd, &message, flags);
    int error = errno;
    outcome(label("receive nowhere %d flags %#x", kind, flags), result);
    if (result >= 0 || error == EFAULT)
        received_one(model, flags);
}

static void receive_something(void) {
    int at = draw_open();
    if (at < 0)
        return;
    int fd = world->descriptors[at].fd;
    struct socket_model *model = socket_of(at);
    unsigned kind = below(20);
    if (kind < 10)
        receive_plain(fd, model);
    else if (kind < 15)
        receive_message(fd, model);
    else if (kind < 19)
        receive_messages(fd, model);
    else
        receive_nowhere(fd, model);
}

/* ---- what clients do ---- */

/* An edge-triggered epoll tells once more of what has not been read, when something comes
 * that must be dropped. Whether it would do so for a socket, but for one. */
static bool junk_is_an_edge(int server, const struct socket_model *but) {
    for (int i = 0; i < SOCKETS; i++) {
        const struct socket_model *model = &world->sockets[i];
        if (model != but && model->is_open && model->server == server && model->has_edges &&
            model->queued > 0)
            return true;
    }
    return false;
}

static void client_does(void) {
    int at = draw_open();
    if (at < 0)
        return;
    const struct socket_model *drawn = socket_of(at);
    const char *to = server_names[drawn->server];
    int count = 1 + below(chance(70) ? 1 : 4);
    for (int i = 0; i < count; i++) {
        int client = below(CLIENTS);
        if (drawn->connected && chance(80))
            client = drawn->connected - 1;
        struct socket_model *model = socket_for(drawn->server, client);
        size_t len = draw_len(), queued = 0;
        for (int n = 0; model && n < model->queued; n++)
            queued += model->queue[n].len;
        if (model && (model->queued == QUEUE || queued + len > QUEUED_BYTES))
            return;
        if (junk_is_an_edge(drawn->server, model) || world->is_closed[client])
            return;
        client_sends_bytes(client_names[client], to, len);
        row("%s", label("%s sends %zu to %s", client_names[client], len, to));
        if (model) {
            model->queue[model->queued].client = client;
            model->queue[model->queued++].len = len;
        }
    }
}

static void client_comes_and_goes(void) {
    int client = below(CLIENTS);
    /* What has one socket for all clients has nobody refused. */
    if (world->is_tagged)
        return;
    if (world->is_closed[client])
        client_opens(client_names[client]);
    else
        client_closes(client_names[client]);
    world->is_closed[client] = !world->is_closed[client];
    row("%s", label("%s %s", client_names[client], world->is_closed[client] ? "closes" : "opens"));
}

static void junk_comes(void) {
    int at = draw_open();
    if (at < 0)
        return;
    int server = socket_of(at)->server;
    if (!junk_is_an_edge(server, NULL))
        junk(server_names[server], 1 + below(3));
}

/* ---- sending ---- */

static unsigned char payload[LONGEST];

static void fill_payload(void) {
    for (size_t i = 0; i < sizeof payload; i++)
        payload[i] = 'a' + i % 23;
}

static int draw_send_flags(void) {
    return chance(70) ? 0 : ONE_OF(MSG_DONTWAIT, MSG_NOSIGNAL, MSG_CONFIRM, MSG_EOR);
}

/* Parts of the payload that are `len` bytes together. */
static int cut_payload(struct iovec iov[5], size_t len) {
    size_t from = 0;
    int count = 1 + below(4);
    for (int i = 0; i < count; i++) {
        size_t left = len - from, size = i == count - 1 ? left : below(left + 1);
        iov[i] = (struct iovec){payload + from, size};
        from += size;
    }
    return count;
}

/* With a tag in front, not as much fits into a datagram. */
static size_t draw_send_len(void) {
    size_t len = draw_len();
    if (chance(95))
        return world->is_tagged && len > 65000 ? 65000 : len;
    return world->is_tagged ? 65536 : ONE_OF(65507, 65508, 65527, 65528, 65536);
}

static void send_messages(int fd, struct socket_model *model) {
    enum { MOST = 5 };
    struct mmsghdr messages[MOST];
    struct iovec iov[MOST][5];
    address to[MOST];
    int clients[MOST];
    unsigned vlen = 1 + below(MOST);
    memset(messages, 0, sizeof messages);
    for (unsigned i = 0; i < vlen; i++) {
        int client = draw_heard(model);
        bool named = client >= 0 && !(model->connected && chance(50));
        size_t len = draw_send_len();
        messages[i].msg_hdr.msg_iov = iov[i];
        messages[i].msg_hdr.msg_iovlen = cut_payload(iov[i], len);
        messages[i].msg_len = 77;
        clients[i] = model->connected - 1;
        if (named) {
            to[i] = address_of(client_names[client]);
            messages[i].msg_hdr.msg_name = &to[i].storage;
            messages[i].msg_hdr.msg_namelen = to[i].len;
            clients[i] = client;
        }
    }
    long result = sendmmsg(fd, messages, vlen, draw_send_flags());
    row("%s -> %s", label("sendmmsg %u", vlen), result_text(result));
    for (unsigned i = 0; i < vlen; i++) {
        if ((long)i < result) {
            row("  length %u", messages[i].msg_len);
            sent_to(model, clients[i]);
        } else if (messages[i].msg_len != 77) {
            row("  length of %u written", i);
        }
    }
}

/* Control data of a datagram that is sent: what the kernel takes, and what it refuses. */
static size_t draw_control(char control[200]) {
    size_t used = 0;
    memset(control, 0, 200);
    for (int count = chance(70) ? 0 : 1 + below(3); count > 0; count--) {
        struct cmsghdr cmsg = {.cmsg_level = family == V4 ? IPPROTO_IP : IPPROTO_IPV6};
        int number = below(200);
        struct in_pktinfo info = {.ipi_ifindex = 0};
        struct in6_pktinfo info6 = {.ipi6_ifindex = 0};
        address from = address_of("s1");
        info.ipi_spec_dst = from.in.sin_addr;
        info6.ipi6_addr = from.in6.sin6_addr;
        const void *data = &number;
        size_t len = sizeof number;
        switch (below(4)) {
        case 0:
            cmsg.cmsg_type = family == V4 ? IP_TOS : IPV6_TCLASS;
            break;
        case 1:
            cmsg.cmsg_type = family == V4 ? IP_TTL : IPV6_HOPLIMIT;
            number += 1;
            break;
        case 2:
            cmsg.cmsg_type = family == V4 ? IP_PKTINFO : IPV6_PKTINFO;
            data = family == V4 ? (void *)&info : (void *)&info6;
            len = family == V4 ? sizeof info : sizeof info6;
            break;
        default:
            /* Unknown to the kernel. */
            cmsg.cmsg_type = 9999;
        }
        cmsg.cmsg_len = CMSG_LEN(chance(90) ? len : below(len));
        memcpy(control + used, &cmsg, sizeof cmsg);
        memcpy(control + used + CMSG_LEN(0), data, len);
        used += CMSG_SPACE(cmsg.cmsg_len - CMSG_LEN(0));
    }
    return chance(95) ? used : used + below(40);
}

static void send_something(void) {
    int at = draw_open();
    if (at < 0)
        return;
    int fd = world->descriptors[at].fd;
    struct socket_model *model = socket_of(at);
    int client = draw_heard(model), kind = below(7), flags = draw_send_flags();
    size_t len = draw_send_len();
    bool named = client >= 0 && !(model->connected && chance(50));
    if (kind == 6) {
        send_messages(fd, model);
        return;
    }
    if (!named || kind < 3)
        client = model->connected - 1;
    address to = {0};
    if (client >= 0)
        to = address_of(client_names[client]);
    struct iovec iov[5];
    int count = cut_payload(iov, len);
    bool is_sent = true;
    long result;
    switch (kind) {
    case 0:
        result = send(fd, payload, len, flags);
        break;
    case 1:
        result = write(fd, payload, len);
        break;
    case 2:
        result = writev(fd, iov, count);
        is_sent = len > 0;
        break;
    case 3:
        result = sendto(fd, payload, len, flags, named ? &to.sa : NULL, named ? to.len : 0);
        break;
    case 4:
        result = syscall(SYS_sendto, fd, payload, len, flags, named ? &to.sa : NULL,
                         named ? to.len : 0);
        break;
    default:;
        char control[200];
        struct msghdr message = {.msg_name = named ? &to.storage : NULL,
                                 .msg_namelen = named ? to.len : 0,
                                 .msg_iov = iov,
                                 .msg_iovlen = count,
                                 .msg_control = control,
                                 .msg_controllen = draw_control(control)};
        /* Of two things that are wrong, the library may find the other one first. */
        if (len > 65000)
            message.msg_controllen = 0;
        result = sendmsg(fd, &message, flags);
    }
    outcome(label("send %d %zu flags %#x %s", kind, len, flags,
                  client < 0 ? "nobody" : client_names[client]),
            result);
    if (result >= 0 && is_sent && client >= 0)
        sent_to(model, client);
}

/* Where a datagram of a socket may go to; -1: nowhere. A message names it, or doesn't. */
static int draw_destination(struct socket_model *model, address *to, struct msghdr *message) {
    int client = draw_heard(model);
    if (client < 0 || (model->connected && chance(50)))
        return model->connected - 1;
    *to = address_of(client_names[client]);
    message->msg_name = &to->storage;
    message->msg_namelen = to->len;
    return client;
}

/* The kernel puts parts together to one datagram. */
static void send_in_parts(void) {
    int at = draw_open();
    if (at < 0)
        return;
    int fd = world->descriptors[at].fd;
    struct socket_model *model = socket_of(at);
    address to;
    struct iovec iov[5];
    struct msghdr message = {.msg_iov = iov};
    int client = draw_destination(model, &to, &message), count = 2 + below(3), cork = chance(50);
    if (client < 0)
        return;
    /* Linux goes on to send to the other client what has no address. */
    if (model->connected && client != model->connected - 1)
        return;
    if (cork)
        must("setsockopt", setsockopt(fd, IPPROTO_UDP, UDP_CORK, &cork, sizeof cork));
    long result = 0;
    for (int i = 0; i < count; i++) {
        bool is_last = i == count - 1;
        message.msg_iovlen = cut_payload(iov, below(chance(80) ? 50 : 12000));
        result = sendmsg(fd, &message, cork || is_last ? 0 : MSG_MORE);
        outcome(label("part %d of %d%s to %s", i + 1, count, cork ? " corked" : "",
                      client_names[client]),
                result);
        /* What was begun is forgotten. */
        if (result < 0)
            break;
    }
    if (cork) {
        cork = 0;
        outcome(label("uncorked"), setsockopt(fd, IPPROTO_UDP, UDP_CORK, &cork, sizeof cork));
    }
    if (result >= 0)
        sent_to(model, client);
}

/* The kernel cuts the payload into datagrams. */
static void send_segments(void) {
    int at = draw_open();
    if (at < 0)
        return;
    struct socket_model *model = socket_of(at);
    address to;
    struct iovec iov[5];
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(uint16_t))] = "";
    struct msghdr message = {.msg_iov = iov, .msg_control = control,
                             .msg_controllen = sizeof control};
    uint16_t segment = 1 + below(chance(50) ? 100 : 1400);
    size_t len = below(5 * segment);
    int client = draw_destination(model, &to, &message);
    if (client < 0)
        return;
    message.msg_iovlen = cut_payload(iov, len);
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&message);
    *cmsg = (struct cmsghdr){.cmsg_level = IPPROTO_UDP, .cmsg_type = UDP_SEGMENT,
                             .cmsg_len = CMSG_LEN(sizeof segment)};
    memcpy(CMSG_DATA(cmsg), &segment, sizeof segment);
    long result = sendmsg(world->descriptors[at].fd, &message, 0);
    outcome(label("segments of %u from %zu to %s", segment, len, client_names[client]), result);
    for (size_t sent = 0; result >= 0 && (sent < len || sent == 0); sent += segment)
        sent_to(model, client);
}

/* Addresses that the kernel refuses. */
static void send_badly(void) {
    int at = draw_open();
    if (at < 0)
        return;
    int fd = world->descriptors[at].fd, kind = below(5);
    address to = address_of("c1");
    switch (kind) {
    case 0:
        to.len = below(to.len);
        if (to.len == 0)
            return;
        break;
    case 1:
        to.in.sin_port = 0;
        break;
    case 2:
        to.sa.sa_family = ONE_OF(AF_UNIX, AF_NETLINK, 999);
        break;
    case 3:
        to.len = ONE_OF(129u, 4000u, -1u);
        break;
    default:
        /* Where it may go is looked at first. */
        if (!socket_of(at)->heard[0])
            return;
        outcome(label("send of no memory"), sendto(fd, NULL, 10, 0, &to.sa, to.len));
        return;
    }
    /* An IPv6 address may lack its scope. */
    if (kind == 0 && to.len >= 24)
        return;
    outcome(label("send badly %d", kind), sendto(fd, payload, 4, 0, &to.sa, to.len));
}

/* ---- waiting ---- */

static bool is_ready(const struct socket_model *model) {
    return model->queued > 0 || model->shut_read;
}

static void poll_some(void) {
    struct pollfd fds[4];
    const struct socket_model *models[4];
    int count = 1 + below(4);
    bool ready = false;
    for (int i = 0; i < count; i++) {
        int at = draw_open();
        short events = chance(70) ? POLLIN : ONE_OF(POLLIN | POLLRDNORM, POLLRDNORM, POLLOUT,
                                                    POLLIN | POLLOUT, POLLRDHUP, POLLPRI, 0);
        models[i] = at < 0 ? NULL : socket_of(at);
        fds[i] = (struct pollfd){.fd = at < 0 ? -1 : world->descriptors[at].fd,
                                 .events = events, .revents = -1};
        ready |= at >= 0 && (events & (POLLIN | POLLRDNORM)) && is_ready(models[i]);
    }
    int timeout = ready && chance(50) ? -1 : (int)below(3);
    struct timespec time = {0, timeout * 1000000};
    bool precise = chance(50);
    long result = precise ? ppoll(fds, count, timeout < 0 ? NULL : &time, NULL)
                          : poll(fds, count, timeout);
    char text[200] = "";
    for (int i = 0, len = 0; i < count; i++) {
        if (models[i] && may_seem_readable(models[i]) && fds[i].revents & (POLLIN | POLLRDNORM)) {
            fds[i].revents &= ~(POLLIN | POLLRDNORM);
            result -= fds[i].revents == 0;
        }
        len += snprintf(text + len, sizeof text - len, " %#x", fds[i].revents);
    }
    row("%s -> %s%s", label("poll of %d for %d", count, timeout), result_text(result), text);
}

static void select_some(void) {
    fd_set sets[3];
    bool ready = false;
    int highest = -1;
    for (int i = 0; i < 3; i++)
        FD_ZERO(&sets[i]);
    for (int at = 0; at < DESCRIPTORS; at++) {
        int fd = world->descriptors[at].fd;
        if (fd < 0)
            continue;
        if (chance(60)) {
            FD_SET(fd, &sets[0]);
            ready |= is_ready(socket_of(at));
            highest = fd > highest ? fd : highest;
        }
        for (int i = 1; i < 3; i++)
            if (chance(15)) {
                FD_SET(fd, &sets[i]);
                highest = fd > highest ? fd : highest;
            }
    }
    bool forever = ready && chance(50);
    struct timeval time = {0, below(3) * 1000};
    struct timespec precise = {0, time.tv_usec * 1000};
    long result = chance(50) ? select(highest + 1, &sets[0], &sets[1], &sets[2],
                                      forever ? NULL : &time)
                             : pselect(highest + 1, &sets[0], &sets[1], &sets[2],
                                       forever ? NULL : &precise, NULL);
    char text[200] = "";
    for (int at = 0, len = 0; at < DESCRIPTORS; at++) {
        int fd = world->descriptors[at].fd;
        if (fd < 0)
            continue;
        if (FD_ISSET(fd, &sets[0]) && may_seem_readable(socket_of(at))) {
            FD_CLR(fd, &sets[0]);
            result--;
        }
        len += snprintf(text + len, sizeof text - len, " %d%d%d", !!FD_ISSET(fd, &sets[0]),
                        !!FD_ISSET(fd, &sets[1]), !!FD_ISSET(fd, &sets[2]));
    }
    row("%s -> %s%s", label("select"), result_text(result), text);
}

static void epoll_change(void) {
    int at = draw_open();
    if (at < 0)
        return;
    struct descriptor *descriptor = &world->descriptors[at];
    struct socket_model *model = socket_of(at);
    uint32_t events = chance(80) ? EPOLLIN : ONE_OF(EPOLLOUT, EPOLLIN | EPOLLOUT, EPOLLRDHUP,
                                                    EPOLLIN | EPOLLRDNORM, 0u);
    unsigned way = below(10);
    bool once = way < 2 && !model->nonblocking;
    if (once)
        events |= EPOLLONESHOT;
    /* With each arrival, also of what must be dropped, an edge tells that the socket is
     * writable, too. */
    if (way >= 1 && way < 6 && !(events & EPOLLIN && events & EPOLLOUT))
        events |= EPOLLET;
    struct epoll_event event = {.events = events, .data.u64 = at};
    int operation = !descriptor->registered ? EPOLL_CTL_ADD
                    : chance(80)            ? EPOLL_CTL_MOD
                                            : EPOLL_CTL_DEL;
    if (chance(5))
        operation = ONE_OF(EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL);
    long result = epoll_ctl(world->epoll, operation, descriptor->fd, &event);
    outcome(label("epoll_ctl %d of %d %#x", operation, at, events), result);
    if (result == 0) {
        descriptor->registered = operation != EPOLL_CTL_DEL;
        model->has_edges |= (events & EPOLLET) && operation != EPOLL_CTL_DEL;
        model->is_cut |= once && operation != EPOLL_CTL_DEL;
    }
}

static int by_data(const void *a, const void *b) {
    const struct epoll_event *one = a, *other = b;
    return (one->data.u64 > other->data.u64) - (one->data.u64 < other->data.u64);
}

static void epoll_some(void) {
    struct epoll_event events[ROOM];
    int timeout = below(3);
    struct timespec time = {0, timeout * 1000000};
    int kind = below(3);
    long result = kind == 0   ? epoll_wait(world->epoll, events, ROOM, timeout)
                  : kind == 1 ? epoll_pwait(world->epoll, events, ROOM, timeout, NULL)
                              : epoll_pwait2(world->epoll, events, ROOM, &time, NULL);
    if (result > 0)
        qsort(events, result, sizeof *events, by_data);
    char text[300] = "";
    long count = result;
    for (int i = 0, len = 0; i < result; i++) {
        uint32_t told = events[i].events;
        if (may_seem_readable(socket_of(events[i].data.u64)))
            told &= ~(EPOLLIN | EPOLLRDNORM);
        if (told == 0)
            count--;
        else
            len += snprintf(text + len, sizeof text - len, " %d:%#x", (int)events[i].data.u64,
                            told);
    }
    row("%s -> %s%s", label("epoll_wait"), result_text(count), text);
}

/* ---- the sockets themselves ---- */

static struct socket_model *free_model(void) {
    for (int i = 0; i < SOCKETS; i++)
        if (!world->sockets[i].is_open)
            return &world->sockets[i];
    return NULL;
}

static void open_socket(void) {
    int at = free_descriptor(), number = below(SERVERS);
    struct socket_model *model = free_model();
    if (at < 0 || !model)
        return;
    for (int i = 0; i < SOCKETS; i++)
        if (world->sockets[i].is_open && world->sockets[i].server == number)
            return;
    bool nonblocking = chance(30);
    int fd = udp_socket(nonblocking ? SOCK_NONBLOCK : 0), on = 1;
    static const int v4[] = {IP_PKTINFO, IP_RECVTOS, IP_RECVTTL, IP_RECVORIGDSTADDR};
    static const int v6[] = {IPV6_RECVPKTINFO, IPV6_RECVTCLASS, IPV6_RECVHOPLIMIT,
                             IPV6_RECVORIGDSTADDR};
    for (int i = 0; i < 4; i++)
        if (chance(20))
            must("setsockopt", family == V4
                                   ? setsockopt(fd, IPPROTO_IP, v4[i], &on, sizeof on)
                                   : setsockopt(fd, IPPROTO_IPV6, v6[i], &on, sizeof on));
    if (chance(10))
        must("setsockopt", setsockopt(fd, SOL_SOCKET, ONE_OF(SO_TIMESTAMP, SO_TIMESTAMPNS), &on,
                                      sizeof on));
    bind_to(fd, server_names[number]);
    row("%s", label("open %s%s", server_names[number], nonblocking ? " nonblocking" : ""));
    *model =
        (struct socket_model){.is_open = true, .server = number, .nonblocking = nonblocking};
    world->descriptors[at] = (struct descriptor){.fd = fd, .socket = model - world->sockets};
}

/* A socket for one client, as servers of DTLS make them. */
static void open_beside(void) {
    int at = draw_open(), to = free_descriptor(), on = 1;
    struct socket_model *model = free_model();
    if (at < 0 || to < 0 || !model || world->is_tagged)
        return;
    const struct socket_model *listener = socket_of(at);
    int client = draw_heard(listener);
    if (listener->is_beside || listener->connected || client < 0 ||
        is_connected(listener->server, client))
        return;
    bool nonblocking = chance(30);
    int fd = udp_socket(nonblocking ? SOCK_NONBLOCK : 0);
    must("setsockopt", setsockopt(world->descriptors[at].fd, SOL_SOCKET, SO_REUSEADDR, &on,
                                  sizeof on));
    must("setsockopt", setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on));
    bind_to(fd, server_names[listener->server]);
    address peer = address_of(client_names[client]);
    outcome(label("open %s beside for %s", server_names[listener->server],
                  client_names[client]),
            connect(fd, &peer.sa, peer.len));
    *model = (struct socket_model){.is_open = true,
                                   .server = listener->server,
                                   .is_beside = true,
                                   .nonblocking = nonblocking,
                                   .connected = client + 1};
    memcpy(model->heard, listener->heard, sizeof model->heard);
    world->descriptors[to] = (struct descriptor){.fd = fd, .socket = model - world->sockets};
}

static void close_descriptor(int at) {
    struct descriptor *descriptor = &world->descriptors[at];
    struct socket_model *model = socket_of(at);
    /* As long as the socket is open, epoll would go on to tell of the descriptor. */
    if (descriptor->registered)
        epoll_ctl(world->epoll, EPOLL_CTL_DEL, descriptor->fd, NULL);
    outcome(label("close %d", at), close(descriptor->fd));
    descriptor->fd = -1;
    descriptor->registered = false;
    model->is_open = false;
    for (int other = 0; other < DESCRIPTORS; other++)
        if (world->descriptors[other].fd >= 0 && socket_of(other) == model)
            model->is_open = true;
}

static void duplicate(void) {
    int at = draw_open(), to = free_descriptor();
    if (at < 0 || to < 0)
        return;
    int from = world->descriptors[at].fd, kind = below(3);
    int fd = kind == 0   ? dup(from)
             : kind == 1 ? fcntl(from, F_DUPFD_CLOEXEC, 20)
                         : dup3(from, 40 + to, O_CLOEXEC);
    row("%s", label("dup %d of %d to %d -> %d", kind, at, to, fd));
    if (fd >= 0)
        world->descriptors[to] =
            (struct descriptor){.fd = fd, .socket = world->descriptors[at].socket};
}

static void change_mode(void) {
    int at = draw_open();
    if (at < 0)
        return;
    int fd = world->descriptors[at].fd, on;
    struct socket_model *model = socket_of(at);
    switch (below(4)) {
    case 0:
    case 1:
        on = model->is_cut ? 0 : chance(50);
        outcome(label("nonblocking %d", on),
                chance(50) ? ioctl(fd, FIONBIO, &on) : fcntl(fd, F_SETFL, on ? O_NONBLOCK : 0));
        model->nonblocking = on;
        break;
    case 2:
        on = chance(60);
        outcome(label("timeout %d", on),
                setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO,
                           on ? &short_time : &(struct timeval){0, 0}, sizeof short_time));
        model->has_timeout = on;
        break;
    default:;
        int how = ONE_OF(SHUT_RD, SHUT_WR, SHUT_RDWR);
        if (chance(60))
            return;
        outcome(label("shutdown %d", how), shutdown(fd, how));
        model->shut_read |= how != SHUT_WR;
    }
}

static void ask(void) {
    int at = draw_open();
    if (at < 0)
        return;
    int fd = world->descriptors[at].fd, number = -1, kind = below(8);
    socklen_t len = sizeof number;
    address name = {.len = chance(80) ? sizeof name.storage : below(30)};
    socklen_t room = name.len;
    long result;
    memset(&name.storage, 0, sizeof name.storage);
    switch (kind) {
    case 0:
    case 1:
        /* Through the library, nobody can look while there is an error. */
        if (socket_of(at)->may_fail)
            return;
        result = ioctl(fd, FIONREAD, &number);
        break;
    case 2:
        result = ioctl(fd, SIOCOUTQ, &number);
        break;
    case 3:
        result = getsockopt(fd, SOL_SOCKET, SO_ERROR, &number, &len);
        break;
    case 4:
        result = fcntl(fd, F_GETFL);
        break;
    case 5:
        result = family == V4 ? getsockopt(fd, IPPROTO_IP, IP_PKTINFO, &number, &len)
                              : getsockopt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &number, &len);
        break;
    default:
        result = kind == 6 ? getsockname(fd, &name.sa, &name.len)
                           : getpeername(fd, &name.sa, &name.len);
        row("%s -> %s %s %u", label("name %d", kind), result_text(result),
            result == 0 && room >= sizeof name.in6 ? name_of(&name, name.len) : "", name.len);
        return;
    }
    row("%s -> %s %d", label("ask %d", kind), result_text(result), number);
}

/* Through the library, what a connected socket has of other clients is dropped. */
/* What a socket is told with each datagram, asked for while none is there. */
static void change_options(void) {
    int at = draw_open(), on = chance(60);
    if (at < 0 || socket_of(at)->queued > 0)
        return;
    static const int v4[] = {IP_PKTINFO, IP_RECVTOS, IP_RECVTTL, IP_RECVORIGDSTADDR};
    static const int v6[] = {IPV6_RECVPKTINFO, IPV6_RECVTCLASS, IPV6_RECVHOPLIMIT,
                             IPV6_RECVORIGDSTADDR};
    int which = below(4), fd = world->descriptors[at].fd;
    outcome(label("option %d %d", which, on),
            family == V4 ? setsockopt(fd, IPPROTO_IP, v4[which], &on, sizeof on)
                         : setsockopt(fd, IPPROTO_IPV6, v6[which], &on, sizeof on));
}

static void drain(int fd, struct socket_model *model) {
    char buffer[10];
    long result = 0;
    while (model->queued > 0) {
        result = recv(fd, buffer, sizeof buffer, MSG_DONTWAIT | MSG_TRUNC);
        if (result >= 0)
            taken(model);
        else if (errno == EAGAIN)
            break;
    }
    outcome(label("%d are left", model->queued), result);
}

static void connect_socket(void) {
    int at = draw_open();
    if (at < 0 || world->is_tagged)
        return;
    int fd = world->descriptors[at].fd;
    struct socket_model *model = socket_of(at);
    int client = draw_heard(model);
    if (model->is_beside)
        return;
    /* Of an IPv6 socket that was connected, Linux still compares the peer's address. */
    if (model->connected && family != V6 && chance(50)) {
        struct sockaddr nobody = {.sa_family = AF_UNSPEC};
        outcome(label("disconnect"), connect(fd, &nobody, sizeof nobody));
        model->connected = 0;
    } else if (client >= 0 && !is_connected(model->server, client)) {
        drain(fd, model);
        address to = address_of(client_names[client]);
        long result = connect(fd, &to.sa, to.len);
        outcome(label("connect %s", client_names[client]), result);
        if (result == 0)
            model->connected = client + 1;
    }
}

static void step(bool is_child);

static void fork_once(void) {
    row("%s", label("fork"));
    pid_t child = fork_child();
    if (child == 0) {
        for (int count = 1 + below(3); count > 0; count--)
            step(true);
        _exit(0);
    }
    wait_child("child", child);
}

static void step(bool is_child) {
    unsigned kind = below(1000);
    world->step++;
    if (kind < 250)
        client_does();
    else if (kind < 300)
        junk_comes();
    else if (kind < 560)
        receive_something();
    else if (kind < 640)
        send_something();
    else if (kind < 650)
        send_in_parts();
    else if (kind < 660)
        send_segments();
    else if (kind < 680)
        send_badly();
    else if (kind < 730)
        poll_some();
    else if (kind < 760)
        select_some();
    else if (kind < 790)
        ask();
    else if (is_child)
        return;
    else if (kind < 830)
        epoll_change();
    else if (kind < 880)
        epoll_some();
    else if (kind < 900)
        open_socket();
    else if (kind < 915)
        open_beside();
    else if (kind < 930)
        duplicate();
    else if (kind < 935)
        change_options();
    else if (kind < 945)
        client_comes_and_goes();
    else if (kind < 960)
        change_mode();
    else if (kind < 985)
        connect_socket();
    else if (kind < 995) {
        int at = draw_open();
        if (at >= 0)
            close_descriptor(at);
    } else
        fork_once();
}

static void sequence(uint64_t seed, bool is_tagged) {
    enum { LIMIT = 20 };
    alarm(LIMIT);
    memset(world, 0, sizeof *world);
    world->state = seed * 0xd1342543de82ef95;
    world->is_tagged = is_tagged;
    world->epoll = must("epoll_create1", epoll_create1(EPOLL_CLOEXEC));
    for (int at = 0; at < DESCRIPTORS; at++)
        world->descriptors[at].fd = -1;
    row("sequence %llu", (unsigned long long)seed);
    open_socket();
    if (chance(50))
        open_socket();
    for (int steps = 4 + below(40); steps > 0; steps--)
        step(false);
    for (int at = 0; at < DESCRIPTORS; at++)
        if (world->descriptors[at].fd >= 0)
            close_descriptor(at);
    close(world->epoll);
    for (int client = 0; client < CLIENTS; client++)
        if (world->is_closed[client])
            client_opens(client_names[client]);
    clients_have_nothing();
}

int random_sequences(uint64_t seed, unsigned count, bool is_tagged) {
    world = mmap(NULL, sizeof *world, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (world == MAP_FAILED)
        fail("mmap");
    fill_payload();
    while (count-- > 0)
        sequence(seed++, is_tagged);
    return 0;
}
