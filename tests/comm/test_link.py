"""The link: fitted from points, measured within a budget, and a file that is doubted."""

import json

import pytest

from magi_train.comm import link
from magi_train.core.config import CommConfig, link_from_text

GBIT = 8e-9


def timed(latency, per_byte):
    return lambda num_bytes: latency + num_bytes * per_byte


def test_fit_finds_latency_and_bandwidth_past_one_disturbed_size():
    clean = timed(1e-3, GBIT)
    points = [(size, clean(size)) for size in link.SIZES[:6]]
    points[4] = (points[4][0], points[4][1] * 1.5)
    found = link.fit(tuple(points))
    assert found.latency_seconds == pytest.approx(1e-3, rel=0.05)
    assert found.seconds_per_byte == pytest.approx(GBIT, rel=0.05)
    assert found.seconds(10**6) == pytest.approx(clean(10**6), rel=0.05)


@pytest.mark.parametrize("gap", [0.0, 2e-4, 1e-3])
def test_fit_finds_the_gap_between_messages_in_flight(gap):
    single = timed(1e-3, GBIT)
    points = tuple((size, single(size)) for size in link.SIZES[:6])
    count, size = link.BURST_MESSAGES, link.BURST_BYTES
    together = 1e-3 + (count - 1) * gap + count * size * GBIT
    assert link.fit(points, burst_seconds=together).gap == pytest.approx(gap, abs=1e-9)
    assert link.fit(points).gap == pytest.approx(1e-3)  # not measured: as one after the other
    for disturbed in (0.0, 10.0):
        assert 0 <= link.fit(points, burst_seconds=disturbed).gap <= 1e-3 * (1 + 1e-9)


def test_fit_of_noise_stays_positive():
    found = link.fit(((4096, 2e-3), (2**20, 1e-3), (2**22, 1e-3)))
    assert found.latency_seconds > 0
    assert found.seconds_per_byte > 0


@pytest.mark.parametrize("latency", [2e-5, 1e-2])
@pytest.mark.parametrize("gbit", [100.0, 1.0, 0.2, 0.02])
def test_probe_keeps_the_budget(latency, gbit):
    spent = []

    def send(num_bytes):
        spent.append(timed(latency, GBIT / gbit)(num_bytes))
        return spent[-1]

    points = link.probe(send, lambda seconds: seconds)
    assert len(points) >= 2
    assert sum(spent) <= 1.2 * link.BUDGET_SECONDS
    found = link.fit(points)
    assert found.seconds_per_byte == pytest.approx(GBIT / gbit, rel=0.05)
    assert found.latency_seconds == pytest.approx(latency, rel=0.05)


def test_the_slowest_rank_counts():
    heard = []
    link.probe(timed(1e-4, GBIT), lambda seconds: heard.append(seconds) or 2 * seconds)
    points = link.probe(timed(1e-4, GBIT), lambda seconds: 2 * seconds)
    assert points[0][1] == pytest.approx(2 * timed(1e-4, GBIT)(4096))
    assert len(heard) > len(points), "every repeat is heard of, not only medians"


def test_the_file_comes_back_and_a_wrong_one_does_not(tmp_path):
    file = tmp_path / "magi_train" / "link.json"
    link._save(file, link.fit(((4096, 1e-3), (2**20, 9e-3))))
    good = json.loads(file.read_text())
    assert link._points(link._load(file)) == ((4096, 1e-3), (2**20, 9e-3))
    old = {k: v for k, v in good.items() if k not in ("gap_seconds", "launch_seconds")}
    wrong = [
        {**old, "version": 1},
        {**good, "gap_seconds": -1.0},
        {**good, "gap_seconds": "none"},
        {**good, "version": link.VERSION + 1},
        {**good, "points": [[4096, 1e-3]]},
        {**good, "points": [[4096, 1e-3], [2**20, -1.0]]},
        {**good, "points": [[2**20, 9e-3], [4096, 1e-3]]},
        {**good, "points": [[4096, 1e-3], [5000, 9e-3]]},
        {**good, "points": [[4096, 1e-3], [2**20, "soon"]]},
        {**good, "points": [[4096, 1e-3], [2**20, float("nan")]]},
        [],
    ]
    for each in wrong:
        file.write_text(json.dumps(each))
        assert link._load(file) is None, each
    file.write_text(json.dumps(good)[:-9])
    assert link._load(file) is None
    file.unlink()
    assert link._load(file) is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "magi_train").write_text("a file in the place of the folder")
    link._save(tmp_path / "magi_train" / "link.json", link.fit(((4096, 1e-3), (2**20, 9e-3))))


def test_a_given_link():
    assert link_from_text("300us 1gbit") == pytest.approx((3e-4, 8e-9))
    assert link_from_text("20 us, 400 Gbit") == pytest.approx((2e-5, 2e-11))
    CommConfig(link="300us 1gbit")
    for wrong in ("fast", "300us", "1gbit", "300us 0gbit"):
        with pytest.raises(ValueError, match=r"CommConfig\.link must be .* got '" + wrong):
            CommConfig(link=wrong)
