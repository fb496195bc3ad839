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
