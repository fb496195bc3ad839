"""Plan → XML, by golden files and by the promises they stand for. REGENERATE=1 writes the golden files: read the difference."""

from __future__ import annotations

import base64
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from lxml import etree

from orchestrator.domain import build_domain
from orchestrator.host.firmware import QBOOT
from orchestrator.images.description import DiskImage, RamRoot
from orchestrator.images.store import Image
from orchestrator.model.edge import EdgeMode
from orchestrator.model.plan import DiskPlan, ImageRef, NicPlan, Plan
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

GOLDEN = Path(__file__).parents[1] / "data" / "domains"
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
IMAGE = Image(
    folder=Path("/images/minimal"), cmdline="console=ttyS0 panic=-1", memory=Size.parse("96M"), console="nohype-1",
    kernel_version="6.12", hash="0",
)  # fmt: skip
LOG = Path("/var/log/nohype/g1.log")
QEMU = {"qemu": "http://libvirt.org/schemas/domain/qemu/1.0"}

PF = PciAddress.parse("0000:41:00.0")
SMT = Plan(
    name="g1",
    cores=(CpuSet.parse("2-3"),),
    node=0,
    page_size=Size.parse("2M"),
    pages=128,
    nics=(NicPlan(PF, "nic0", 0, PciAddress.parse("0000:41:10.0"), MacAddress.parse("02:4e:48:00:00:01")),),
    image=ImageRef("minimal"),
    cmdline="nohype.address=10.9.0.11/24",
    uuid=UUID("f64abb56-b811-53db-a220-f48cce745777"),
)
TAP_MAC = MacAddress.parse("02:4e:48:00:00:02")
PLANS = {
    "one-core-smt": SMT,
    # Siblings far apart, as most servers number them; a PCI domain and VF that need all their digits.
    "two-cores-1g-pages": replace(
        SMT,
        cores=(CpuSet.parse("10,42"), CpuSet.parse("11,43")),
        node=1,
        page_size=Size.parse("1G"),
        pages=4,
        nics=(replace(SMT.vf, address=PciAddress.parse("10002:a1:1f.7")),),
    ),
    "amd-smt": replace(SMT, cpu_features=("topoext",)),
    "two-nics": replace(SMT, nics=(*SMT.nics, replace(SMT.vf, index=3, address=PciAddress.parse("0000:82:10.6")))),
    "two-disks": replace(
        SMT,
        disks=(
            DiskPlan(Size.parse("1G"), "S5GXNX0T400123", PciAddress.parse("0000:44:00.0"), 0),
            DiskPlan(Size.parse("2G"), file="/var/lib/nohype/disks/g1-2.raw"),
        ),
    ),
    "software-edge": replace(
        SMT,
        nics=(
            SMT.vf,
            NicPlan(None, "eth0", None, None, TAP_MAC, EdgeMode.MACVTAP_VEPA, tap="nh-000002"),
        ),
    ),
    "no-smt-no-cmdline": replace(SMT, cores=(CpuSet.parse("3"),), cmdline=""),
    "configured": replace(SMT, name="g2"),
}
CONFIGURED: dict[str, Any] = {
    "credentials": {"system.hostname": "web", "ssh.authorized_keys.root": 'ssh-ed25519 AAAA <a@b>, "c"\n'},
    "seeded_initrd": Path("/var/lib/nohype/ledger.sqlite.secrets/f64abb56-b811-53db-a220-f48cce745777.initrd"),
}


def housekeeping(plan: Plan) -> CpuSet:
    return CpuSet.parse("0-1,32-33" if plan.node else "0-1")


def build_text(plan: Plan, image: Image = IMAGE) -> str:
    configured = CONFIGURED if plan == PLANS["configured"] else {}
    image = image.model_copy(update={"configuration": ("cloud-init",)}) if configured else image
    return build_domain(plan, image, housekeeping(plan), log=LOG, **configured)


def build(plan: Plan = SMT, image: Image = IMAGE) -> etree._Element:
    return etree.fromstring(build_text(plan, image))


def texts(domain: etree._Element, path: str) -> list[str]:
    found = domain.xpath(path, namespaces=QEMU)
    assert isinstance(found, list)
    return [str(item) for item in found]


@pytest.mark.parametrize("name", PLANS)
def test_golden(name: str) -> None:
    file = GOLDEN / f"{name}.xml"
    text = build_text(PLANS[name])
    if os.environ.get("REGENERATE"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), f"if this is meant: REGENERATE=1 pytest {__file__}, and read the difference"


def test_every_golden_file_is_used() -> None:
    assert {file.stem for file in GOLDEN.glob("*.xml")} == set(PLANS)


@pytest.mark.parametrize("name", PLANS)
def test_libvirts_schema(name: str) -> None:
    if not SCHEMA.exists():
        pytest.skip(f"{SCHEMA} is not there: libvirt is not installed")
    schema = etree.RelaxNG(etree.parse(SCHEMA))
    assert schema.validate(build(PLANS[name])), str(schema.error_log)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_vcpus_are_pinned_one_to_one(plan: Plan) -> None:
    domain = build(plan)
    assert texts(domain, "vcpu/text()") == [str(len(plan.cpus))]
    assert texts(domain, "cputune/vcpupin/@vcpu") == [str(vcpu) for vcpu in range(len(plan.cpus))]
    assert texts(domain, "cputune/vcpupin/@cpuset") == [str(cpu) for cpu in plan.cpus]
    assert texts(domain, "cputune/emulatorpin/@cpuset") == [str(housekeeping(plan))]
    topology = domain.find("cpu/topology")
    assert topology is not None
    assert int(topology.get("sockets", "")) == 1
    assert int(topology.get("cores", "")) == len(plan.cores)
    assert int(topology.get("cores", "")) * int(topology.get("threads", "")) == len(plan.cpus)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_memory_is_static_and_of_the_node(plan: Plan) -> None:
    domain = build(plan)
    (kib,) = texts(domain, "memory[@unit='KiB']/text()")
    assert int(kib) * 1024 == plan.memory.bytes
    (page,) = texts(domain, "memoryBacking/hugepages/page[@unit='KiB']/@size")
    assert int(page) * 1024 == plan.page_size.bytes
    for promise in ("nosharepages", "locked", "allocation[@mode='immediate']"):
        assert domain.find(f"memoryBacking/{promise}") is not None, promise
    assert texts(domain, "numatune/memory[@mode='strict']/@nodeset") == [str(plan.node)]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_vfs_are_passed_through_in_fixed_slots(plan: Plan) -> None:
    """The manager binds them; the first has slot 2, the next slot 3."""
    hostdevs = build(plan).findall("devices/hostdev[@managed='no']")
    found = [[hostdev.find(path) for path in ("source/address", "address")] for hostdev in hostdevs]
    numbers = [
        tuple(int(address.get(part, ""), 16) for part in ("domain", "bus", "slot", "function"))
        for pair in found
        for address in pair
        if address is not None
    ]
    controllers = [disk.address for disk in plan.controllers]
    assert [PciAddress(*source) for source in numbers[::2]] == [*(vf.address for vf in plan.vfs), *controllers]
    slots = [*(slot for slot, nic in enumerate(plan.nics, 2) if nic.address), *range(16, 16 + len(controllers))]
    assert numbers[1::2] == [(0, 0, slot, 0) for slot in slots]


def test_credentials_are_smbios_strings_and_the_seed_is_announced() -> None:
    domain = build(PLANS["configured"])
    assert texts(domain, "os/smbios/@mode") == ["sysinfo"]
    found = {}
    for entry in texts(domain, "sysinfo[@type='smbios']/oemStrings/entry/text()"):
        prefix, _, rest = entry.partition(":")
        assert prefix == "io.systemd.credential.binary"
        name, _, content = rest.partition("=")
        found[name] = base64.b64decode(content, validate=True).decode()
    assert found == CONFIGURED["credentials"]
    assert texts(domain, "os/initrd/text()") == [str(CONFIGURED["seeded_initrd"])]
    assert texts(domain, "os/cmdline/text()")[0].split()[-1] == "ds=nocloud;s=/run/cloud-seed/"
    assert not texts(build(), "os/smbios | sysinfo")
    assert "ds=nocloud" not in build_text(SMT)


def test_no_device_beyond_those_wanted() -> None:
    domain = build()
    devices = domain.find("devices")
    assert devices is not None
    assert sorted(device.tag for device in devices) == ["controller", "controller", "hostdev", "memballoon", "serial"]
    assert texts(domain, "devices/controller[@type='usb']/@model") == ["none"]
    assert texts(domain, "devices/memballoon/@model") == ["none"]
    assert texts(domain, "devices/hostdev/address/@bus") == ["0x00"], "on the root bus, else libvirt adds root ports"
    assert texts(domain, "qemu:commandline/qemu:arg/@value") == [
        *("-machine", "i8042=off,sata=off,smbus=off,pit=off,pic=off"),
        *("-global", "kvm-apic.vapic=off"),
        *("-global", "ICH9-LPC.enable_tco=off"),
    ]
    assert texts(domain, "qemu:capabilities/*/@capability") == ["cpu-unavailable-features"]
    assert texts(domain, "clock/timer[@present='no']/@name") == ["hpet"]
    assert texts(domain, "features/smm/@state | features/pmu/@state") == ["off", "off"]
    assert texts(domain, "pm/*/@enabled") == ["no", "no"]


def test_kvm_is_never_hidden_from_the_guest() -> None:
    """A guest that does not know its clock reads the ACPI timer instead, at four times the exits (measured)."""
    domain = build()
    assert texts(domain, "clock/timer[@name='kvmclock']/@present") == ["yes"]
    assert texts(domain, "features/kvm/hint-dedicated/@state") == ["on"]
    assert domain.find("features/kvm/hidden") is None


ROOTS = {
    "disk": DiskImage(size=1 << 30, sha256="0" * 64, layout="ext4"),
    "ram_root": RamRoot(packed=1 << 20, unpacked=1 << 22),
}
DISK = replace(SMT, disks=PLANS["two-disks"].disks[:1])


@pytest.mark.parametrize(
    ("plan", "fields", "initrd"),
    [
        (SMT, {}, "initrd"),
        (DISK, {}, "initrd"),
        (DISK, ROOTS, "initrd"),
        (SMT, ROOTS, "ram-initrd"),
        (DISK, {"disk": ROOTS["disk"]}, "initrd"),
    ],
)
def test_guest_without_a_disk_has_its_root_in_ram(plan: Plan, fields: dict[str, object], initrd: str) -> None:
    assert build(plan, IMAGE.model_copy(update=fields)).findtext("os/initrd") == f"/images/minimal/{initrd}"


def test_firmware_boots_from_the_first_disk_only() -> None:
    image = IMAGE.model_copy(update={"boot": "firmware", **ROOTS})
    domain = build(PLANS["two-disks"], image)
    assert texts(domain, "os/kernel | os/initrd | os/cmdline | os/boot") == []
    assert texts(domain, "devices/hostdev[boot]/source/address/@bus") == ["0x44"]
    assert texts(domain, "//boot/@order") == ["1"]
    assert "-machine" in texts(domain, "qemu:commandline/qemu:arg/@value")
    assert "sata=off,smbus=off" in texts(domain, "qemu:commandline/qemu:arg/@value")
    assert texts(build(PLANS["two-disks"]), "//boot/@order") == []


@pytest.mark.parametrize(
    ("fields", "plan", "more", "found"),
    [
        ({"bios": "qboot"}, SMT, {}, [str(QBOOT)]),
        ({"bios": "qboot"}, SMT, {"qboot": None}, []),
        ({"bios": "seabios"}, SMT, {}, []),
        ({"bios": "qboot"}, SMT, CONFIGURED, []),  # qboot has no SMBIOS tables, in which credentials are passed
        ({"bios": "qboot", "boot": "firmware", **ROOTS}, PLANS["two-disks"], {}, []),
    ],
)
def test_qboot_only_for_images_that_need_no_more(fields: Any, plan: Plan, more: Any, found: list[str]) -> None:
    """A loader of libvirt; without it QEMU starts SeaBIOS."""
    options = {"qboot": QBOOT, "log": LOG, **more}
    domain = etree.fromstring(build_domain(plan, IMAGE.model_copy(update=fields), housekeeping(plan), **options))
    assert texts(domain, "os/loader[@type='rom']/text()") == found
    if SCHEMA.exists():
        assert etree.RelaxNG(etree.parse(SCHEMA)).validate(domain)


def test_a_guest_that_ends_is_gone() -> None:
    domain = build()
    assert [domain.findtext(event) for event in ("on_poweroff", "on_reboot", "on_crash")] == ["destroy"] * 3


@pytest.mark.parametrize(
    ("image", "plan", "line"),
    [
        ("console=ttyS0", "quiet", "console=ttyS0 nohype.name=g1 quiet"),
        ("", "", "nohype.name=g1"),
        ("a", "", "a nohype.name=g1"),
        ("", """x="<&>'" """.strip(), """nohype.name=g1 x="<&>'\""""),
    ],
)
def test_kernel_command_line(image: str, plan: str, line: str) -> None:
    """The image's words come first: the kernel takes the last of two that contradict each other."""
    assert build(replace(SMT, cmdline=plan), IMAGE.model_copy(update={"cmdline": image})).findtext("os/cmdline") == line


def test_guest_without_a_disk_boots_the_initrd_that_is_its_root() -> None:
    image = IMAGE.model_copy(update={"ram_root": RamRoot(packed=1, unpacked=2)})
    assert build(image=image).findtext("os/initrd") == "/images/minimal/ram-initrd"
    assert build().findtext("os/initrd") == "/images/minimal/initrd"
