"""The documentation: links within it resolve, the reference is complete, quick starts run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import magi_train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
START = re.compile(
    r'```python title="(\w+\.py)"\n(.*?)```\n+```console\n\$ (.*?)\n(.*?)```', re.DOTALL
)
STARTS = START.findall((ROOT / "docs" / "quick-starts.md").read_text())


def anchors(path):
    """Return the anchors of a page's headings, as GitHub and mkdocs make them of plain words."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in titles}


def broken(page, text):
    """Return the links of `text`, which stands in `page`, that lead nowhere in this checkout."""
    found = []
    for link in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(r"[a-z]+:", link):
            continue  # of the network
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not broken(page, page.read_text())


def test_a_broken_link_is_seen():
    page = ROOT / "docs" / "index.md"
    text = "[a](nowhere.md) [b](bench.md#nothing) [c](bench.md#a-script-of-yours) [d](api.md)"
    assert broken(page, text) == ["nowhere.md", "bench.md#nothing"]


def test_the_site_holds_every_page_and_the_reference_every_name():
    site = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"^ +- (\S+\.md)$", site, re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    rows = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    names = [row.rpartition(".")[2] for row in rows if "integrations" not in row]
    assert sorted(names) == sorted(magi_train.__all__)


def test_there_is_a_quick_start_of_each_kind():
    assert [name for name, *_ in STARTS] == [
        "plain.py", "with_lightning.py", "with_trainer.py", "train.py"
    ]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize(("name", "code", "command", "shown"), STARTS, ids=[s[0] for s in STARTS])
def test_a_quick_start_runs_as_it_stands(name, code, command, shown, tmp_path):
    (tmp_path / name).write_text(code)
    program, *words = command.split()
    magi = ["-m", "magi_train.cli"] if program == "magi" else []
    done = subprocess.run(
        [sys.executable, *magi, *words], capture_output=True, text=True, cwd=tmp_path, timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert shown.strip() in done.stdout


@pytest.mark.full
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'magi-train[docs]'")
    pytest.importorskip("mkdocstrings", reason="pip install 'magi-train[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
    assert 'id="magi_train.api.prepare"' in (tmp_path / "api.html").read_text()
