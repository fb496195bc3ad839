"""Members that managers of an earlier version do not send, and what the client returns instead."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Added:
    """Marks such a member of a type of `shapes`: ``Annotated[str | None, Added(None)]``.

    Args:
        value: of the member's type, for a response without the member: null if the type has it, otherwise empty.
    """

    value: object
