"""The robustness zoo: a case runs, and its row says what holds and what does not."""

import argparse

import pytest

from benchmarks import zoo

TIERS = ["eager", "graph"]


def tier(**found):
    return {"tier": "graph", "off": {"loss": 1e-7, "state": 2e-6}, "bad": {}, "as_traced": False,
            "first_seconds": 1.25, "speed": 0.5} | found  # fmt: skip


@pytest.mark.parametrize(
    ("row", "says", "wrong"),
    [
        ({"graph": tier()}, "graph x0.50, off 2e-06, start 1.2 s", False),
        (
            {"graph": tier(bad={"loss": 0.5})},
            "DIFFERS loss 5.0e-01, off 2e-06, start 1.2 s",
            True,
        ),
        (
            {"graph": tier(bad={"loss": 0.5}, as_traced=True)},
            "DIFFERS WHEN TRACED loss 5.0e-01, off 2e-06, start 1.2 s",
            False,
        ),
        (
            {"graph": {"refused": 'File "/home/me/lib/site-packages/x.py"'}},
            'REFUSED File "x.py"',
            False,
        ),
        ({"graph": {"raised": "RuntimeError: no"}}, "RAISED RuntimeError: no", True),
    ],
)
def test_a_row_says_what_holds(row, says, wrong):
    row = {"case": "a/b", "parameters": 7, "eager": tier(tier="eager")} | row
    assert zoo.short(row, TIERS)["graph"] == says
    assert zoo._wrong(row, TIERS) == wrong


def test_a_case_without_a_toy_says_why():
    row = {"case": "a/b", "not_built": "ValueError: sizes"}
    assert zoo.short(row, TIERS)["eager"] == "no toy: ValueError: sizes"


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # as its main() does
def test_a_case_runs_in_all_tiers():
    options = argparse.Namespace(device="cpu", tiers=list(zoo.TIERS), lowering="aot_eager")
    row = zoo.run_case("causal/gpt2", options)
    assert not zoo._wrong(row, options.tiers)
    assert zoo.short(row, options.tiers)["graph"].startswith("graph x")


def test_a_case_that_no_library_has_is_an_error():
    assert zoo.names(["causal/llama"]) == ["causal/llama"]
    with pytest.raises(ValueError, match="'causal/lama' is neither a family"):
        zoo.names(["causal/llama", "causal/lama"])


def test_timm_is_an_error_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(zoo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="timm is not installed"):
        zoo.names(["timm"])
