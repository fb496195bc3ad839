"""Domains of the host that the manager did not create: what they use or would use is left to them, however it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import Conflict, NoRoom
from orchestrator.model.access import OPERATOR, Identity, Role
from tests.fakes.server import Server
from tests.harness.crash import World
from tests.harness.guests import ask, create, open_manager, warned

SERVER = Server(cores=8, nodes=2, vfs=7, pages=512)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world", SERVER)


def domain(inner: str = "", *, vcpu: str = "<vcpu>1</vcpu>", number: int = 7) -> str:
    uuid = f"00000000-0000-0000-0000-{number:012}"
    return f"<domain><name>db{number}</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory>{vcpu}{inner}</domain>"


FIRST = "2-3"
"""The core that a guest gets which comes first."""


@pytest.mark.parametrize(
    "xml",
    [
        domain("<cputune><vcpupin vcpu='0' cpuset='2'/></cputune>"),
        domain("<cputune><emulatorpin cpuset='3'/></cputune>"),
        domain("<cputune><iothreadpin iothread='1' cpuset='2-3'/></cputune>"),
        domain(vcpu="<vcpu placement='static' cpuset='0-3'>1</vcpu>"),
    ],
)
@pytest.mark.parametrize("running", [True, False])
def test_however_a_domain_pins_its_cores_are_not_given_away(world: World, xml: str, running: bool) -> None:
    manager = open_manager(world)
    assert str(ask(manager)[0].cores[0]) == FIRST
    world.hypervisor.domains.define(xml, threads="0-15" if running else None)
    plan, warnings = ask(manager)
    assert (str(plan.cores[0]), warnings) == ("4-5", ())
    if running:
        with pytest.raises(NoRoom) as caught:
            ask(manager, placement={"cpus": FIRST})
        assert "are pinned by unmanaged domain db7" in str(caught.value.reasons)
    else:
        _, warnings = ask(manager, placement={"cpus": FIRST})
        assert "are pinned by unmanaged domain db7 (shut off), and no others are free" in str(warnings)


@pytest.mark.parametrize("by", ["affinity", "cgroup"])
def test_what_the_kernel_says_of_a_domain_counts_whatever_its_xml_says(world: World, by: str) -> None:
    """As after `taskset`, `vcpu placement='auto'` with numad, or a cpuset that something gave to its scope."""
    manager = open_manager(world)
    world.hypervisor.domains.define(domain(), threads="2-3" if by == "affinity" else "0-15")
    if by == "cgroup":
        world.host.add("sys/fs/cgroup/machine.slice/machine-qemu-db7.scope/cpuset.cpus.effective", "2-3")
    assert str(ask(manager)[0].cores[0]) == "4-5"


def test_a_domain_that_may_run_anywhere_claims_nothing(world: World) -> None:
    manager = open_manager(world)
    world.hypervisor.domains.define(domain(), threads="0-15")
    assert str(ask(manager)[0].cores[0]) == FIRST


@pytest.mark.parametrize("threads", ["0-15", None])
@pytest.mark.parametrize("more", ["", "<cputune><emulatorpin cpuset='0-1'/></cputune>"])
def test_cpus_of_the_node_that_a_domain_is_bound_to_come_last(world: World, threads: str | None, more: str) -> None:
    manager = open_manager(world)
    world.hypervisor.domains.define(domain(f"<numatune><memory mode='strict' nodeset='0'/></numatune>{more}"), threads=threads)
    plan, warnings = ask(manager)
    assert (plan.node, warnings) == (1, ())
    _, warnings = ask(manager, placement={"cpus": FIRST})
    assert "are on the NUMA node to which unmanaged domain db7" in str(warnings)


def test_cores_of_a_domain_that_is_shut_off_are_the_last_choice_and_named(world: World) -> None:
    manager = open_manager(world)
    world.hypervisor.domains.define(domain("<cputune><vcpupin vcpu='0' cpuset='2-15'/></cputune>"))
    _, warnings = ask(manager)
    assert "CPUs 2-3 are pinned by unmanaged domain db7 (shut off), and no others are free" in str(warnings)
    create(manager)
    (event,) = [event for event in manager.events(OPERATOR) if event.kind == "host-warning"]
    assert (event.subject, event.tenant) == ("web", "")
    assert "CPUs 2-3 are pinned by unmanaged domain db7 (shut off)" in event.detail


@pytest.mark.parametrize("kind", ["hostdev type='pci'", "interface type='hostdev'"])
def test_a_vf_of_a_domain_that_is_shut_off_is_the_last_choice_and_named(world: World, kind: str) -> None:
    manager = open_manager(world)
    first = ask(manager)[0].vf
    source = f"<source><address bus='{first.address.bus}' slot='{first.address.device}'/></source>"
    world.hypervisor.domains.define(domain(f"<devices><{kind}>{source}</{kind.split()[0]}></devices>"))
    plan, warnings = ask(manager)
    assert (plan.vf.index, warnings) == (1, ())
    _, warnings = ask(manager, placement={"cpus": FIRST, "vf": str(first.address)})
    assert f"VF {first.address} is a device of unmanaged domain db7 (shut off)" in str(warnings)


def test_a_domain_that_libvirt_cannot_describe_stops_nothing_and_is_named(world: World) -> None:
    manager = open_manager(world)
    world.hypervisor.broken.add("db7")
    world.hypervisor.domains.define(domain(), threads="2-3")
    world.hypervisor.domains.define(domain(vcpu="<vcpu cpuset='all'>1</vcpu>", number=8), threads="0-15")
    plan, warnings = ask(manager)
    assert str(plan.cores[0]) == "4-5", "the kernel tells where its threads may run"
    assert "db7: cannot read its XML" in str(warnings)
    assert "db8: 'all' is not a list of CPUs" in str(warnings)
    create(manager, name="one")
    create(manager, name="two")
    assert len(warned(manager)) == 1, "it has not changed"


def test_the_name_of_a_domain_that_is_shut_off_is_taken(world: World) -> None:
    """libvirt would refuse a guest of this name."""
    manager = open_manager(world)
    world.hypervisor.domains.define(domain())
    with pytest.raises(Conflict, match="the name db7 is taken"):
        ask(manager, name="db7")


def test_a_tenant_learns_nothing_of_domains(world: World) -> None:
    manager, tenant = open_manager(world), Identity("alice", Role.TENANT, "acme")
    world.hypervisor.domains.define(domain("<cputune><vcpupin vcpu='0' cpuset='2-15'/></cputune>"))
    assert ask(manager, tenant)[1] == ()
    world.hypervisor.domains.define(domain("<cputune><vcpupin vcpu='0' cpuset='2-15'/></cputune>"), threads="0-15")
    with pytest.raises(NoRoom) as caught:
        ask(manager, tenant)
    assert "are pinned by an unmanaged domain" in str(caught.value.reasons)
    assert "db7" not in str(caught.value)


def test_a_vf_that_a_domain_which_is_shut_off_stands_on_is_the_last_choice(world: World) -> None:
    """Macvtap names the interface of the VF: `<interface type='direct'>`."""
    manager = open_manager(world)
    create(manager, name="first")
    vf = ask(manager)[0].vf
    world.host.add_link("sys/class/net/ens1v1/device", f"../../../{vf.address}")
    world.host.add_link("sys/class/net/bond0/device", "../../../platform")
    xml = "".join(
        f"<interface type='direct'><source dev='{name}' mode='passthrough'/></interface>" for name in ("ens1v1", "bond0")
    )
    world.hypervisor.domains.define(domain(f"<devices>{xml}</devices>"))
    plan, warnings = ask(manager)
    assert (plan.vf.index, warnings) == (vf.index + 1, ())
    _, warnings = ask(manager, placement={"cpus": "4-5", "vf": str(vf.address)})
    assert f"VF {vf.address} has an interface of unmanaged domain db7 (shut off)" in str(warnings)
