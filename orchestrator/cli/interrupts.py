"""Turns signals that end a program into an exception, so that what it has started is removed."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

from orchestrator.cli.output import print_error, print_os_error
from orchestrator.errors import LabLost, OrchestratorError

FAILED = 125
"""Exit status of a command that runs other commands and has failed itself, as of env(1) and timeout(1)."""
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        self.name, self.status = signal.Signals(number).name, 128 + number


@contextmanager
def raising_interrupted() -> Iterator[None]:
    """Raises Interrupted in the block at the first signal; further signals do not disturb the removal.

    A signal that is ignored stays so, as with nohup(1). To be called in the main thread.
    """

    def handle(number: int, _frame: FrameType | None) -> None:
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def handling_failures() -> Iterator[None]:
    """Prints an error and exits with FAILED, so that it differs from most statuses of the command that was to run.

    Not for LabLost and for a closed pipe, which have their own status.
    """
    try:
        yield
    except Interrupted as interrupt:
        click.echo(f"nohype: interrupted by {interrupt.name}", err=True)
        raise click.exceptions.Exit(interrupt.status) from None
    except LabLost:
        raise
    except OrchestratorError as error:
        print_error(error)
        raise click.exceptions.Exit(FAILED) from None
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        print_os_error(error)
        raise click.exceptions.Exit(FAILED) from None
