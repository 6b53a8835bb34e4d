"""docs/results.md and its pictures say what the records in benchmarks/results say."""

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import tables


def test_the_results_page_is_made_from_the_records():
    assert tables.stale() == []


def test_a_table_compares_with_the_best_peer_of_the_same_case():
    rows = [
        {"case": "a", "variant": "eager", "step_ms": 20.0},
        {"case": "a", "variant": "compile", "step_ms": 12.0, "step_ms_p10": 10.0},
        {"case": "a", "variant": "magi", "step_ms": 8.0, "report": {"tier": "graph"}},
        {"case": "b", "variant": "magi", "step_ms": 1.0},
    ]
    assert [row.get("to the best peer") for row in tables.compared(rows)] == [0.5, 1.0, 1.25, None]
    lines = tables.table(tables.compared(rows))
    assert lines[0] == "| case | variant | step_ms | step_ms_p10 | to the best peer |"
    assert lines[4] == "| a | magi | 8 |  | 1.25 |"


def step(variant, ms, ranks):
    return {"variant": variant, "step_ms": ms, "step_ms_p10": ms - 1, "step_ms_p90": ms + 1,
            "back_to_back_ms": ms, "ranks": ranks}  # fmt: skip


RECORD = {
    "question": "bench", "date": "2026-11-23", "commit": "abc", "versions": {}, "case": "<toy>",
    "rows": [step("eager", 19.0, 2), step("liger+magi:tune=true", 9.0, 2), step("magi", 99.0, 4),
             {"variant": "zero1", "ranks": 2, "failed": "needs the package"}],
}  # fmt: skip


def test_a_picture_has_a_bar_of_each_variant_on_the_scale_of_its_group():
    picture = ElementTree.fromstring(tables.figure(RECORD))
    name = "{http://www.w3.org/2000/svg}"
    rects = [each for each in picture.iter(f"{name}rect") if each.get("class")]
    # the widest that a bar and its spread may be is 388 units, here for 20 and 100 ms
    found = [(each.get("class"), float(each.get("width"))) for each in rects]
    expected = [("theirs", 388 * 19 / 20), ("ours", 388 * 9 / 20), ("ours", 388 * 99 / 100)]
    for (kind, width), (its_kind, its_width) in zip(found, expected, strict=True):
        assert kind == its_kind
        assert width == pytest.approx(its_width, abs=0.06), "rounded to a tenth"
    words = [each.text for each in picture.iter(f"{name}text")]
    assert {"<toy>, 2 ranks", "<toy>, 4 ranks", "19 ms", "zero1", "failed"} <= set(words)
    assert "zero1: failed" in picture.find(f"{name}desc").text
    height = float(picture.get("viewBox").split()[3])
    assert all(float(each.get("y")) + 10 <= height for each in rects)


def test_a_record_with_nothing_to_compare_has_no_picture():
    assert not tables.figure(RECORD | {"rows": RECORD["rows"][2:]})
    assert not tables.figure(RECORD | {"rows": [{"variant": "a", "step_ms": 1.0}] * 2})
    assert "![" not in tables.section(RECORD | {"rows": RECORD["rows"][2:]}, "name")
    assert "](figures/name.svg)" in tables.section(RECORD, "name")


def test_what_is_not_as_the_records_say_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(tables, "FIGURES", tmp_path / "figures")
    tables.write()
    assert tables.stale() == []
    old = tmp_path / "figures" / "old.svg"
    old.write_text("")
    assert tables.stale() == [old]
    first = next(iter((tmp_path / "figures").glob("2*.svg")))
    first.write_text("other")
    tables.PAGE.write_text("other")
    assert set(tables.stale()) == {old, first, tables.PAGE}
    tables.write()
    assert tables.stale() == []
