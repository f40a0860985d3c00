"""What holds for every test."""

import signal

# A shell that starts a background job, and nohup, have it ignore SIGINT, and the
# programs under test would inherit that. A handler is not inherited: they begin with
# the system's default.
signal.signal(signal.SIGINT, signal.default_int_handler)
