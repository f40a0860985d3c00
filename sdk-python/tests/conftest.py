"""Signals and fixtures for all tests."""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

import real_proxy
from peers import PATIENCE

Main = Callable[[], Coroutine[Any, Any, None]]

# A shell that starts a background job, and nohup, have it ignore SIGINT, and the
# programs under test would inherit that. A handler is not inherited: they begin with
# the system's default.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["session", "tagged"])
def any_replies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the real proxy with each kind of replies, by socket and by tag."""
    monkeypatch.setattr(real_proxy, "replies", request.param)


@pytest.fixture(params=["standard", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Main], None]:
    """Runs a coroutine on each kind of event loop, for `PATIENCE` seconds at most."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run(main: Main) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.wait_for(main(), PATIENCE))

    return run
