"""Creates, uses and deletes guests in a lab on a loaded machine, to find hangs and repeated interrupts of the emulator.

    .venv/bin/python benchmarks/lab_soak.py [GUESTS]

Requires root. Uses the lab `bench`, or the one named by NOHYPE_TEST_LAB, which must have no guests. Guests are created three at a
time, ping each other, are busy for some seconds, and are deleted. A busy process per CPU of the machine takes time from the
emulator. A uprobe in the emulator counts repeated deliveries if the kernel has uprobes and tracefs. Prints a line per round, then
a line of JSON. Exits with 1 if a guest hung or failed, or an interrupt was delivered twice.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bench_lab import use_lab

from orchestrator.errors import LabLost
from orchestrator.lab.demo import ask
from orchestrator.lab.emulator import PROGRAM
from orchestrator.lab.health import check_emulation
from orchestrator.lab.lab import Lab, execute
from orchestrator.lab.patches import UnexpectedForm, find_exception_probe

INSIDE = Path(__file__).with_name("lab_soak_inside.py")
BUSY = "while True: pass"
GUEST = 200.0
"""Maximum seconds per guest."""


@dataclass
class Result:
    """The result; deliveries are None if they could not be counted."""

    guests: int = 0
    failed: int = 0
    hung: int = 0
    seconds: int = 0
    exceptions: int | None = None
    twice: int | None = None
    not_counted: str = ""


class Deliveries:
    """Counts the exceptions that the emulator delivers, by a uprobe (Documentation/trace/uprobetracer.rst).

    uprobe_profile counts all; the filter passes external interrupts to the trace (vector 32 or more, not a software interrupt).
    Only the bug ``stale-vector`` (``orchestrator.lab.patches``) delivers an external interrupt in this way.
    """

    def __init__(self, tracefs: Path, program: Path, offset: int) -> None:
        self._tracefs, self._name = tracefs, f"nohype{os.getpid()}"
        self._instance = tracefs / "instances" / self._name
        probe = f"p:{self._name}/exception {program}:{offset:#x} vector=%si:s32 software=%dx:s32"
        self._command(probe)
        try:
            self._instance.mkdir()
            (self._event / "filter").write_text("vector >= 32 && vector < 256 && software == 0")
            (self._event / "enable").write_text("1")
        except BaseException:
            self.end()
            raise

    @property
    def _event(self) -> Path:
        return self._instance / "events" / self._name / "exception"

    def read(self) -> tuple[int, int]:
        """Exceptions of all kinds, and external interrupts among them."""
        lines = [line.split() for line in (self._tracefs / "uprobe_profile").read_text().splitlines()]
        total = sum(int(words[2]) for words in lines if words[1] == "exception")
        twice = sum(not line.startswith("#") for line in (self._instance / "trace").read_text().splitlines())
        return total, twice

    def end(self) -> None:
        """Removes instance and probe."""
        if self._instance.exists():
            (self._event / "enable").write_text("0")
            self._instance.rmdir()
        self._command(f"-:{self._name}/exception")

    def _command(self, line: str) -> None:
        # O_APPEND: O_TRUNC would remove other programs' probes. Python's own mode "a" seeks, which this file refuses.
        descriptor = os.open(self._tracefs / "uprobe_events", os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, line.encode() + b"\n")
        finally:
            os.close(descriptor)


@contextmanager
def count_deliveries(lab: Lab, result: Result) -> Iterator[None]:
    """Counts during the block; prints the reason if it cannot."""
    with ExitStack() as undo:
        deliveries = None
        try:
            program = Path(f"/proc/{lab.state.qemu}/root/{PROGRAM}")
            deliveries = Deliveries(_mount_tracefs(undo), program, find_exception_probe(program))
            undo.callback(deliveries.end)
        except (OSError, UnexpectedForm, subprocess.CalledProcessError) as error:
            result.not_counted = str(error)
        try:
            yield
        finally:
            if deliveries:
                result.exceptions, result.twice = deliveries.read()


@contextmanager
def load_machine() -> Iterator[None]:
    """One busy process per CPU of this machine."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def run_guests(lab: Lab, wanted: int, result: Result) -> None:
    """Creates and uses guests in the lab until their number is reached or one fails.

    Raises:
        LabLost: the lab or one of its guests hangs, or the emulator exited.
    """
    began, pending = time.monotonic(), bytearray()

    def show(name: str, data: bytes) -> None:
        if name != "stdout":
            sys.stderr.write(data.decode(errors="replace"))
            return
        pending.extend(data)
        while b"\n" in pending:
            line, _, rest = pending.partition(b"\n")
            pending[:] = rest
            round_ = json.loads(line)
            result.guests, result.failed = round_["made"], len(round_["errors"])
            print(f"{time.monotonic() - began:6.0f} s: {line.decode()}", flush=True)

    words = ["/opt/nohype/bin/python", "-", str(wanted)]
    done = execute(lab, words, input=INSIDE.read_bytes(), timeout=GUEST * wanted, stream=show)
    if done.status:
        result.failed = result.failed or 1
        check_emulation(lab)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("guests", type=int, nargs="?", default=200)
    wanted, result = parser.parse_args().guests, Result()
    began = time.monotonic()
    with use_lab() as lab:
        if ask(lab, "guest", "list"):
            sys.exit(f"lab {lab.name} has guests: delete them first")
        print(json.dumps(lab.state.emulator and lab.state.emulator.model_dump(mode="json")), flush=True)
        with count_deliveries(lab, result), load_machine():
            try:
                run_guests(lab, wanted, result)
            except LabLost as error:
                result.hung += 1
                print(error, flush=True)
    result.seconds = round(time.monotonic() - began)
    print(json.dumps(asdict(result)))
    return int(bool(result.hung or result.failed or result.twice))


def _mount_tracefs(undo: ExitStack) -> Path:
    """The mount point of tracefs, which is mounted for the benchmark if necessary."""
    usual = Path("/sys/kernel/tracing")
    if (usual / "uprobe_events").exists():
        return usual
    folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="nohype-tracing-"))
    subprocess.run(["mount", "-t", "tracefs", "nohype", folder], check=True, capture_output=True)
    undo.callback(subprocess.run, ["umount", folder], check=True)
    return Path(folder)


if __name__ == "__main__":
    sys.exit(main())
