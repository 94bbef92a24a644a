"""Commands that are run in the test's own process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

Say = Callable[..., tuple[int, str, str]]
"""Runs a command with these arguments; gives its exit code, standard output and standard error."""


@contextmanager
def spoken(
    main: Callable[[], object], name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Say]:
    """The command ``name``, whose program is ``main``, without the settings of whoever runs the tests."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    for variable in [variable for variable in os.environ if variable.startswith(("MEMVID_", "RUNPOD_"))]:
        monkeypatch.delenv(variable)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
