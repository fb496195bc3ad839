"""Pools of persistent huge pages, one per NUMA node and page size (Documentation/admin-guide/mm/hugetlbpage.rst), and KSM."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import PagePool, PromisedPages
from orchestrator.values import Size

_NODES = "sys/devices/system/node"
_FLAT = "sys/kernel/mm/hugepages"
_NODE = re.compile(r"node(\d+)", re.ASCII)
_POOL = re.compile(r"hugepages-(\d+)kB", re.ASCII)


def survey_pools(host: HostRoot) -> tuple[tuple[PagePool, ...], tuple[HostError, ...]]:
    """All pools by node and page size, including empty ones, and the errors of unreadable pools."""
    folders = [(0, _FLAT)]  # a kernel without NUMA has only machine-wide pools
    if host.exists(_NODES):
        nodes = sorted(int(match[1]) for match in map(_NODE.fullmatch, host.names(_NODES)) if match)
        folders = [(node, f"{_NODES}/node{node}/hugepages") for node in nodes]
    pools: list[PagePool] = []
    problems: list[HostError] = []
    for node, folder in folders:
        try:
            names = host.names(folder) if host.exists(folder) else ()
        except HostError as error:
            problems.append(error)
            continue
        for kib in sorted(int(match[1]) for match in map(_POOL.fullmatch, names) if match):
            try:
                pools.append(_read_pool(host, node, Size(kib << 10), f"{folder}/hugepages-{kib}kB"))
            except HostError as error:
                problems.append(error)
    return tuple(pools), tuple(problems)


def find_pool(host: HostRoot, node: int, page_size: Size) -> PagePool | None:
    folder = _find_folder(host, node, page_size)
    return _read_pool(host, node, page_size, folder) if host.exists(folder) else None


def read_free_pages(host: HostRoot, pools: Iterable[PagePool]) -> tuple[PagePool, ...]:
    """Reads `free` again, and drops pools that can no longer be read. Empty pools are returned unchanged."""
    found = (_try_free(host, pool) if pool.total else pool for pool in pools)
    return tuple(pool for pool in found if pool)


def _try_free(host: HostRoot, pool: PagePool) -> PagePool | None:
    try:
        return replace(pool, free=_read_free(host, _find_folder(host, pool.node, pool.page_size)))
    except HostError:
        return None


def survey_promised_pages(host: HostRoot, sizes: Iterable[Size]) -> tuple[tuple[PromisedPages, ...], tuple[HostError, ...]]:
    """Pages that the kernel has reserved for mappings but not allocated yet: they count as free, but QEMU cannot get them
    (mm/hugetlb.c, hugetlb_acct_memory). Reported machine-wide only; sizes without such pages are left out.
    """
    promised: list[PromisedPages] = []
    problems: list[HostError] = []
    for size in sorted(set(sizes)):
        name = f"{_FLAT}/hugepages-{size.kib}kB/resv_hugepages"
        try:
            count = _parse_count(name, host.find(name) or "0")
        except HostError as error:
            problems.append(error)
            continue
        promised += [PromisedPages(size, count)] if count else []
    return tuple(promised), tuple(problems)


def read_pool_size(host: HostRoot, node: int, page_size: Size) -> int:
    """Pages of a pool, including pages in use. Raises HostError (ENOENT) if the pool does not exist."""
    return _read_count(host, f"{_find_folder(host, node, page_size)}/nr_hugepages")


def read_ksm_run(host: HostRoot) -> str | None:
    """None on a kernel without KSM. The values are those of Documentation/admin-guide/mm/ksm.rst."""
    return host.find("sys/kernel/mm/ksm/run")


def _read_pool(host: HostRoot, node: int, page_size: Size, folder: str) -> PagePool:
    return PagePool(node, page_size, _read_count(host, f"{folder}/nr_hugepages"), _read_free(host, folder))


def _read_free(host: HostRoot, folder: str) -> int:
    return _read_count(host, f"{folder}/free_hugepages")


def _read_count(host: HostRoot, name: str) -> int:
    return _parse_count(name, host.read(name))


def _parse_count(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise HostError(f"cannot parse /{name}: {text!r} is not a number") from None


def _find_folder(host: HostRoot, node: int, page_size: Size) -> str:
    pools = f"{_NODES}/node{node}/hugepages" if host.exists(_NODES) else _FLAT
    return f"{pools}/hugepages-{page_size.kib}kB"
