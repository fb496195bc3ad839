"""`python3 nohype-doctor.pyz`, `python3 -m orchestrator.doctor`: the checks without an installation."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import cast

from orchestrator.doctor.catalogue import CHECKS
from orchestrator.doctor.check import run_checks
from orchestrator.doctor.facts import Facts
from orchestrator.doctor.report import build_json, build_lines, find_status
from orchestrator.errors import OrchestratorError, RequestError
from orchestrator.host.cpus import read_online
from orchestrator.host.link_files import FileNet
from orchestrator.host.root import HostRoot, Net
from orchestrator.values import CpuSet

DESCRIPTION = """Check whether this server is fit for NoHype.

Reads only, needs neither an installation nor a manager, and shows for each check what was found, what is needed, and what to
do. Without root some checks are not measured. Exit status: 0 fit; 1 a required check failed; 8 none failed, but not all were
measured."""
_PIPE_CLOSED = 141  # as a shell shows SIGPIPE
_NOT_WRITTEN = 74  # sysexits.h, EX_IOERR
HOUSEKEEPING = "CPUs that guests do not get, such as 0-1; the first core without this option"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="nohype-doctor", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--housekeeping", metavar="CPUS", help=HOUSEKEEPING)
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    words = parser.parse_args(arguments)
    try:
        chosen = CpuSet.parse(words.housekeeping) if words.housekeeping is not None else None
        return examine(chosen, as_json=words.as_json)
    except OrchestratorError as error:
        name = "argument --housekeeping: " if isinstance(error, RequestError) else ""
        parser.error(name + "; ".join(filter(None, (error.message, error.hint))))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as head(1), has ended: nothing is left to be written when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except OSError as error:  # of the file that the output goes to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"nohype-doctor: cannot write the results: {error.strerror}", file=sys.stderr)
        return _NOT_WRITTEN


def examine(housekeeping: CpuSet | None, *, as_json: bool) -> int:
    """Prints the results, and returns the exit status. Raises RequestError for CPUs that are not online."""
    facts = Facts(HostRoot(net=_find_net()), housekeeping)
    if housekeeping is not None and not housekeeping:
        raise RequestError("no CPUs given", "name the CPUs that guests do not get, such as 0-1")
    if housekeeping and not housekeeping <= (online := read_online(facts.host)):
        raise RequestError(f"CPUs {housekeeping - online} are not online", f"the server has CPUs {online}")
    results = run_checks(facts, CHECKS)
    text = json.dumps(build_json(results), indent=2, ensure_ascii=False) if as_json else "\n".join(build_lines(results))
    _print(text)
    return find_status(results)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except UnicodeEncodeError:  # a terminal that knows ASCII only
        print(text.encode("ascii", "backslashreplace").decode(), flush=True)


def _find_net() -> Net:
    """The network of this host, or what sysfs tells of it where the Python package pyroute2 is not installed."""
    try:
        from orchestrator.host import netlink
    except ImportError:
        return cast(Net, FileNet(HostRoot()))
    return netlink


if __name__ == "__main__":
    sys.exit(main())
