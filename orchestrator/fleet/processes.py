"""Which jobs have a script that runs on this host, from the processes of slurmd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_STEP_DAEMON = "slurmstepd"


def find_job_scripts(proc: Path = Path("/proc")) -> Iterator[tuple[str, int]]:
    """Node and job of each job script on this host; slurmd sets these variables of its environment (proc_pid_environ(5)).

    A job script is a child of a slurmstepd of root: others can set the variables, too. Prolog and Epilog, which have a
    SLURM_SCRIPT_CONTEXT, are left out: that of another guest can have the number.
    """
    for path in proc.glob("[0-9]*"):
        with suppress(OSError):  # it ended
            words = dict(word.partition(b"=")[::2] for word in (path / "environ").read_bytes().split(b"\0"))
            if (job := words.get(b"SLURM_JOB_ID", b"")).isdigit() and b"SLURM_SCRIPT_CONTEXT" not in words:
                parent = proc / (path / "stat").read_text().rpartition(")")[2].split()[1]
                if (parent / "comm").read_text().strip() == _STEP_DAEMON and parent.stat().st_uid == 0:
                    yield words.get(b"SLURMD_NODENAME", b"").decode(errors="replace"), int(job)
