"""The lab for benchmarks: `bench`, started for the benchmark, or the running lab named by NOHYPE_TEST_LAB."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.lab import control
from orchestrator.lab.accel import AccelChoice
from orchestrator.lab.lab import Lab, find_lab
from orchestrator.lab.progress import Timeline
from orchestrator.lab.spec import load_spec
from orchestrator.lab.start import start_lab


@contextmanager
def use_lab() -> Iterator[Lab]:
    """A lab that is up. A lab given by NOHYPE_TEST_LAB stays up."""
    given = os.environ.get("NOHYPE_TEST_LAB")
    lab = find_lab(given) if given else start_lab("bench", load_spec("numa"), AccelChoice.AUTO, Timeline())
    try:
        yield lab
    finally:
        if not given:
            control.down("bench")
