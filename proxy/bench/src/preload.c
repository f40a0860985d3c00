/* Gives every UDP socket of a program the same receive buffer, whatever it asks
 * for itself: proxies differ in what they ask for, and hosts in what they grant.
 * SO_RCVBUFFORCE needs CAP_NET_ADMIN over the network namespace, which the
 * bench has in the one that it makes. A program that has given it up gets at most
 * net.core.rmem_max. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/socket.h>

static const int buffer = 4 << 20;

static int force(int fd) {
    static int (*real)(int, int, int, const void *, socklen_t);
    if (!real) real = dlsym(RTLD_NEXT, "setsockopt");
    if (real(fd, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof buffer) == 0) return 0;
    return real(fd, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
}

int socket(int domain, int type, int protocol) {
    static int (*real)(int, int, int);
    if (!real) real = dlsym(RTLD_NEXT, "socket");
    int fd = real(domain, type, protocol);
    if (fd >= 0 && (domain == AF_INET || domain == AF_INET6) && (type & 0xf) == SOCK_DGRAM) force(fd);
    return fd;
}

int setsockopt(int fd, int level, int name, const void *value, socklen_t len) {
    static int (*real)(int, int, int, const void *, socklen_t);
    if (!real) real = dlsym(RTLD_NEXT, "setsockopt");
    if (level == SOL_SOCKET && (name == SO_RCVBUF || name == SO_RCVBUFFORCE)) {
        int type = 0;
        socklen_t type_len = sizeof type;
        if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &type_len) == 0 && type == SOCK_DGRAM)
            return force(fd);
    }
    return real(fd, level, name, value, len);
}
