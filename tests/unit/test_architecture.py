"""The order of the code, held by machine: imports go one way, and each outside thing has one owner (docs/architecture.md)."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import click
import pytest

from orchestrator.cli.main import LOCAL_COMMANDS, nohype

PACKAGE = Path(__file__).parents[2] / "orchestrator"

# From the bottom up. A module may import from rows above its own in this list, never from rows below; within a row only siblings
# of one package may see each other.
ORDER = [
    ("errors",),
    ("values",),
    ("canonical", "locks", "partial_import", "serving_cpu", "waiting"),
    ("client",),
    ("web",),
    ("evidence",),
    ("model",),
    ("config_values",),
    ("config_network",),
    ("config",),
    ("host.root", "host.run"),
    ("host", "hypervisor", "ssh", "console"),
    ("planning", "images", "switches", "fleet"),
    ("ledger",),
    ("resources",),
    ("domain",),
    ("audit", "doctor", "guests", "metrics"),
    ("api", "lab"),
    ("daemon",),
    ("cli",),
]

OWNERS = {
    "subprocess": {"host.run"},
    "libvirt": {"hypervisor.connection", "hypervisor.counters", "hypervisor.events"},
    "libvirt_qemu": {"hypervisor.events", "hypervisor.guests"},
    "pyroute2": {"host.netlink.sockets"},
    "paramiko": {"ssh.login", "ssh.session", "ssh.shell", "ssh.server", "ssh.transfer", "ssh.transport"},
    "prometheus_client": {"metrics.collect"},
    "sqlite3": {
        "ledger.chain",
        "ledger.chain_check",
        "ledger.claims",
        "ledger.database",
        "ledger.events",
        "ledger.loading",
        "ledger.retention",
        "ledger.schema",
        "ledger.unfinished",
    },
}


@cache
def modules() -> Mapping[str, Path]:
    """All modules by their name within the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("__init__", ""):
            found[name] = path
    return found


@cache
def imports(path: Path) -> frozenset[str]:
    """Everything a module imports, at whatever depth, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def rank(module: str) -> tuple[int, str]:
    """Row of a module, and the name that put it there; the most specific name wins."""
    rows = [(len(name), row, name) for row, names in enumerate(ORDER) for name in names if f"{module}.".startswith(f"{name}.")]
    assert rows, f"{module} has no place in ORDER"
    _, row, name = max(rows)
    return row, name


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module: str) -> None:
    row, name = rank(module)
    wrong = []
    for imported in imports(modules()[module]):
        inner = imported.removeprefix("orchestrator.")
        if inner != imported and inner in modules():
            other_row, other_name = rank(inner)
            if other_row > row or (other_row == row and other_name != name):
                wrong.append(inner)
    assert not wrong, f"{module} imports {wrong} from its own level or above"


@pytest.mark.parametrize("module", modules())
def test_outside_things_have_one_owner(module: str) -> None:
    foreign = [
        imported
        for imported in imports(modules()[module])
        if imported.split(".")[0] in OWNERS and module not in OWNERS[imported.split(".")[0]]
    ]
    assert not foreign, f"{module} is not the owner of {foreign}"


REMOTE_COMMANDS = {"cli.main"} | {
    f"cli.{name}" for name in set(nohype.list_commands(click.Context(nohype))) - set(LOCAL_COMMANDS)
}


def reach(*start: str) -> set[str]:
    """Modules that these import, directly or through others; themselves included."""
    known = set(start)
    while more := {
        inner
        for module in known
        for imported in imports(modules()[module])
        if (inner := imported.removeprefix("orchestrator.")) in modules() and inner not in known
    }:
        known |= more
    return known


def above_the_model(found: set[str]) -> set[str]:
    """Those between `model` and `cli`: they read or change the host, or load what a client does not need."""
    return {module for module in found if ORDER.index(("model",)) < rank(module)[0] < ORDER.index(("cli",))}


def test_commands_that_contact_a_manager_cannot_reach_the_host() -> None:
    """They only talk to the manager; nothing that reads or changes the host is even imported."""
    assert not above_the_model(reach(*REMOTE_COMMANDS))


def test_ssh_to_guests_reaches_nothing_of_the_host_but_ssh() -> None:
    """The command is loaded by name when it is used, so that the others need no paramiko."""
    assert above_the_model(reach("cli.ssh_session")) == {f"ssh.{name}" for name in ("login", "session", "transfer", "transport")}


def test_fleet_reaches_nothing_of_the_host_but_programs() -> None:
    """Its modules are loaded by name when they are used; they run Slurm's commands, and take all else from the manager."""
    found = above_the_model(reach(*(module for module in modules() if module.startswith("fleet."))))
    assert {module for module in found if not module.startswith("fleet")} == {"host.pci", "host.root", "host.run"}


def test_local_commands_reach_the_host() -> None:
    """So that the test above can fail."""
    assert {"host.run", "host.root", "config"} <= above_the_model(reach("cli.config", "cli.lab"))


def test_commands_that_contact_a_manager_need_only_click() -> None:
    """They, and the client, can be installed without the extra `host`."""
    names = {imported.split(".")[0] for module in reach(*REMOTE_COMMANDS) for imported in imports(modules()[module])}
    assert names - sys.stdlib_module_names == {"orchestrator", "click"}
    assert declared() == {"click"}


def test_client_needs_only_the_standard_library() -> None:
    parts = ("errors", "values", "client")
    wrong = [
        f"{module}: {imported}"
        for module, path in modules().items()
        if module.partition(".")[0] in parts
        for imported in imports(path)
        if imported != "orchestrator"
        and imported.split(".")[0] not in sys.stdlib_module_names
        and not any(f"{imported}.".startswith(f"orchestrator.{part}.") for part in parts)
    ]
    assert not wrong


def test_the_audit_shares_no_code_with_what_it_judges() -> None:
    audit = {module for module in modules() if module.partition(".")[0] == "audit"}
    assert "audit.catalogue" in audit
    judged = {"planning", "ledger", "resources", "domain", "guests"}
    assert judged <= {module.partition(".")[0] for module in modules()}
    assert not {module for module in reach(*audit) if module.partition(".")[0] in judged}


def declared(*extras: str) -> set[str]:
    """Distributions that setup.cfg declares, by their normalized names."""
    parser = configparser.ConfigParser()
    parser.read(PACKAGE.parent / "setup.cfg")
    lists = [parser["options"]["install_requires"], *(parser["options.extras_require"][extra] for extra in extras)]
    return {normalize(re.split(r"[<>=!~ ;\[]", line)[0]) for text in lists for line in text.split("\n") if line}


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("orchestrator", ("host", "lab")),
        ("tests", ("host", "lab", "test")),
        ("benchmarks", ("host", "lab", "test", "bench")),
        ("release", ("host", "lab", "test")),
    ],
)
def test_every_imported_package_is_declared(folder: str, extras: tuple[str, ...]) -> None:
    """What comes along with another package today may not do so tomorrow."""
    ours = {"orchestrator", "release", "tests", *(path.stem for path in (PACKAGE.parent / "benchmarks").glob("*.py"))}
    known, missing = packages_distributions(), []
    for path in sorted((PACKAGE.parent / folder).rglob("*.py")):
        given = {"pytest"} if path.name == "pytest_plugin.py" else set()  # pytest loads it
        for name in {imported.split(".")[0] for imported in imports(path)} - sys.stdlib_module_names - ours - given:
            if not {normalize(one) for one in known.get(name, [name])} & declared(*extras):
                missing.append(f"{path.name}: {name}")
    assert not missing


def test_modules_are_small() -> None:
    assert {name: lines for name, path in modules().items() if (lines := len(path.read_text().splitlines())) > 350} == {}


def kernel_paths(code: str) -> list[str]:
    """Strings and parts of f-strings that begin like a path below /sys or /proc. Text with blanks (a hint) is not a path."""
    return [
        node.value
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.removeprefix("/").startswith(("sys/", "proc/"))
        and not re.search(r"\s", node.value)
    ]


@pytest.mark.parametrize("module", [name for name in modules() if not f"{name}.".startswith("host.")])
def test_only_host_names_files_of_the_kernel(module: str) -> None:
    assert not kernel_paths(modules()[module].read_text())


def test_host_names_kernel_files_by_relative_paths() -> None:
    """An absolute path would escape from a HostRoot that is not the root folder."""
    code = {name: path.read_text() for name, path in modules().items() if f"{name}.".startswith("host.")}
    assert not {name: found for name, text in code.items() if (found := [p for p in kernel_paths(text) if p[0] == "/"])}


@pytest.mark.parametrize(
    "code",
    [
        'host.read("sys/kernel/mm/ksm/run")',
        'KSM = "/sys/kernel/mm/ksm/run"',
        'name = f"proc/{pid}/stat"',
        'name = f"{root}/proc/{pid}/stat"',
        'open(file="/proc/stat")',
    ],
)
def test_a_kernel_path_is_found(code: str) -> None:
    assert kernel_paths(code)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def find_private_uses(code: str) -> list[str]:
    """Uses of private names of the product or of another test file. Names of other libraries' modules are their own matter."""
    tree = ast.parse(code)
    ours, foreign, own = ("orchestrator", "tests"), set(), {"self", "cls"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ours:
            found += [alias.name for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            foreign |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            # A method may use what other objects of its class have, such as `other._folder`.
            own |= {argument.arg for one in ast.walk(node) if isinstance(one, ast.arguments) for argument in one.args}
    inside = {name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for name in own_attributes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            base = ast.unparse(node.value)
            if base not in foreign | {"self", "cls", "super()"} and not (base in own and node.attr in inside):
                found.append(f"{base}.{node.attr}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("setattr", "delattr", "getattr"):
            words = [argument.value for argument in node.args[:2] if isinstance(argument, ast.Constant)]
            found += [word for word in words if isinstance(word, str) and is_private(word.rpartition(".")[2])]
    return found


def own_attributes(tree: ast.ClassDef) -> set[str]:
    """What a class defines, or sets on itself."""
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    return defined | {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_tests_use_the_public_interface(folder: str) -> None:
    files = sorted((PACKAGE.parent / folder).rglob("*.py"))
    assert not {path.name: found for path in files if (found := find_private_uses(path.read_text()))}


@pytest.mark.parametrize(
    "code",
    [
        "from orchestrator.ledger.store import _now",
        "from tests.fakes.root import _store",
        "from orchestrator import ledger\nledger._now()",
        "ledger = Ledger(path)\nassert ledger._database",
        "def test() -> None:\n    assert open_ledger()._rows == []",
        "monkeypatch.setattr(guard, '_HELD', 0.3)",
        "monkeypatch.setattr('orchestrator.api.guard._HELD', 0.3)",
        "getattr(guard, '_HELD')",
        "class Fake:\n    def f(self, guard: Guard) -> None:\n        guard._turns = 1",
    ],
)
def test_use_of_a_private_name_is_found(code: str) -> None:
    assert find_private_uses(code)


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(1)",
        "from lxml import etree\ndef build() -> etree._Element: ...",
        "class Fake:\n    def __eq__(self, other):\n        self._folder = 1\n        return other._folder == self._folder",
        "print(guard.__class__.__name__)",
    ],
)
def test_use_of_an_own_or_foreign_private_name_is_allowed(code: str) -> None:
    assert not find_private_uses(code)


def texts() -> list[Path]:
    """Files with messages and documents that name commands."""
    root = PACKAGE.parent
    return [*PACKAGE.rglob("*.py"), *root.glob("*.md"), *(root / "docs").glob("*.md"), *(root / "ansible").rglob("*.md")]


def is_command(words: list[str]) -> bool:
    """Whether `nohype` has such a command; what follows a command that is no group are its arguments."""
    command: click.Command | None = nohype
    for word in words:
        if not isinstance(command, click.Group):
            break
        command = command.get_command(click.Context(command), word)
    return command is not None


STATE_WRITERS = ("set_state", "quarantine", "release")


def find_state_writes(source: str) -> list[int]:
    """Lines that call one of the ledger's methods that write a guest's state."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr in STATE_WRITERS and re.search(r"\b_?ledger$", ast.unparse(node.value))
    ]


def test_only_transitions_writes_the_state_of_a_guest() -> None:
    found = {name: lines for name, path in modules().items() if (lines := find_state_writes(path.read_text()))}
    assert list(found) == ["guests.transitions"]


@pytest.mark.parametrize("ledger", ["ledger", "self._ledger", "context.ledger", "self._context.ledger"])
@pytest.mark.parametrize("method", STATE_WRITERS)
def test_a_state_that_is_written_elsewhere_is_found(ledger: str, method: str) -> None:
    assert find_state_writes(f"x = 1\nwrite = {ledger}.{method}") == [2]
    assert not find_state_writes(f"setup.{method}()")


def test_every_command_in_a_message_or_document_exists() -> None:
    named = re.compile(r"`(?:\S*/)?nohype ((?:[a-z][a-z-]*)(?: [a-z][a-z-]*)*)")
    wrong = [
        f"{path.name}: {found[0]}"
        for path in texts()
        for found in named.finditer(path.read_text())
        if not is_command(found[1].split())
    ]
    assert not wrong
    assert not is_command(["list"])
    assert is_command(["guest", "create", "web"])


def test_every_file_named_in_a_document_exists() -> None:
    """Paths below the top-level folders in backticks, such as `tests/unit/test_values.py`."""
    root = PACKAGE.parent
    named = re.compile(r"`((?:tests|benchmarks|orchestrator|ansible|docs|guest-images)/[\w./*-]+)`")
    documents = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("*/README.md")]
    missing = [
        f"{path.name}: {found[1]}"
        for path in documents
        for found in named.finditer(path.read_text())
        if not any(root.glob(found[1]))
    ]
    assert not missing


def test_every_test_named_in_a_document_exists() -> None:
    root = PACKAGE.parent
    functions = {name for path in (root / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    named = {(path.name, name) for path in root.glob("docs/*.md") for name in re.findall(r"`(test_\w+)`", path.read_text())}
    assert named
    assert not {(document, name) for document, name in named if name not in functions}


def test_the_document_has_the_same_levels() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`[^|]*`) \|", text[text.index("## Levels") :], re.MULTILINE)
    assert [tuple(re.findall(r"`([^`]+)`", row)) for row in rows] == ORDER
