"""The only user of subprocess: argument lists only, no inherited stdin, and CommandError for every failure."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from orchestrator import serving_cpu
from orchestrator.errors import CommandError

_TAIL = 12


@dataclass(frozen=True)
class Completed:
    status: int
    stdout: str
    stderr: str


def run(
    argv: Sequence[str | Path],
    *,
    timeout: float = 60,
    input: str = "",
    env: Mapping[str, str] | None = None,
    inherits: bool = True,
    cwd: Path | None = None,
    log: Path | None = None,
    check: bool = True,
) -> Completed:
    """Raises CommandError, with the end of the output, if the program is not found, times out or (with `check`) fails.

    Args:
        timeout: seconds after which the process group is killed.
        env: variables added to the inherited environment.
        inherits: False for a program that has no variables but ``env``, which needs PATH then.
        log: file to which stdout and stderr are appended; the result then has neither.
    """
    words = [str(word) for word in argv]
    output: IO[bytes] | int = log.open("ab") if log else subprocess.PIPE
    try:
        errors = subprocess.STDOUT if log else subprocess.PIPE
        variables = {**(os.environ if inherits else {}), **(env or {})}
        process = _popen(words, stdin=subprocess.PIPE, stdout=output, stderr=errors, env=variables, cwd=cwd)
        try:
            out, err = process.communicate(input.encode(), timeout=timeout)
        except BaseException as error:
            _kill_group(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise CommandError(f"`{shlex.join(words)}` timed out after {timeout:g} s", _log_hint(log)) from None
            raise
    finally:
        if not isinstance(output, int):
            output.close()
    done = Completed(process.returncode, (out or b"").decode(errors="replace"), (err or b"").decode(errors="replace"))
    if check and done.status:
        raise CommandError(f"`{shlex.join(words)}` {_describe_status(done.status)}{_tail(done, log)}", _log_hint(log))
    return done


def spawn(
    argv: Sequence[str | Path],
    *,
    log: Path,
    pass_fds: Sequence[int] = (),
    new_session: bool = True,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a long-lived program whose output goes to a log file. A new session protects it from ctrl-C at the terminal."""
    with log.open("ab") as output:
        return _popen(
            [str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})}, pass_fds=tuple(pass_fds), start_new_session=new_session,
        )  # fmt: skip


def _popen(words: list[str], **options: Any) -> subprocess.Popen[bytes]:
    options.setdefault("start_new_session", True)
    try:
        with serving_cpu.left():
            return subprocess.Popen(words, **options)
    except FileNotFoundError:
        raise CommandError(f"`{words[0]}` is not installed", "install the dependencies with `make setup`") from None
    except OSError as error:
        raise CommandError(f"cannot start `{words[0]}`", errno=error.errno or 0) from None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _describe_status(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


def _tail(done: Completed, log: Path | None) -> str:
    return format_tail(log.read_text(errors="replace") if log else done.stderr or done.stdout)


def format_tail(output: str) -> str:
    """Follows an error's own line: a colon and the last lines, indented; empty without output."""
    lines = output.strip().splitlines()[-_TAIL:]
    return ":\n    " + "\n    ".join(lines) if lines else ""


def _log_hint(log: Path | None) -> str:
    return f"see {log} for the complete output" if log else ""
