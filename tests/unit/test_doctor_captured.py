"""The doctor on servers that others have captured, and on servers with the network cards that guests get VFs of."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.doctor.catalogue import CHECKS
from orchestrator.doctor.check import Result, run_checks
from orchestrator.doctor.facts import Facts
from orchestrator.errors import CommandError, HostError
from orchestrator.host.run import Completed
from orchestrator.model.proof import Verdict
from orchestrator.values import CpuSet
from tests.fakes.root import FakeRoot, build_host
from tests.harness import captured

HOSTS = sorted(path.stem for path in captured.FOLDER.glob("*.txt"))
NOT_MEASURED = (str(Verdict.NOT_MEASURED), "")


def refuse(words: Sequence[str]) -> Completed:
    """Programs of a captured server cannot be started."""
    raise CommandError(f"cannot start `{words[0]}`", errno=errno.EACCES)


def deny() -> None:
    raise HostError("/dev/kvm: No such file or directory")


def examine(host: FakeRoot, own: str | None = None) -> dict[str, Result]:
    facts = Facts(host, CpuSet.parse(own) if own else None, run_instruction=deny, execute=refuse)
    return {result.check.name: result for result in run_checks(facts, CHECKS)}


@pytest.mark.parametrize("name", HOSTS)
def test_verdicts_on_a_captured_server(tmp_path: Path, name: str) -> None:
    host, expected = captured.load(tmp_path / "host", name)
    assert expected.keys() <= {check.name for check in CHECKS}
    for check, result in examine(host).items():
        verdict, words = expected.get(check, NOT_MEASURED)
        finding = result.finding
        assert finding.verdict == verdict, f"{name}: {check}: {finding}"
        assert words in finding.found, f"{name}: {check}: {finding}"
        assert finding.found
        if finding.verdict is Verdict.FAIL:
            assert all((finding.needed, finding.remedy)), f"{name}: {check}: {finding}"


def test_there_are_a_laptop_and_six_servers() -> None:
    assert len(HOSTS) >= 7
    assert any(name.startswith("laptop") for name in HOSTS)


def test_nothing_of_a_server_is_visible(tmp_path: Path) -> None:
    """As in a container without /sys and /proc: no check passes."""
    (tmp_path / "host").mkdir()
    results = examine(FakeRoot(tmp_path / "host"))
    assert {result.finding.verdict for result in results.values()} == {Verdict.NOT_MEASURED}


CARD = """
sys/bus/pci/drivers/{driver}/bind =
sys/bus/pci/devices/0000:41:00.0 -> ../../../devices/pci0000:40/0000:40:01.1/0000:41:00.0
sys/devices/pci0000:40/0000:40:01.1/0000:41:00.0/vendor = 0x{vendor}
sys/devices/pci0000:40/0000:40:01.1/0000:41:00.0/device = 0x{device}
sys/devices/pci0000:40/0000:40:01.1/0000:41:00.0/class = 0x020000
sys/devices/pci0000:40/0000:40:01.1/0000:41:00.0/numa_node = 0
sys/devices/pci0000:40/0000:40:01.1/0000:41:00.0/driver -> ../../../../bus/pci/drivers/{driver}
sys/devices/pci0000:40/0000:40:01.1/0000:41:00.0/sriov_totalvfs = {total}
sys/devices/pci0000:40/0000:40:01.1/0000:41:00.0/sriov_numvfs = 0
sys/devices/pci0000:40/0000:40:01.1/0000:41:00.0/sriov_offset = {offset}
sys/devices/pci0000:40/0000:40:01.1/0000:41:00.0/sriov_stride = 1
sys/devices/pci0000:40/0000:40:01.1/0000:41:00.0/net/ens1/address = 02:00:00:00:00:01
sys/devices/pci0000:40/0000:40:01.1/0000:41:00.0/net/ens1/operstate = up
sys/devices/pci0000:40/0000:40:01.1/0000:41:00.0/net/ens1/carrier = 1
sys/devices/system/cpu/online = 0-3
sys/devices/system/cpu/present = 0-3
sys/devices/system/cpu/cpu0/topology/core_cpus_list = 0-1
sys/devices/system/cpu/cpu0/topology/physical_package_id = 0
sys/devices/system/cpu/cpu2/topology/core_cpus_list = 2-3
sys/devices/system/cpu/cpu2/topology/physical_package_id = 0
"""
# Vendor and device, VFs, offset of the first one: `lspci -vv` of the makers' documents. Verdicts by the table of each driver.
CARDS = {
    "mlx5_core": ("15b3", "1017", 8, 2, "pass", "pass"),
    "ice": ("8086", "1592", 256, 8, "pass", "pass"),
    "ixgbe": ("8086", "10fb", 63, 128, "pass", "pass"),
    "bnxt_en": ("14e4", "16d7", 128, 256, "pass", "pass"),
    "igb": ("8086", "1521", 7, 384, "pass", "fail"),  # I350: no rates
    "be2net": ("10df", "0720", 32, 4, "pass", "fail"),  # no trust
    "sfc": ("1924", "0a03", 127, 2, "fail", "not measured"),  # not in the tables
}  # fmt: skip


@pytest.mark.parametrize("driver", CARDS)
def test_what_drivers_of_cards_can_do(tmp_path: Path, driver: str) -> None:
    vendor, device, total, offset, vepa, controls = CARDS[driver]
    text = CARD.format(driver=driver, vendor=vendor, device=device, total=total, offset=offset)
    results = examine(build_host(tmp_path / "host", text))
    found = {name: str(results[name].finding.verdict) for name in ("sr-iov", "uplink-link", "uplink-node", "vepa", "vf-controls")}
    assert found == {"sr-iov": "pass", "uplink-link": "pass", "uplink-node": "pass", "vepa": vepa, "vf-controls": controls}
    assert f"{total} VFs" in results["sr-iov"].finding.found
