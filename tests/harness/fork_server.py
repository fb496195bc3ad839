"""Runs `nohype` commands and Python programs, each in a fork of this process, which has imported the modules of the commands.

A program for the lab host, where the start of Python and the imports take longer than the command: one request per line on
stdin (a JSON list: the words of a command, or `-c`, a program and its arguments), one response per line on stdout (status,
stdout, stderr).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from typing import BinaryIO

import click

from orchestrator.cli.main import main, nohype


def run(words: list[str]) -> tuple[int, str, str]:
    """Runs a command as a process of its own, with nothing on stdin."""
    if words and words[0] in nohype.list_commands(click.Context(nohype)):
        importlib.import_module(f"orchestrator.cli.{words[0]}")
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if not child:
            become(words, stdout, stderr)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return os.waitstatus_to_exitcode(status), texts[0], texts[1]


def become(words: list[str], stdout: BinaryIO, stderr: BinaryIO) -> None:
    """Turns a forked process into the command; does not return."""
    with open(os.devnull, "rb") as nothing:
        for number, file in enumerate((nothing, stdout, stderr)):
            os.dup2(file.fileno(), number)
    status = 1
    try:
        if words[:1] == ["-c"]:
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<program>", "exec"), {"__name__": "__main__"})
            status = 0
        else:
            sys.argv = ["nohype", *words]
            main()
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    requests, responses = sys.stdin.buffer, sys.stdout.buffer
    for line in requests:
        responses.write(json.dumps(run(json.loads(line))).encode() + b"\n")
        responses.flush()


if __name__ == "__main__":
    serve()
