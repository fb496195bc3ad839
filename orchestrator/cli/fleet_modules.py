"""Loads `orchestrator.fleet` for the commands of the fleet."""

from __future__ import annotations

import importlib
from typing import Any


def load_fleet(module: str) -> Any:
    """Loaded when it is used, so that the commands for one host reach neither pydantic nor programs of the host."""
    return importlib.import_module(f"orchestrator.fleet.{module}")
