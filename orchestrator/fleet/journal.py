"""What happened to a guest, kept in the comment of its job: the controller stores it as long as it knows the job.

The comment is the guest's id and then the entries. Slurm refuses changes of a job that has ended, so the Epilog cannot write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

MAX_COMMENT = 1000
"""Bytes; Slurm refuses comments of more than 1024."""
_MAX_TEXT = 300
_SEPARATOR = "\x1f"
_ENTRY = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) ([a-z-]+): (.*)")


class What(StrEnum):
    SUBMITTED = "submitted"
    ALLOCATED = "allocated"
    REFUSED = "refused"
    """By the Prolog."""
    WAITING = "waiting"
    """For the disks of a deleted guest of the host."""
    STARTED = "started"
    READY = "ready"
    READY_BY_SSH = "ready-by-ssh"
    """The guest reports that it is ready only by answering SSH, which its host does not check."""
    FAILED = "failed"
    """The job script."""
    ENDED = "ended"
    DRAINED = "drained"


@dataclass(frozen=True)
class Entry:
    """``time`` is UTC in ISO 8601, ``what`` the value of a `What`."""

    time: str
    what: str
    text: str


def make_entry(what: What, text: str) -> Entry:
    """With the present time; the text on one line, cut, without control characters: it may come from a guest."""
    words = "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
    return Entry(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", what, words[:_MAX_TEXT])


def parse_comment(comment: str) -> tuple[str, tuple[Entry, ...]]:
    """The guest's id, and the entries."""
    guest_id, *texts = comment.split(_SEPARATOR)
    return guest_id, tuple(Entry(*match.groups()) for text in texts if (match := _ENTRY.fullmatch(text)))


def build_comment(guest_id: str, entries: Iterable[Entry]) -> str:
    """The oldest entries are left out if all would be too long."""
    texts = [f"{entry.time} {entry.what}: {entry.text}" for entry in entries]
    while len((comment := _SEPARATOR.join([guest_id, *texts])).encode()) > MAX_COMMENT and texts:
        texts.pop(0)
    return comment
