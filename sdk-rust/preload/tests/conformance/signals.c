/* Signals, cancellation, jumps out of handlers, and threads that share a socket. */
#include "harness.h"

#include <stdatomic.h>

static volatile sig_atomic_t handled;

static void count(int number) {
    (void)number;
    handled++;
}

static void on_signal(void (*handler)(int), int flags) {
    struct sigaction action = {.sa_handler = handler, .sa_flags = flags};
    must("sigaction", sigaction(SIGUSR1, &action, NULL));
}

static pthread_t start_thread(void *(*run)(void *), void *argument) {
    pthread_t thread;
    int error = pthread_create(&thread, NULL, run, argument);
    if (error)
        fail("pthread_create: %s", strerror(error));
    return thread;
}

struct target {
    pthread_t thread;
    pid_t id;
    int signals;
    const char *datagram;
};

static struct target this_thread(void) {
    return (struct target){.thread = pthread_self(), .id = thread_id()};
}

static atomic_bool stop;

/* Sends signals whenever the target sleeps, until it is told to stop: a single one could
 * arrive just before the target's call. */
static void *interrupt(void *argument) {
    struct target *target = argument;
    while (!stop) {
        await_sleep(target->id);
        if (!stop)
            pthread_kill(target->thread, SIGUSR1);
        sched_yield();
    }
    return NULL;
}

/* Sends some signals, each after the one before was handled, and a datagram after them. */
static void *interrupt_then_send(void *argument) {
    struct target *target = argument;
    for (int i = 0; i < target->signals; i++) {
        await_sleep(target->id);
        int before = handled;
        pthread_kill(target->thread, SIGUSR1);
        while (handled == before)
            sched_yield();
    }
    await_sleep(target->id);
    client_sends("c1", "s1", target->datagram);
    return NULL;
}

enum call { RECV, RECVFROM, RECVMSG, RECVMMSG, READ, READV, POLL, PPOLL, SELECT, PSELECT, EPOLL, CALLS };

static const char *const call_names[] = {"recv",  "recvfrom", "recvmsg", "recvmmsg",
                                         "read",  "readv",    "poll",    "ppoll",
                                         "select", "pselect", "epoll_wait"};

static long wait_by(enum call call, int fd) {
    char bytes[100];
    struct iovec iov = {bytes, sizeof bytes};
    struct mmsghdr batch = {.msg_hdr = {.msg_iov = &iov, .msg_iovlen = 1}};
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
    fd_set reads;
    FD_ZERO(&reads);
    FD_SET(fd, &reads);
    struct epoll_event event = {.events = EPOLLIN};
    switch (call) {
    case RECV:
        return recv(fd, bytes, sizeof bytes, 0);
    case RECVFROM:
        return recvfrom(fd, bytes, sizeof bytes, 0, NULL, NULL);
    case RECVMSG:
        return recvmsg(fd, &batch.msg_hdr, 0);
    case RECVMMSG:
        return recvmmsg(fd, &batch, 1, 0, NULL);
    case READ:
        return read(fd, bytes, sizeof bytes);
    case READV:
        return readv(fd, &iov, 1);
    case POLL:
        return poll(&poll_fd, 1, -1);
    case PPOLL:
        return ppoll(&poll_fd, 1, NULL, NULL);
    case SELECT:
        return select(fd + 1, &reads, NULL, NULL, NULL);
    case PSELECT:
        return pselect(fd + 1, &reads, NULL, NULL, NULL, NULL);
    case EPOLL: {
        int epoll = must("epoll_create1", epoll_create1(0));
        must("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
        return epoll_wait(epoll, &event, 1, -1);
    }
    default:
        return -2;
    }
}

static void interrupt_each(int fd) {
    for (enum call call = RECV; call < CALLS; call++) {
        struct target target = this_thread();
        stop = false;
        handled = 0;
        pthread_t thread = start_thread(interrupt, &target);
        long result = wait_by(call, fd);
        stop = true;
        outcome(call_names[call], result);
        pthread_join(thread, NULL);
        if (!handled)
            row("  without a signal");
    }
}

CASE(signals_interrupt) {
    int fd = server("s1");
    on_signal(count, 0);
    junk("s1", 5);
    interrupt_each(fd);
    client_sends("c1", "s1", "after all");
    receive("recvfrom", fd, 0);
}

static void *send_signals(void *argument) {
    struct target *target = argument;
    while (!stop)
        pthread_kill(target->thread, SIGUSR1), sched_yield();
    return NULL;
}

CASE(signals_restart) {
    int fd = server("s1");
    on_signal(count, SA_RESTART);
    for (enum call call = RECV; call <= READV; call++) {
        struct target target = this_thread();
        target.signals = 3;
        target.datagram = "after signals";
        handled = 0;
        pthread_t thread = start_thread(interrupt_then_send, &target);
        outcome(call_names[call], wait_by(call, fd));
        pthread_join(thread, NULL);
        row("  %d signals", handled);
    }
    for (enum call call = POLL; call < CALLS; call++) {
        struct target target = this_thread();
        stop = false;
        pthread_t thread = start_thread(interrupt, &target);
        outcome(call_names[call], wait_by(call, fd));
        stop = true;
        pthread_join(thread, NULL);
    }
}

/* socket(7): with a timeout set, calls are interrupted even with SA_RESTART. */
CASE(signals_interrupt_timeouts) {
    int fd = server("s1");
    struct timeval timeout = {10, 0};
    must("setsockopt", setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout));
    on_signal(count, SA_RESTART);
    for (enum call call = RECV; call <= READV; call++) {
        struct target target = this_thread();
        stop = false;
        pthread_t thread = start_thread(interrupt, &target);
        outcome(call_names[call], wait_by(call, fd));
        stop = true;
        pthread_join(thread, NULL);
    }
}

/* A flood doesn't let the target sleep. */
static void *interrupt_in_a_flood(void *argument) {
    struct target *target = argument;
    while (!stop) {
        usleep(3000);
        if (!stop)
            pthread_kill(target->thread, SIGUSR1);
    }
    return NULL;
}

static void *interrupt_in_a_flood_then_send(void *argument) {
    struct target *target = argument;
    for (int i = 0; i < target->signals; i++) {
        usleep(3000);
        int before = handled;
        pthread_kill(target->thread, SIGUSR1);
        while (handled == before)
            sched_yield();
    }
    /* A flood leaves little room in the queue. */
    while (!stop) {
        client_sends("c1", "s1", target->datagram);
        usleep(1000);
    }
    return NULL;
}

static void interrupted_in_a_flood(int fd, enum call last) {
    for (enum call call = RECV; call <= last; call++) {
        struct target target = this_thread();
        stop = false;
        flood("s1");
        pthread_t thread = start_thread(interrupt_in_a_flood, &target);
        outcome(call_names[call], wait_by(call, fd));
        stop = true;
        pthread_join(thread, NULL);
    }
    sigset_t now;
    sigprocmask(SIG_SETMASK, NULL, &now);
    row("blocked %d %d", sigismember(&now, SIGUSR1), sigismember(&now, SIGTERM));
}

CASE_IN(signals_interrupt_in_a_flood, V4) {
    int fd = server("s1");
    on_signal(count, 0);
    interrupted_in_a_flood(fd, EPOLL);
    struct timeval timeout = {10, 0};
    must("setsockopt", setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout));
    on_signal(count, SA_RESTART);
    interrupted_in_a_flood(fd, READV);
}

CASE_IN(signals_restart_in_a_flood, V4) {
    on_signal(count, SA_RESTART);
    for (enum call call = RECV; call <= READV; call++) {
        int fd = server("s1");
        struct target target = this_thread();
        target.signals = 3;
        target.datagram = "after signals";
        handled = 0;
        stop = false;
        flood("s1");
        pthread_t thread = start_thread(interrupt_in_a_flood_then_send, &target);
        outcome(call_names[call], wait_by(call, fd));
        stop = true;
        pthread_join(thread, NULL);
        row("  %d signals", handled);
        close(fd);
    }
}

CASE(signal_masks_of_waits) {
    int fd = server("s1"), epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN};
    must("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
    struct timespec zero = {0, 0};
    fd_set reads;
    sigset_t blocked, none;
    sigemptyset(&none);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    must("sigprocmask", sigprocmask(SIG_BLOCK, &blocked, NULL));
    on_signal(count, SA_RESTART);
    for (int i = 0; i < 3; i++) {
        junk("s1", 3);
        raise(SIGUSR1);
        row("%d handled", handled);
        if (i == 0)
            outcome("ppoll", ppoll(&poll_fd, 1, NULL, &none));
        if (i == 1) {
            FD_ZERO(&reads);
            FD_SET(fd, &reads);
            outcome("pselect", pselect(fd + 1, &reads, NULL, NULL, NULL, &none));
        }
        if (i == 2)
            outcome("epoll_pwait", epoll_pwait(epoll, &event, 1, -1, &none));
        row("%d handled", handled);
    }
    sigset_t now;
    sigprocmask(SIG_SETMASK, NULL, &now);
    row("blocked %d", sigismember(&now, SIGUSR1));
    outcome("ppoll with a blocked signal", ppoll(&poll_fd, 1, &zero, &blocked));
}

/* The program holds the signal back but where it waits. */
CASE_IN(signal_masks_of_waits_in_a_flood, V4) {
    int fd = server("s1"), epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN};
    must("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
    sigset_t blocked, none;
    sigemptyset(&none);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    must("sigprocmask", sigprocmask(SIG_BLOCK, &blocked, NULL));
    on_signal(count, SA_RESTART);
    for (int i = 0; i < 3; i++) {
        struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
        struct target target = this_thread();
        fd_set reads;
        FD_ZERO(&reads);
        FD_SET(fd, &reads);
        stop = false;
        flood("s1");
        pthread_t thread = start_thread(interrupt_in_a_flood, &target);
        if (i == 0)
            outcome("ppoll", ppoll(&poll_fd, 1, NULL, &none));
        if (i == 1)
            outcome("pselect", pselect(fd + 1, &reads, NULL, NULL, NULL, &none));
        if (i == 2)
            outcome("epoll_pwait", epoll_pwait(epoll, &event, 1, -1, &none));
        stop = true;
        pthread_join(thread, NULL);
        sigset_t now;
        sigprocmask(SIG_SETMASK, NULL, &now);
        row("blocked %d %d", sigismember(&now, SIGUSR1), sigismember(&now, SIGTERM));
    }
}

/* ---- handlers that call ---- */

static int handler_fd, handler_result, handler_errno;
static unsigned char *handler_bytes;
static address handler_address;
static atomic_int handler_received, handler_sent;

static void receive_in_handler(int number) {
    (void)number;
    int saved = errno;
    handler_address.len = sizeof handler_address.storage;
    handler_result = recvfrom(handler_fd, handler_bytes, 100, MSG_DONTWAIT, &handler_address.sa,
                              &handler_address.len);
    handler_errno = errno;
    errno = saved;
    handled++;
}

static void send_in_handler(int number) {
    (void)number;
    int saved = errno;
    handler_result = sendto(handler_fd, "by a handler", 12, 0, &handler_address.sa,
                            handler_address.len);
    handler_errno = errno;
    errno = saved;
    handled++;
}

static void show_handler(void) {
    errno = handler_errno;
    row("in the handler -> %s", result_text(handler_result));
}

CASE(handler_receives) {
    int fd = server("s1"), other = server("s2");
    handler_fd = other;
    handler_bytes = fresh(100);
    client_sends("c2", "s2", "for the handler");
    on_signal(receive_in_handler, SA_RESTART);
    struct target target = this_thread();
    target.signals = 1;
    target.datagram = "for the program";
    pthread_t thread = start_thread(interrupt_then_send, &target);
    receive("recvfrom", fd, 0);
    pthread_join(thread, NULL);
    show_handler();
    row("  %s from %s", bytes_text(handler_bytes, 15),
        name_of(&handler_address.storage, handler_address.len));
}

CASE(handler_receives_from_the_same_socket) {
    int fd = server("s1");
    handler_fd = fd;
    handler_bytes = fresh(100);
    junk("s1", 3);
    on_signal(receive_in_handler, SA_RESTART);
    struct target target = this_thread();
    target.signals = 2;
    target.datagram = "for the program";
    pthread_t thread = start_thread(interrupt_then_send, &target);
    receive("recvfrom", fd, 0);
    pthread_join(thread, NULL);
    show_handler();
}

CASE(handler_sends) {
    int fd = server("s1");
    client_sends("c1", "s1", "hello");
    receive("recvfrom", fd, 0);
    handler_fd = fd;
    handler_address = address_of("c1");
    on_signal(send_in_handler, SA_RESTART);
    struct target target = this_thread();
    target.signals = 2;
    target.datagram = "for the program";
    pthread_t thread = start_thread(interrupt_then_send, &target);
    receive("recvfrom", fd, 0);
    pthread_join(thread, NULL);
    show_handler();
    client_expects("c1");
    client_expects("c1");
}

/* A handler may be refused while the thread is at work, but it waits for nothing. */
static void work_in_handler(int number) {
    (void)number;
    int saved = errno;
    char bytes[100];
    address from = {.len = sizeof from.storage};
    if (recvfrom(handler_fd, bytes, sizeof bytes, MSG_DONTWAIT, &from.sa, &from.len) >= 0)
        handler_received++;
    if (sendto(handler_fd, "ping", 4, 0, &handler_address.sa, handler_address.len) == 4)
        handler_sent++;
    errno = saved;
    handled++;
}

CASE(handlers_in_a_storm_of_signals) {
    int fd = server("s1"), other = server("s2");
    client_sends("c2", "s2", "hello");
    receive("other", other, 0);
    handler_fd = other;
    handler_address = address_of("c2");
    for (int i = 0; i < 20; i++)
        client_sends("c2", "s2", "for the handler");
    on_signal(work_in_handler, 0);
    struct target target = this_thread();
    stop = false;
    pthread_t thread = start_thread(send_signals, &target);
    int rounds = 0;
    for (int i = 1; i <= 100; i++) {
        char bytes[200];
        long len;
        address from;
        client_sends_bytes("c1", "s1", i);
        do {
            from.len = sizeof from.storage;
            len = recvfrom(fd, bytes, sizeof bytes, 0, &from.sa, &from.len);
        } while (len < 0 && errno == EINTR);
        while (sendto(fd, bytes, len, 0, &from.sa, from.len) < 0 && errno == EINTR)
            continue;
        rounds += len == i;
    }
    stop = true;
    pthread_join(thread, NULL);
    raise(SIGUSR1);
    int left = 0;
    char bytes[100];
    while (recv(other, bytes, sizeof bytes, MSG_DONTWAIT) >= 0)
        left++;
    row("%d rounds, %d for the handler, handler %s", rounds, left + handler_received,
        handler_sent ? "sent" : "never sent");
    for (int i = 0; i < 100; i++)
        client_expects("c1");
}

/* ---- jumps ---- */

static sigjmp_buf jump;

static void jump_out(int number) {
    (void)number;
    siglongjmp(jump, 1);
}

static atomic_bool go;

/* Once pthread_create has returned, which may not be left by a jump. */
static void *interrupt_once(void *argument) {
    struct target *target = argument;
    while (!go)
        sched_yield();
    await_sleep(target->id);
    pthread_kill(target->thread, SIGUSR1);
    return NULL;
}

CASE(jumps_out_of_waits) {
    int fd = server("s1");
    on_signal(jump_out, 0);
    static volatile int jumps;
    static pthread_t thread;
    static struct target target;
    target = this_thread();
    static volatile enum call call;
    for (call = RECV; call < CALLS; call++)
        for (int volatile i = 0; i < 2; i++) {
            if (sigsetjmp(jump, 1) == 0) {
                go = false;
                thread = start_thread(interrupt_once, &target);
                go = true;
                outcome("not reached", wait_by(call, fd));
            }
            jumps++;
            pthread_join(thread, NULL);
        }
    row("%d jumps", jumps);
    client_sends("c1", "s1", "after all");
    receive("recvfrom", fd, 0);
    address c1 = address_of("c1");
    outcome("sendto", sendto(fd, "reply", 5, 0, &c1.sa, c1.len));
    client_expects("c1");
}

/* recvfrom(2) is safe in handlers and may be left at any time. */
CASE(jumps_out_of_work) {
    int fd = server("s1");
    static volatile int jumps;
    on_signal(jump_out, 0);
    junk_stream("s1");
    static struct itimerval after = {.it_value = {.tv_usec = 300}};
    struct sigaction action = {.sa_handler = jump_out};
    must("sigaction", sigaction(SIGPROF, &action, NULL));
    must("sigaction", sigaction(SIGVTALRM, &action, NULL));
    for (jumps = 0; jumps < 20; jumps++) {
        if (sigsetjmp(jump, 1) == 0) {
            char bytes[10];
            /* Time that this process has spent, so that it jumps while it works. */
            must("setitimer", setitimer(ITIMER_PROF, &after, NULL));
            for (;;)
                recv(fd, bytes, sizeof bytes, MSG_DONTWAIT);
        }
    }
    row("%d jumps", jumps);
    /* The library takes some time to tell that its work was left from a handler that
     * interrupts it, and refuses calls meanwhile, while junk fills the queue. */
    struct timeval timeout = {0, 50000};
    must("setsockopt", setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout));
    unsigned char *buffer = fresh(100);
    long len;
    errno = EAGAIN;
    do {
        if (errno == EAGAIN)
            client_sends("c1", "s1", "after all");
        else
            sched_yield();
    } while ((len = recv(fd, buffer, 100, 0)) < 0);
    received("recv", len, buffer, 100, NULL, 0);
    address c1 = address_of("c1");
    outcome("sendto", sendto(fd, "reply", 5, 0, &c1.sa, c1.len));
    client_expects("c1");
}

/* ---- cancellation ---- */

struct cancelled {
    int fd;
    enum call call;
    atomic_int id;
    bool cleaned;
};

static void clean(void *argument) { ((struct cancelled *)argument)->cleaned = true; }

static void *be_cancelled(void *argument) {
    struct cancelled *this = argument;
    pthread_cleanup_push(clean, this);
    this->id = thread_id();
    wait_by(this->call, this->fd);
    pthread_cleanup_pop(0);
    return NULL;
}

static void show_join(const char *label, pthread_t thread, const struct cancelled *this) {
    void *result;
    pthread_join(thread, &result);
    row("%s: %s, %s", label, result == PTHREAD_CANCELED ? "cancelled" : "returned",
        this->cleaned ? "cleaned up" : "not cleaned up");
}

CASE(cancelled_while_waiting) {
    int fd = server("s1");
    junk("s1", 3);
    for (enum call call = RECV; call < CALLS; call++) {
        struct cancelled this = {.fd = fd, .call = call};
        pthread_t thread = start_thread(be_cancelled, &this);
        while (!this.id)
            sched_yield();
        await_sleep(this.id);
        pthread_cancel(thread);
        show_join(call_names[call], thread, &this);
    }
    client_sends("c1", "s1", "after all");
    receive("recvfrom", fd, 0);
    address c1 = address_of("c1");
    outcome("sendto", sendto(fd, "reply", 5, 0, &c1.sa, c1.len));
    client_expects("c1");
}

CASE(cancelled_in_a_stream_of_junk) {
    int fd = server("s1");
    junk_stream("s1");
    for (int i = 0; i < 20; i++) {
        struct cancelled this = {.fd = fd, .call = i % 2 ? RECVFROM : RECVMMSG};
        pthread_t thread = start_thread(be_cancelled, &this);
        while (!this.id)
            sched_yield();
        pthread_cancel(thread);
        show_join("cancelled", thread, &this);
    }
    client_sends("c1", "s1", "after all");
    receive("recvfrom", fd, 0);
}

static void *be_cancelled_anywhere(void *argument) {
    struct cancelled *this = argument;
    int before;
    pthread_cleanup_push(clean, this);
    pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &before);
    this->id = thread_id();
    for (;;)
        wait_by(this->call, this->fd);
    pthread_cleanup_pop(0);
    return NULL;
}

CASE_IN(cancelled_anywhere, V4) {
    int fd = server("s1");
    address c1 = address_of("c1");
    client_sends("c1", "s1", "one");
    receive("recvfrom", fd, 0);
    flood("s1");
    for (int i = 0; i < 60; i++) {
        struct cancelled this = {.fd = fd, .call = i % EPOLL};
        pthread_t thread = start_thread(be_cancelled_anywhere, &this);
        while (!this.id)
            sched_yield();
        usleep(1000);
        pthread_cancel(thread);
        show_join(call_names[this.call], thread, &this);
    }
    outcome("sendto", sendto(fd, "reply", 5, 0, &c1.sa, c1.len));
    client_expects("c1");
}

/* With a datagram that could be received at once, or a client that could be sent to. */
static void *be_cancelled_before(void *argument) {
    struct cancelled *this = argument;
    pthread_cleanup_push(clean, this);
    pthread_cancel(pthread_self());
    if (this->call == CALLS) {
        address c1 = address_of("c1");
        sendto(this->fd, "reply", 5, 0, &c1.sa, c1.len);
    } else {
        wait_by(this->call, this->fd);
    }
    pthread_cleanup_pop(0);
    return NULL;
}

CASE(cancelled_before_the_call) {
    int fd = server("s1");
    client_sends("c1", "s1", "first");
    receive("recvfrom", fd, 0);
    client_sends("c1", "s1", "second");
    for (enum call call = RECV; call <= CALLS; call++) {
        struct cancelled this = {.fd = fd, .call = call};
        pthread_t thread = start_thread(be_cancelled_before, &this);
        show_join(call == CALLS ? "sendto" : call_names[call], thread, &this);
    }
    client_has_nothing("c1");
    receive("what is left", fd, MSG_DONTWAIT);
    receive("nothing", fd, MSG_DONTWAIT);
}

static void *not_be_cancelled(void *argument) {
    struct cancelled *this = argument;
    int old;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &old);
    this->id = thread_id();
    char bytes[100];
    long len = recv(this->fd, bytes, sizeof bytes, 0);
    row("recv -> %s %s", result_text(len), bytes_text(bytes, len));
    pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, &old);
    row("was disabled: %d", old == PTHREAD_CANCEL_DISABLE);
    pthread_testcancel();
    return NULL;
}

CASE(cancelled_only_when_enabled) {
    int fd = server("s1");
    struct cancelled this = {.fd = fd};
    pthread_t thread = start_thread(not_be_cancelled, &this);
    while (!this.id)
        sched_yield();
    await_sleep(this.id);
    pthread_cancel(thread);
    await_sleep(this.id);
    client_sends("c1", "s1", "all the same");
    show_join("thread", thread, &this);
}

/* ---- threads ---- */

static atomic_long thread_bytes;
static atomic_int thread_count;

static void *echo(void *argument) {
    int fd = *(int *)argument;
    char bytes[2000];
    for (;;) {
        address from = {.len = sizeof from.storage};
        long len = must("recvfrom", recvfrom(fd, bytes, sizeof bytes, 0, &from.sa, &from.len));
        if (len == 0)
            return NULL;
        must("sendto", sendto(fd, bytes, len, 0, &from.sa, from.len));
        thread_bytes += len;
        thread_count++;
    }
}

CASE(threads_share_a_socket) {
    int fd = server("s1");
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        threads[i] = start_thread(echo, &fd);
    for (int i = 1; i <= 60; i++)
        client_sends_bytes(i % 2 ? "c1" : "c2", "s1", i);
    for (int i = 0; i < 4; i++)
        client_sends("c3", "s1", "");
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    row("%d datagrams, %ld bytes", thread_count, thread_bytes);
}

CASE(threads_with_sockets_of_their_own) {
    int fds[2] = {server("s1"), server("s2")};
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        threads[i] = start_thread(echo, &fds[i]);
    for (int i = 1; i <= 20; i++) {
        client_sends_bytes("c1", i % 2 ? "s1" : "s2", i);
        client_expects("c1");
    }
    client_sends("c1", "s1", "");
    client_sends("c1", "s2", "");
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    row("%d datagrams, %ld bytes", thread_count, thread_bytes);
}

static void *open_and_close(void *argument) {
    (void)argument;
    while (!stop) {
        int copies[3];
        for (int i = 0; i < 3; i++)
            copies[i] = socket(domain(), SOCK_DGRAM, 0);
        for (int i = 0; i < 3; i++)
            close(copies[i]);
    }
    return NULL;
}

CASE(threads_open_and_close_meanwhile) {
    int fd = server("s1");
    stop = false;
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        threads[i] = start_thread(open_and_close, NULL);
    int wrong = 0;
    for (int i = 1; i <= 50; i++) {
        int copy = must("dup", dup(fd));
        char bytes[100];
        client_sends_bytes("c1", "s1", i);
        wrong += recv(copy, bytes, sizeof bytes, 0) != i;
        close(copy);
    }
    stop = true;
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    row("%d wrong", wrong);
}

/* A thread is blocked in a receive call when the process forks. */
CASE(fork_beside_a_blocked_thread) {
    int fd = server("s1"), other = server("s2");
    pthread_t thread = start_thread(echo, &fd);
    client_sends("c1", "s1", "one");
    client_expects("c1");
    pid_t child = fork_child();
    if (child == 0) {
        client_sends("c2", "s2", "to the child");
        receive("child", other, 0);
        address c2 = address_of("c2");
        outcome("child: sendto", sendto(other, "reply", 5, 0, &c2.sa, c2.len));
        client_expects("c2");
        _exit(0);
    }
    wait_child("child", child);
    client_sends("c1", "s1", "two");
    client_expects("c1");
    client_sends("c1", "s1", "");
    pthread_join(thread, NULL);
}

static void *work(void *argument) {
    int fd = *(int *)argument;
    char bytes[100];
    address c1 = address_of("c1");
    for (int i = 0; !stop; i++) {
        recv(fd, bytes, sizeof bytes, MSG_DONTWAIT);
        /* Not so often that the other client's datagrams have no room beside these. */
        if (i % 100 == 0)
            sendto(fd, "x", 1, 0, &c1.sa, c1.len);
    }
    return NULL;
}

/* A thread receives and sends all the time while the process forks. */
CASE(fork_beside_a_working_thread) {
    int busy = server("s2"), fd = server("s1");
    client_sends("c1", "s2", "hello");
    receive("busy", busy, 0);
    client_sends("c2", "s1", "hello");
    receive("recvfrom", fd, 0);
    stop = false;
    pthread_t thread = start_thread(work, &busy);
    address c2 = address_of("c2");
    for (int i = 0; i < 20; i++) {
        pid_t child = fork_child();
        if (child == 0)
            _exit(sendto(fd, "child", 5, 0, &c2.sa, c2.len) == 5 ? 0 : 1);
        wait_child("child", child);
        client_expects("c2");
    }
    stop = true;
    pthread_join(thread, NULL);
}
