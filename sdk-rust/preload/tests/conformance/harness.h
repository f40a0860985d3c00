/* What all cases share: the names of addresses, requests to the test that runs this
 * program, and the canonical form in which results are printed.
 *
 * The program is run once for each case and family. It prints one line for each result,
 * beginning with "=", and asks the test for what it needs by lines that begin with "!";
 * the test answers each by one line on standard input. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Whether messages are read by the kernel alone, which says EFAULT. musl reads them first: a
 * bad pointer ends the program. */
#ifdef __GLIBC__
enum { KERNEL_READS_MESSAGES = true };
#else
enum { KERNEL_READS_MESSAGES = false };

/* Functions that musl lacks, or lacked for long. A program may find them in the library; where
 * it doesn't, these make the system calls. */
int close_range_found(unsigned first, unsigned last, int flags);
void closefrom_found(int first);
ssize_t preadv2_found(int fd, const struct iovec *iov, int count, off_t offset, int flags);
ssize_t pwritev2_found(int fd, const struct iovec *iov, int count, off_t offset, int flags);
int epoll_pwait2_found(int epoll, struct epoll_event *events, int count,
                       const struct timespec *timeout, const sigset_t *mask);
#define close_range close_range_found
#define closefrom closefrom_found
#define preadv2 preadv2_found
#define pwritev2 pwritev2_found
#define epoll_pwait2 epoll_pwait2_found
#endif

/* Families in which a case runs: an IPv4 socket, an IPv6 socket, and an IPv6 socket
 * bound to all addresses whose clients have IPv4 addresses. */
enum { V4 = 1, V6 = 2, MAPPED = 4, ALL = V4 | V6 | MAPPED };

struct test {
    const char *name;
    void (*run)(void);
    int families;
    struct test *next;
};

void add_test(struct test *test);

#define CASE_IN(NAME, FAMILIES)                                                   \
    static void NAME(void);                                                       \
    static struct test test_##NAME = {#NAME, NAME, FAMILIES, NULL};               \
    __attribute__((constructor)) static void add_##NAME(void) { add_test(&test_##NAME); } \
    static void NAME(void)
#define CASE(NAME) CASE_IN(NAME, ALL)

/* The family of this run. */
extern int family;
/* AF_INET or AF_INET6. */
int domain(void);

typedef struct {
    union {
        struct sockaddr sa;
        struct sockaddr_in in;
        struct sockaddr_in6 in6;
        struct sockaddr_storage storage;
    };
    socklen_t len;
} address;

/* The address with this name: c1 to c3 are clients, s1 to s4 the server's sockets, as a
 * socket of this run's family knows them. */
address address_of(const char *name);
/* The same as an IPv4 address of the plain form, in a run with IPv4 clients. */
address plain_address_of(const char *name);
/* The address to which socket s1 to s4 is bound: all of this host's in the run MAPPED. */
address bind_address(const char *name);
/* All of this host's addresses, with the port of s1 to s4. */
address any_address(const char *name);
/* The name of an address; a v4-mapped one begins with "mapped:". In one of 8 buffers. */
const char *name_of(const void *sockaddr, socklen_t len);
const char *name_of_ip(int address_family, const void *ip);

/* A socket of this run's family. */
int udp_socket(int flags);
/* A socket bound to s1 to s4. */
int server(const char *name);
int server_with(const char *name, int flags);
/* Binds to s1 to s4, and ends the program if that fails. */
void bind_to(int fd, const char *name);

/* Ends the program: the case can't be run. */
__attribute__((noreturn, format(printf, 1, 2))) void fail(const char *format, ...);
/* Ends the program if `result` is negative. */
long must(const char *what, long result);

/* Prints a line. */
__attribute__((format(printf, 1, 2))) void row(const char *format, ...);
/* "EAGAIN"; NULL for numbers that no case is about. */
const char *error_name(int number);
/* "5" or "EAGAIN", in one of 8 buffers. */
const char *result_text(long result);
/* Prints what a call returned: a number, or the name of errno. */
void outcome(const char *call, long result);
/* Prints bytes: quoted if they are few and plain, otherwise their number and hash. */
const char *bytes_text(const void *bytes, size_t len);

/* A buffer of `size` bytes filled with a pattern, with more of it behind its end. */
unsigned char *fresh(size_t size);
/* " OVERWRITTEN" if a byte after `used` is no longer what fresh() made it. */
const char *overwritten(const unsigned char *buffer, size_t size, size_t used);
/* Prints a receive call's result with the payload in a fresh() buffer, and the sender
 * unless `from` is NULL. */
void received(const char *call, long result, const unsigned char *buffer, size_t size,
              const void *from, socklen_t fromlen);
/* Calls recvfrom(fd, 2048 bytes, flags) and prints the result. */
void receive(const char *label, int fd, int flags);
/* Prints what the header of a received message says; payload from its iovecs. */
void show_message(const char *call, long result, const struct msghdr *message);
/* Prints the received control data. */
void show_control(const struct msghdr *message);

/* Requests to the test. */

/* Has a client send text or `len` bytes of a pattern to a server's socket; it is in the
 * socket's queue on return. */
void client_sends(const char *client, const char *server, const char *text);
void client_sends_bytes(const char *client, const char *server, size_t len);
/* The same, with the traffic class. */
void client_sends_tos(const char *client, const char *server, int tos, const char *text);
/* The same, as soon as the calling thread sleeps. */
void client_sends_later(const char *client, const char *server, const char *text);
/* Has datagrams that must be dropped sent to a server's socket; nothing in a plain run. */
void junk(const char *server, int count);
/* The same, without end, until the next request. */
void junk_stream(const char *server);
/* The same, as fast as they can be sent. */
void flood(const char *server);
/* Waits for a datagram at a client and prints it and its sender. */
void client_expects(const char *client);
/* The same, where the sender is not the same by intention. */
void client_expects_from_anywhere(const char *client);
/* The same, past the relay. */
void client_expects_directly(const char *client);
/* Prints what has arrived at a client: nothing, if all is well. */
void client_has_nothing(const char *client);
/* Prints what has arrived at all clients. */
void clients_have_nothing(void);
/* Has a client send to where its latest datagram came from. */
void client_replies(const char *client, const char *text);
/* Closes a client's socket, so that what is sent there is refused. */
void client_closes(const char *client);
/* Opens it again. */
void client_opens(const char *client);

/* A child by fork(2) that can't outlive the case. */
pid_t fork_child(void);
/* Waits for it and prints how it ended. */
void wait_child(const char *label, pid_t child);

/* Waits until a thread of this process sleeps. */
void await_sleep(pid_t thread);
pid_t thread_id(void);

/* What the program does after exec, see descriptors.c. */
int after_exec(int argc, char **argv);
/* Random sequences of calls, see random.c. */
int random_sequences(uint64_t seed, unsigned count, bool is_tagged);
