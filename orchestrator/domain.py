"""Plan → libvirt domain XML (https://libvirt.org/formatdomain.html). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from xml.etree.ElementTree import Element

from orchestrator.images.configuration import SEED_ARGUMENT, has_seed
from orchestrator.images.store import Image
from orchestrator.model.plan import Plan
from orchestrator.resources import configuration, cores, disk, memory, nic
from orchestrator.resources.xml import QEMU, element, to_text
from orchestrator.values import CpuSet

# Default devices of a q35 machine that guests do not need, by QEMU's switches (`qemu-system-x86_64 -M q35,help`).
# libvirt has an element only for the first, and only since 10.7.
_ABSENT = (
    "i8042",  # PS/2 keyboard and mouse, and with their controller port 92, vmport and vmmouse
    "sata",  # the AHCI controller
    "smbus",  # the SMBus with 8 EEPROMs
    "pit",  # the 8254 timer and the PC speaker: the guest uses its local APIC's timer
    "pic",  # two 8259 interrupt controllers: the guest uses its I/O APIC and MSI
)
_NONE: Mapping[str, str] = {}
_FIRMWARE_DEVICES = ("i8042", "pit", "pic")
"""Devices of ``_ABSENT`` that SeaBIOS and boot loaders use."""
_ABSENT_PROPERTIES = (
    "kvm-apic.vapic",  # help for 32-bit guests that write the task priority often, by a page and an I/O port of its own
    "ICH9-LPC.enable_tco",  # the chip set's watchdog timer
)


def build_domain(
    plan: Plan, image: Image, housekeeping: CpuSet, *,
    log: Path, credentials: Mapping[str, str] = _NONE, seeded_initrd: Path | None = None, qboot: Path | None = None,
) -> str:  # fmt: skip
    """XML for virDomainCreateXML, which keeps nothing of the guest after its end.

    Args:
        housekeeping: CPUs for QEMU's threads that are not vCPUs; all must be online.
        log: file for the output of the guest's serial console.
        credentials: for the guest's systemd, by name. The XML and QEMU's arguments contain them: nothing secret.
        seeded_initrd: an initrd with the guest's own files (for cloud-init, for a network disk), instead of the image's.
        qboot: the firmware of guests whose images need no more, unless they have credentials; None: SeaBIOS for all.
    """
    seed = SEED_ARGUMENT if seeded_initrd and has_seed(image) else ""
    cmdline = (image.cmdline, f"nohype.name={plan.name}", plan.cmdline, seed)
    domain = element(
        "domain",
        element("name", plan.name),
        element("uuid", str(plan.uuid)),
        element("memory", str(plan.memory.kib), unit="KiB"),
        memory.build_backing(plan),
        element("vcpu", str(len(plan.cpus)), placement="static"),
        cores.build_pinning(plan, housekeeping),
        memory.build_placement(plan),
        _boot(
            plan, image, cmdline, seeded_initrd, has_credentials=bool(credentials), qboot=qboot if image.bios == "qboot" else None
        ),
        *((configuration.build_sysinfo(credentials),) if credentials else ()),
        _features(),
        _cpu(plan),
        _clock(),
        # A guest that ends for any reason releases its cores; libvirt does not restart it.
        element("on_poweroff", "destroy"),
        element("on_reboot", "destroy"),
        element("on_crash", "destroy"),
        element("pm", element("suspend-to-mem", enabled="no"), element("suspend-to-disk", enabled="no")),
        _devices(plan, log, boot=boots_firmware(plan, image)),
        _machine_options(firmware=boots_firmware(plan, image)),
        _without_capabilities(),
        type="kvm",
    )
    return to_text(domain)


def boots_firmware(plan: Plan, image: Image) -> bool:
    """SeaBIOS boots the guest from its first disk."""
    return image.boot == "firmware" and bool(plan.disks)


def _boot(
    plan: Plan, image: Image, cmdline: Iterable[str], seeded_initrd: Path | None, *, has_credentials: bool, qboot: Path | None
) -> Element:
    parts = [element("type", "hvm", arch="x86_64", machine="q35")]
    if not boots_firmware(plan, image):
        if qboot and not has_credentials:
            parts.append(element("loader", str(qboot), readonly="yes", type="rom"))
        initrd = seeded_initrd or image.choose_initrd(has_disk=bool(plan.disks))
        parts += [element("kernel", str(image.kernel)), element("initrd", str(initrd))]
        parts.append(element("cmdline", " ".join(filter(None, cmdline))))
    return element("os", *parts, *((element("smbios", mode="sysinfo"),) if has_credentials else ()))


def _features() -> Element:
    return element(
        "features",
        element("acpi"),
        element("apic"),
        element("pmu", state="off"),
        # The guest needs no paravirtual spinlocks: its vCPUs are never descheduled.
        element("kvm", element("hint-dedicated", state="on")),
        # System management mode: no firmware of the guest needs it.
        element("smm", state="off"),
    )


def _cpu(plan: Plan) -> Element:
    """The guest sees its cores and their SMT threads: a scheduler that does not know the siblings slows them down."""
    return element(
        "cpu",
        element("topology", sockets="1", dies="1", cores=str(len(plan.cores)), threads=str(len(plan.cores[0]))),
        *(element("feature", policy="require", name=name) for name in ("x2apic", *plan.cpu_features)),
        mode="host-passthrough",
        check="none",
        # A guest with a passed-through device cannot migrate anyway, so it can have the host's invariant TSC.
        migratable="off",
    )


def _clock() -> Element:
    # kvmclock: without it a guest falls back to the ACPI timer, each read of which is a VM exit (measured: four times the exits).
    return element(
        "clock",
        element("timer", name="kvmclock", present="yes"),
        element("timer", name="hpet", present="no"),
        offset="utc",
    )


def _devices(plan: Plan, log: Path, *, boot: bool) -> Element:
    return element(
        "devices",
        element("controller", type="usb", model="none"),
        element("controller", type="pci", index="0", model="pcie-root"),
        *nic.build_nics(plan),
        *disk.build_disks(plan, boot=boot),
        element("serial", element("log", file=str(log)), type="pty"),
        element("memballoon", model="none"),
    )


def _machine_options(*, firmware: bool) -> Element:
    """A second -machine extends the one that libvirt writes."""
    words = ["-machine", ",".join(f"{device}=off" for device in _ABSENT if not firmware or device not in _FIRMWARE_DEVICES)]
    for name in _ABSENT_PROPERTIES:
        words += ["-global", f"{name}=off"]
    return element(f"{{{QEMU}}}commandline", *(element(f"{{{QEMU}}}arg", value=word) for word in words))


def _without_capabilities() -> Element:
    """With this capability of QEMU libvirt reads each of the vCPU's 460 properties by a command of its own (libvirt 11.3,
    qemuProcessFetchGuestCPU). Without it, it reads the same features as words of CPUID, by three commands.
    """
    unused = element(f"{{{QEMU}}}del", capability="cpu-unavailable-features")
    return element(f"{{{QEMU}}}capabilities", unused)
