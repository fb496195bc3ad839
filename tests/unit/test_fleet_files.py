"""Files of the fleet that are replaced as a whole."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from orchestrator.fleet.files import replace_file


def test_failed_write_keeps_the_file_and_leaves_no_part(tmp_path: Path) -> None:
    replace_file(file := tmp_path / "fleet.prom", "old\n")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limit[1]))  # as a full disk: Python ignores SIGXFSZ, so write(2) fails
    try:
        with pytest.raises(OSError, match="File too large"):
            replace_file(file, "longer than the limit\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert file.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [file]
    replace_file(file, "longer than the limit\n")
    assert file.read_text() == "longer than the limit\n"
