/* Answers each datagram with the address that it came from, and what it said: by two processes
 * with two threads each, which share the socket.
 *
 * usage: whoami ADDRESS PORT */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <signal.h>
#include <unistd.h>

union name {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
};

static int server;

static void must(int result, const char *what) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
}

/* As HOST:PORT or [HOST]:PORT. */
static int write_name(const union name *name, char *to, size_t room) {
    char host[INET6_ADDRSTRLEN];
    int is_v4 = name->any.sa_family == AF_INET;
    const void *ip = is_v4 ? (const void *)&name->v4.sin_addr : &name->v6.sin6_addr;
    inet_ntop(name->any.sa_family, ip, host, sizeof host);
    return snprintf(to, room, is_v4 ? "%s:%d" : "[%s]:%d", host, ntohs(name->v4.sin_port));
}

static void *serve(void *nothing) {
    for (;;) {
        struct pollfd readable = {.fd = server, .events = POLLIN};
        must(poll(&readable, 1, -1), "poll");
        char bytes[2048], seen[64];
        union name client;
        struct iovec parts[2] = {{seen, 0}, {bytes, sizeof bytes}};
        struct msghdr message = {.msg_name = &client, .msg_namelen = sizeof client,
                                 .msg_iov = parts + 1, .msg_iovlen = 1};
        ssize_t len = recvmsg(server, &message, MSG_DONTWAIT);
        if (len < 0)
            continue;
        parts[0].iov_len = write_name(&client, seen, sizeof seen - 1);
        seen[parts[0].iov_len++] = ' ';
        parts[1].iov_len = len;
        message.msg_iov = parts;
        message.msg_iovlen = 2;
        must(sendmsg(server, &message, 0), "sendmsg");
    }
    return nothing;
}

int main(int count, char **arguments) {
    if (count != 3)
        return 2;
    union name address = {.v6.sin6_family = AF_INET6};
    socklen_t len = sizeof address.v6;
    if (inet_pton(AF_INET6, arguments[1], &address.v6.sin6_addr) != 1) {
        address.v4.sin_family = AF_INET;
        len = sizeof address.v4;
        if (inet_pton(AF_INET, arguments[1], &address.v4.sin_addr) != 1)
            return 2;
    }
    address.v4.sin_port = htons(atoi(arguments[2])); /* where IPv6 has it, too */
    must(server = socket(address.any.sa_family, SOCK_DGRAM, 0), "socket");
    must(bind(server, &address.any, len), "bind");
    pid_t child = fork();
    must(child, "fork");
    if (child == 0)
        prctl(PR_SET_PDEATHSIG, SIGKILL);
    pthread_t second;
    if (pthread_create(&second, NULL, serve, NULL) != 0)
        return 1;
    if (child != 0)
        fprintf(stderr, "ready\n");
    serve(NULL);
}
