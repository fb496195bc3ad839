"""A store on a file system that is full, then read-only: a small tmpfs in a mount namespace of its own. Run as a program.

Its argument is an empty folder with an empty folder ``disk``, the mount point. It ends with an exception on a wrong result.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.images.install import collect, delete_image, install_image
from orchestrator.images.store import find_image
from orchestrator.images.store_lock import keeping_builds
from orchestrator.images.verify import verify
from tests.harness.images import list_store, make_build

SIZE = 4 << 20


def main(folder: Path) -> None:
    disk, store = folder / "disk", folder / "disk/store"
    install_image(make_build(folder / "small"), store, "one")
    before = list_store(store)
    # too large at once, and too large next to what is there
    install_image(make_build(folder / "half", "half", disk=bytes([1]) * (SIZE // 2)), store, "two")
    before = list_store(store)
    for size in (SIZE, SIZE // 2):
        large = make_build(folder / f"large{size}", "large", disk=bytes([2]) * size)
        for name in ("one", "two", "three"):
            with pytest.raises(ImageError, match="No space left on device") as caught:
                install_image(large, store, name)
            assert caught.value.hint == "free some space on its disk"
            assert list_store(store) == before, "nothing is left, and the images are as before"
    for image in ("one", "two"):
        assert not [result for result in verify(find_image(store, image)) if result.problem]
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for change in (
        lambda: install_image(folder / "small", store, "three"),
        lambda: delete_image(store, "one", lambda: ()),
        lambda: collect(store, lambda: ()),
    ):
        with pytest.raises(ImageError, match="Read-only file system") as caught:
            change()
        assert "run as root, or give the path of another store" in caught.value.hint
    # as a manager does, which may only read the store
    with keeping_builds(store, timeout=0):
        find_image(store, "one")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
