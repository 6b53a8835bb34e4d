"""Every example of docs/export.md runs."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
BLOCKS = re.findall(r"(<!-- full -->\n)?```python\n(.*?)```", TEXT, re.S)


def run(blocks, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    for block in blocks:
        exec(compile(block, "docs/export.md", "exec"), names)
    return names


def test_the_quick_examples(tmp_path, monkeypatch, capsys):
    quick = [block for full, block in BLOCKS if not full]
    assert len(quick) == 4
    names = run(quick, tmp_path, monkeypatch)
    assert names["logits"].shape == (7, 5)
    assert "fold_batch_norm" in capsys.readouterr().out


@pytest.mark.full
def test_all_examples(tmp_path, monkeypatch, capsys):
    names = run([block for _, block in BLOCKS], tmp_path, monkeypatch)
    assert capsys.readouterr().out.count("tensor([[ 5,  6,  7,") == 2
    assert len(names["run"]._run._code) == 2, "both buckets are compiled"
