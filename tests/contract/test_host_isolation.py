"""Kernel settings that keep the host off guest cores: which the kernel has, and what it makes of what is written."""

from __future__ import annotations

from errno import EINVAL, ENOENT, EROFS

import pytest

from orchestrator.errors import HostError
from orchestrator.host.cpus import read_online
from orchestrator.host.irqbalance import Irqbalance, find_irqbalance
from orchestrator.host.isolation import (
    SETTINGS,
    WORKQUEUE,
    Division,
    Notation,
    Owner,
    Reading,
    Without,
    read_settings,
    write_cpus,
    write_text,
)
from orchestrator.host.processes import survey_threads
from orchestrator.host.root import HostRoot
from orchestrator.host.tuned import find_tuned
from orchestrator.values import CpuSet
from tests.fakes.domains import add_thread
from tests.fakes.root import FakeRoot

OWN = tuple(setting for setting in SETTINGS if setting.owner is Owner.MANAGER)


@pytest.fixture(autouse=True)
def _settings(host: HostRoot) -> None:
    """The fake host gets what the kernel of the lab has."""
    if isinstance(host, FakeRoot):
        for name in (f"{WORKQUEUE}/cpumask", f"{WORKQUEUE}/writeback/cpumask", "proc/irq/default_smp_affinity"):
            host.add(name, "ff")
        host.add("proc/sys/kernel/watchdog_cpumask", "0-7")
        add_thread(host, 1, 1, "systemd", "0-1")


def parse(reading: Reading) -> CpuSet:
    assert isinstance(reading.setting.wanted, Without)
    assert reading.text is not None
    return reading.setting.wanted.notation.parse(reading.text)


def test_manager_reads_all_that_it_changes(host: HostRoot) -> None:
    possible = CpuSet.parse(host.read("sys/devices/system/cpu/possible"))
    readings = read_settings(host, Owner.MANAGER)
    assert [reading.setting for reading in readings] == list(OWN)
    for reading in readings:
        assert parse(reading) <= possible, reading.setting.name


def test_no_setting_is_an_unexpected_error(host: HostRoot) -> None:
    """Each is read, or the kernel does not have it."""
    division = Division(CpuSet.of([0]), CpuSet.of([1]), CpuSet())
    for reading in read_settings(host):
        assert not reading.problem, reading.setting.name
        reading.is_wanted(division)


@pytest.mark.parametrize("setting", OWN, ids=lambda setting: setting.name)
def test_cpus_are_set_and_the_text_restored(host: HostRoot, setting: object) -> None:
    (reading,) = (reading for reading in read_settings(host, Owner.MANAGER) if reading.setting is setting)
    rule, file, before = reading.setting.wanted, reading.setting.file, reading.text
    assert isinstance(rule, Without)
    assert before is not None
    target = CpuSet.of([min(parse(reading))])
    try:
        write_cpus(host, file, rule.notation, target)
        assert rule.notation.parse(host.read(file)) == target
    finally:
        write_text(host, file, before)
    assert host.read(file) == before


@pytest.mark.parametrize("setting", OWN[:2], ids=lambda setting: setting.name)
def test_no_cpu_at_all_is_refused_and_changes_nothing(host: HostRoot, setting: object) -> None:
    (reading,) = (reading for reading in read_settings(host, Owner.MANAGER) if reading.setting is setting)
    with pytest.raises(HostError, match=reading.setting.file) as caught:
        write_cpus(host, reading.setting.file, Notation.MASK, CpuSet())
    assert caught.value.errno == EINVAL
    assert host.read(reading.setting.file) == reading.text


def test_clamped_cpus_are_an_error_with_both_sets(fake: FakeRoot) -> None:
    with pytest.raises(HostError, match="requested CPUs 0,70, kernel set 0"):
        write_cpus(fake, f"{WORKQUEUE}/cpumask", Notation.MASK, CpuSet.parse("0,70"))


def test_read_only_file_says_what_to_do(fake: FakeRoot) -> None:
    fake.write_errors["proc/sys/kernel/watchdog_cpumask"] = EROFS
    with pytest.raises(HostError, match="ReadWritePaths") as caught:
        write_cpus(fake, "proc/sys/kernel/watchdog_cpumask", Notation.LIST, CpuSet.of([0]))
    assert caught.value.errno == EROFS


def test_kernel_without_a_setting_has_no_text(fake: FakeRoot) -> None:
    (fake.path / "proc/sys/kernel/watchdog_cpumask").unlink()
    found = {reading.setting.name: reading for reading in read_settings(fake)}
    assert (found["watchdog_cpumask"].text, found["watchdog_cpumask"].problem) == (None, "")
    with pytest.raises(HostError) as caught:
        write_cpus(fake, "proc/sys/kernel/watchdog_cpumask", Notation.LIST, CpuSet.of([0]))
    assert caught.value.errno == ENOENT


@pytest.mark.parametrize("text", ["(null)", ""])
def test_no_cpus_without_a_tick_are_none(fake: FakeRoot, text: str) -> None:
    fake.add("sys/devices/system/cpu/nohz_full", text)
    found = {reading.setting.name: reading.text for reading in read_settings(fake)}
    assert found["nohz_full"] == ""


@pytest.mark.parametrize(
    ("words", "cpus"),
    [("rcu_nocbs=2-7", "2-7"), ("rcu-nocbs=3", "3"), ("rcu_nocbs", "0-7"), ("quiet", ""), ("rcu_nocbs=all", "0-7")],
)
def test_cpus_without_rcu_callbacks_are_those_of_the_command_line(fake: FakeRoot, words: str, cpus: str) -> None:
    fake.add("proc/cmdline", f"root=/dev/vda {words} quiet")
    found = {reading.setting.name: reading.text for reading in read_settings(fake)}
    assert found["rcu_nocbs"] == cpus


def test_odd_text_is_an_error_of_its_setting_only(fake: FakeRoot) -> None:
    fake.add("proc/cmdline", "rcu_nocbs=5-2")
    problems = {reading.setting.name for reading in read_settings(fake) if reading.problem}
    assert problems == {"rcu_nocbs"}
    fake.add(f"{WORKQUEUE}/cpumask", "zz")
    (reading,) = (reading for reading in read_settings(fake) if reading.setting.name == "workqueue")
    with pytest.raises(HostError, match="workqueue"):
        reading.is_wanted(Division(CpuSet.of([0]), CpuSet.of([1]), CpuSet()))


def run_tuned(fake: FakeRoot, profile: str, **files: str) -> None:
    fake.add("run/tuned/tuned.pid", "400")
    fake.add("etc/tuned/active_profile", profile)
    add_thread(fake, 400, 400, "tuned", "0-1")
    for name, text in files.items():
        fake.add(f"usr/lib/tuned/{name}/tuned.conf", text)


def test_tuned_sets_what_its_profile_and_those_included_set(fake: FakeRoot) -> None:
    run_tuned(
        fake, "realtime",
        realtime="[main]\ninclude=partitioning\n[sysctl]\n# kernel.nmi_watchdog=0\n",
        partitioning=f"[main]\ninclude = ?realtime\n[sysfs]\n/{WORKQUEUE}/cpumask = ${{not_isolated_cpumask}}\n",
    )  # fmt: skip
    tuned = find_tuned(fake)
    assert tuned
    assert str(tuned) == "tuned (profile realtime)"
    assert [setting.name for setting in SETTINGS if tuned.sets(setting)] == ["workqueue"]


def test_tuned_that_does_not_run_sets_nothing(fake: FakeRoot) -> None:
    assert find_tuned(fake) is None
    run_tuned(fake, "balanced", balanced="[sysctl]\nkernel.nmi_watchdog=0\n")
    fake.add("run/tuned/tuned.pid", "399")
    assert find_tuned(fake) is None, "it was killed, and left its file"
    add_thread(fake, 399, 399, "cron", "0-1")
    assert find_tuned(fake) is None, "another program got its id"


@pytest.mark.parametrize("profile", ["missing", "../../etc", ""])
def test_profile_that_cannot_be_found_sets_nothing(fake: FakeRoot, profile: str) -> None:
    run_tuned(fake, profile)
    tuned = find_tuned(fake)
    assert tuned is None or not any(tuned.sets(setting) for setting in SETTINGS)


@pytest.mark.parametrize(
    ("environment", "banned"),
    [
        ("A=1\0IRQBALANCE_BANNED_CPULIST=2-7\0", CpuSet.parse("2-7")),
        ("IRQBALANCE_BANNED_CPUS=fc", CpuSet.parse("2-7")),
        ("PATH=/bin", None),
        ("IRQBALANCE_BANNED_CPULIST=\0", None),
    ],
)
def test_irqbalance_leaves_banned_cpus_alone(fake: FakeRoot, environment: str, banned: CpuSet | None) -> None:
    add_thread(fake, 77, 77, "irqbalance", "0-1")
    fake.add("proc/77/environ", environment)
    assert find_irqbalance(fake, survey_threads(fake)[0]) == (Irqbalance(77, banned),)


def test_irqbalance_with_an_odd_list_is_an_error(fake: FakeRoot) -> None:
    add_thread(fake, 77, 77, "irqbalance", "0-1")
    fake.add("proc/77/environ", "IRQBALANCE_BANNED_CPULIST=many")
    with pytest.raises(HostError, match="irqbalance"):
        find_irqbalance(fake, survey_threads(fake)[0])


def test_host_without_irqbalance_has_none(host: HostRoot) -> None:
    threads = survey_threads(host)[0]
    if not any(thread.name == "irqbalance" for thread in threads):
        assert find_irqbalance(host, threads) == ()
    assert read_online(host)
