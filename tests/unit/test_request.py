"""Requests: strict, with every wrong field named."""

from __future__ import annotations

import json
from ipaddress import IPv4Interface, ip_interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import RequestError
from orchestrator.model.request import GuestRequest, NicRequest, parse_guest_request
from orchestrator.values import Size

GOOD: dict[str, object] = {"name": "g1", "memory": "256M", "image": "minimal"}


def test_defaults() -> None:
    request = parse_guest_request(GOOD)
    assert (request.cores, request.address, request.cmdline, request.size) == (1, None, "", Size(256 << 20))


@given(
    st.fixed_dictionaries(
        {
            "name": st.from_regex(r"[a-z0-9]{1,40}", fullmatch=True),
            "memory": st.integers(1, 1 << 40).map(lambda count: str(Size(count))),
            "image": st.from_regex(r"[a-z0-9]{1,40}", fullmatch=True),
            "cores": st.integers(1, 1024),
            "cmdline": st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=1024),
            "address": st.none() | st.ip_addresses(v=4).map(lambda address: f"{address}/24"),
        }
    )
)
def test_json_round_trip(fields: dict[str, object]) -> None:
    request = parse_guest_request(fields)
    assert parse_guest_request(request.model_dump()) == request
    assert GuestRequest.model_validate_json(request.model_dump_json()) == request


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("name", "G1", "use 1 to 40"),
        ("name", "", "use 1 to 40"),
        ("name", 1, "string"),
        ("cores", 0, "greater than or equal to 1"),
        ("cores", 1025, "less than or equal to 1024"),
        ("cores", "2", "integer"),
        ("cores", True, "integer"),
        ("cores", 1.0, "integer"),
        ("memory", "lots", "use the form 256M"),
        ("memory", "0M", "use the form 256M"),
        ("memory", 256, "string"),
        ("image", "../minimal", "use 1 to 40"),
        ("address", "10.9.0.11", "prefix length"),
        ("address", "10.9.0.300/24", "IPv4"),
        ("address", "10.9.0.1/33", "IPv4"),
        ("address", "fe80::1%eth0/64", "zone"),
        ("cmdline", "a\nb", "printable ASCII"),
        ("cmdline", "ä", "printable ASCII"),
        ("cmdline", "x" * 1025, "1024"),
        ("vcpus", 2, "Extra inputs"),
    ],
)
def test_wrong_field_is_named(field: str, value: object, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        parse_guest_request({**GOOD, field: value})
    assert f"{field}: " in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("field", "written", "kept"),
    [
        ("placement", {"cpus": "2-3,\u001f\n8191"}, {"cpus": "2-3,8191", "vf": None, "disks": None}),
        ("placement", {"cpus": " 3,2,,7-7 \t"}, {"cpus": "2-3,7", "vf": None, "disks": None}),
        ("placement", {"cpus": "2", "vf": "41:10.0\n"}, {"cpus": "2", "vf": "0000:41:10.0", "disks": None}),
        ("memory", "1024 MiB\u001f", "1G"),
        ("page_size", "\n2048K", "2M"),
    ],
)
def test_one_thing_has_one_spelling(field: str, written: object, kept: object) -> None:
    """Also in what an older version has written into the ledger: asked again with the same id, it is the same request."""
    request = parse_guest_request({**GOOD, field: written})
    assert request.model_dump()[field] == kept
    assert GuestRequest.model_validate_json(json.dumps({**GOOD, field: written})) == request
    assert GuestRequest.model_validate_json(request.model_dump_json(exclude_unset=True)) == request


@pytest.mark.parametrize("field", ["name", "memory", "image"])
def test_missing_field_is_named(field: str) -> None:
    with pytest.raises(RequestError, match=f"{field}: .*required"):
        parse_guest_request({key: value for key, value in GOOD.items() if key != field})


def test_all_wrong_fields_are_named_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        parse_guest_request({"name": "G1", "memory": "x", "image": "minimal"})
    assert "name: " in caught.value.message
    assert "memory: " in caught.value.message


@given(st.ip_addresses().flatmap(lambda ip: st.integers(0, ip.max_prefixlen).map(lambda prefix: f"{ip}/{prefix}")))
def test_address_keeps_host_part_and_prefix(text: str) -> None:
    request = parse_guest_request({**GOOD, "address": text})
    assert request.address is not None
    assert ip_interface(request.address) == ip_interface(text)


def test_requests_are_values() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_guest_request(GOOD).cores = 2  # type: ignore[misc]
    assert IPv4Interface("10.9.0.11/24") == ip_interface(parse_guest_request({**GOOD, "address": "10.9.0.11/24"}).address or "")


FIELDS = st.sampled_from(["name", "cores", "memory", "image", "address", "cmdline", "vcpus"])


@given(st.dictionaries(FIELDS, st.none() | st.booleans() | st.integers() | st.text(max_size=9)))
def test_any_json_is_parsed_or_refused(fields: dict[str, object]) -> None:
    """Nothing but RequestError leaves the parser, whatever is sent."""
    try:
        parse_guest_request(fields)
    except RequestError:
        return
    assert {"name", "memory", "image"} <= set(fields)


def test_single_nic_fields_are_short_for_one_nic() -> None:
    assert parse_guest_request(GOOD).wanted_nics == (NicRequest(),)
    request = parse_guest_request({**GOOD, "address": "10.9.0.1/24", "placement": {"cpus": "2", "vf": "41:10.0"}})
    assert request.wanted_nics == (NicRequest(vf="0000:41:10.0", address="10.9.0.1/24"),)


def test_nics_are_kept_in_order_and_in_one_spelling() -> None:
    nics = [{"uplink": "nic1"}, {"vf": "41:10.2", "address": "fd00::0:1/64"}, {}]
    request = parse_guest_request({**GOOD, "nics": nics})
    expected = (NicRequest(uplink="nic1"), NicRequest(vf="0000:41:10.2", address="fd00::1/64"), NicRequest())
    assert request.nics == request.wanted_nics == expected
    assert GuestRequest.model_validate_json(request.model_dump_json(exclude_unset=True)) == request


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"nics": []}, "nics: .*at least 1"),
        ({"nics": [{}] * 9}, "nics: .*at most 8"),
        ({"nics": [{"uplink": "a/b"}]}, "nics.0.uplink: 'a/b' is not the name of a network interface"),
        ({"nics": [{"uplink": "a" * 16}]}, "nics.0.uplink: .*at most 15"),
        ({"nics": [{}, {"vf": "x"}]}, "nics.1.vf: 'x' is not a PCI address"),
        ({"nics": [{"address": "10.9.0.1"}]}, "nics.0.address: .*no prefix length"),
        ({"nics": [{"mac": "02:4e:48:00:00:01"}]}, "nics.0.mac: "),
        ({"nics": [{}], "address": "10.9.0.1/24"}, "nics cannot be given together with address"),
        ({"nics": [{}], "placement": {"cpus": "2", "vf": "41:10.0"}}, "nics cannot be given together with"),
        ({"nics": [{"vf": "41:10.0"}, {"vf": "0000:41:10.0"}]}, "nics name the same VF twice"),
    ],
)
def test_wrong_nics_are_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        parse_guest_request({**GOOD, **fields})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"profile": "tickless"}, "^invalid request: profile tickless needs housekeeping"),
        ({"profile": "tickless", "housekeeping": "1"}, "with vCPU 0 among it"),
        ({"profile": "fast", "housekeeping": "0"}, "profile: .*'tickless'"),
        ({"profile": ["tickless"], "housekeeping": "0"}, "profile: "),
    ],
)
def test_wrong_profile_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        parse_guest_request({**GOOD, **fields})
