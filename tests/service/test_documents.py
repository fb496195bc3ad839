"""The documents as a site: complete, with all links, readable without a server."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("*.md", "docs/*.md", "ansible/README.md", "benchmarks/README.md", "examples/README.md", "tests/README.md")


def build(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(source / "docs"), str(source), str(output)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("site")
    done = build(ROOT, output)
    assert (done.returncode, done.stderr) == (0, "")
    return output


def test_every_page_is_in_the_navigation(site: Path) -> None:
    entry = (site / "docs" / "index.html").read_text()
    linked = {(site / "docs" / target).resolve() for target in re.findall(r'href="([^"#:]+\.html)', entry)}
    pages = {path.relative_to(ROOT).with_suffix(".html") for pattern in PAGES for path in ROOT.glob(pattern)}
    assert {site / page for page in pages} - {site / "docs" / "index.html"} <= linked


def test_words_of_the_pages_are_searchable(site: Path) -> None:
    index = (site / "searchindex.js").read_text()
    assert "quarantin" in index
    assert "docs/configuration" in index


def test_site_needs_no_other_host(site: Path) -> None:
    """Scripts, styles and images: none is loaded from elsewhere."""
    loaded = re.compile(r'<(?:script|link|img)\b[^>]*\b(?:src|href)="(?:https?:)?//(?!\S*canonical)')
    assert not [page for page in site.rglob("*.html") if loaded.search(page.read_text())]


def test_dead_links_are_errors(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", docs)
    (docs / "_redirect").mkdir()
    (docs / "cli.md").write_text("# Commands\n\n## Section\n")
    page = "# Index\n\n```{toctree}\ncli\n```\n\n[right](cli.md#section)\n"
    (docs / "index.md").write_text(page)
    assert build(tmp_path, tmp_path / "right").returncode == 0
    (docs / "index.md").write_text(f"{page}[a](nothing.md)\n[b](cli.md#no-such-section)\n[c](#nowhere)\n")
    done = build(tmp_path, tmp_path / "wrong")
    assert done.returncode
    assert done.stderr.count("[myst.xref_missing]") == 3
