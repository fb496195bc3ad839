"""Lab specs: the shipped ones, and refusals that name the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import RequestError
from orchestrator.lab.spec import SHIPPED, LabSpec, load_spec, parse_lab_name, parse_spec, shipped_specs

GOOD = """
sockets = 2
cores = 2
threads = 2
nodes = 2
memory = "6G"
hugepages_per_node = 256
"""


def parse(text: str) -> LabSpec:
    return parse_spec(text, name="mine", source="mine.toml")


def test_shipped_specs_match_the_documentation() -> None:
    assert shipped_specs() == ("numa", "plain", "small")
    numa, small = load_spec("numa"), load_spec("small")
    assert (numa.sockets, numa.cores, numa.threads, numa.nodes, numa.cpus) == (2, 2, 2, 2, 8)
    assert (small.sockets, small.nodes, small.threads, small.cpus) == (1, 1, 1, 4)


def test_housekeeping_is_the_first_physical_core() -> None:
    spec = parse(GOOD)
    assert (str(spec.housekeeping), str(spec.guest_cpus)) == ("0-1", "2-7")
    assert [str(spec.node_cpus(node)) for node in range(2)] == ["0-3", "4-7"]
    assert str(spec.node_memory) == "3G"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("cores = 2", "cores = 0"),
        ("threads = 2", "threads = 3"),
        ("sockets = 2", 'sockets = "2"'),
        ("sockets = 2", "sockets = true"),
        ('memory = "6G"', 'memory = "lots"'),
        ('memory = "6G"', ""),
        ("hugepages_per_node = 256", "hugepages_per_node = 256\nvfs = 8"),
        ("hugepages_per_node = 256", 'hugepages_per_node = 256\ndisks = ["0G"]'),
        ("hugepages_per_node = 256", "hugepages_per_node = 256\ncolour = 1"),
        ("hugepages_per_node = 256", "hugepages_per_node = 1200"),
        ("hugepages_per_node = 256", "hugepages_per_node = 256\ngigantic_pages = 5"),
        ("nodes = 2", "nodes = 3"),
        ('memory = "6G"', 'memory = "6145M"'),
        ("cores = 2", "cores = 1\n# one core in all"),
    ],
)
def test_invalid_field_is_named(change: str, complaint: str) -> None:
    text = GOOD.replace(change, complaint)
    if "one core in all" in complaint:
        text = text.replace("sockets = 2", "sockets = 1").replace("nodes = 2", "nodes = 1")
    field = (complaint or change).replace("hugepages_per_node = 256\n", "").split(" ")[0]
    with pytest.raises(RequestError, match=rf"invalid lab spec mine.toml: .*{field}"):
        parse(text)


def test_invalid_toml_is_refused() -> None:
    with pytest.raises(RequestError, match=r"mine.toml is not valid TOML: .*line 1"):
        parse("sockets: 2")


def test_unknown_spec_is_refused_with_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no lab spec named 'huge'\n  hint: use a shipped spec \(numa, plain, small\)"):
        load_spec("huge")
    with pytest.raises(RequestError, match="no lab spec named"):
        load_spec(str(tmp_path / "none.toml"))


def test_spec_file_is_named_after_itself(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((SHIPPED / "small.toml").read_text())
    assert load_spec(str(path)).name == "mine"


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a/b", "..", "a b", "x" * 25, "ä", "a\n"])
def test_invalid_lab_name_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="is not a lab name"):
        parse_lab_name(name)
