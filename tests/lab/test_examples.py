"""The scripts of examples/ that start several guests: their results, and that nothing is left when a guest fails."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.images.store import Image
from orchestrator.ssh import Completed
from tests.lab.conftest import LabHost

# The fixture `image` too: the image debian in the lab's store.
from tests.lab.test_debian_image import image

__all__ = ["image"]

pytestmark = pytest.mark.soak

EXAMPLES = Path(__file__).parents[2] / "examples"
NETWORK = "10.9.0.0/24"


@pytest.fixture(scope="module", autouse=True)
def uplink_address(host: LabHost) -> Iterator[None]:
    """Through the uplink: the host gets an address on it."""
    with host.changed("ip address add 10.9.0.100/24 dev nic0", "ip address delete 10.9.0.100/24 dev nic0"):
        yield


def run_example(host: LabHost, image: Image, name: str, *words: str) -> Completed:
    assert image.ram_root
    script = (EXAMPLES / name).read_text()
    options = f"--memory {image.ram_root.min_memory} --network {NETWORK} {' '.join(words)}"
    line = f"cd \"$(mktemp -d)\" && cat >example.py <<'END'\n{script}\nEND\n/opt/nohype/bin/python example.py {options}"
    return host.run(line, check=False, timeout=800)


def check_nothing_is_left(host: LabHost) -> None:
    assert json.loads(host.nohype("guest", "list", "--json").stdout) == []
    pfs = json.loads(host.nohype("survey", "--json").stdout)["pfs"]
    assert not [vf for pf in pfs for vf in pf["vfs"] if vf["driver"] == "vfio-pci"]


def test_same_command_is_measured_alone_and_side_by_side(host: LabHost, image: Image) -> None:
    command = "-- sh -c 'head -c 4M /dev/zero | sha256sum'"
    done = run_example(host, image, "reproducibility.py", "--guests 2 --repeat 2", command)
    assert done.status == 0, done.stderr
    seconds = r"[0-9]+\.[0-9]{3}"
    line = rf"median {seconds} s  spread [0-9.]+%\n"
    assert re.fullmatch(rf"alone +{line}side by side +{line}ratio +{seconds}\n", done.stdout), done.stdout
    check_nothing_is_left(host)


def test_command_that_fails_is_one_message(host: LabHost, image: Image) -> None:
    done = run_example(host, image, "reproducibility.py", "--guests 1", "-- sh -c 'exit 7'")
    assert (done.status, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("reproducibility: the command ended with status 7 in guest bench-0")
    check_nothing_is_left(host)


def test_front_end_asks_the_back_end_over_the_network(host: LabHost, image: Image) -> None:
    done = run_example(host, image, "two_tier.py")
    assert done.status == 0, done.stderr
    assert re.fullmatch(r"front end front asked:\nback end back, up [0-9.]+ s\n", done.stdout), done.stdout
    check_nothing_is_left(host)
