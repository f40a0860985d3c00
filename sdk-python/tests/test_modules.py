"""`import ppv2` is all that it takes to use its modules."""

import importlib.metadata
import subprocess
import sys

import pytest

import ppv2

# With the name in the package, and a member of each.
MODULES = {
    "aioquic": "serve",
    "anyio": "create_udp_socket",
    "asyncio": "create_datagram_endpoint",
    "gevent": "DatagramServer",
    "socketserver": "UDPServer",
    "twisted": "listenUDP",
}
EXTRAS = ["aioquic", "anyio", "gevent", "twisted"]


def run(script: str, *arguments: str) -> None:
    command = [sys.executable, "-I", "-W", "error", "-c", script, *arguments]
    subprocess.run(command, timeout=60, check=True)


LAZY = """
import sys, ppv2
_, module, member = sys.argv
assert f"ppv2.{module}" not in sys.modules
assert module in dir(ppv2)
assert getattr(getattr(ppv2, module), member).__module__ == f"ppv2.{module}"
assert getattr(ppv2, module) is sys.modules[f"ppv2.{module}"]
assert not hasattr(ppv2, "nosuch")
"""


@pytest.mark.parametrize(("module", "member"), MODULES.items())
def test_a_module_is_imported_when_it_is_first_used(module: str, member: str) -> None:
    run(LAZY, module, member)


MISSING = """
import importlib, sys, ppv2
extra = sys.argv[1]
sys.modules[extra] = None  # As if it were not installed.
for use in (
    lambda: getattr(ppv2, extra),
    lambda: importlib.import_module(f"ppv2.{extra}"),
    lambda: exec(f"from ppv2 import {extra}"),
):
    try:
        use()
    except ModuleNotFoundError as error:
        assert f"pip install 'ppv2[{extra}]'" in str(error), error
    else:
        raise AssertionError(f"{extra} was imported")
assert extra not in dir(ppv2)
"""


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_is_not_installed_is_named_with_the_extra_that_installs_it(extra: str) -> None:
    run(MISSING, extra)
    provided = importlib.metadata.metadata("ppv2").get_all("Provides-Extra")
    assert extra in (provided or [])


def test_type_checkers_know_the_modules() -> None:
    # For mypy, which warns where an error is expected and not found.
    with pytest.raises(AttributeError, match="module 'ppv2' has no attribute 'nosuch'"):
        ppv2.nosuch  # type: ignore[attr-defined]  # noqa: B018
    assert callable(ppv2.asyncio.create_datagram_endpoint)
    assert callable(ppv2.socketserver.UDPServer)
    assert callable(ppv2.aioquic.serve)
    assert callable(ppv2.anyio.create_udp_socket)
    assert callable(ppv2.gevent.wrap)
    assert callable(ppv2.twisted.listenUDP)
