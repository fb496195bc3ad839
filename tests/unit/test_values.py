"""Values: what is printed can be read back as the same value, and wrong text is refused with a hint."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import RequestError
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size, parse_guest_name

CPU_SETS = st.frozensets(st.integers(0, 4095), max_size=40).map(CpuSet)
PCI = st.builds(PciAddress, st.integers(0, 0xFFFF_FFFF), st.integers(0, 0xFF), st.integers(0, 0x1F), st.integers(0, 7))
MACS = st.binary(min_size=6, max_size=6).filter(lambda raw: any(raw) and not raw[0] & 1).map(lambda raw: MacAddress(raw.hex(":")))
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", fullmatch=True)


@given(CPU_SETS)
def test_cpu_set_round_trip(cpus: CpuSet) -> None:
    assert CpuSet.parse(str(cpus)) == cpus


@given(CPU_SETS)
def test_cpu_mask_round_trip(cpus: CpuSet) -> None:
    assert CpuSet.parse_mask(cpus.mask) == cpus


@pytest.mark.parametrize(
    ("text", "cpus", "mask"),
    [
        ("03", "0-1", "3"),
        ("ff\n", "0-7", "ff"),
        ("00000000,00000003", "0-1", "3"),
        ("1,00000000", "32", "1,00000000"),
        ("0", "", "0"),
    ],
)
def test_cpu_mask_is_that_of_the_kernel(text: str, cpus: str, mask: str) -> None:
    assert str(CpuSet.parse_mask(text)) == cpus
    assert CpuSet.parse_mask(text).mask == mask


@pytest.mark.parametrize("text", ["", "0x3", "g", "1,2", ",00000001", "123456789", "-1", "f," + ",".join(["00000000"] * 256)])
def test_odd_cpu_mask_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="not a mask"):
        CpuSet.parse_mask(text)


@given(CPU_SETS, CPU_SETS)
def test_cpu_sets_are_sets(one: CpuSet, other: CpuSet) -> None:
    assert set(one | other) == set(one) | set(other)
    assert set(one & other) == set(one) & set(other)
    assert set(one - other) == set(one) - set(other)
    assert (one <= other) == (set(one) <= set(other))
    assert len(one) == len(set(one))


@pytest.mark.parametrize(
    ("text", "ids", "formatted"),
    [
        ("", [], ""),
        ("\n", [], ""),
        ("0", [0], "0"),
        ("0-3,8", [0, 1, 2, 3, 8], "0-3,8"),
        ("8,0-1, 2", [0, 1, 2, 8], "0-2,8"),
        ("3-3", [3], "3"),
        ("5,4,5", [4, 5], "4-5"),
    ],
)
def test_cpu_set_takes_the_kernels_format(text: str, ids: list[int], formatted: str) -> None:
    assert list(CpuSet.parse(text)) == ids
    assert str(CpuSet.parse(text)) == formatted


@pytest.mark.parametrize("text", ["a", "3-1", "-1", "1-", "0x2", "1-2-3", "1;2", "٣", "0-99999999"])
def test_cpu_set_refuses(text: str) -> None:
    with pytest.raises(RequestError, match="not a list of CPUs") as caught:
        CpuSet.parse(text)
    assert repr(text) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("text", ["8192", "0-8192", "0-4095,0-4095,7", "0-99999," * 500])
def test_cpu_set_counts_before_it_counts_out(text: str) -> None:
    assert len(CpuSet.parse("0-8191")) == 8192
    with pytest.raises(RequestError, match="more CPUs than the kernel supports") as caught:
        CpuSet.parse(text)
    assert len(caught.value.message) < 200


@given(st.integers(1, (1 << 49) - 1).map(Size))
def test_size_round_trip(size: Size) -> None:
    assert Size.parse(str(size)) == size


@pytest.mark.parametrize(
    ("text", "count", "formatted"),
    [
        ("1", 1, "1"),
        ("4096", 4096, "4K"),
        ("2M", 2 << 20, "2M"),
        ("2MB", 2 << 20, "2M"),
        ("2MiB", 2 << 20, "2M"),
        (" 1 G ", 1 << 30, "1G"),
        ("1024M", 1 << 30, "1G"),
        ("1536M", 1536 << 20, "1536M"),
        ("3T", 3 << 40, "3T"),
        ("7B", 7, "7"),
    ],
)
def test_size_units_are_binary(text: str, count: int, formatted: str) -> None:
    assert Size.parse(text).bytes == count
    assert str(Size.parse(text)) == formatted


@pytest.mark.parametrize("text", ["", "0", "0M", "-1M", "1.5G", "1E", "1m", "M", "1 2", "1e3", "2Mi B", "1iB", "٣M", "1" * 16])
def test_size_refuses(text: str) -> None:
    with pytest.raises(RequestError, match="not a size") as caught:
        Size.parse(text)
    assert repr(text) in caught.value.message
    assert caught.value.hint


def test_size_in_kib_is_rounded_down() -> None:
    assert (Size(2047).kib, Size(2048).kib) == (1, 2)


@given(PCI)
def test_pci_address_round_trip(address: PciAddress) -> None:
    assert PciAddress.parse(str(address)) == address


@given(PCI, st.integers(0, 0xFFFF))
def test_pci_offset_counts_routing_ids(address: PciAddress, steps: int) -> None:
    moved = address.offset(steps)
    assert moved.domain == address.domain
    assert _routing_id(moved) == _routing_id(address) + steps


def _routing_id(address: PciAddress) -> int:
    return (address.bus * 32 + address.device) * 8 + address.function


@pytest.mark.parametrize(
    ("text", "formatted"), [("0000:41:10.3", "0000:41:10.3"), ("41:10.3", "0000:41:10.3"), (" 0000:AB:1F.7\n", "0000:ab:1f.7")]
)
def test_pci_address_parses(text: str, formatted: str) -> None:
    assert str(PciAddress.parse(text)) == formatted


@pytest.mark.parametrize("text", ["", "41:10", "41:10.8", "41:20.0", "000:41:10.0", "0000:141:10.0", "0000-41-10.0", "g1:10.0"])
def test_pci_address_refuses(text: str) -> None:
    with pytest.raises(RequestError, match="not a PCI address") as caught:
        PciAddress.parse(text)
    assert caught.value.hint


@given(MACS)
def test_mac_address_round_trip(mac: MacAddress) -> None:
    assert MacAddress.parse(str(mac)) == mac
    assert MacAddress.parse(str(mac).upper()) == mac


@pytest.mark.parametrize(
    "text",
    [
        "",
        "02:4e:48:00:00",
        "02:4e:48:00:00:00:01",
        "02-4e-48-00-00-01",
        "01:00:5e:00:00:01",
        "ff:ff:ff:ff:ff:ff",
        "00:00:00:00:00:00",
        "0g:00:00:00:00:01",
    ],
)
def test_mac_address_refuses(text: str) -> None:
    with pytest.raises(RequestError, match="not a unicast Ethernet address") as caught:
        MacAddress.parse(text)
    assert caught.value.hint


@given(NAMES)
def test_guest_names_are_dns_labels(name: str) -> None:
    assert parse_guest_name(name) == name


@pytest.mark.parametrize("text", ["", "G1", "g_1", "-g", "g-", "g 1", "g1\n", "../g", "a" * 41, "gä", "g.1"])
def test_guest_name_refuses(text: str) -> None:
    with pytest.raises(RequestError, match="not a guest name") as caught:
        parse_guest_name(text)
    assert caught.value.hint


@given(st.text(max_size=20))
@pytest.mark.parametrize("parse", [CpuSet.parse, Size.parse, PciAddress.parse, MacAddress.parse, parse_guest_name])
def test_any_text_is_parsed_or_refused(parse, text: str) -> None:  # type: ignore[no-untyped-def]
    """Nothing but RequestError leaves a parser, and what is accepted survives printing."""
    try:
        value = parse(text)
    except RequestError:
        return
    assert parse(str(value)) == value
