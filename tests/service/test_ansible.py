"""The playbooks as Ansible reads them. The host role is applied for real by the lab's build, and again by its tests."""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from pydantic import BaseModel

from orchestrator.api.server import SOCKET_GROUP
from orchestrator.cli.main import nohype
from orchestrator.config import DaemonConfig, TenantConfig, TokenConfig, UplinkConfig, read_config
from orchestrator.doctor.catalogue import CHECKS
from orchestrator.doctor.check import run_checks
from orchestrator.doctor.facts import Facts
from orchestrator.doctor.report import build_json
from orchestrator.errors import OrchestratorError
from orchestrator.host.run import Completed, run
from orchestrator.images.cache import cache_folder
from orchestrator.images.install import install_image
from orchestrator.images.wheels import source_tree
from orchestrator.lab.ansible import build_environment, find_ansible
from orchestrator.lab.build import build_switch_tools
from orchestrator.model.exit_policy import ExitBudgets
from orchestrator.switches import relay_table
from orchestrator.switches.commands import LocalCommands
from orchestrator.values import CpuSet
from tests.fakes.root import load_host
from tests.harness.api_server import Authority
from tests.harness.images import list_store, make_build
from tests.harness.openvswitch import BRIDGE, running

ANSIBLE = source_tree() / "ansible"
ROLE = ANSIBLE / "roles/nohype_host"
HASH = "sha256:" + "0123456789abcdef" * 4
OTHER_HASH = "sha256:" + "fedcba9876543210" * 4

NEEDED: dict[str, Any] = {
    "nohype_housekeeping_cpus": "0-1", "nohype_guest_cpus": "2-3", "nohype_hugepages": [16],
    "nohype_uplinks": [{"name": "nic0"}, {"name": "nic1"}],
}  # fmt: skip
EVERYTHING: dict[str, Any] = {
    **NEEDED,
    "nohype_uplinks": [
        {"name": "nic0", "edge": "vepa", "vlans": "100-199", "switch": "sw1", "port": "swp1"},
        {"name": "nic1.100", "match": {}, "edge": "auto"},
    ],
    "nohype_vfs_per_uplink": 4,
    "nohype_reserved_pages": {"1G": 1, "2M": 512},
    "nohype_paths": {
        "images": "/srv/images",
        "ledger": "/srv/ledger/ledger.sqlite",
        "consoles": "/srv/consoles",
        "socket": "/run/x.sock",
    },
    "nohype_disks": {"serials": ["S5GX 1"], "emulated": "/srv/disks"},
    "nohype_accept": ["emulated-disk"],
    "nohype_switches": {"ssh_key": "/srv/switch_key"},
    "nohype_exits": {
        "total": 100,
        "emulated": 2.5,
        "policy": {
            "action": "kill",
            "boot_seconds": 300,
            "application": {"io": "0/s", "PF excp": "any"},
            "housekeeping": {"interrupt window": {"second": 7, "minute": 70}},
        },
    },
    "nohype_events": {"keep": 5000},
    "nohype_audit": {"key": "/srv/audit.key"},
    "nohype_access": {
        "operators": {"users": ["root"], "groups": ["daemon"], "certificates": ['CN:Ädmin "A" \\ 1']},
        "viewers": {"users": ["daemon"], "groups": [], "certificates": ["DNS:monitor.example"]},
    },
    "nohype_tenants": {
        "acme": {
            "cores": 16,
            "memory": "64G",
            "vfs": 8,
            "disks": 4,
            "networks": 3,
            "users": ["1234"],
            "groups": ["4321"],
            "certificates": ["alice"],
            "boot_servers": ["http://192.0.2.80/acme/"],
            "exit_policy": {
                "action": "pause",
                "boot_seconds": 60,
                "application": {"all": "60/min"},
                "housekeeping": {"all": {"minute": 5}},
            },
        },
        "bolt": None,
    },
    "nohype_tokens": {"ci": {"hash": HASH, "role": "tenant", "tenant": "acme"}, "look": {"hash": OTHER_HASH, "role": "viewer"}},
    "nohype_api": {
        "listen": "[::]:8443",
        "certificate": "/srv/c.pem",
        "key": "/srv/k.pem",
        "client_ca": "/srv/ca.pem",
        "page": True,
    },
    "nohype_boot": {"servers": ["https://boot.example/"], "max_size": "64M", "timeout": 30},
    "nohype_limits": {"rate": 5, "burst": 6, "concurrent": 7, "body": "8K", "nesting": 9},
}
"""Every variable that stands in the manager's configuration, none as it would be anyway."""


def play(
    folder: Path, tasks: list[dict[str, Any]], variables: Mapping[str, Any], path: str = "", *, check: bool = True, **more: Any
) -> Completed:
    """Runs tasks on this machine with the role's defaults; ``path``: folders of programs before those of the system."""
    whole = {"hosts": "localhost", "gather_facts": False, "vars_files": [str(ROLE / "defaults/main.yml")], "tasks": tasks, **more}
    (folder / "play.yml").write_text(json.dumps([whole]))
    env = {**build_environment(ANSIBLE, folder / "home"), "PATH": ":".join(filter(None, (path, os.environ["PATH"])))}
    argv = [find_ansible(), "--connection=local", "--inventory=localhost,", f"--extra-vars={json.dumps(variables)}"]
    return run([*argv, folder / "play.yml"], env=env, timeout=240, check=check)


def render(folder: Path, name: str, variables: Mapping[str, Any]) -> str:
    """A template of the host role, with its defaults; written to the folder under its name."""
    (text,) = render_each(folder, (name, variables))
    (folder / name).write_text(text)
    return text


def render_each(folder: Path, *wanted: tuple[str, Mapping[str, Any]]) -> list[str]:
    """Several templates, each with its own variables, by one start of Ansible, which takes longer than all of them."""
    files = [folder / f"rendered-{number}" for number in range(len(wanted))]
    tasks = [
        {
            "ansible.builtin.template": {"src": str(ROLE / f"templates/{name}.j2"), "dest": str(file), "force": True},
            "vars": dict(variables),
        }
        for file, (name, variables) in zip(files, wanted, strict=True)
    ]
    play(folder, tasks, {})
    return [file.read_text() for file in files]


PLAYBOOKS = sorted(str(path.relative_to(ANSIBLE)) for folder in (ANSIBLE, ANSIBLE / "playbooks") for path in folder.glob("*.yml"))


@pytest.mark.parametrize("playbook", [name for name in PLAYBOOKS if not name.startswith("inventory")])
def test_syntax(playbook: str, tmp_path: Path) -> None:
    argv = [find_ansible(), "--syntax-check", "--inventory=localhost,", ANSIBLE / playbook]
    run(argv, env=build_environment(ANSIBLE, tmp_path))


@pytest.mark.parametrize("role", sorted(path.name for path in (ANSIBLE / "roles").iterdir()))
def test_argument_specs_name_the_variables_of_the_defaults(role: str) -> None:
    specs = yaml.safe_load((ANSIBLE / "roles" / role / "meta/argument_specs.yml").read_text())["argument_specs"]
    assert set(specs["main"]["options"]) == set(yaml.safe_load((ANSIBLE / "roles" / role / "defaults/main.yml").read_text()))


def test_the_inventory_example_has_known_variables() -> None:
    group = yaml.safe_load((ANSIBLE / "inventory.example.yml").read_text())["nohype_hosts"]
    known = {*yaml.safe_load((ROLE / "defaults/main.yml").read_text()), "ansible_user"}
    for variables in (group["vars"], *group["hosts"].values()):
        assert set(variables) <= known


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "Set nohype_housekeeping_cpus"),
    ({"nohype_tokens": {"ci": {"hash": "nohype_secret", "role": "viewer"}}}, "nohype_tokens: hash must be `sha256:`"),
    ({"nohype_tokens": {"ci": {"hash": HASH + "0", "role": "viewer"}}}, "nohype_tokens: hash must be `sha256:`"),
    ({"nohype_api": {"client_ca": "/srv/ca.pem"}}, "nohype_api: `listen` is required"),
    ({"nohype_tls_folder": "/none"}, "nohype_tls_folder: certificate.pem or key.pem is missing"),
    ({"nohype_paths": {"ledger": "ledger.sqlite"}}, "nohype_paths: paths must be absolute"),
    ({"nohype_paths": {"ledger": "/srv/a b"}}, "nohype_paths: paths must be absolute"),
    ({"nohype_housekeeping_cpus": 0}, 'nohype_housekeeping_cpus must be a string in quotes, such as "0-1,32-33", but is'),
    ({"nohype_guest_cpus": 12}, "nohype_guest_cpus must be a string in quotes"),
    ({"nohype_guest_cpus": [2, 3]}, "nohype_guest_cpus must be a string in quotes"),
    ({"nohype_hugepages": 512}, "nohype_hugepages must be a list with one number per NUMA node, such as [16384, 16384]"),
    ({"nohype_hugepages": "512"}, "nohype_hugepages must be a list"),
    ({"nohype_hugepages": {"0": 512}}, "'nohype_hugepages' is of type dict and we were unable to convert to list"),
    ({"nohype_hugepages": [512, "many"]}, "nohype_hugepages must have one whole number per NUMA node"),
    ({"nohype_uplinks": "nic0"}, "nohype_uplinks must be a list"),
    ({"nohype_iomem_relaxed": "false"}, "nohype_iomem_relaxed must be true or false, without quotes"),
    ({"nohype_vfs_per_uplink": "all"}, "'nohype_vfs_per_uplink' is of type str and we were unable to convert to int"),
    ({"nohype_reserved_pages": 512}, "'nohype_reserved_pages' is of type int and we were unable to convert to dict"),
    ({"nohype_tokens": "nohype_secret"}, "'nohype_tokens' is of type str and we were unable to convert to dict"),
    ({"nohype_hugepage_size": "4M"}, "value of nohype_hugepage_size must be one of: 2M, 1G, got: 4M"),
    ({"nohype_guest_cpus": "2:3"}, "nohype_guest_cpus is not a CPU list in the kernel's format, such as 0-1,32-33: 2:3"),
    ({"nohype_guest_cpus": "2-3, 5"}, "nohype_guest_cpus is not a CPU list"),
    ({"nohype_guest_cpus": "2-3,7-5"}, "nohype_guest_cpus is not a CPU list"),
    ({"nohype_housekeeping_cpus": "0-1,99999"}, "nohype_housekeeping_cpus is not a CPU list"),
    ({"nohype_housekeeping_cpus": "0-1,7", "nohype_guest_cpus": "2-8,1"}, "CPUs 1,7 are in nohype_housekeeping_cpus"),
    ({"nohype_guest_cpus": ",".join(map(str, range(2, 1024, 2)))}, "x86 keeps 2047, of which 256 are reserved"),
    ({"nohype_extra_cmdline": "x" * 1800}, "x86 keeps 2047, of which 256 are reserved"),
]  # fmt: skip


@pytest.mark.timeout(600)
def test_role_refuses_to_guess(tmp_path: Path) -> None:
    """Before it changes anything, and without showing a secret. A host for each case: one start of Ansible instead of many."""
    given = [{**NEEDED, "nohype_offline": True, **variables} if variables else {} for variables, _ in REFUSED]
    hosts = {f"case{number}": {"ansible_connection": "local", **host} for number, host in enumerate(given)}
    (tmp_path / "inventory.json").write_text(json.dumps({"all": {"hosts": hosts}}))
    argv = [find_ansible(), f"--inventory={tmp_path}/inventory.json", ANSIBLE / "playbooks/lab.yml"]
    done = run(argv, env=build_environment(ANSIBLE, tmp_path), timeout=500, check=False)
    assert done.status
    assert "secret" not in done.stdout
    # Ansible shows values as JSON.
    lines = done.stdout.replace('\\"', '"').splitlines()
    for number, (_, said) in enumerate(REFUSED):
        failures = [line for line in lines if re.match(rf"(fatal|failed): \[case{number}\]", line)]
        assert said in "\n".join(failures), f"case {number}"
        assert [line for line in lines if re.match(rf"case{number} .* changed=0 ", line)], f"case {number}"


def test_guest_images_are_installed_into_the_store_and_only_when_they_change(tmp_path: Path) -> None:
    """From a store of the controlling machine, where a name is a link; into a store that an earlier role copied to."""
    built, store, copies = tmp_path / "build/images", tmp_path / "store", tmp_path / "copies"
    install_image(make_build(tmp_path / "one", "new"), built, "minimal")
    make_build(store / "minimal", "old")
    text = (ROLE / "tasks/manager.yml").read_text().replace("/usr/share/nohype/images", str(copies))
    program = Path(sys.executable).with_name("nohype")
    tasks = [
        task for task in yaml.safe_load(text.replace("/opt/nohype/bin/nohype", str(program))) if "guest images" in task["name"]
    ]
    assert [task.pop("tags", None) for task in tasks] == [None, None, None, "nohype_install"]
    variables = {
        "nohype_guest_images": [str(built / "minimal")],
        "nohype_paths": {"images": str(store)},
        "nohype_manager": {"stat": {"exists": True}},
        "role_path": str(ROLE),
    }
    done = play(tmp_path, tasks[1:], variables)
    assert list_store(store) == {"minimal": "new", ".builds": "1"}, done.stdout
    assert "changed=3" in done.stdout
    assert "changed=0" in play(tmp_path, tasks[1:], variables).stdout
    install_image(make_build(tmp_path / "two", "newer"), built, "minimal")
    assert "changed=2" in play(tmp_path, tasks[1:], variables).stdout
    assert list_store(store) == {"minimal": "newer", ".builds": "1"}


TASKS = yaml.safe_load((ROLE / "tasks/variables.yml").read_text())


def check_server(folder: Path, possible: str, nodes: str | None, variables: Mapping[str, Any]) -> str:
    """What the role says of a server with these CPUs and nodes, as sysfs tells them; nothing if the variables fit."""
    tasks = [task for task in TASKS if "server" in task["name"]]
    assert len(tasks) == 4
    for task, name, text in ((tasks[0], "possible", possible), (tasks[2], "nodes", nodes)):
        task = task["ansible.builtin.slurp"]
        task["src"] = str(folder / name)
        if text is not None:
            (folder / name).write_text(text + "\n")
    done = play(folder, tasks, variables, check=False)
    return done.stdout.replace('\\"', '"') if done.status else ""


@pytest.mark.parametrize(
    ("possible", "nodes", "variables", "said"),
    [
        ("0-3", "0", {}, ""),
        ("0-3", None, {}, ""),
        ("0-127", "0-1", {"nohype_guest_cpus": "2-127", "nohype_hugepages": [16, 16]}, ""),
        ("0-2", "0", {}, "CPUs 3 of nohype_housekeeping_cpus and nohype_guest_cpus do not exist: the server has CPUs 0-2"),
        ("2-3", "0", {}, "CPUs 0,1 of nohype_housekeeping_cpus"),
        ("0-3", "0", {"nohype_hugepages": [16, 16]}, "nohype_hugepages has 2 numbers; the server has 1 NUMA nodes"),
    ],
)  # fmt: skip
def test_the_variables_are_compared_with_the_server(
    tmp_path: Path, possible: str, nodes: str | None, variables: dict[str, Any], said: str
) -> None:
    found = check_server(tmp_path, possible, nodes, {**NEEDED, "nohype_offline": False, **variables})
    assert said in found
    assert bool(said) == bool(found)


CPU_LISTS = [
    ("0-3,8", "0-3,8"), ("3,2,1,0", "0-3"), ("0-4,2-6,6", "0-6"), ("7", "7"), ("0,64,1,65,2,66", "0-2,64-66"),
    (",".join(str(cpu) for cpu in range(512) if cpu % 128), "1-127,129-255,257-383,385-511"),
]  # fmt: skip


def test_lists_of_cpus_are_written_as_ranges(tmp_path: Path) -> None:
    fixed = {**NEEDED, "nohype_housekeeping_cpus": "1000,1001"}
    lines = render_each(tmp_path, *(("kernel.cmdline", {**fixed, "nohype_guest_cpus": given}) for given, _ in CPU_LISTS))
    for line, (given, written) in zip(lines, CPU_LISTS, strict=True):
        words = dict(word.partition("=")[::2] for word in line.split())
        assert line.count("\n") == 1, "it is one line, as the boot loader takes it"
        assert words["isolcpus"] == f"nohz,domain,managed_irq,{written}"
        assert (words["nohz_full"], words["rcu_nocbs"], words["irqaffinity"]) == (written, written, "1000-1001")
        assert CpuSet.parse(written) == CpuSet.parse(given)


def test_the_kernel_command_line_has_the_words_that_doctor_asks_for(tmp_path: Path) -> None:
    """On a server that is not isolated yet, with the same division."""
    fake = load_host(tmp_path / "host", "numa")
    fake.add("proc/cmdline", "quiet")
    cpus = "sys/devices/system/cpu"
    for name in (f"{cpus}/isolated", f"{cpus}/nohz_full", "sys/fs/cgroup/cpuset.cpus.isolated"):
        fake.add(name, "")
    (check,) = (check for check in CHECKS if check.name == "isolation")
    (result,) = run_checks(Facts(fake, CpuSet.parse("0-1")), (check,))
    words = result.finding.remedy.split("`")[1].split()
    assert len(words) == 3
    line = render(tmp_path, "kernel.cmdline", {**NEEDED, "nohype_guest_cpus": "2-7"})
    assert set(words) <= set(line.split())


@pytest.mark.parametrize("built", [True, False])
def test_server_whose_kernel_cannot_stop_the_tick_stops_the_playbook(tmp_path: Path, built: bool) -> None:  # noqa: FBT001
    """By what `nohype doctor` finds on it, before any server is changed. `nohype_ignore_checks` can name the check."""
    fake = load_host(tmp_path / "host", "numa")
    fake.add("sys/devices/system/cpu/isolated", "")
    if built:
        fake.add("sys/devices/system/cpu/nohz_full", "")
    (check,) = (check for check in CHECKS if check.name == "kernel-options")
    report = build_json(run_checks(Facts(fake, CpuSet.parse("0-1")), (check,)))
    (task,) = (
        task
        for task in yaml.safe_load((ROLE / "tasks/precheck.yml").read_text())
        if task["name"] == "Check that the server is fit"
    )
    (tmp_path / "filter_plugins").symlink_to(ROLE / "filter_plugins")
    variables = {**NEEDED, "nohype_examined": {"stdout": json.dumps(report)}, "nohype_tables": {"matched": 1}}
    done = play(tmp_path, [task], variables, check=False)
    assert bool(done.status) is not built, done.stdout
    reason = (
        "kernel-options: the kernel has no nohz_full: each guest CPU has a periodic tick; needed: a kernel with CONFIG_NO_HZ_FULL"
    )
    assert (
        f"{reason}; to do: boot a kernel that is built with CONFIG_NO_HZ_FULL. Nothing was changed" in done.stdout
    ) is not built
    if not built:
        assert play(tmp_path, [task], {**variables, "nohype_ignore_checks": ["kernel-options"]}).status == 0


def test_every_file_has_the_housekeeping_cpus_as_ranges(tmp_path: Path) -> None:
    variables = {**NEEDED, "nohype_housekeeping_cpus": "0,1,2,64", "item": {"weight": 1}}
    names = ("affinity.conf", "slice.conf", "scope.conf", "nohyped.service", "nohype.toml")
    for name, text in zip(names, render_each(tmp_path, *((name, variables) for name in names)), strict=True):
        assert "0-2,64" in text, name
        assert "0,1,2,64" not in text, name
        assert text.startswith("# Written by Ansible"), "nothing else has changed"


def test_fair_servers_that_cannot_be_switched_off_stop_nothing(tmp_path: Path) -> None:
    """As on a kernel that is locked down: a file whose opening for writing the kernel refuses, also to root."""
    tasks = yaml.safe_load((ROLE / "tasks/kernel.yml").read_text())
    (task,) = (task for task in tasks if task.get("ansible.builtin.copy", {}).get("dest") == "/etc/tmpfiles.d/nohype.conf")
    task["ansible.builtin.copy"]["dest"] = file = str(tmp_path / "nohype.conf")
    play(tmp_path, [{**task, "notify": []}], {**NEEDED, "nohype_guest_cpus": "2-3,10"})
    lines = [line for line in Path(file).read_text().splitlines() if "fair_server" in line]
    assert [re.sub(r".*fair_server/(\w+)/.*", r"\1", line) for line in lines] == ["cpu2", "cpu3", "cpu10"]
    closed = [re.sub(r"/sys\S+", "/proc/sys/kernel/ostype", line) for line in lines]
    Path(file).write_text("\n".join((*closed, f"f {tmp_path}/later", "")))
    run(["systemd-tmpfiles", "--create", file])
    assert Path(tmp_path, "later").exists()


def test_with_the_defaults_nothing_is_opened(tmp_path: Path) -> None:
    text = render(tmp_path, "nohype.toml", {**NEEDED, "nohype_vfs_per_uplink": 4})
    assert text == (
        "# Written by Ansible (nohype_host).\n"
        '[host]\nhousekeeping = "0-1"\nuplinks = ["nic0", "nic1"]\npage_size = "2M"\nvfs_per_uplink = 4\n'
    )


def fields(model: type[BaseModel], value: BaseModel, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each field of a configuration, in all its sections: its path, what it is, and what it would be if it were left out."""
    for name, field in model.model_fields.items():
        found = getattr(value, name)
        if isinstance(found, BaseModel):
            yield from fields(type(found), found, f"{path}{name}.")
        else:
            yield f"{path}{name}", found, field.get_default()


def test_every_field_of_the_configuration_can_be_set(tmp_path: Path) -> None:
    render(tmp_path, "nohype.toml", {**EVERYTHING, "nohype_hugepage_size": "1G"})
    found = read_config(tmp_path / "nohype.toml")
    parts = {"": found, "tenants.": found.tenants["acme"], "tokens.": found.tokens["ci"]}
    left_out = {
        name for part, value in parts.items() for name, is_, default in fields(type(value), value, part) if is_ == default
    }  # fmt: skip
    # Nobody is a viewer by a group here; a volume group excludes a folder for emulated disks.
    assert left_out == {"access.viewers.groups", "disks.volume_group"}
    volumes = render(tmp_path, "nohype.toml", {**EVERYTHING, "nohype_disks": {"volume_group": "vg0"}})
    assert DaemonConfig.model_validate(tomllib.loads(volumes)).disks.volume_group == "vg0"
    assert found.access
    assert found.access.operators.certificates == ('CN:Ädmin "A" \\ 1',)
    assert found.exits.policy == ExitBudgets.model_validate(EVERYTHING["nohype_exits"]["policy"])
    assert found.tenants["acme"].exit_policy == ExitBudgets.model_validate(EVERYTHING["nohype_tenants"]["acme"]["exit_policy"])
    assert found.tenants["bolt"] == TenantConfig()
    assert found.tokens["look"] == TokenConfig(hash=OTHER_HASH, role="viewer")  # type: ignore[arg-type]
    assert found.host.reserved_pages == {"1G": 1, "2M": 512}
    assert found.uplinks == {
        "nic0": UplinkConfig(edge="vepa", vlans="100-199", switch="sw1", port="swp1"),
        "nic1.100": UplinkConfig(),
    }


def test_the_files_of_the_port_have_a_usual_place(tmp_path: Path) -> None:
    variables = {**NEEDED, "nohype_api": {"listen": "192.0.2.1:8443"}, "nohype_tokens": EVERYTHING["nohype_tokens"]}
    text = render(tmp_path, "nohype.toml", {**variables, "nohype_tenants": {"acme": {}}})
    api = DaemonConfig.model_validate(tomllib.loads(text)).api
    assert api
    assert (api.certificate, api.key, api.client_ca) == (
        "/etc/nohype/tls/certificate.pem", "/etc/nohype/tls/key.pem", None,
    )  # fmt: skip


def test_what_the_configuration_knows_is_in_the_defaults() -> None:
    """With a comment each; a section or field that is new in `config` must be told of."""
    text = (ROLE / "defaults/main.yml").read_text()
    told = dict.fromkeys(
        ("disks", "switches", "paths", "exits", "audit", "events", "access", "tenants", "tokens", "api", "limits", "boot")
    )
    assert set(DaemonConfig.model_fields) == {"host", "uplinks", *told}
    uplinks = re.search(r"((?:^#.*\n)+)^nohype_uplinks:", text, re.MULTILINE)
    assert uplinks
    assert set(re.findall(r"\w+", uplinks[1])) >= set(UplinkConfig.model_fields)
    for name in told:
        comment = re.search(rf"((?:^#.*\n)+)^nohype_{name}: {{}}$", text, re.MULTILINE)
        assert comment, name
        model: Any = DaemonConfig.model_fields[name].annotation
        for inner in getattr(model, "__args__", (model,)):
            if isinstance(inner, type) and issubclass(inner, BaseModel) and inner.model_fields:
                assert set(re.findall(r"\w+", comment[1])) >= set(inner.model_fields), name
    assert set(yaml.safe_load(text)) >= set(EVERYTHING)
    assert {"nohype_reserved_pages", "nohype_vfs_per_uplink", "nohype_hugepage_size"} <= set(yaml.safe_load(text))


def test_the_manager_checks_what_the_role_writes(tmp_path: Path) -> None:
    """`nohype config check`, as the role calls it."""
    authority = Authority(tmp_path)
    certificate, key = authority.issue("manager")
    api = {"listen": "127.0.0.1:0", "certificate": str(certificate), "key": str(key), "client_ca": str(authority.file)}
    good = {**NEEDED, "nohype_api": api, "nohype_tenants": {"acme": {"users": ["daemon"], "certificates": ["alice"]}}}
    file = tmp_path / "nohype.toml"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"nohype_limits": {"ratte": 5}}, "limits.ratte"),
        ({"nohype_access": {"viewers": {"users": ["nobody-here"]}}}, "user 'nobody-here' does not exist"),
        ({"nohype_api": {**api, "key": str(tmp_path / "none.pem")}}, "none.pem"),
        ({"nohype_tenants": {"acme": {"cores": "many"}}}, "tenants.acme.cores"),
    ]
    changes = [{}, *(change for change, _ in wrong)]
    texts = render_each(tmp_path, *(("nohype.toml", {**good, **change}) for change in changes))
    results = []
    for text in texts:
        file.write_text(text)
        results.append(CliRunner().invoke(nohype, ["config", "check", str(file)]))
    assert (results[0].exit_code, results[0].output) == (0, f"configuration {file} is valid\n")
    for result, (_, said) in zip(results[1:], wrong, strict=True):
        assert result.exit_code
        assert said in str(result.exception)


def test_the_group_of_the_socket_is_the_same_everywhere(tmp_path: Path) -> None:
    tasks = yaml.safe_load((ROLE / "tasks/manager.yml").read_text())
    assert tasks[0]["ansible.builtin.group"] == {"name": SOCKET_GROUP, "system": True}
    unit = render(tmp_path, "nohyped.socket", EVERYTHING)
    assert f"SocketGroup={SOCKET_GROUP}\n" in unit
    assert "SocketMode=0660\n" in unit
    assert "ListenStream=/run/x.sock\n" in unit


def test_the_manager_has_ip_only_for_other_hosts(tmp_path: Path) -> None:
    without, with_api, narrow, boots = render_each(
        tmp_path,
        ("nohyped.service", NEEDED),
        ("nohyped.service", EVERYTHING),
        ("nohyped.service", {**EVERYTHING, "nohype_api_clients": ["192.0.2.0/24", "2001:db8::/32"]}),
        ("nohyped.service", {**NEEDED, "nohype_boot_addresses": ["192.0.2.80", "localhost"]}),
    )
    assert "AF_INET" not in without
    assert "\nIPAddressDeny=any\n" in without
    assert "\nRestrictAddressFamilies=AF_INET AF_INET6\n" in with_api
    assert "IPAddressDeny" not in with_api
    assert "\nSocketBindDeny=any\nSocketBindAllow=tcp:8443\n" in with_api
    assert "SocketBindAllow" not in without
    assert "\nIPAddressDeny=any\nIPAddressAllow=192.0.2.0/24 2001:db8::/32\n" in narrow
    assert "\nRestrictAddressFamilies=AF_INET AF_INET6\nIPAddressDeny=any\nIPAddressAllow=192.0.2.80 localhost\n" in boots
    ssh = render(tmp_path, "nohyped.service", {**NEEDED, "nohype_switch_addresses": ["192.0.2.90"]})
    assert "\nRestrictAddressFamilies=AF_INET AF_INET6\nIPAddressDeny=any\nIPAddressAllow=192.0.2.90\n" in ssh


def test_what_is_kept_elsewhere_can_be_written(tmp_path: Path) -> None:
    elsewhere = ("nohyped.service", EVERYTHING)
    text, without = render_each(tmp_path, elsewhere, ("nohyped.service", {**NEEDED, "nohype_paths": {"images": "/srv/images"}}))
    assert "ReadWritePaths=/srv/ledger /srv/consoles /srv/disks\n" in text
    (paths,) = re.findall(r"^ReadWritePaths=(.*)$", without, re.MULTILINE)
    changed = "/sys/bus/pci /sys/devices /sys/fs/cgroup -/sys/kernel/tracing/instances -/sys/fs/resctrl"
    assert paths == f"{changed} -/sys/devices/virtual/workqueue -/proc/sys/kernel/watchdog_cpumask"


QEMU_CONF = """\
#security_driver = "selinux"
#security_require_confined = 1
# seccomp_sandbox is a filter
#seccomp_sandbox = 1
#user = "x"
"""


@pytest.mark.parametrize(
    ("variables", "driver", "required"),
    [
        ({"nohype_offline": True}, '"apparmor"', 1),
        ({"nohype_offline": True, "nohype_confine_qemu": "leave"}, '[ "apparmor", "none" ]', 0),
        ({"nohype_confine_qemu": "require"}, '"apparmor"', 1),
    ],
)
def test_qemu_is_confined(tmp_path: Path, variables: dict[str, Any], driver: str, required: int) -> None:
    """Each setting is there once, applied again nothing changes, and all else in the package's files stays."""
    for name, content in (("qemu.conf", QEMU_CONF), ("virtlogd.conf", "#max_size = 2097152\nmax_backups = 9\n")):
        (tmp_path / name).write_text(content)
    text = (
        (ROLE / "tasks/confine.yml")
        .read_text()
        .replace("/etc/libvirt", str(tmp_path))
        .replace("/etc/systemd/system", str(tmp_path))
    )
    tasks = yaml.safe_load(text.replace("src: guest.conf.j2", f"src: {ROLE}/templates/guest.conf.j2"))
    handlers = [
        {"name": name, "ansible.builtin.meta": "noop"} for name in ("Restart libvirt", "Reload virtlogd", "Reload systemd")
    ]
    for changed in (True, False):
        done = play(tmp_path, tasks, {**NEEDED, **variables}, handlers=handlers)
        assert ("changed=0" in done.stdout) is not changed
    assert set((tmp_path / "qemu.conf").read_text().splitlines()) == {
        f"security_driver = {driver}", f"security_require_confined = {required}", "security_default_confined = 1",
        "seccomp_sandbox = 1", 'stdio_handler = "logd"', "# seccomp_sandbox is a filter", '#user = "x"',
    }  # fmt: skip
    assert (tmp_path / "virtlogd.conf").read_text() == "max_size = 1048576\nmax_backups = 1\n"
    assert "\nMemoryMax=4G\n" in (tmp_path / "machine-.scope.d/nohype.conf").read_text()


def test_services_come_before_guests(tmp_path: Path) -> None:
    """On the CPUs that both run on, by weights of control groups."""
    wanted = [("slice.conf", {**NEEDED, "item": {"weight": weight}}) for weight in (1000, 100)]
    weights = [text.splitlines()[-1] for text in render_each(tmp_path, *wanted)]
    tasks = (ROLE / "tasks/services.yml").read_text()
    assert "file: system/system.slice.d, weight: 1000" in tasks
    assert "file: system/user.slice.d, weight: 100" in tasks
    assert weights == ["CPUWeight=1000", "CPUWeight=100"]
    assert "CPUWeight=100\n" in (ROLE / "tasks/confine.yml").read_text()


SYSTEMCTL = """#!/bin/sh
echo "$@" >> {log}
case "$1" in show) echo LoadState=loaded; echo ActiveState=active; echo UnitFileState=enabled;; esac
"""


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        (["Restart the manager"], ["restart nohyped.service"]),
        (
            # as notified by a new unit of the socket
            ["Restart the manager", "Reopen the manager's socket", "Reload systemd"],
            ["stop nohyped.service", "restart nohyped.socket", "restart nohyped.service"],
        ),
    ],
)
def test_what_has_changed_is_applied_in_order(tmp_path: Path, told: list[str], wanted: list[str]) -> None:
    """systemd refuses to start a socket whose service runs."""
    log, program = tmp_path / "log", tmp_path / "bin/systemctl"
    program.parent.mkdir()
    program.write_text(SYSTEMCTL.format(log=log))
    program.chmod(0o755)
    task = {"ansible.builtin.command": {"argv": ["true"]}, "notify": told}
    handlers = yaml.safe_load((ROLE / "handlers/main.yml").read_text())
    variables = {**NEEDED, "nohype_manager": {"stat": {"exists": True}}}
    play(tmp_path, [task], variables, str(program.parent), handlers=handlers)
    done = log.read_text().splitlines()
    assert [line for line in done if line.split()[0] in ("stop", "start", "restart")] == wanted
    # Else it would go on with the units as they were.
    assert done[0] == "daemon-reload"


def test_a_host_without_the_manager_has_nothing_to_restart(tmp_path: Path) -> None:
    task = {"ansible.builtin.command": {"argv": ["true"]}, "notify": ["Restart the manager", "Reopen the manager's socket"]}
    handlers = yaml.safe_load((ROLE / "handlers/main.yml").read_text())
    play(tmp_path, [task], {**NEEDED, "nohype_manager": {"stat": {"exists": False}}}, "/none", handlers=handlers)


def test_each_unit_that_changes_is_applied() -> None:
    tasks = yaml.safe_load((ROLE / "tasks/manager.yml").read_text())
    notified = {task["ansible.builtin.template"]["src"]: task["notify"] for task in tasks if "ansible.builtin.template" in task}
    assert "Restart the manager" in notified["nohype.toml.j2"]
    assert {"Reload systemd", "Restart the manager"} == set(notified["nohyped.service.j2"])
    assert {"Reload systemd", "Restart the manager", "Reopen the manager's socket"} == set(notified["nohyped.socket.j2"])
    names = {handler["name"] for handler in yaml.safe_load((ROLE / "handlers/main.yml").read_text())}
    topics = {handler.get("listen") for handler in yaml.safe_load((ROLE / "handlers/main.yml").read_text())}
    for path in (ROLE / "tasks").glob("*.yml"):
        told = re.findall(r"notify: (.*)", path.read_text())
        assert {one.strip() for line in told for one in line.strip("[]").split(",")} <= names | topics


def test_the_key_is_never_shown() -> None:
    tasks = yaml.safe_load((ROLE / "tasks/tls.yml").read_text())
    of_keys = [task for task in tasks if "key.pem" in json.dumps(task)]
    assert len(of_keys) == 1
    assert of_keys[0]["no_log"] is True
    assert of_keys[0]["ansible.builtin.copy"]["mode"] == "0600"


FLEET = ANSIBLE / "roles/nohype_fleet"
FLEET_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"nohype_fleet_name": "Host_1"}, "nohype_fleet_name must have 1 to 59 characters of a-z, 0-9 and inner hyphens: Host_1"),
    ({"nohype_fleet_address": "10.0.0.1/24"}, "nohype_fleet_address is neither a host name nor an address: 10.0.0.1/24"),
    ({"nohype_fleet_port": 80}, "nohype_fleet_port must be between 1024 and 65000: 80"),
    ({"nohype_fleet_id": 0}, "nohype_fleet_id must be between 100 and 59999: 0"),
    ({"nohype_fleet_page_size": "4M"}, "value of nohype_fleet_page_size must be one of: 2M, 1G, got: 4M"),
    ({"nohype_paths": {"socket": "/run/x.sock"}}, "nohype_paths.socket cannot be set on a host of a fleet"),
    ({"nohype_fleet_settings": {"a": 1}}, "unable to convert to list"),
]


def play_fleet(folder: Path, inventory: Mapping[str, Any], *words: str) -> str:
    """The output of fleet.yml, which has refused and changed nothing."""
    (folder / "inventory.json").write_text(json.dumps(inventory))
    argv = [find_ansible(), f"--inventory={folder}/inventory.json", *words, ANSIBLE / "fleet.yml"]
    done = run(argv, env={**build_environment(ANSIBLE, folder), "ANSIBLE_ANY_ERRORS_FATAL": "0"}, timeout=500, check=False)
    assert done.status
    assert not re.search("changed=[1-9]", done.stdout)
    return done.stdout.replace('\\"', '"')


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("variables", "said"), FLEET_REFUSED)
def test_fleet_role_refuses_before_it_changes_anything(tmp_path: Path, variables: dict[str, Any], said: str) -> None:
    host = {"ansible_connection": "local", "ansible_become": False, **NEEDED, **variables}
    groups = {"nohype_hosts": {"hosts": {"server1": host}}, "nohype_fleet_controller": {"hosts": {"server1": {}}}}
    assert said in play_fleet(tmp_path, groups)


def test_fleet_role_configures_all_machines_together(tmp_path: Path) -> None:
    """Files that name the hosts of one --limit would take the others out of the fleet."""
    local = {"ansible_connection": "local", "ansible_become": False}
    hosts = {"hosts": {"server1": local, "server2": local}}
    groups = {"nohype_hosts": hosts, "nohype_fleet_controller": {"hosts": {"server2": {}}}}
    assert "Slurm's files need server2 too: run the playbook without --limit" in play_fleet(tmp_path, groups, "--limit=server1")
    groups["nohype_fleet_controller"] = hosts
    assert "the group nohype_fleet_controller with one machine" in play_fleet(tmp_path, groups)


@pytest.mark.parametrize(
    ("text", "is_refused"), [("ClusterName=nohype\n", False), ("ClusterName=physics\n", True), (None, False)]
)
def test_fleet_role_leaves_another_cluster_alone(tmp_path: Path, text: str | None, is_refused: bool) -> None:  # noqa: FBT001
    tasks = yaml.safe_load((FLEET / "tasks/variables.yml").read_text())[-2:]
    tasks[0]["ansible.builtin.slurp"]["src"] = str(tmp_path / "slurm.conf")
    if text:
        (tmp_path / "slurm.conf").write_text(text)
    done = play(tmp_path, tasks, {}, check=False)
    assert ("is that of another cluster" in done.stdout) == bool(done.status) == is_refused


def test_slurmd_is_confined_and_waits_for_the_vfs(tmp_path: Path) -> None:
    """The unit of slurmd, and that of the VFs, run on a device in a folder."""
    files = [str(ROLE / "defaults/main.yml"), str(FLEET / "vars/main.yml")]
    uplinks = [{"name": "nic0"}, {"name": "nic1", "edge": "vepa"}, {"name": "eth0", "edge": "macvtap-vepa"}]
    tasks = [
        {
            "ansible.builtin.template": {
                "src": str(FLEET / f"templates/nohype-{name}@.service.j2"),
                "dest": str(tmp_path / name),
            },
            "vars": {"nohype_vfs_per_uplink": 3},
        }
        for name in ("slurmd", "vfs")
    ]
    play(tmp_path, tasks, {**NEEDED, "nohype_uplinks": uplinks}, vars_files=files)
    slurmd = (tmp_path / "slurmd").read_text()
    assert "\nCPUAffinity=0-1\n" in slurmd
    assert "nohyped.service nohype-vfs@nic0.service nohype-vfs@nic1.service\n" in slurmd
    [line] = re.findall("^ExecStart=/bin/sh -ec '(.*)'$", (tmp_path / "vfs").read_text(), re.MULTILINE)
    script = line.replace("/sys/class/net/%i/device", str(tmp_path)).replace("$$", "$")
    for before, after in (("0", "3"), ("2", "2")):  # those that exist stay
        (tmp_path / "sriov_numvfs").write_text(f"{before}\n")
        run(["/bin/sh", "-ec", script])
        assert (tmp_path / "sriov_numvfs").read_text().strip() == after


OPENVSWITCH = ANSIBLE / "roles/nohype_openvswitch"


def prepare_openvswitch(folder: Path) -> list[dict[str, Any]]:
    """The tasks of the role that need no package archive and no systemd; they write below a folder."""
    text = (OPENVSWITCH / "tasks/main.yml").read_text()
    for place in ("/etc/openvswitch", "/etc/systemd/system"):
        text = text.replace(place, str(folder))
    text = text.replace("src: ", f"src: {OPENVSWITCH}/templates/")
    tasks: list[dict[str, Any]] = yaml.safe_load(text)
    return [task for task in tasks if not {"ansible.builtin.apt", "ansible.builtin.systemd_service"} & set(task)]


def test_flows_of_the_role_are_those_of_the_driver(tmp_path: Path) -> None:
    variables = {"nohype_openvswitch_ports": ["p1", "p2"]}
    task = {"ansible.builtin.template": {"src": str(OPENVSWITCH / "templates/relay.flows.j2"), "dest": str(tmp_path / "flows")}}
    play(tmp_path, [task], variables)
    assert (tmp_path / "flows").read_text() == relay_table.build_flows(relay_table.Relay({1: (), 2: ()}))


@pytest.mark.parametrize("variables", [{}, {"nohype_openvswitch_ports": ["p1"], "nohype_openvswitch_datapath": "fast"}])
def test_openvswitch_role_refuses_to_guess(tmp_path: Path, variables: dict[str, Any]) -> None:
    whole = {"nohype_openvswitch_ports": [], "nohype_openvswitch_datapath": "system", **variables}
    done = play(tmp_path, prepare_openvswitch(tmp_path)[:1], whole, check=False)
    assert done.status
    assert "Set nohype_openvswitch_ports" in done.stdout


@pytest.mark.netns
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for mount and network namespaces")
def test_openvswitch_role_makes_a_switch_that_the_driver_accepts(tmp_path: Path) -> None:
    """With the real Open vSwitch; applied again it changes nothing."""
    try:
        tools = build_switch_tools(cache_folder())
    except OrchestratorError as error:
        pytest.skip(f"the root with Open vSwitch cannot be built: {error.message}")
    with running(tmp_path, tools, bridge=False) as daemons:
        programs = tmp_path / "bin"
        programs.mkdir()
        (programs / "ovs-vsctl").write_text(f'#!/bin/sh\nexec {" ".join(daemons.prefix)} ovs-vsctl "$@"\n')
        (programs / "ovs-vsctl").chmod(0o755)
        for name in ("p1", "p2"):
            daemons.run("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}-far")
        defaults = yaml.safe_load((OPENVSWITCH / "defaults/main.yml").read_text())
        variables = {
            **defaults, "nohype_openvswitch_bridge": BRIDGE, "nohype_openvswitch_ports": ["p1"],
            "nohype_openvswitch_plain_ports": ["p2"], "nohype_openvswitch_datapath": "netdev",
        }  # fmt: skip
        handlers = [{"name": "Load the flows", "ansible.builtin.meta": "noop"}]
        tasks = prepare_openvswitch(tmp_path)
        play(tmp_path, tasks, variables, str(programs), handlers=handlers)
        assert "changed=0" in play(tmp_path, tasks, variables, str(programs), handlers=handlers).stdout
        unit = (tmp_path / "nohype-relay.service").read_text()
        assert f"ExecStart=ovs-ofctl --bundle add-flows {BRIDGE} /etc/openvswitch/nohype-relay.flows\n" in unit
        LocalCommands(daemons.prefix).run(
            ["ovs-ofctl", "--bundle", "add-flows", BRIDGE, "-"], input=(tmp_path / "nohype-relay.flows").read_text()
        )
        state = daemons.driver.read()
    assert state.fail_mode == "secure"
    assert {port.name: port.hairpin for port in state.ports} == {"p1": True, "p2": False}
    assert state.other_flows == 0


@pytest.mark.parametrize(
    ("virsh", "packages", "said"),
    [
        ("exit 0", ["libvirt-daemon"], ""),
        ("", ["libvirt-daemon"], ""),
        ("case $* in *--all*) echo stopped;; esac", [], ""),
        ("case $* in *--all*) echo stopped;; esac", ["libvirt-daemon"], "guests of other users: stopped"),
        ("echo failed to connect >&2; exit 1", [], "libvirt does not tell its guests (failed to connect)"),
        ("echo virsh: libvirt.so.0: No such file or directory >&2; exit 127", [], "libvirt does not tell its guests"),
        ("exit 124", [], "no answer within 60 s"),
    ],
    ids=["none", "no libvirt", "stopped", "stopped, ours", "no daemon", "no library", "hangs"],
)
def test_undo_refuses_while_libvirt_has_guests_of_others(tmp_path: Path, virsh: str, packages: list[str], said: str) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("timeout", "sh", "env"):
        (programs / name).symlink_to(f"/usr/bin/{name}")
    if virsh:
        (programs / "virsh").write_text(f"#!/bin/sh\n{virsh}\n")
        (programs / "virsh").chmod(0o755)
    tasks = yaml.safe_load((ROLE / "tasks/undo_check.yml").read_text())
    names = [task["name"] for task in tasks]
    asked = tasks[names.index("List the guests of other users of libvirt") : names.index("Check that no guest runs")]
    for task in asked:
        if "ansible.builtin.command" in task:  # only these programs, also where this machine has libvirt
            task["environment"] = {**task.get("environment", {}), "PATH": str(programs)}
    variables = {"nohype_packages_found": {"own": packages}}
    done = play(tmp_path, asked, variables, check=False)
    assert bool(done.status) == bool(said), done.stdout
    assert said in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("file", "reason"),
    [("undo_check.yml", "undo.yml reboots"), ("reboot.yml", "A reboot is required: the server was booted without x")],
)
@pytest.mark.parametrize("runs", [True, False])
def test_a_server_is_not_rebooted_while_guests_run(tmp_path: Path, file: str, reason: str, runs: bool) -> None:  # noqa: FBT001
    """Also guests that libvirt does not know."""
    folder = tmp_path / "proc/812"
    (folder / "fd").mkdir(parents=True)
    (folder / "exe").symlink_to("/usr/bin/qemu-system-x86_64" if runs else "/usr/bin/sshd")
    (folder / "cmdline").write_text("qemu-system-x86_64\0-name\0theirs\0")
    tasks = yaml.safe_load((ROLE / "tasks" / file).read_text())
    tasks += [inner for task in tasks for inner in task.get("block", [])]
    [checked] = [task for task in tasks if task["name"] == "Check that no guest runs"]
    asked = yaml.safe_load((ROLE / "tasks" / checked["ansible.builtin.import_tasks"]).read_text())
    asked[0]["nohype_guests"] = {"proc": str(tmp_path / "proc")}
    done = play(tmp_path, asked, {"nohype_differs": ["without x"], **checked["vars"]}, check=False)
    assert bool(done.status) == runs, done.stdout
    assert (f"{reason}" in done.stdout and "812 (qemu-system-x86_64, theirs)" in done.stdout) == runs


@pytest.mark.parametrize("installed", [True, False])
def test_the_role_refuses_a_host_with_the_debian_package(tmp_path: Path, installed: bool) -> None:  # noqa: FBT001
    unit = tmp_path / "nohyped.service"
    if installed:
        unit.write_text("")
    for file in ("main.yml", "precheck.yml"):
        tasks = yaml.safe_load((ROLE / "tasks" / file).read_text())
        assert {"name": "Debian package", "ansible.builtin.import_tasks": "no_package.yml"} in tasks[:6]
    asked = yaml.safe_load((ROLE / "tasks/no_package.yml").read_text())
    [path] = [task["ansible.builtin.stat"]["path"] for task in asked if "ansible.builtin.stat" in task]
    assert path.removeprefix("/") == f"usr/lib/systemd/system/{unit.name}", "that of release.deb"
    asked[0]["ansible.builtin.stat"]["path"] = str(unit)
    done = play(tmp_path, asked, {}, check=False)
    assert bool(done.status) == installed, done.stdout
    assert ("apt remove nohype" in done.stdout) == installed


def test_a_word_that_was_taken_out_requires_a_reboot(tmp_path: Path) -> None:
    """Until the server has booted without it; and one that is wanted again does not."""
    (tmp_path / "etc").mkdir()
    booted = tmp_path / "cmdline"

    def apply(extra: str) -> dict[str, list[str]]:
        tasks = []
        for file, names in (
            (
                "kernel.yml",
                ("Read the words of earlier runs", "Write the words of earlier runs", "Write the kernel command line"),
            ),
            ("reboot.yml", ("Read the kernel command line", "Read the words of earlier runs", "Determine if a reboot")),
        ):
            text = (ROLE / "tasks" / file).read_text().replace("/etc/nohype", str(tmp_path / "etc"))
            text = text.replace("/proc/cmdline", str(booted)).replace("kernel.cmdline.j2", f"{ROLE}/templates/kernel.cmdline.j2")
            tasks += [task for task in yaml.safe_load(text) if task["name"].startswith(names)]
        for task in tasks:
            task.pop("notify", None)
        links = {"nohype_links": {"results": []}}
        told = tmp_path / "told.json"
        text = "{{ {'lacking': nohype_lacking, 'surplus': nohype_surplus} | to_json }}"
        tasks.append({"ansible.builtin.copy": {"content": text, "dest": str(told)}})
        play(tmp_path, tasks, {**NEEDED, **links, "nohype_extra_cmdline": extra})
        found: dict[str, list[str]] = json.loads(told.read_text())
        return found

    booted.write_text("ro quiet\n")
    assert "nopti" in apply("nopti mitigations=off")["lacking"]
    words = (tmp_path / "etc/kernel.cmdline").read_text()
    booted.write_text(f"ro quiet {words}")
    assert apply("nopti mitigations=off") == {"lacking": [], "surplus": []}
    assert apply("nopti") == {"lacking": [], "surplus": ["mitigations=off"]}
    assert apply("") == {"lacking": [], "surplus": ["nopti", "mitigations=off"]}, "not booted in between"
    assert apply("mitigations=off") == {"lacking": [], "surplus": ["nopti"]}
    booted.write_text("ro quiet " + words.replace("nopti", ""))
    assert apply("mitigations=off") == {"lacking": [], "surplus": []}


def test_folders_of_nohype_paths_are_removed_by_undo_unless_they_existed(tmp_path: Path) -> None:
    """The record keeps those that exist; the tasks create no others."""
    task = {"ansible.builtin.copy": {"content": "{{ nohype_all_trees | to_json }}", "dest": str(tmp_path / "trees")}}
    files = {"vars_files": [str(ROLE / "defaults/main.yml"), str(ROLE / "vars/main.yml")]}
    play(tmp_path, [task], {"nohype_paths": EVERYTHING["nohype_paths"]}, **files)
    assert {"/srv/images", "/srv/ledger", "/srv/consoles"} <= set(json.loads((tmp_path / "trees").read_text()))
    recorded = [
        (ROLE / "tasks" / name).read_text().count('trees: "{{ nohype_all_trees }}"') for name in ("record.yml", "main.yml")
    ]
    assert recorded == [1, 1]


def test_recipes_of_guest_images_are_copied_with_their_modes_and_once(tmp_path: Path) -> None:
    text = (ROLE / "tasks/manager.yml").read_text().replace("{{ role_path }}", str(ROLE))
    (tmp_path / "share").mkdir()
    text = text.replace("/usr/share/nohype/", f"{tmp_path}/share/").replace("owner: root", f"owner: '{os.getuid()}'")
    text = text.replace("group: root", f"group: '{os.getgid()}'")
    tasks = [task for task in yaml.safe_load(text) if task["name"] == "Copy the recipes of guest images"]
    assert "changed=1" in play(tmp_path, tasks, {}).stdout
    sources = [path for path in (source_tree() / "guest-images").rglob("*") if "__pycache__" not in path.parts]
    for path in sources:
        copied = tmp_path / "share" / path.relative_to(source_tree())
        assert copied.stat().st_mode == path.stat().st_mode
        assert path.is_dir() or copied.read_bytes() == path.read_bytes()
    assert len(sources) > 20
    assert "changed=0" in play(tmp_path, tasks, {}).stdout, "nothing is left to do"
