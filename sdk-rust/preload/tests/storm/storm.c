/* Threads, and signal handlers that interrupt them, receive from one socket in every way until
 * standard input ends; then what is left is received. Prints how many datagrams the program got,
 * how many calls failed for their pointers, and how many datagrams had no room in the queue. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#ifndef SO_MEMINFO
#define SO_MEMINFO 55
#endif

enum { THREADS = 4, SIZE = 65536, DROPS = 8 };

static int fd;
static atomic_bool over;
static atomic_ulong got, unreachable;

static void count(long result) {
    if (result > 0)
        got += result;
    else if (result < 0 && errno == EFAULT)
        unreachable++;
}

static void one(long result) { count(result > 0 ? 1 : result); }

static void handle(int signal) {
    static _Thread_local char buffer[SIZE];
    int saved = errno;
    (void)signal;
    one(recv(fd, buffer, sizeof buffer, MSG_DONTWAIT));
    errno = saved;
}

static void *receive(void *seed) {
    unsigned state = (uintptr_t)seed;
    char *buffer = malloc(4 * SIZE);
    while (!over) {
        struct pollfd polled = {.fd = fd, .events = POLLIN};
        struct sockaddr_in from;
        socklen_t len = sizeof from;
        struct mmsghdr messages[4] = {0};
        struct iovec parts[4];
        int bytes;
        for (int i = 0; i < 4; i++) {
            parts[i] = (struct iovec){buffer + i * SIZE, SIZE};
            messages[i].msg_hdr.msg_iov = &parts[i];
            messages[i].msg_hdr.msg_iovlen = 1;
        }
        switch (rand_r(&state) % 12) {
        case 0:
        case 1:
            one(recv(fd, buffer, SIZE, 0));
            break;
        case 2:
            one(recv(fd, buffer, SIZE, MSG_DONTWAIT));
            break;
        case 3:
            one(recvfrom(fd, buffer, SIZE, 0, (struct sockaddr *)&from, &len));
            break;
        case 4:
            one(recvfrom(fd, buffer, SIZE, MSG_DONTWAIT, (struct sockaddr *)&from, NULL));
            break;
        case 5:
            one(recv(fd, NULL, SIZE, MSG_DONTWAIT));
            break;
        case 6:
            parts[2].iov_base = (void *)8;
            count(recvmmsg(fd, messages, 4, MSG_DONTWAIT, NULL));
            break;
        case 7:
            count(recvmmsg(fd, messages, 4, MSG_WAITFORONE, NULL));
            break;
        case 8:
            recv(fd, buffer, SIZE, MSG_PEEK | MSG_DONTWAIT);
            break;
        case 9:
            recv(fd, buffer, SIZE, MSG_PEEK);
            break;
        case 10:
            poll(&polled, 1, 1);
            break;
        default:
            ioctl(fd, FIONREAD, &bytes);
        }
    }
    free(buffer);
    return NULL;
}

static void *interrupt(void *threads) {
    pthread_t *them = threads;
    for (unsigned n = 0; !over; n++) {
        pthread_kill(them[n % THREADS], SIGUSR1);
        usleep(50);
    }
    return NULL;
}

int main(int argc, char **argv) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(argc > 1 ? atoi(argv[1]) : 0)};
    struct timeval timeout = {0, 5000};
    struct sigaction action = {.sa_handler = handle, .sa_flags = SA_RESTART};
    uint32_t memory[16] = {0};
    socklen_t len = sizeof memory;
    pthread_t threads[THREADS], interrupter;
    char byte;
    inet_pton(AF_INET, "127.0.0.1", &at.sin_addr);
    fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) != 0 ||
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) != 0 ||
        sigaction(SIGUSR1, &action, NULL) != 0) {
        perror("storm");
        return 1;
    }
    for (uintptr_t n = 0; n < THREADS; n++)
        pthread_create(&threads[n], NULL, receive, (void *)(n + 1));
    pthread_create(&interrupter, NULL, interrupt, threads);
    printf("ready\n");
    fflush(stdout);
    while (read(0, &byte, 1) > 0)
        ;
    over = true;
    pthread_join(interrupter, NULL);
    for (int n = 0; n < THREADS; n++)
        pthread_join(threads[n], NULL);
    static char buffer[SIZE];
    /* A call that has met many datagrams that must be dropped ends, too. */
    for (int tries = 0; tries < 1000; tries++)
        one(recv(fd, buffer, SIZE, MSG_DONTWAIT));
    if (getsockopt(fd, SOL_SOCKET, SO_MEMINFO, memory, &len) != 0) {
        perror("SO_MEMINFO");
        return 1;
    }
    printf("%lu %lu %u\n", got, unreachable, memory[DROPS]);
    return 0;
}
