"""`magi explain`: a report in text and JSON, and what is no report."""

import pytest

from magi_train import Report
from magi_train.cli import main
from magi_train.core.report import PassRow


def test_explain_shows_a_report(tmp_path, capsys):
    path = tmp_path / "report.json"
    report = Report(tier="region", reason="line 7 prints")
    report.add(PassRow("some_pass", "joint", {"saved_mib": 3.0}, 0.1))
    report.save(path)
    assert Report.load(path) == report
    assert main(["explain", str(path)]) == 0
    out = capsys.readouterr().out
    for words in ("tier REGION", "line 7 prints", "some_pass", "saved_mib=3.0"):
        assert words in out
    assert main(["explain", str(path), "--json"]) == 0
    assert '"tier": "region"' in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "{}", "not json", '{"rows": 3}'])
def test_explain_names_a_file_that_is_no_report(tmp_path, content, capsys):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    assert main(["explain", str(path)]) == 2
    assert f"{path} is not a report of magi-train" in capsys.readouterr().err
