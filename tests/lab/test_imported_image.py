"""An image as distributions publish it, imported, and started by the emulator of the lab: from its kernel, and by SeaBIOS."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest

from orchestrator.images.cache import cache_folder
from orchestrator.images.configuration import SEED_ARGUMENT, build_seed
from orchestrator.images.cpio import pad
from orchestrator.images.imported import ImportRequest, import_image
from orchestrator.images.store import Image
from orchestrator.lab.build import build_tools
from orchestrator.lab.qemu import INSIDE, build_entry
from orchestrator.model.configuration import Configuration
from orchestrator.waiting import wait_until
from tests.harness.cloud_image import build_cloud_image

pytestmark = [pytest.mark.soak, pytest.mark.skipif(os.geteuid() != 0, reason="imports need root")]

PATIENCE = 1200  # seconds, on a busy machine
SPOKEN = "user data was taken"
USER_DATA = f"#cloud-config\nruncmd:\n  - [sh, -c, 'echo {SPOKEN} >/dev/ttyS0']\n"


@pytest.fixture(scope="module")
def file() -> Path:
    return build_cloud_image(cache_folder())


@contextmanager
def started(folder: Path, image: Image, words: list[str], **binds: Path) -> Iterator[Path]:
    """Starts the image with a copy of its disk on an NVMe controller; yields the log of its console."""
    subprocess.run(["cp", "--sparse=always", image.disk_file, folder / "disk"], check=True)
    inside = INSIDE / "guest"
    argv = [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-M", "q35", "-cpu", "max", "-m", "768",
        "-accel", "tcg,thread=multi", "-no-reboot", "-serial", f"file:{inside}/console.log",
        "-drive", f"if=none,id=disk,file={inside}/disk,format=raw,cache=unsafe",
        "-device", "nvme,serial=one,drive=disk,bootindex=1",
    ]  # fmt: skip
    entry = build_entry(build_tools(cache_folder()), {"guest": folder, **binds}, os.getpid())
    with subprocess.Popen([*entry, *argv, *words]) as process:
        try:
            yield folder / "console.log"
        finally:
            process.kill()


def await_text(log: Path, pattern: str) -> None:
    text = wait_until(
        lambda: log.read_text(errors="replace") if log.exists() else "",
        lambda text: re.search(pattern, text), timeout=PATIENCE, interval=1,
    )  # fmt: skip
    assert re.search(pattern, text), text[-2000:]


@pytest.mark.timeout(3000)
def test_kernel_of_the_image_starts_it_with_user_data(tmp_path: Path, file: Path) -> None:
    image = import_image(tmp_path / "store", ImportRequest("one", file), progress=print)
    assert (image.boot, image.ready, image.configuration) == ("direct", "cloud-init", ("cloud-init",))
    seed = build_seed(image, Configuration(UUID(int=1), "one", (), (), user_data=USER_DATA))
    assert seed
    shutil.copyfile(image.initrd, tmp_path / "initrd")
    with (tmp_path / "initrd").open("ab") as initrd:
        initrd.write(pad(initrd.tell()) + seed)
    cmdline = f"{image.cmdline} quiet {SEED_ARGUMENT}"
    words = ["-kernel", f"{INSIDE}/kernel", "-initrd", f"{INSIDE}/guest/initrd", "-append", cmdline]
    with started(tmp_path, image, words, kernel=image.kernel) as log:
        await_text(log, re.escape(SPOKEN))
        await_text(log, r"Cloud-init v\. \S+ finished at .*DataSourceNoCloud")


@pytest.mark.timeout(1500)
def test_firmware_starts_the_image_from_its_disk(tmp_path: Path, file: Path) -> None:
    request = ImportRequest("one", file, boot="firmware", configuration=("credentials",))
    image = import_image(tmp_path / "store", request, progress=print)
    assert image.boot == "firmware"
    with started(tmp_path, image, []) as log:
        await_text(log, "login: ")
