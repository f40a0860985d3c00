"""A small service manager: binds sockets, keeps them, and hands them to a program.

usage: stand_in.py [store[=FILE]|store-nothing] [folder=PATH] [SOCKET...] -- PROGRAM [ARGUMENT...]

A socket is TYPE=ADDRESS[,OPTION...]: `udp=127.0.0.1:53,reuse`, `udp=[::]:53,dual`,
`tcp=127.0.0.1:9901`, `unix=/run/x.sock`, `connected=` for a Unix stream that nobody listens
on, or `file=` for what is no socket.

SIGUSR1 ends the program by SIGTERM, waits for it and starts it again. SIGTERM ends it for
good. SIGHUP is passed on. The program ends with this process.

With `store`, the program is ended by SIGUSR2 instead, and what it stores by FDSTORE=1 is handed
to the next one. With a file, a stored socket is replaced by one in which the file's bytes wait.
Standard error tells what is stored and removed. With `store-nothing`, what is to be stored is
closed, as by a unit without FileDescriptorStoreMax=.

A folder is removed with all that is in it when the program ends, and made anew for the next one.
"""

import os
import shutil
import signal
import socket
import sys
import threading

FIRST = 3
names, sockets, kept = [], [], []
stored = {}
# What was stored in truth: the program sees whether anybody has it.
replaced = []
folders = []


def keep_store(notify, replacement, is_kept):
    """Reads what the program tells, in its order."""
    while True:
        text, descriptors, _, _ = socket.recv_fds(notify, 4096, 4)
        told = dict(line.partition("=")[::2] for line in text.decode().splitlines())
        name = told.get("FDNAME", "stored")
        if "FDSTORE" in told and not is_kept:
            print(f"not stored {name}", file=sys.stderr, flush=True)
        elif "FDSTORE" in told:
            assert told["FDPOLL"] == "0" and len(descriptors) == 1 and not stored, told
            stored[name] = descriptors.pop()
            if replacement is not None:
                replaced.append(stored[name])
                ours, theirs = socket.socketpair()
                ours.sendall(replacement)
                ours.close()
                stored[name] = theirs.detach()
            print(f"stored {name}", file=sys.stderr, flush=True)
        elif "FDSTOREREMOVE" in told:
            if name in stored:
                os.close(stored.pop(name))
                print(f"removed {name}", file=sys.stderr, flush=True)
        # A barrier ends when its descriptor is closed.
        for one in descriptors:
            os.close(one)


def bind(spec):
    kind, _, rest = spec.partition("=")
    address, *options = rest.split(",")
    if kind == "file":
        return open("/dev/null")
    if kind == "connected":
        ours, theirs = socket.socketpair()
        kept.append(theirs)
        return ours
    if kind == "unix":
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        one.bind(address)
        one.listen()
        return one
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    one = socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
    if "reuse" in options:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int("dual" not in options))
    one.bind((host, int(port)))
    if kind == "tcp":
        one.listen()
    return one


def start(program):
    while replaced:
        os.close(replaced.pop())
    pid = os.fork()
    if pid:
        return pid
    # Out of the way of the numbers that they get.
    all_of_them = [one.fileno() for one in sockets] + list(stored.values())
    high = [os.dup2(one, 1000 + number) for number, one in enumerate(all_of_them)]
    for number, one in enumerate(high):
        os.dup2(one, FIRST + number, inheritable=True)
    os.closerange(FIRST + len(high), 2000)
    for one in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(one, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.environ.setdefault("LISTEN_PID", str(os.getpid()))
    os.environ.setdefault("LISTEN_FDS", str(len(high)))
    os.environ.setdefault("LISTEN_FDNAMES", ":".join(names + list(stored)))
    os.execvp(program[0], program)


def end_with_us(told):
    """A process that kills the program once this one is gone."""
    if os.fork():
        return
    os.setsid()
    program = 0
    for line in os.fdopen(told):
        program = int(line)
    if program:
        os.kill(program, signal.SIGKILL)
    os._exit(0)


def main():
    split = sys.argv.index("--")
    specs, program = sys.argv[1:split], sys.argv[split + 1 :]
    told, tell = os.pipe()
    signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    end, is_kept = signal.SIGTERM, True
    if specs and specs[0].startswith("store"):
        end = signal.SIGUSR2
        word, _, file = specs.pop(0).partition("=")
        is_kept = word == "store"
        replacement = open(file, "rb").read() if file else None
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        name = f"ppv2-test/store/{os.getpid()}"
        notify.bind("\0" + name)
        os.environ["NOTIFY_SOCKET"] = "@" + name
    if not os.fork():
        os.close(tell)
        os.close(2)
        end_with_us(told)
        os._exit(0)
    os.close(told)
    while specs and specs[0].startswith("folder="):
        folders.append(specs.pop(0).partition("=")[2])
    for spec in specs:
        sockets.append(bind(spec))
        names.append(spec.partition("=")[0])
    if end == signal.SIGUSR2:
        threading.Thread(target=keep_store, args=(notify, replacement, is_kept), daemon=True).start()

    def begin():
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            os.mkdir(folder)
            # The program may be another user.
            os.chmod(folder, 0o777)
        running = start(program)
        os.write(tell, b"%d\n" % running)
        return running

    running, again = begin(), False
    while True:
        match signal.sigwait(signals):
            case signal.SIGCHLD:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid != running:
                    continue
                os.write(tell, b"0\n")
                if not again:
                    sys.exit(os.waitstatus_to_exitcode(status))
                running, again = begin(), False
            case signal.SIGUSR1:
                again = True
                os.kill(running, end)
            case one:
                os.kill(running, one)


main()
