/* The program's entry, and what harness.h declares. */
#include "harness.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <linux/errqueue.h>
#include <sys/prctl.h>

enum {
    /* Seconds after which a case has failed. */
    LIMIT = 20,
    GUARD = 64,
    PATTERN = 0xa5,
};

int family;
static struct test *tests;
static struct test **last_test = &tests;

void add_test(struct test *test) {
    *last_test = test;
    last_test = &test->next;
}

/* One of several buffers, so that a line can show more than one name. */
static char *text_buffer(void) {
    static _Thread_local char buffers[8][256];
    static _Thread_local unsigned next;
    return buffers[next++ % 8];
}

void fail(const char *format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    row("CAN'T RUN: %s", text);
    _exit(3);
}

long must(const char *what, long result) {
    if (result < 0)
        fail("%s: %s", what, strerror(errno));
    return result;
}

static void write_all(const char *bytes, size_t len) {
    while (len > 0) {
        ssize_t written = write(1, bytes, len);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0)
            _exit(4);
        bytes += written;
        len -= written;
    }
}

void row(const char *format, ...) {
    int saved = errno;
    char text[1024] = "=";
    va_list arguments;
    va_start(arguments, format);
    int len = vsnprintf(text + 1, sizeof text - 2, format, arguments);
    va_end(arguments);
    if (len > (int)sizeof text - 3)
        len = sizeof text - 3;
    text[len + 1] = '\n';
    write_all(text, len + 2);
    errno = saved;
}

/* ---- addresses ---- */

int domain(void) { return family == V4 ? AF_INET : AF_INET6; }

/* "c1=198.51.100.1:4001", "s1=[2001:db8::10]:2000", "@server=192.0.2.10": from the command line. */
static char **names;

static bool parse_ip(const char *text, size_t len, address *to) {
    char ip[64] = "";
    if (len >= sizeof ip)
        return false;
    memcpy(ip, text, len);
    memset(to, 0, sizeof *to);
    if (inet_pton(AF_INET, ip, &to->in.sin_addr) == 1) {
        to->in.sin_family = AF_INET;
        to->len = sizeof to->in;
        return true;
    }
    if (inet_pton(AF_INET6, ip, &to->in6.sin6_addr) == 1) {
        to->in6.sin6_family = AF_INET6;
        to->len = sizeof to->in6;
        return true;
    }
    return false;
}

static bool parse_name(const char *entry, char name[32], address *to) {
    const char *value = strchr(entry, '=');
    if (!value || value - entry >= 32)
        return false;
    memcpy(name, entry, value - entry);
    name[value - entry] = 0;
    value++;
    if (name[0] == '@')
        return parse_ip(value, strlen(value), to);
    const char *colon = strrchr(value, ':');
    bool brackets = value[0] == '[';
    if (!colon || !parse_ip(value + brackets, colon - value - 2 * brackets, to))
        return false;
    to->in.sin_port = htons(atoi(colon + 1)); /* where IPv6 has it, too */
    return true;
}

address plain_address_of(const char *wanted) {
    char name[32];
    address found;
    for (char **entry = names; *entry; entry++)
        if (parse_name(*entry, name, &found) && strcmp(name, wanted) == 0)
            return found;
    fail("no address is named %s", wanted);
}

static address mapped(address plain) {
    address to = {.len = sizeof to.in6};
    to.in6.sin6_family = AF_INET6;
    to.in6.sin6_port = plain.in.sin_port;
    to.in6.sin6_addr.s6_addr[10] = to.in6.sin6_addr.s6_addr[11] = 0xff;
    memcpy(&to.in6.sin6_addr.s6_addr[12], &plain.in.sin_addr, 4);
    return to;
}

address address_of(const char *name) {
    address plain = plain_address_of(name);
    return family == MAPPED && plain.sa.sa_family == AF_INET ? mapped(plain) : plain;
}

address any_address(const char *name) {
    address to = address_of(name);
    if (to.sa.sa_family == AF_INET)
        to.in.sin_addr.s_addr = INADDR_ANY;
    else
        to.in6.sin6_addr = in6addr_any;
    return to;
}

address bind_address(const char *name) {
    return family == MAPPED ? any_address(name) : address_of(name);
}

static bool is_mapped(const struct in6_addr *ip) { return IN6_IS_ADDR_V4MAPPED(ip); }

const char *name_of_ip(int address_family, const void *ip) {
    char *text = text_buffer();
    char name[32];
    address found;
    const char *prefix = "";
    if (address_family == AF_INET6 && is_mapped(ip)) {
        prefix = "mapped:";
        ip = (const char *)ip + 12;
        address_family = AF_INET;
    }
    for (char **entry = names; *entry; entry++) {
        if (!parse_name(*entry, name, &found) || name[0] != '@' ||
            found.sa.sa_family != address_family)
            continue;
        const void *known = address_family == AF_INET ? (void *)&found.in.sin_addr
                                                       : (void *)&found.in6.sin6_addr;
        if (memcmp(known, ip, address_family == AF_INET ? 4 : 16) == 0) {
            snprintf(text, 256, "%s%s", prefix, name + 1);
            return text;
        }
    }
    char plain[64];
    inet_ntop(address_family, ip, plain, sizeof plain);
    snprintf(text, 256, "%s%s", prefix, plain);
    return text;
}

/* The name of the socket that has this port. */
static const char *name_of_port(in_port_t port) {
    char *text = text_buffer();
    address found;
    for (char **entry = names; *entry; entry++)
        if (parse_name(*entry, text, &found) && text[0] != '@' && found.in.sin_port == port)
            return text;
    snprintf(text, 256, port ? "another port" : "port 0");
    return text;
}

const char *name_of(const void *sockaddr, socklen_t len) {
    char *text = text_buffer();
    address at = {0};
    memcpy(&at.storage, sockaddr, len < sizeof at.storage ? len : sizeof at.storage);
    if (at.sa.sa_family == AF_INET && len >= sizeof at.in) {
        static const char zero[8];
        snprintf(text, 256, "%s of %s%s", name_of_port(at.in.sin_port),
                 name_of_ip(AF_INET, &at.in.sin_addr),
                 memcmp(at.in.sin_zero, zero, 8) ? " sin_zero!" : "");
    } else if (at.sa.sa_family == AF_INET6 && len >= sizeof at.in6) {
        snprintf(text, 256, "%s of %s%s%s", name_of_port(at.in6.sin6_port),
                 name_of_ip(AF_INET6, &at.in6.sin6_addr), at.in6.sin6_flowinfo ? " flow!" : "",
                 at.in6.sin6_scope_id ? " scope!" : "");
    } else {
        snprintf(text, 256, "family %d in %u bytes", at.sa.sa_family, len);
    }
    return text;
}

/* ---- sockets ---- */

int udp_socket(int flags) { return must("socket", socket(domain(), SOCK_DGRAM | flags, 0)); }

void bind_to(int fd, const char *name) {
    address at = bind_address(name);
    must("bind", bind(fd, &at.sa, at.len));
}

int server_with(const char *name, int flags) {
    int fd = udp_socket(flags);
    bind_to(fd, name);
    return fd;
}

int server(const char *name) { return server_with(name, 0); }

/* ---- results ---- */

const char *error_name(int number) {
#define NAME(NUMBER) [NUMBER] = #NUMBER
    static const char *const names[] = {
        NAME(EPERM), NAME(ENOENT), NAME(EINTR), NAME(EIO), NAME(ENXIO), NAME(EBADF), NAME(ECHILD),
        NAME(EAGAIN), NAME(ENOMEM), NAME(EACCES), NAME(EFAULT), NAME(EBUSY), NAME(EEXIST),
        NAME(ENODEV), NAME(EINVAL), NAME(ENFILE), NAME(EMFILE), NAME(ENOTTY), NAME(EFBIG),
        NAME(ENOSPC), NAME(ESPIPE), NAME(EPIPE), NAME(EDOM), NAME(ERANGE), NAME(EDEADLK),
        NAME(ENOSYS), NAME(EPROTO), NAME(EBADMSG), NAME(EOVERFLOW), NAME(ENOTSOCK),
        NAME(EDESTADDRREQ), NAME(EMSGSIZE), NAME(EPROTOTYPE), NAME(ENOPROTOOPT),
        NAME(EPROTONOSUPPORT), NAME(EOPNOTSUPP), NAME(EAFNOSUPPORT), NAME(EADDRINUSE),
        NAME(EADDRNOTAVAIL), NAME(ENETDOWN), NAME(ENETUNREACH), NAME(ECONNABORTED),
        NAME(ECONNRESET), NAME(ENOBUFS), NAME(EISCONN), NAME(ENOTCONN), NAME(ESHUTDOWN),
        NAME(ETIMEDOUT), NAME(ECONNREFUSED), NAME(EHOSTDOWN), NAME(EHOSTUNREACH), NAME(EALREADY),
        NAME(EINPROGRESS),
    };
#undef NAME
    return number > 0 && number < (int)(sizeof names / sizeof *names) ? names[number] : NULL;
}

const char *result_text(long result) {
    char *text = text_buffer();
    const char *name = result == -1 ? error_name(errno) : NULL;
    if (name)
        snprintf(text, 256, "%s", name);
    else
        snprintf(text, 256, "%ld", result);
    return text;
}

void outcome(const char *call, long result) { row("%s -> %s", call, result_text(result)); }

const char *bytes_text(const void *bytes, size_t len) {
    char *text = text_buffer();
    const unsigned char *at = bytes;
    bool is_plain = len <= 40;
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < len; i++) {
        is_plain = is_plain && at[i] >= 0x20 && at[i] < 0x7f;
        hash = (hash ^ at[i]) * 0x100000001b3;
    }
    if (is_plain)
        snprintf(text, 256, "'%.*s'", (int)len, (const char *)at);
    else
        snprintf(text, 256, "%zu bytes %016llx", len, (unsigned long long)hash);
    return text;
}

unsigned char *fresh(size_t size) {
    unsigned char *buffer = malloc(size + GUARD);
    if (!buffer)
        fail("malloc");
    memset(buffer, PATTERN, size + GUARD);
    return buffer;
}

const char *overwritten(const unsigned char *buffer, size_t size, size_t used) {
    for (size_t i = used; i < size + GUARD; i++)
        if (buffer[i] != PATTERN)
            return " OVERWRITTEN";
    return "";
}

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

void received(const char *call, long result, const unsigned char *buffer, size_t size,
              const void *from, socklen_t fromlen) {
    size_t used = result < 0 ? 0 : smaller(result, size);
    char sender[300] = "";
    if (from && result >= 0)
        snprintf(sender, sizeof sender, " from %s (%u)", name_of(from, fromlen), fromlen);
    row("%s -> %s %s%s%s", call, result_text(result), bytes_text(buffer, used), sender,
        overwritten(buffer, size, used));
}

void receive(const char *label, int fd, int flags) {
    unsigned char *buffer = fresh(2048);
    address from = {.len = sizeof from.storage};
    long result = recvfrom(fd, buffer, 2048, flags, &from.sa, &from.len);
    received(label, result, buffer, 2048, &from, from.len);
    free(buffer);
}

void show_control(const struct msghdr *message) {
    /* CMSG_NXTHDR writes nothing. */
    struct msghdr *at = (struct msghdr *)message;
    for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(at); cmsg; cmsg = CMSG_NXTHDR(at, cmsg)) {
        const void *data = CMSG_DATA(cmsg);
        size_t len = cmsg->cmsg_len - CMSG_LEN(0);
        int level = cmsg->cmsg_level, type = cmsg->cmsg_type;
        char name[IF_NAMESIZE] = "?";
        int number;
        if (level == IPPROTO_IP && type == IP_PKTINFO && len >= sizeof(struct in_pktinfo)) {
            struct in_pktinfo info;
            memcpy(&info, data, sizeof info);
            if_indextoname(info.ipi_ifindex, name);
            row("  IP_PKTINFO %s %s %s (%zu)", name, name_of_ip(AF_INET, &info.ipi_spec_dst),
                name_of_ip(AF_INET, &info.ipi_addr), len);
        } else if (level == IPPROTO_IPV6 && type == IPV6_PKTINFO &&
                   len >= sizeof(struct in6_pktinfo)) {
            struct in6_pktinfo info;
            memcpy(&info, data, sizeof info);
            if_indextoname(info.ipi6_ifindex, name);
            row("  IPV6_PKTINFO %s %s (%zu)", name, name_of_ip(AF_INET6, &info.ipi6_addr), len);
        } else if (level == IPPROTO_IP && type == IP_ORIGDSTADDR) {
            row("  IP_ORIGDSTADDR %s (%zu)", name_of(data, len), len);
        } else if (level == IPPROTO_IPV6 && type == IPV6_ORIGDSTADDR) {
            row("  IPV6_ORIGDSTADDR %s (%zu)", name_of(data, len), len);
        } else if (level == SOL_SOCKET && (type == SO_TIMESTAMP || type == SO_TIMESTAMPNS)) {
            long seconds = 0;
            memcpy(&seconds, data, smaller(len, sizeof seconds));
            row("  %s %s (%zu)", type == SO_TIMESTAMP ? "SO_TIMESTAMP" : "SO_TIMESTAMPNS",
                len < sizeof seconds                    ? "cut"
                : labs(seconds - time(NULL)) < 60 ? "now"
                                                  : "wrong",
                len);
        } else if (len == sizeof number) {
            memcpy(&number, data, sizeof number);
            row("  cmsg %d/%d %d (4)", level, type, number);
        } else if (len == 1) {
            row("  cmsg %d/%d %d (1)", level, type, *(const uint8_t *)data);
        } else {
            row("  cmsg %d/%d %s", level, type, bytes_text(data, len));
        }
    }
}

void show_message(const char *call, long result, const struct msghdr *message) {
    char *payload = malloc(65536);
    size_t len = 0, left = result < 0 ? 0 : result;
    for (size_t i = 0; i < (size_t)message->msg_iovlen && left > 0; i++) {
        size_t part = smaller(left, message->msg_iov[i].iov_len);
        memcpy(payload + len, message->msg_iov[i].iov_base, part);
        len += part;
        left -= part;
    }
    if (result < 0)
        row("%s -> %s", call, result_text(result));
    else
        row("%s -> %s %s from %s (%u) control %zu flags %#x", call, result_text(result),
            bytes_text(payload, len),
            message->msg_name ? name_of(message->msg_name, message->msg_namelen) : "NULL",
            message->msg_namelen, (size_t)message->msg_controllen, (unsigned)message->msg_flags);
    free(payload);
}

/* ---- requests ---- */

/* Asks the test, and returns its answer in one of the text buffers. */
__attribute__((format(printf, 1, 2))) static const char *ask(const char *format, ...) {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    int saved = errno;
    pthread_mutex_lock(&mutex);
    char request[256] = "!";
    va_list arguments;
    va_start(arguments, format);
    int len = vsnprintf(request + 1, sizeof request - 2, format, arguments);
    va_end(arguments);
    request[len + 1] = '\n';
    write_all(request, len + 2);
    char *answer = text_buffer();
    size_t filled = 0;
    for (;;) {
        ssize_t got = read(0, answer + filled, 1);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0 || filled == 255)
            _exit(5);
        if (answer[filled] == '\n')
            break;
        filled++;
    }
    answer[filled] = 0;
    pthread_mutex_unlock(&mutex);
    errno = saved;
    return answer;
}

void client_sends(const char *client, const char *to, const char *text) {
    ask("send %s %s 0 %s", client, to, text);
}

void client_sends_tos(const char *client, const char *to, int tos, const char *text) {
    ask("send %s %s %d %s", client, to, tos, text);
}

void client_sends_bytes(const char *client, const char *to, size_t len) {
    ask("bytes %s %s %zu", client, to, len);
}

void client_sends_later(const char *client, const char *to, const char *text) {
    ask("later %d %d %s %s %s", getpid(), thread_id(), client, to, text);
}

void junk(const char *to, int count) { ask("junk %s %d", to, count); }

void junk_stream(const char *to) { ask("stream %s", to); }

void flood(const char *to) { ask("flood %s", to); }

void client_expects(const char *client) { row("%s has %s", client, ask("expect %s", client)); }

void client_expects_from_anywhere(const char *client) {
    row("%s has %s", client, ask("anywhere %s", client));
}

void client_expects_directly(const char *client) {
    row("%s has %s", client, ask("directly %s", client));
}

void client_has_nothing(const char *client) { row("%s has %s", client, ask("now %s", client)); }

void clients_have_nothing(void) {
    const char *found = ask("rest");
    if (*found)
        row("%s", found);
}

void client_replies(const char *client, const char *text) { ask("reply %s %s", client, text); }

void client_closes(const char *client) { ask("close %s", client); }

void client_opens(const char *client) { ask("open %s", client); }

/* ---- processes and threads ---- */

pid_t fork_child(void) {
    pid_t child = must("fork", fork());
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        alarm(LIMIT);
    }
    return child;
}

void wait_child(const char *label, pid_t child) {
    int status;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            fail("waitpid: %s", strerror(errno));
    if (WIFSIGNALED(status))
        row("%s ended by signal %d", label, WTERMSIG(status));
    else
        row("%s ended with %d", label, WEXITSTATUS(status));
}

pid_t thread_id(void) { return syscall(SYS_gettid); }

void await_sleep(pid_t thread) {
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", thread);
    for (int seen = 0; seen < 3;) {
        FILE *file = fopen(path, "r");
        if (!file)
            return;
        size_t len = fread(text, 1, sizeof text - 1, file);
        fclose(file);
        text[len] = 0;
        const char *state = strrchr(text, ')');
        seen = state && state[2] == 'S' ? seen + 1 : 0;
        sched_yield();
    }
}

static const struct {
    const char *name;
    int family;
} families[] = {{"v4", V4}, {"v6", V6}, {"mapped", MAPPED}};

int main(int argc, char **argv) {
    if (errno != 0) {
        perror("errno is set at the start");
        return 2;
    }
    if (argc == 2 && strcmp(argv[1], "list") == 0) {
        for (struct test *test = tests; test; test = test->next)
            for (int i = 0; i < 3; i++)
                if (test->families & families[i].family)
                    printf("%s %s\n", test->name, families[i].name);
        return 0;
    }
    if (argc < 4) {
        fprintf(stderr, "usage: conformance list | CASE FAMILY NAME=ADDRESS...\n"
                        "       conformance random FAMILY SEED COUNT IS_TAGGED NAME=ADDRESS...\n");
        return 2;
    }
    alarm(LIMIT);
    for (int i = 0; i < 3; i++)
        if (strcmp(argv[2], families[i].name) == 0)
            family = families[i].family;
    names = argv + 3;
    if (strcmp(argv[1], "after_exec") == 0) {
        /* What to do stands before the names. */
        names = argv + 5;
        return after_exec(argc, argv);
    }
    if (strcmp(argv[1], "random") == 0 && argc > 6) {
        names = argv + 6;
        return random_sequences(strtoull(argv[3], NULL, 10), atoi(argv[4]), atoi(argv[5]));
    }
    for (struct test *test = tests; test; test = test->next)
        if (strcmp(argv[1], test->name) == 0) {
            test->run();
            return 0;
        }
    fprintf(stderr, "no case %s\n", argv[1]);
    return 2;
}

#ifndef __GLIBC__
/* ---- what musl lacks ---- */

#undef close_range
#undef closefrom
#undef preadv2
#undef pwritev2
#undef epoll_pwait2

/* The function of this name, if the library has it. */
#define FOUND(RESULT, NAME, ...)                                                  \
    RESULT (*found)(__VA_ARGS__) = (RESULT(*)(__VA_ARGS__))dlsym(RTLD_DEFAULT, #NAME)

int close_range_found(unsigned first, unsigned last, int flags) {
    FOUND(int, close_range, unsigned, unsigned, int);
    return found ? found(first, last, flags) : syscall(SYS_close_range, first, last, flags);
}

void closefrom_found(int first) {
    FOUND(void, closefrom, int);
    if (found)
        found(first);
    else
        syscall(SYS_close_range, first, ~0U, 0);
}

ssize_t preadv2_found(int fd, const struct iovec *iov, int count, off_t offset, int flags) {
    FOUND(ssize_t, preadv2, int, const struct iovec *, int, off_t, int);
    return found ? found(fd, iov, count, offset, flags)
                 : syscall(SYS_preadv2, fd, iov, count, offset, 0, flags);
}

ssize_t pwritev2_found(int fd, const struct iovec *iov, int count, off_t offset, int flags) {
    FOUND(ssize_t, pwritev2, int, const struct iovec *, int, off_t, int);
    return found ? found(fd, iov, count, offset, flags)
                 : syscall(SYS_pwritev2, fd, iov, count, offset, 0, flags);
}

int epoll_pwait2_found(int epoll, struct epoll_event *events, int count,
                       const struct timespec *timeout, const sigset_t *mask) {
    FOUND(int, epoll_pwait2, int, struct epoll_event *, int, const struct timespec *,
          const sigset_t *);
    return found ? found(epoll, events, count, timeout, mask)
                 : syscall(SYS_epoll_pwait2, epoll, events, count, timeout, mask, 8);
}
#endif
