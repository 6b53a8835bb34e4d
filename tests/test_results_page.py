"""docs/results.md says what the records in benchmarks/results say."""

from benchmarks import tables


def test_the_results_page_is_made_from_the_records():
    assert tables.PAGE.read_text() == "\n".join([tables.HEAD, *tables.sections()])


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
