"""Ethernet addresses of guests. Pure.

An address is ?2:4e:HH:HH:HH:HH: locally administered (IEEE 802-2014 8.4; of 802c's quadrants the one for administrators), with 36
bits of a hash. 12 bits are the same for all guests, so that a guest's address is recognised. With n NICs in one layer 2 segment
the probability that two have the same address is about n²/2^37: 7e-6 for 1,000 NICs, 7e-4 for 10,000. (24 bits, as in earlier
versions, gave 3 % and 95 %.)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container

from orchestrator.errors import NoRoom
from orchestrator.values import MacAddress

_GUESTS = re.compile(r"[0-9a-f]2:4e:.*")
"""Also matches 02:4e:48:*, the addresses of earlier versions."""
_HASHES = 1 << 36


def choose_mac(seed: str, used: Container[MacAddress]) -> MacAddress:
    """The same seed gives the same address if it is not used. Raises NoRoom if all addresses are used."""
    start = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:5], "big") % _HASHES
    for step in range(_HASHES):
        digits = f"{(start + step) % _HASHES:09x}"
        text = f"{digits[0]}24e{digits[1:]}"
        mac = MacAddress(":".join(text[index : index + 2] for index in range(0, 12, 2)))
        if mac not in used:
            return mac
    raise NoRoom("no Ethernet address is free", ("all addresses of guests are used",))


def is_guest_mac(mac: MacAddress) -> bool:
    """Whether the address has the form of a guest's. Of random, locally administered addresses 1 in 1,024 has it."""
    return _GUESTS.fullmatch(mac.text) is not None
