"""Writes docs/host.svg: what `nohype map --svg` draws of the fake host of the tests, with guests in several states."""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from click.testing import CliRunner  # noqa: E402

from orchestrator.cli.main import nohype  # noqa: E402
from tests.harness.example_host import audit, serve_example  # noqa: E402


def main() -> None:
    quoted = partial(audit, finding="thread 77 (backup) ran on CPU 8")
    with tempfile.TemporaryDirectory() as folder, serve_example(Path(folder), audit=quoted) as served:
        words = ["--socket", str(served.path), "map", "--svg", str(ROOT / "docs/host.svg")]
        result = CliRunner().invoke(nohype, words, catch_exceptions=False)
    print(result.output or "docs/host.svg")


if __name__ == "__main__":
    main()
