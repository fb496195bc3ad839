"""Imports modules of a package without the rest of it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def parts_only(package: str) -> Iterator[None]:
    """Imports in the block do not run the package's `__init__`. Afterwards the whole package can still be imported."""
    spec = importlib.util.find_spec(package)
    if package in sys.modules or spec is None:
        yield
        return
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        del sys.modules[package]
