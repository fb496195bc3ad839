"""Slurm's abstract CPU ids are mapped to this host's CPUs, and its configuration describes exactly what guests can own."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import HostError, RequestError
from orchestrator.fleet.apart import SLOTS
from orchestrator.fleet.configuration import (
    GRES_FILE,
    NODES_FILE,
    Address,
    build_common,
    build_gres_lines,
    build_node_lines,
    build_step,
    check_host_name,
    find_differences,
)
from orchestrator.fleet.node import build_nodes, find_host, find_left_out
from orchestrator.fleet.steps import check_configuration
from orchestrator.values import CpuSet, PciAddress, Size

_2M, _1G = Size.parse("2M").bytes, Size.parse("1G").bytes
PF = {"address": "0000:41:00.0", "interface": "nic0", "node": 0, "fault": ""}


def core(cpus: str, node: int = 0, use: str = "free", socket: int | None = None) -> dict[str, Any]:
    return {"cpus": cpus, "node": node, "use": use, "socket": node if socket is None else socket, "guest": ""}


def vf(index: int, use: str = "") -> dict[str, Any]:
    return {"address": f"0000:41:10.{index}", "index": index, "driver": None, "iommu_group": None, "use": use}


def host(
    *cores: dict[str, Any], pages: list[tuple[int, int, str, int]] | None = None, vfs: int = 2, edge: str = "vepa",
    pfs: list[dict[str, Any]] | None = None, disks: list[tuple[int | None, str]] | None = None, emulated: bool = False,
) -> Any:  # fmt: skip
    """``pages``: node, size, use and count. ``disks``: node and use."""
    uses = [(node, _2M, "free", 512) for node in sorted({one["node"] for one in cores})] if pages is None else pages
    keys = ("node", "page_size", "use", "count")
    return {
        "cores": list(cores),
        "pages": [dict(zip(keys, use, strict=True)) for use in uses],
        "uplinks": [{"name": "nic0", "edge": edge}, {"name": "nic1", "edge": edge}],
        "survey": {"pfs": [{**PF, "vfs": [vf(index) for index in range(vfs)]}] if pfs is None else pfs},
        "disks": [
            {"address": f"0000:5{number}:00.0", "node": node, "use": use} for number, (node, use) in enumerate(disks or [])
        ],
        "emulated_disks": emulated,
    }


# By how Linux numbers the CPUs: siblings next to each other, in halves, no SMT, four threads, with a gap, in another order.
NUMBERINGS = {
    "adjacent": (("0-1", "2-3", "4-5", "6-7"), "2-5", "4-7"),
    "halves": (("0,4", "1,5", "2,6", "3,7"), "2-5", "2-3,6-7"),
    "no SMT": (("0", "1", "2", "3"), "1-2", "2-3"),
    "four threads": (("0,4,8,12", "1,5,9,13", "2,6,10,14", "3,7,11,15"), "0-3", "1,5,9,13"),
    "gap": (("0,8", "2,10", "4,12", "6,14"), "4-5", "6,14"),
    "listed in another order": (("3,7", "0,4", "2,6", "1,5"), "0-1", "1,5"),
}


@pytest.mark.parametrize("kind", NUMBERINGS)
def test_abstract_ids_are_mapped_by_core(kind: str) -> None:
    """The manager has the first core, which Slurm does not see: its core 0 is the second of the host."""
    cpus, abstract, expected = NUMBERINGS[kind]
    first = min(cpus, key=lambda text: min(CpuSet.parse(text)))
    cores = [core(text, use="housekeeping" if text == first else "free") for text in cpus]
    (node,) = build_nodes(host(*cores), "a")
    assert len(node.cores) == 3
    assert node.map_cpus(CpuSet.parse(abstract)) == CpuSet.parse(expected)


def test_each_core_is_the_image_of_exactly_one_abstract_core() -> None:
    for cpus, _, _ in NUMBERINGS.values():
        (node,) = build_nodes(host(*map(core, cpus)), "a")
        size = len(node.cores) * node.threads
        images = [node.map_cpus(CpuSet.of(range(at, at + node.threads))) for at in range(0, size, node.threads)]
        assert sorted(map(str, images)) == sorted(str(CpuSet.parse(text)) for text in cpus)


@pytest.mark.parametrize("ids", ["0", "1-2", "0-1,3", "8-9", ""])
def test_ids_that_are_not_whole_cores_of_the_node_are_refused(ids: str) -> None:
    (node,) = build_nodes(host(core("0,4"), core("1,5"), core("2,6"), core("3,7")), "a")
    with pytest.raises(RequestError, match="not whole cores of 4 cores with 2 threads"):
        node.map_cpus(CpuSet.parse(ids))


def test_numa_nodes_are_nodes_of_their_own_and_number_cores_by_socket() -> None:
    cores = [core("0,4", 0, "housekeeping"), core("2,6", 0), core("1,5", 1), core("3,7", 1)]
    pfs = [{**PF, "vfs": [vf(1), vf(0)]}, {**PF, "address": "0000:81:00.0", "interface": "nic1", "node": 1, "vfs": [
        {**vf(0), "address": "0000:81:10.0"}]}]  # fmt: skip
    first, second = build_nodes(host(*cores, pfs=pfs), "a")
    assert (first.name, second.name) == ("a-n0", "a-n1")
    assert list(map(str, first.cores)) == ["2,6"]
    assert list(map(str, second.cores)) == ["1,5", "3,7"]
    assert list(map(str, first.vfs)) == ["0000:41:10.0", "0000:41:10.1"]  # by index, not as listed
    assert list(map(str, second.vfs)) == ["0000:81:10.0"]
    assert second.map_vfs(CpuSet.parse("0")) == (PciAddress.parse("0000:81:10.0"),)
    with pytest.raises(RequestError, match="VF 1 of a-n1, which has 1 VFs"):
        second.map_vfs(CpuSet.parse("1"))


def test_pages_of_the_host_itself_are_left_out() -> None:
    pages = [(0, _2M, "free", 100), (0, _2M, "claimed", 28), (0, _2M, "housekeeping", 50), (0, _1G, "free", 0)]
    (node,) = build_nodes(host(core("2"), pages=pages), "a")
    assert (node.memory, node.page_size) == (256, _2M)


def test_vfs_that_the_host_uses_and_faulty_pfs_are_left_out() -> None:
    pfs = [
        {**PF, "vfs": [vf(0, use="its interface is up"), vf(1)]},
        {**PF, "address": "0000:42:00.0", "fault": "cannot be read", "vfs": [vf(2)]},
        {**PF, "address": "0000:43:00.0", "interface": "other", "vfs": [vf(3)]},  # not an uplink
        {**PF, "address": "0000:44:00.0", "node": None, "interface": "nic1", "vfs": [vf(4)]},  # belongs to the first node
    ]
    (node,) = build_nodes(host(core("2"), pfs=pfs), "a")
    assert list(map(str, node.vfs)) == ["0000:41:10.1", "0000:41:10.4"]


def test_node_without_vfs_has_the_feature_edge_only_with_a_software_edge() -> None:
    (node,) = build_nodes(host(core("2"), vfs=0, edge="nft-vepa"), "a")
    assert node.features == ("edge", "pages-2M")
    with pytest.raises(HostError, match="no uplink has VFs or a software edge"):
        build_nodes(host(core("2"), vfs=0), "a")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (host(core("0", use="housekeeping"), core("1", use="unusable")), "no core is isolated"),
        (host(core("2"), pages=[(0, _2M, "housekeeping", 5)]), "no huge pages of 2M"),
    ],
)
def test_host_that_cannot_have_a_guest_is_refused(bad: Any, message: str) -> None:
    with pytest.raises(HostError, match=message):
        build_nodes(bad, "a")


@pytest.mark.parametrize(
    ("cores", "offered", "threads", "left_out"),
    [
        (("2-3", "4", "6-7"), ["2-3", "6-7"], 1, "CPUs 4 of NUMA node 0"),  # CPU 5 is offline
        (("0-1", "2-3", "4", "5", "6", "7", "8"), ["4", "5", "6", "7", "8"], 1, "CPUs 0-3 of NUMA node 0"),  # two kinds of core
        (("2-3", "4-5"), ["2-3", "4-5"], 2, ""),
    ],
)
def test_cores_with_another_number_of_threads_are_left_out(
    cores: tuple[str, ...], offered: list[str], threads: int, left_out: str
) -> None:
    """slurmd finds one thread per core if the number differs: the cores of the node then count as one CPU each."""
    found = host(*map(core, cores))
    (node,) = build_nodes(found, "a")
    assert (list(map(str, node.cores)), node.threads) == (offered, threads)
    assert node.map_cpus(CpuSet.parse(f"{threads}-{2 * threads - 1}")) == node.cores[1]
    texts = find_left_out(found, [node])
    assert [text.split(":")[0] for text in texts] == ([left_out] if left_out else [])


def test_core_of_the_manager_with_an_offline_cpu_counts_too() -> None:
    """slurmd counts the whole machine."""
    (node,) = build_nodes(host(core("0", use="housekeeping"), core("2-3"), core("4-5")), "a")
    assert (len(node.cores), node.threads) == (2, 1)


def test_numa_node_that_cannot_have_a_guest_is_left_out_with_the_reason() -> None:
    found = host(core("2"), core("3", node=1), pages=[(0, _2M, "free", 512)])
    (node,) = build_nodes(found, "a")
    assert node.name == "a-n0"
    assert ["NUMA node 1: it has no huge pages" in text for text in find_left_out(found, [node])] == [True]


def test_page_size_must_be_chosen_if_there_are_several() -> None:
    found = host(core("2"), pages=[(0, _2M, "free", 512), (0, _1G, "free", 3)])
    with pytest.raises(RequestError, match="2M and 1G"):
        build_nodes(found, "a")
    (node,) = build_nodes(found, "a", Size.parse("1G"))
    assert node.memory == 3 << 10


def example() -> Any:
    return host(core("0,4", use="housekeeping"), core("1,5"), core("2,6"), core("3,7"))


def test_configuration_is_the_same_for_equal_hosts_and_complete() -> None:
    nodes = build_nodes(example(), "a")
    lines = build_node_lines(nodes, Address("a", "192.0.2.1", 17000))
    assert lines == build_node_lines(build_nodes(example(), "a"), Address("a", "192.0.2.1", 17000))
    assert lines.startswith(
        "NodeName=a NodeHostname=a NodeAddr=192.0.2.1 Port=17000 Sockets=1 CoresPerSocket=3 ThreadsPerCore=2 RealMemory=1024"
        " Gres=vf:2,apart0:1,apart1:1,"
    )
    assert re.search(r" Feature=sriov,pages-2M,cores-[0-9a-f]{12} State=UNKNOWN$", lines, re.MULTILINE)
    assert build_gres_lines(nodes).splitlines() == [
        f"NodeName=a Name=vf File=/sys/bus/pci/devices/0000:41:10.{index}" for index in (0, 1)
    ]
    common = build_common("controller", "ops")
    for setting in ("TaskPlugin=task/none", "JobRequeue=0", "SelectTypeParameters=CR_Core_Memory", "AllowGroups=ops"):
        assert setting in common
    assert "config_overrides" not in common  # it would switch off the check of the hardware


def files(found: Any) -> tuple[str, str]:
    nodes = build_nodes(found, "a")
    return build_node_lines(nodes, Address("a", "a")), build_gres_lines(nodes)


def test_files_that_match_have_no_differences() -> None:
    other = "NodeName=b NodeHostname=b CoresPerSocket=9\n"
    nodes, gres = files(example())
    assert find_differences(build_nodes(example(), "a"), "a", other + "# comment\n" + nodes, gres) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda nodes, gres: ("", gres), "does not have node a"),
        (lambda nodes, gres: (nodes * 2, gres), "has node a twice"),
        (lambda nodes, gres: (nodes + "NodeName=a-n1 NodeHostname=a\n", gres), "has node a-n1, which the host cannot offer"),
        (
            lambda nodes, gres: (nodes.replace("CoresPerSocket=3", "CoresPerSocket=4"), gres),
            "CoresPerSocket=4 in .*, the host has 3",
        ),
        (lambda nodes, gres: (nodes.replace("RealMemory=1024", "RealMemory=2048"), gres), "RealMemory=2048"),
        (
            lambda nodes, gres: (nodes.replace("Gres=vf:2", "Gres=vf:3"), gres),
            "Gres=vf:3 in nohype-nodes.conf, the host has vf:2$",
        ),
        (lambda nodes, gres: (nodes.replace("apart3:1,", ""), gres), "the host has vf:2,apart0:1"),
        (lambda nodes, gres: (nodes.replace("sriov,", "sriov,edge,"), gres), "Feature=sriov,edge,pages-2M"),
        (lambda nodes, gres: (nodes.replace("pages-2M,", ""), gres), "Feature=sriov,cores-"),
        (lambda nodes, gres: (nodes.replace("sriov,", "sriov,network-red,"), gres), "host does not have this network"),
        (lambda nodes, gres: (nodes, gres.splitlines()[0]), r"gres.conf has 1 VFs, the host 2.*0000:41:10\.1"),
        (lambda nodes, gres: (nodes, "\n".join(reversed(gres.splitlines()))), "their order"),
    ],
)
def test_each_difference_is_found(change: Any, message: str) -> None:
    found = find_differences(build_nodes(example(), "a"), "a", *change(*files(example())))
    assert len(found) == 1
    assert re.search(message, found[0])


def write_ranges() -> tuple[str, str]:
    """Three equal hosts in one line, as an operator of a large fleet writes them."""
    nodes, gres = files(example())
    for key in ("NodeName", "NodeHostname", "NodeAddr"):
        nodes = nodes.replace(f"{key}=a ", f"{key}=h[08-10] ")
    line = gres.splitlines()[0].replace("NodeName=a ", "NodeName=h[08-10] ").replace("10.0", "10.[0-1]")
    return nodes, line + "\n"


@pytest.mark.parametrize("name", ["h08", "h10"])
def test_ranges_are_read(name: str) -> None:
    assert find_differences(build_nodes(example(), name), name, *write_ranges()) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda nodes, gres: (nodes.replace("08-10", "09-10"), gres), "does not have node h08"),
        (lambda nodes, gres: (nodes + nodes.replace("08-10", "07-08"), gres), "has node h08 twice"),
        (lambda nodes, gres: (nodes, gres.replace("[0-1]", "[0-2]")), "gres.conf has 3 VFs, the host 2"),
        (lambda nodes, gres: (nodes, gres.replace("h[08-10]", "h[09-10]")), "gres.conf has 0 VFs, the host 2"),
    ],
)
def test_differences_in_ranges_are_found(change: Any, message: str) -> None:
    found = find_differences(build_nodes(example(), "h08"), "h08", *change(*write_ranges()))
    assert len(found) == 1
    assert re.search(message, found[0])


def test_comment_in_another_encoding_is_no_fault(tmp_path: Path) -> None:
    for name, text in zip((NODES_FILE, GRES_FILE), files(example()), strict=True):
        (tmp_path / name).write_bytes(b"# Z\xfcrich\n" + text.encode())
    site: Any = SimpleNamespace(configuration=tmp_path, host="a")
    check_configuration(site, build_nodes(example(), "a"))


def test_range_of_another_length_is_refused() -> None:
    nodes, gres = write_ranges()
    with pytest.raises(RequestError, match="has 3 names, NodeAddr another number"):
        find_differences(build_nodes(example(), "h08"), "h08", nodes.replace("NodeAddr=h[08-10]", "NodeAddr=h[08-09]"), gres)


@pytest.mark.parametrize(
    ("nodes", "gres"),
    [
        ("nodename=h[08-10] NodeHostname=h[08-10]", ""),  # Slurm accepts this spelling, the check does not
        ("", "NodeName=h[1-60000] Name=vf File=/sys/vf[1-60000]"),
    ],
)
def test_line_with_ranges_that_cannot_be_read_is_an_error(nodes: str, gres: str) -> None:
    with pytest.raises(RequestError, match="NodeName="):
        find_differences(build_nodes(example(), "h08"), "h08", nodes, gres)


def test_other_cores_of_the_same_number_are_a_difference() -> None:
    """Slurm would see no difference, and guests would get other cores."""
    moved = host(core("0,4"), core("1,5"), core("2,6"), core("3,7", use="housekeeping"))
    (difference,) = find_differences(build_nodes(moved, "a"), "a", *files(example()))
    assert "Feature=" in difference


def test_features_of_the_operator_and_further_networks_are_no_difference() -> None:
    nodes = build_nodes(example(), "a")
    lines = build_node_lines(nodes, Address("a", "a"), ["red", "blue"])
    assert ",network-blue,network-red State" in lines
    gres = build_gres_lines(nodes)
    assert find_differences(nodes, "a", lines.replace("sriov,", "sriov,rack-1,"), gres, ["red", "blue", "green"]) == ()


def test_features_that_the_operator_adds_are_in_the_lines() -> None:
    nodes = build_nodes(example(), "a")
    lines = build_node_lines(nodes, Address("a", "a"), ["red"], ["rack-1", "ssd", "rack-1"])
    assert ",network-red,rack-1,ssd State" in lines
    assert find_differences(nodes, "a", lines, build_gres_lines(nodes), ["red"]) == ()


@pytest.mark.parametrize(
    "name", ["sriov", "edge", "emulated-disk", "pages-2M", "cores-1", "network-red", "", "a b", "a,b", "ä", "-"]
)
def test_feature_that_the_operator_cannot_add_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="feature"):
        build_node_lines(build_nodes(example(), "a"), Address("a", "a"), features=[name])


def test_each_slot_is_on_one_node_of_a_host() -> None:
    """Slurm counts per node: on two nodes, two guests of a group could run on the host."""
    cores = [core(str(number), node=number) for number in range(3)]
    pfs = [{**PF, "address": f"0000:4{node}:00.0", "node": node, "vfs": [vf(0)]} for node in range(3)]
    nodes = build_nodes(host(*cores, pfs=pfs), "a")
    assert len(nodes) == 3
    assert sorted(slot for node in nodes for slot in node.slots) == list(range(SLOTS))


@pytest.mark.parametrize("program", ["nohype", "/usr/bin/no hype", "/bin/x;reboot", "/bin/$x"])
def test_program_with_special_characters_is_refused(program: str) -> None:
    with pytest.raises(RequestError, match="absolute path"):
        build_step("prolog", program, "a", "2M")


def test_host_name_that_a_node_could_have_is_refused() -> None:
    assert [find_host(name) for name in ("a-n0", "a-n12", "a", "an1", "rack-n1-a")] == ["a", "a", "a", "an1", "rack-n1-a"]
    for name in ("a", "an1", "rack-n1-a", "a-n"):
        assert check_host_name(name) == name
    with pytest.raises(RequestError, match="host name 'rack-n1' ends like the name of a NUMA node"):
        check_host_name("rack-n1")
    with pytest.raises(RequestError, match="'A' is not a host name for Slurm"):
        check_host_name("A")
