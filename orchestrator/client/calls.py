"""What the groups of `Client`'s calls have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class Calls(ABC):
    @abstractmethod
    def _ask(
        self,
        kind: Any,
        method: str,
        target: str,
        body: object = None,
        timeout: float = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> Any: ...
