"""The kernel's command line (Documentation/admin-guide/kernel-parameters.rst). Pure."""

from __future__ import annotations

from collections.abc import Mapping

MAX_CMDLINE = 2047  # characters, COMMAND_LINE_SIZE without its NUL (arch/x86/include/asm/setup.h)

# Parameters that make IOMMU groups or interrupts look more isolated than they are. The first is a patch of some distributions,
# which other kernels ignore. The second is in drivers/iommu/intel/irq_remapping.c.
_UNSAFE_WORDS: Mapping[str, str] = {
    "pcie_acs_override": (
        "a kernel with this patch splits IOMMU groups although their devices can reach each other without the IOMMU:"
        " the groups only look isolated"
    ),
    "intremap=nosid": "the IOMMU does not check which device sends an interrupt",
}


# Parameters that switch the IOMMU or its interrupts off (Documentation/admin-guide/kernel-parameters.txt).
_OFF = ("iommu=off", "intel_iommu=off", "amd_iommu=off", "intremap=off", "nointremap", "noapic")
# Parameters with which interrupts of devices do not reach virtual CPUs directly.
_NOT_POSTED = ("intremap=nopost", "amd_iommu_intr=legacy")


def find_words_against_iommu(cmdline: str) -> list[str]:
    """Words of the command line that switch the IOMMU or interrupt remapping off."""
    return _find_words(cmdline, _OFF)


def find_words_against_posting(cmdline: str) -> list[str]:
    return _find_words(cmdline, _NOT_POSTED)


def _find_words(cmdline: str, wanted: tuple[str, ...]) -> list[str]:
    found = []
    for word in cmdline.split(" -- ")[0].split():  # the rest is for init
        name, equals, values = word.strip('"').partition("=")
        choices = [f"{name.replace('-', '_')}{equals}{value}" for value in values.split(",")]
        found += [word] if any(choice in wanted for choice in choices) else []
    return found


def find_unsafe_words(cmdline: str) -> list[tuple[str, str]]:
    """(word, reason) for each unsafe parameter."""
    found = []
    for word in cmdline.split(" -- ")[0].split():  # the rest is for init
        # In parameter names - and _ are equal, and intremap takes several values in one word.
        name, _, values = word.strip('"').partition("=")
        name = name.replace("-", "_")
        for choice in (name, *(f"{name}={value}" for value in values.split(","))):
            found += [(word, _UNSAFE_WORDS[choice])] if choice in _UNSAFE_WORDS else []
    return found
