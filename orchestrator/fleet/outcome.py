"""What became of a guest of a batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What became of a guest.

    ``error`` says why it is not in the fleet (then ``job`` is 0), not known or not ready, or was refused or failed on its host.
    """

    name: str
    guest_id: str
    job: int = 0
    state: str = ""
    error: str = ""
