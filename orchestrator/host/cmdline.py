"""What the kernel's command line tells of a host (Documentation/admin-guide/kernel-parameters.rst). Pure."""

from __future__ import annotations

from collections.abc import Mapping

MAX_CMDLINE = 2047
"""Characters that x86 keeps (COMMAND_LINE_SIZE less its NUL, arch/x86/include/asm/setup.h)."""

# Words of the kernel command line that make IOMMU groups or interrupts look more isolated than the hardware keeps them. The first
# is a patch that some distributions carry, and is ignored by other kernels; the second is drivers/iommu/intel/irq_remapping.c.
_UNSAFE_WORDS: Mapping[str, str] = {
    "pcie_acs_override": (
        "a kernel with this patch puts devices into groups of their own that can reach each other past the IOMMU:"
        " the groups only look isolated"
    ),
    "intremap=nosid": "the IOMMU does not check which device sends an interrupt",
}


def find_unsafe_words(cmdline: str) -> list[tuple[str, str]]:
    """Words of the command line that are in the table, as they are written there, and what is wrong with each."""
    found = []
    for word in cmdline.split(" -- ")[0].split():  # what follows is for init (Documentation/admin-guide/kernel-parameters.rst)
        # The kernel takes - and _ for the same in a parameter's name, and several values of intremap in one word.
        name, _, values = word.strip('"').partition("=")
        name = name.replace("-", "_")
        for choice in (name, *(f"{name}={value}" for value in values.split(","))):
            found += [(word, _UNSAFE_WORDS[choice])] if choice in _UNSAFE_WORDS else []
    return found
