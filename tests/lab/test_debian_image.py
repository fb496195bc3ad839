"""The image debian in a guest without a disk: it boots in memory, reports ready, serves SSH, powers off."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from orchestrator.host.run import run
from orchestrator.images.build import build_image
from orchestrator.images.cache import cache_folder
from orchestrator.images.description import FILE, INITRD, KERNEL, RAM_INITRD, write_description
from orchestrator.images.recipe import recipes_folder
from orchestrator.images.store import STORE, Image, read_image
from orchestrator.lab import lab as labs
from orchestrator.lab import switch
from tests.lab.conftest import LabHost
from tests.lab.test_manager import await_state

NAME = "debian"
ADDRESS, PEER = "10.9.0.21", "10.9.0.1/24"
PATIENCE = 240  # seconds, on a busy machine


@pytest.fixture(scope="module")
def image(host: LabHost) -> Iterator[Image]:
    """The image in the lab's store, without the file system for disks: that would be a minute of copying."""
    built = read_image(build_image(recipes_folder(), "debian", cache_folder(), progress=print))
    folder = STORE / NAME
    with TemporaryDirectory() as name:
        small = Path(name)
        write_description(small, built.model_copy(update={"disk": None}))
        with tarfile.open(small / "image.tar", "w") as tar:
            for source in (built.kernel, built.initrd, built.ram_initrd, small / FILE):
                tar.add(source, source.name)
        with (small / "image.tar").open("rb") as file:
            done = labs.execute(host.lab, f"mkdir -p {folder} && tar -x -C {folder}", timeout=PATIENCE, input=file)
    assert done.status == 0, done.stderr
    assert set(host.run(f"ls {folder}").stdout.split()) == {KERNEL, INITRD, RAM_INITRD, FILE}
    yield built
    host.run(f"rm -rf {folder}")


@pytest.fixture(scope="module")
def guest(host: LabHost, image: Image) -> Iterator[None]:
    assert image.ram_root
    memory = str(image.ram_root.min_memory)
    host.nohype("guest", "create", NAME, "--image", NAME, "--memory", memory, "--address", f"{ADDRESS}/24")
    yield
    host.nohype("guest", "delete", NAME, check=False)


@pytest.fixture(scope="module")
def ready(host: LabHost, guest: None) -> dict[str, str]:
    """The fields of the line with which the guest reports ready."""
    log = f"/var/log/nohype/guests/{NAME}.{host.run(f'virsh domuuid {NAME}').stdout.strip()}.log"
    host.run(f"timeout {PATIENCE} sh -c 'until grep -q \"^nohype: ready\" {log}; do sleep 1; done' || tail {log}", timeout=300)
    lines = [line for line in host.run(f"cat {log}").stdout.splitlines() if line.startswith("nohype: ")]
    assert [line.split()[1] for line in lines] == ["ready"], "one line, and nothing else"
    return dict(word.split("=", 1) for word in lines[0].split()[2:])


def test_request_with_too_little_memory_is_refused(host: LabHost, image: Image) -> None:
    done = host.nohype("guest", "create", "--image", NAME, "--memory", "256M", "small", check=False)
    assert done.status == 1
    assert "of memory for its root in memory, requested 256M" in done.stderr


def test_guest_reports_what_it_was_given(ready: dict[str, str]) -> None:
    assert ready["name"] == NAME
    assert ready["cpus"] == "2", "the threads of one core"
    assert (ready["address"], ready["link"]) == (f"{ADDRESS}/24", "up")
    assert re.fullmatch(r"ssh-ed25519:[A-Za-z0-9+/]{68}=*", ready["hostkey"])


def test_ssh_answers_with_the_key_shown_on_the_console(host: LabHost, ready: dict[str, str]) -> None:
    netns = switch.netns_of(host.lab.name)
    run(["ip", "-n", netns, "address", "add", PEER, "dev", switch.BRIDGE])
    try:
        found = run(["ip", "netns", "exec", netns, "ssh-keyscan", "-T", "60", "-t", "ed25519", ADDRESS], timeout=90).stdout
    finally:
        run(["ip", "-n", netns, "address", "delete", PEER, "dev", switch.BRIDGE])
    assert found.split() == [ADDRESS, *ready["hostkey"].split(":")]


@pytest.mark.usefixtures("ready")
def test_power_button_ends_the_guest(host: LabHost) -> None:
    host.nohype("guest", "stop", NAME, "--timeout", "120")
    await_state(host, NAME, "stopped")
    events = host.nohype("events", "--guest", NAME).stdout
    assert "stopped" in events
    assert "forced off" not in events


@pytest.mark.soak
def test_example_runs_a_job_in_a_guest_and_leaves_nothing(host: LabHost, image: Image) -> None:
    """Through the uplink: the host gets an address on it for the time of the job."""
    assert image.ram_root
    script = (Path(__file__).parents[2] / "examples/ci_runner.py").read_text()
    job = f"""
cd "$(mktemp -d)" && mkdir src && echo '6 * 7' >src/sum
cat >job.py <<'END'
{script}
END
/opt/nohype/bin/python job.py --name job --memory {image.ram_root.min_memory} --address 10.9.0.22/24 \\
    --send src --fetch result -- sh -c 'echo $(( $(cat src/sum) )) >result; exit 3'
echo "status $?" && cat result
"""
    with host.changed("ip address add 10.9.0.100/24 dev nic0", "ip address delete 10.9.0.100/24 dev nic0"):
        done = host.run(job, timeout=600)
    assert done.stdout.splitlines()[-2:] == ["status 3", "42"], done.stderr
    assert "nothing of it is left" in done.stderr
    assert "job" not in [guest["name"] for guest in json.loads(host.nohype("guest", "list", "--json").stdout)]
