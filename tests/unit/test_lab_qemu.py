"""The command line of the emulated server."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.lab.qemu import SPARE_PORT, build_argv, build_cmdline, build_entry, build_tpm_argv
from orchestrator.lab.spec import LabImage, LabSpec, load_spec

IMAGE = LabImage(Path("/c/vmlinuz"), Path("/c/initrd"), Path("/c/root.raw"), "intel_iommu=on isolcpus=2-7")


def values(argv: list[str], option: str) -> list[str]:
    return [value for word, value in zip(argv, argv[1:], strict=False) if word == option]


def build(spec: LabSpec, *, kvm: bool = False) -> list[str]:
    return build_argv(spec, IMAGE, name="x", kvm=kvm, tap=7)


@pytest.mark.parametrize("name", ["small", "numa"])
def test_nodes_have_all_memory_and_cpus(name: str) -> None:
    spec = load_spec(name)
    nodes = [dict(part.partition("=")[::2] for part in text.split(",")) for text in values(build(spec), "-numa")]
    assert len(nodes) == spec.nodes
    assert [node["cpus"] for node in nodes] == [str(spec.node_cpus(number)) for number in range(spec.nodes)]
    backends = [text for text in values(build(spec), "-object") if text.startswith("memory-backend-ram")]
    assert backends == [f"memory-backend-ram,id=ram{number},size={spec.node_memory}" for number in range(spec.nodes)]


def test_nic_is_below_the_host_bridge_of_a_node_and_uses_the_tap() -> None:
    argv = build(load_spec("numa"))
    assert "tap,id=data,fd=7" in values(argv, "-netdev")
    devices = values(argv, "-device")
    assert "pxb-pcie,id=pxb0,bus=pcie.0,bus_nr=64,numa_node=0" in devices
    assert "pcie-root-port,id=port0,bus=pxb0,slot=1,chassis=1" in devices
    assert [text for text in devices if text.startswith("igb,bus=port0,netdev=data,")]


def test_spec_without_vfs_has_no_nic() -> None:
    argv = build_argv(load_spec("small").model_copy(update={"vfs": 0}), IMAGE, name="x", kvm=False, tap=None)
    assert not [word for word in argv if "igb" in word or "tap" in word]


def test_disks_have_own_controllers_on_alternating_nodes() -> None:
    devices = values(build(load_spec("numa")), "-device")
    ports = [text for text in devices if text.startswith("pcie-root-port,id=port") and "slot=1," not in text]
    assert [dict(part.partition("=")[::2] for part in text.split(","))["bus"] for text in ports] == ["pxb0", "pxb1"]
    assert len([text for text in devices if text.startswith("nvme,")]) == 2
    assert not [text for text in devices if text.endswith(f"bus={SPARE_PORT}")]
    chassis = [text.partition("chassis=")[2] for text in devices if text.startswith("pcie-root-port")]
    assert len(set(chassis)) == len(chassis)


def test_tpm_is_the_emulator_that_was_started() -> None:
    argv, emulator = build(load_spec("numa")), build_tpm_argv()
    (socket,) = [text.partition("path=")[2] for text in values(argv, "-chardev")]
    assert socket in values(emulator, "--ctrl")[0]
    assert "tpm-crb,tpmdev=tpm0" in values(argv, "-device")
    assert not [word for word in build(load_spec("numa").model_copy(update={"tpm": False})) if "tpm" in word]


def test_accelerator_options() -> None:
    emulated, real = build(load_spec("small")), build(load_spec("small"), kvm=True)
    assert values(emulated, "-cpu") == ["max"]
    assert values(emulated, "-accel")[0].startswith("tcg,thread=multi")
    assert values(real, "-cpu") == ["host"]
    assert "kernel-irqchip=split" in values(real, "-M")[0]
    for argv in (emulated, real):
        assert [text for text in values(argv, "-device") if text.startswith("intel-iommu,intremap=on")]


def test_image_is_a_snapshot_and_reboot_is_off() -> None:
    argv = build(load_spec("numa"))
    assert all("snapshot=on" in drive for drive in values(argv, "-drive"))
    assert "-no-reboot" in argv
    assert {"panic=-1", "no_timer_check"} <= set(build_cmdline(IMAGE).split())
    assert build_cmdline(IMAGE).endswith(IMAGE.cmdline)


def test_command_line_has_no_secrets_and_host_paths() -> None:
    assert not [word for word in build(load_spec("numa")) if "/c/" in word or "ssh-" in word]


def test_death_signal_is_set_first() -> None:
    words = build_entry(Path("/tools"), {"lab": Path("/run/l"), "kernel": Path("/c/a=b")}, 42)
    assert words[:3] == ["setpriv", "--pdeathsig", "KILL"]
    start = words.index("enter")
    assert words[start : words.index("--", start) + 1] == ["enter", "42", "/tools", "lab=/run/l", "kernel=/c/a=b", "--"]
