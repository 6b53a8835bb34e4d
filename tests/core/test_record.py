"""The record of steps: what counts as a step, bounded series, losses, and the file."""

import gc
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import magi_train
from magi_train import Config, Report
from magi_train.core import record
from magi_train.core.record import Recorder, Steps, first_tensor, loss_in
from magi_train.core.report import write_atomically


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def run(recorder, clock, seconds, *, sync=True, owner=0, batch=None, loss=None):
    """One call of a captured function, and the time until the next one."""
    recorder.begin(owner, sync, (torch.zeros(4, 8) if batch is None else batch,), {})
    recorder.end(owner, torch.tensor(1.0) if loss is None else loss)
    clock.now += seconds


def new_recorder():
    clock = Clock()
    return Recorder(Steps(), "cpu", clock), clock


def test_a_step_lasts_from_one_synchronising_call_to_the_next():
    recorder, clock = new_recorder()
    run(recorder, clock, 30.0)  # compiles
    for _ in range(3):
        run(recorder, clock, 0.25, sync=False)
        run(recorder, clock, 0.75, owner=1)  # another function of the same step
        run(recorder, clock, 1.0)
    run(recorder, clock, 0.0)
    steps = recorder.steps
    assert (steps.count, steps.first_seconds) == (4, 30.0)
    assert steps.seconds == [2.0, 2.0, 2.0]
    assert steps.samples == 24
    assert steps.tokens == 0
    assert recorder.figures()["magi/step_seconds"] == 2.0


def test_token_ids_are_counted():
    recorder, clock = new_recorder()
    for _ in range(4):
        run(recorder, clock, 1.0, batch={"input_ids": torch.zeros(2, 16, dtype=torch.long)})
    assert (recorder.steps.samples, recorder.steps.tokens) == (4, 64)


def test_series_are_bounded_and_keep_the_mean_and_the_longest(monkeypatch):
    monkeypatch.setattr(record, "MOST_POINTS", 8)
    recorder, clock = new_recorder()
    for i in range(102):
        run(recorder, clock, 5.0 if i == 50 else 1.0, loss=torch.tensor(float(i)))
    recorder.close()
    steps = recorder.steps
    assert steps.count == 101
    assert max(map(len, (steps.seconds, steps.longest, steps.loss, steps.memory_gib))) <= 8
    assert steps.stride == 16
    assert sum(steps.seconds) * steps.stride == pytest.approx(6 * 16 + 4)
    assert max(steps.longest) == 5.0
    assert len(steps.loss) >= 3
    assert all(step == value for step, value in steps.loss)


def test_what_counts_as_the_loss():
    loss = torch.tensor(2.0, requires_grad=True)
    for output in (loss, (loss, 1), {"loss": loss}, SimpleNamespace(loss=loss), loss.reshape(1)):
        assert loss_in(output).item() == 2.0
    for output in (None, (), {}, torch.zeros(3), torch.tensor(1), "x", SimpleNamespace()):
        assert loss_in(output) is None


def test_the_first_tensor_is_found_without_looking_into_modules():
    ids = torch.zeros(2, 3)
    assert first_tensor(((nn.Linear(2, 2), {"n": 1, "ids": ids}), {})) is ids
    assert first_tensor(([[[[[ids]]]]],)) is None
    assert first_tensor((nn.ModuleDict({"a": nn.Linear(1, 1)}),)) is None


def test_energy_counts_from_the_second_step():
    recorder, clock = new_recorder()
    joules = iter([1000.0, 1600.0])
    recorder.joules = lambda: next(joules)
    for _ in range(4):
        run(recorder, clock, 1.0)
    recorder.close()
    assert recorder.steps.joules == 600.0
    assert recorder.steps.joules_samples == 8


def test_the_file_is_written_now_and_then_and_a_full_disk_ends_that(caplog):
    recorder, clock = new_recorder()
    written = []
    recorder.write = lambda: written.append(clock.now)
    for _ in range(30):
        run(recorder, clock, 1.0)
    assert 2 <= len(written) <= 3

    def full():
        raise OSError(28, "No space left on device")

    recorder.write = full
    with caplog.at_level(logging.WARNING):
        recorder.flush()
    assert "No space left" in caplog.text
    assert recorder.write is None


def test_a_file_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_atomically(path, "before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "after")
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "before"


def test_a_run_folder_holds_the_run(tmp_path):
    config = Config(tier="eager", run_folder=str(tmp_path))
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters())
    prepared, optimizer = magi_train.prepare(model, optimizer, config=config)
    step = magi_train.prepare_step(lambda x: prepared(x).sum(), prepared)
    for _ in range(5):
        step(torch.ones(2, 4)).backward()
        optimizer.step()
    told = magi_train.report(prepared)
    assert told.steps.count == 4
    prepared = step = None  # the end of the run
    gc.collect()
    found = Report.load(tmp_path)
    assert found.tier == "eager"
    assert found.steps.count == 4
    assert len(found.steps.loss) == 5
    assert found.steps.samples == 6
    assert {"parameters", "optimizer state"} <= set(found.steps.resident_mib)
    assert found.sources == {"tier": "Config in Python", "run_folder": "Config in Python"}
    assert found.settings["tier"] == "eager"


def test_two_models_of_a_process_have_a_file_each(tmp_path):
    config = Config(tier="eager", run_folder=str(tmp_path))
    models = [magi_train.prepare(nn.Linear(1, 1), config=config) for _ in range(2)]
    for each in models:
        each(torch.ones(1, 1)).sum().backward()
    for each in models:
        magi_train.report(each)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["magi_report.json", "magi_report_2.json"]


def test_evaluation_is_no_step(tmp_path):
    prepared = magi_train.prepare(nn.Linear(1, 1), config=Config(tier="eager"))
    for _ in range(3):
        with torch.no_grad():
            prepared(torch.ones(1, 1))
    assert magi_train.report(prepared).steps == Steps()


def test_an_energy_counter_that_fails_ends_the_count_and_not_the_training():
    def fails():
        raise RuntimeError("the driver is gone")

    steps = Steps()
    recorder = Recorder(steps, "cpu", clock=iter(range(1000)).__next__)
    recorder.joules = fails
    for _ in range(4):
        recorder.begin(0, True, (torch.ones(2),), {})
        recorder.end(0, torch.ones(()))
    recorder.close()
    assert steps.joules is None
    assert steps.count == 3


def test_sparse_buffers_do_not_stop_the_report():
    model = nn.Linear(4, 1)
    model.register_buffer("neighbours", torch.eye(4).to_sparse())
    prepared = magi_train.prepare(model, config=Config(tier="eager", progress=False))
    for _ in range(3):
        prepared(torch.ones(2, 4)).sum().backward()
    assert magi_train.report(prepared).steps.resident_mib["parameters"] > 0


def test_a_loss_is_awaited_on_its_own_device(monkeypatch):
    """Which need not be the current one, where a process has several models."""

    class OnSecond:
        device, dtype = torch.device("cuda", 1), torch.float32

        def detach(self):
            return torch.tensor([2.5])

    class Stream:
        def record_event(self):
            return self

        def query(self):
            return True

    asked = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: asked.append(d) or Stream())
    losses = record._Losses()
    losses._pinned = torch.zeros(record.IN_FLIGHT)
    losses.put(3, OnSecond())
    assert losses.take() == [(3, 2.5)]
    assert asked == [torch.device("cuda", 1)]
