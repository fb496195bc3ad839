"""Which jobs have a script that runs on this host, from the environment of its processes (proc_pid_environ(5))."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def find_job_scripts(proc: Path = Path("/proc")) -> Iterator[tuple[str, int]]:
    """Node and job of each process of a job script on this host; slurmd sets the variables.

    Prolog and Epilog, which have a SLURM_SCRIPT_CONTEXT, are left out: that of another guest can have the number.
    """
    for path in proc.glob("[0-9]*/environ"):
        with suppress(OSError):  # it ended
            words = dict(word.partition(b"=")[::2] for word in path.read_bytes().split(b"\0"))
            if (job := words.get(b"SLURM_JOB_ID", b"")).isdigit() and b"SLURM_SCRIPT_CONTEXT" not in words:
                yield words.get(b"SLURMD_NODENAME", b"").decode(errors="replace"), int(job)
