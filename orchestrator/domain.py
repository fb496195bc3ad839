"""Plan → libvirt domain XML (https://libvirt.org/formatdomain.html). Pure: no libvirt, no host."""

from __future__ import annotations

from pathlib import Path

from lxml import etree

from orchestrator.images.store import Image
from orchestrator.model.plan import Plan
from orchestrator.values import PciAddress

_QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"

# What a q35 machine has by itself and a guest does not need, by QEMU's own switches (`qemu-system-x86_64 -M q35,help`).
# libvirt has a word for the first alone, and that since 10.7 only.
_ABSENT = (
    "i8042",  # PS/2 keyboard and mouse, and with their controller port 92, vmport and vmmouse
    "sata",  # the AHCI controller
    "smbus",  # the SMBus with 8 EEPROMs
    "pit",  # the 8254 timer and the PC speaker: the guest uses its local APIC's timer
    "pic",  # two 8259 interrupt controllers: the guest uses its I/O APIC and MSI
)
_ABSENT_PROPERTIES = (
    "kvm-apic.vapic",  # help for 32-bit guests that write the task priority often, by a page and an I/O port of its own
    "ICH9-LPC.enable_tco",  # the chip set's watchdog timer
)

_VF_SLOT = "0x02"


def build_domain(plan: Plan, image: Image, *, log: Path) -> str:
    """The XML that starts the guest.

    Args:
        log: file that gets all that the guest prints on its serial console.

    Returns:
        XML for virDomainCreateXML: the guest is gone from libvirt when it ends.
    """
    domain = _element(
        "domain",
        _element("name", plan.name),
        _element("uuid", str(plan.uuid)),
        _element("memory", str(plan.memory.kib), unit="KiB"),
        _memory_backing(plan),
        _element("vcpu", str(len(plan.cpus)), placement="static"),
        _element(
            "cputune",
            *(_element("vcpupin", vcpu=str(vcpu), cpuset=str(cpu)) for vcpu, cpu in enumerate(plan.cpus)),
            _element("emulatorpin", cpuset=str(plan.housekeeping)),
        ),
        _element("numatune", _element("memory", mode="strict", nodeset=str(plan.node))),
        _element(
            "os",
            _element("type", "hvm", arch="x86_64", machine="q35"),
            _element("kernel", str(image.kernel)),
            _element("initrd", str(image.initrd)),
            _element("cmdline", " ".join(filter(None, (image.cmdline, f"nohype.name={plan.name}", plan.cmdline)))),
        ),
        _features(),
        _cpu(plan),
        _clock(),
        # A guest that ends, however it ends, gives its cores back; nothing restarts it behind our back.
        _element("on_poweroff", "destroy"),
        _element("on_reboot", "destroy"),
        _element("on_crash", "destroy"),
        _element("pm", _element("suspend-to-mem", enabled="no"), _element("suspend-to-disk", enabled="no")),
        _devices(plan, log),
        _machine_options(),
        type="kvm",
    )
    return etree.tostring(domain, pretty_print=True, encoding="unicode")


def _memory_backing(plan: Plan) -> etree._Element:
    return _element(
        "memoryBacking",
        _element("hugepages", _element("page", size=str(plan.page_size.kib), unit="KiB")),
        _element("nosharepages"),
        _element("locked"),
        _element("allocation", mode="immediate"),
    )


def _features() -> etree._Element:
    return _element(
        "features",
        _element("acpi"),
        _element("apic"),
        _element("pmu", state="off"),
        # The guest needs no paravirtual spinlocks: its vCPUs are never descheduled.
        _element("kvm", _element("hint-dedicated", state="on")),
        # Firmware that runs beside the guest's kernel, in system management mode: nothing needs it.
        _element("smm", state="off"),
    )


def _cpu(plan: Plan) -> etree._Element:
    """The guest sees its cores and their SMT threads as they are: a scheduler that does not know siblings slows them down."""
    return _element(
        "cpu",
        _element("topology", sockets="1", dies="1", cores=str(len(plan.cores)), threads=str(len(plan.cores[0]))),
        *(_element("feature", policy="require", name=name) for name in ("x2apic", *plan.cpu_features)),
        mode="host-passthrough",
        check="none",
        # A guest with a passed-through device can't migrate anyway; so it may have an invariant TSC, where the host has one.
        migratable="off",
    )


def _clock() -> etree._Element:
    # kvmclock: without it a guest falls back to the ACPI timer, whose every reading is an exit (measured: four times the exits).
    return _element(
        "clock",
        _element("timer", name="kvmclock", present="yes"),
        _element("timer", name="hpet", present="no"),
        offset="utc",
    )


def _devices(plan: Plan, log: Path) -> etree._Element:
    return _element(
        "devices",
        _element("controller", type="usb", model="none"),
        _element("controller", type="pci", index="0", model="pcie-root"),
        _hostdev(plan.vf.address),
        _element("serial", _element("log", file=str(log)), type="pty"),
        _element("memballoon", model="none"),
    )


def _hostdev(address: PciAddress) -> etree._Element:
    """managed='no': binding to vfio-pci and back is a step of ours, with its undo."""
    source = _element(
        "address",
        domain=f"0x{address.domain:04x}",
        bus=f"0x{address.bus:02x}",
        slot=f"0x{address.device:02x}",
        function=f"0x{address.function:x}",
    )
    # On the root bus, as an integrated endpoint: no emulated root port is needed, and libvirt adds no spare one.
    place = _element("address", type="pci", domain="0x0000", bus="0x00", slot=_VF_SLOT, function="0x0")
    return _element("hostdev", _element("source", source), place, mode="subsystem", type="pci", managed="no")


def _machine_options() -> etree._Element:
    """A second -machine adds to the one that libvirt writes."""
    words = ["-machine", ",".join(f"{device}=off" for device in _ABSENT)]
    for name in _ABSENT_PROPERTIES:
        words += ["-global", f"{name}=off"]
    return _element(f"{{{_QEMU}}}commandline", *(_element(f"{{{_QEMU}}}arg", value=word) for word in words))


def _element(tag: str, *content: etree._Element | str, **attributes: str) -> etree._Element:
    element = etree.Element(tag, attributes, nsmap={"qemu": _QEMU})
    for part in content:
        if isinstance(part, str):
            element.text = part
        else:
            element.append(part)
    return element
