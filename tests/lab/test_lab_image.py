"""The lab's image. Uses the builds that the lab itself was started from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from orchestrator.host.run import run
from orchestrator.images.apt import read_apt_settings
from orchestrator.images.cache import cache_folder, remove_tree
from orchestrator.images.wheels import source_tree
from orchestrator.lab.build import apply_role, build_host, build_lab, role_variables
from orchestrator.lab.spec import LabImage, load_spec

SPEC = load_spec("numa")


def nothing(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def image() -> LabImage:
    return build_lab(SPEC, cache_folder())


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """A copy of the root file system of the image without this package."""
    copy = Path(mkdtemp(dir="/var/tmp")) / "root"
    run(
        ["cp", "--archive", "--reflink=auto", build_host(SPEC, source_tree(), cache_folder(), progress=nothing), copy],
        timeout=300,
    )
    yield copy
    remove_tree(copy.parent)


def test_image_is_small(image: LabImage) -> None:
    assert image.root.stat().st_blocks * 512 <= 1 << 30


def test_building_again_builds_nothing(image: LabImage) -> None:
    notes: list[str] = []
    assert build_lab(SPEC, cache_folder(), notes.append) == image
    assert notes == []


@pytest.mark.soak
def test_role_applied_again_changes_nothing(root: Path, tmp_path: Path) -> None:
    assert apply_role(source_tree(), root, role_variables(SPEC), log=tmp_path / "log") == 0


def test_no_mirror_proxy_or_key_is_in_the_image(root: Path) -> None:
    settings = read_apt_settings()
    texts = [settings.uri, *re.findall(r'"(\w+://[^"]+)"', "".join(settings.options))]
    hosts = {match[1] for text in texts if (match := re.match(r"\w+://([^/:]+)", text))}
    for host in hosts:
        found = run(["grep", "-rIlF", host, root / "etc/apt", root / "var/lib/apt"], check=False).stdout
        assert found == ""
    assert list((root / "etc/ssh").glob("ssh_host_*")) == []
    assert list((root / "root/.ssh").glob("*")) == []


def test_kernel_command_line_has_the_options_of_a_host(image: LabImage) -> None:
    words = image.cmdline.split()
    assert {
        "intel_iommu=on",
        "iommu.strict=1",
        "nohz_full=2-7",
        "irqaffinity=0-1",
        "hugepages=0:256,1:256",
        "iomem=relaxed",
    } <= set(words)
    assert "isolcpus=nohz,domain,managed_irq,2-7" in words
