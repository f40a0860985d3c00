"""Tests that need addresses which a machine doesn't have, in a network namespace
of their own.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import wraps

_INSIDE = "PPV2_TEST_NAMESPACE"

_FORBIDDEN = (
    "if no namespace can be made, allow user namespaces (sysctl "
    "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)"
)


def inside(setup: str, *, rights: bool) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Runs a test in a new namespace after the shell commands `setup`, with all rights
    there or with those of an ordinary user.
    """
    drop = "" if rights else "setpriv --bounding-set=-all --inh-caps=-all"
    script = f'ip link set lo up\n{setup}\nexec {drop} "$@"'

    def decorate(test: Callable[[], None]) -> Callable[[], None]:
        @wraps(test)
        def run() -> None:
            if os.environ.get(_INSIDE):
                test()
                return
            node = os.environ["PYTEST_CURRENT_TEST"].rsplit(" ", 1)[0]
            # Within the limit of the test outside, to tell where the one inside waits.
            pytest = [sys.executable, "-P", "-m", "pytest", "--quiet", "--timeout=90", node]
            namespace = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
            result = subprocess.run(
                [*namespace, "sh", "-ec", script, "sh", *pytest],
                env={**os.environ, _INSIDE: "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            assert result.returncode == 0, f"{_FORBIDDEN}\n{result.stdout}"
            assert "1 passed" in result.stdout, result.stdout

        return run

    return decorate
