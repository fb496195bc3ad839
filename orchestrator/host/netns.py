"""Calls in another network namespace."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from orchestrator.errors import HostError

_CLONE_NEWNET = 0x4000_0000

T = TypeVar("T")


def call_in_netns(netns: str | None, call: Callable[[], T]) -> T:
    """Calls in a named network namespace (ip-netns(8)); None for the own. A socket stays where it was created."""
    if netns is None:
        return call()
    # In a thread of its own, which ends afterwards: the namespace is a property of the thread (network_namespaces(7)).
    results: list[T] = []
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            _setns(netns)
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=enter, name="enter-netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _setns(netns: str) -> None:
    # os.setns needs Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        descriptor = os.open(f"/run/netns/{netns}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot open network namespace {netns}", "check the name with `ip netns`", error.errno or 0) from None
    try:
        if libc.setns(descriptor, _CLONE_NEWNET):
            raise HostError(f"cannot enter network namespace {netns}", "run as root", ctypes.get_errno())
    finally:
        os.close(descriptor)
