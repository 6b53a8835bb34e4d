"""magi export, magi bench and magi generate, and what they say when something is wrong."""

import json

import pytest
import torch

from magi_train import cli
from magi_train.exporter import bench
from tests.exporter.nets import Heads

MODEL = "tests.exporter.nets:Heads"


def test_export_then_bench(tmp_path, capsys):
    torch.save(Heads().state_dict(), tmp_path / "weights.pt")
    path = str(tmp_path / "model.pt2")
    words = ["export", str(tmp_path / "weights.pt"), path, "--model", MODEL]
    words += ["--input", "x=float32[2,3,8]", "--dynamic", "batch=1:16", "--without", "attention"]
    assert cli.main(words) == 0
    assert "fold_constants" in capsys.readouterr().out
    assert cli.main(["bench", "--inference", path, "--model", MODEL, "--calls", "5",
                     "--size", "batch=4", "--no-compile", "--json"]) == 0  # fmt: skip
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["artifact", "eager"]
    assert all(0 < row["p50_ms"] <= row["p99_ms"] and row["rows_per_second"] > 0 for row in rows)
    assert cli.main(["bench", "--inference", path, "--calls", "5"]) == 0
    assert "p99 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--model", "tests.nowhere:Net"), "is not MODULE:NAME"),
        (("--input", "x=float32"), "--input must be like"),
        (("--dynamic", "batch=many"), "--dynamic must be like"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, capsys, change, words):
    given = {"--model": MODEL, "--input": "x=float32[2,3,8]", change[0]: change[1]}
    line = [word for pair in given.items() for word in pair]
    assert cli.main(["export", "-", str(tmp_path / "model.pt2"), *line]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_percentiles():
    assert bench._percentile([float(n) for n in range(100)], 0.99) == 99
    assert bench._percentile([1.0], 0.99) == 1
