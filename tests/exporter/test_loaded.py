"""load: inputs are checked, files are checked, threads, buckets, warm-up, replay."""

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import magi_train
from magi_train.core import device_graphs
from magi_train.core.errors import ExportError
from magi_train.exporter.artifact import MANIFEST


class Pair(nn.Module):
    """Two inputs that share a batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, ids, flag=True):
        return self.linear(x) + ids[:, None] if flag else x


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.pt2"
    inputs = {"x": torch.randn(2, 4), "ids": torch.arange(2), "flag": True}
    magi_train.export(Pair(), inputs, path, dynamic={"batch": (1, 8)})
    return path


def changed(path, **changes):
    """Rewrite the manifest of a file."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(n for n in entries if n.endswith(MANIFEST))
    manifest = json.loads(entries[name])
    for key, value in changes.items():
        manifest[key] = {**manifest[key], **value} if isinstance(value, dict) else value
    entries[name] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for key, data in entries.items():
            archive.writestr(key, data)


def test_inputs_are_checked(file):
    run = magi_train.load(file)
    x, ids = torch.randn(3, 4), torch.arange(3)
    inner, seen = run._run, []
    run._run = lambda *t: seen.extend(t) or inner(*t)
    run(x.T.contiguous().T, ids)
    assert all(t.is_contiguous() for t in seen), "compiled code does not look at strides"
    assert run(x, ids).shape == run(ids=ids, x=x, flag=True).shape == (3, 3)
    for args, kwargs, words in (
        ((x,), {}, r"\['ids'\] missing; the file takes \['x', 'ids', 'flag'\]"),
        ((x, ids), {"mask": 1}, "no input is 'mask'"),
        ((x, ids), {"x": x}, "'x' is given twice"),
        ((x, ids, True, 1), {}, "4 arguments given"),
        ((x, ids, False), {}, "flag was True when the model was exported"),
        ((x.numpy(), ids), {}, "and no tensor"),
        ((x.half(), ids), {}, r"x must be float32 \[batch in 1..8, 4\]: got float16"),
        ((x[0], ids), {}, "got 1 dimensions"),
        ((x[:, :2], ids), {}, r"got \[3, 2\], whose dimension 1 does not fit"),
        ((torch.randn(9, 4), torch.arange(9)), {}, "dimension 0 does not fit"),
        ((x, torch.arange(2)), {}, "batch is 3 in x and 2 in ids"),
        ((x.to("meta"), ids), {}, "got a tensor on meta, and the file is for 'cpu'"),
    ):
        with pytest.raises(ExportError, match=words):
            run(*args, **kwargs)


def test_files_are_checked(file, tmp_path):
    with pytest.raises(ExportError, match="does not exist"):
        magi_train.load(tmp_path / "missing.pt2")
    whole = file.read_bytes()
    for part in (0.0, 0.5, 0.99):
        file.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(ExportError, match="cut short"):
            magi_train.load(file)
    foreign = tmp_path / "foreign.zip"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ExportError, match="no artifact of magi-train"):
        magi_train.load(foreign)
    for changes, words in (
        ({"target": "pt2", "versions": {"torch": "2.1.0"}}, "machine code made with torch 2.1.0"),
        ({"versions": {"torch": "9.9.0"}}, "written by torch 9.9.0, and this is torch .* older"),
        ({"target": "pt2", "hardware": {"machine": "vax"}}, "machine code for machine vax"),
        ({"target": "pt2", "hardware": {"instructions": "AVX9"}}, "for instructions AVX9"),
        ({"contract": {"device": "tpu"}}, "is for 'tpu'"),
        ({"format": 1}, "has format 1"),
    ):
        file.write_bytes(whole)
        changed(file, **changes)
        with pytest.raises(ExportError, match=words):
            magi_train.load(file)
    file.write_bytes(whole)
    changed(file, versions={"torch": "2.11.0"})  # an older program is fine
    assert magi_train.load(file)(torch.randn(1, 4), torch.arange(1)).shape == (1, 3)


def test_calls_from_many_threads(file):
    run = magi_train.load(file)
    inputs = [(torch.randn(1 + i % 8, 4), torch.arange(1 + i % 8)) for i in range(64)]
    wanted = [run(*pair) for pair in inputs]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda pair: run(*pair), inputs))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not got[0].requires_grad


def test_buckets_pad_and_cut(file):
    plain, run = magi_train.load(file), magi_train.load(file, buckets=(4, 2, 8))
    seen = []
    inner = run._run
    run._run = lambda *t: seen.append(len(t[0])) or inner(*t)
    for rows in (1, 2, 3, 8):
        x, ids = torch.randn(rows, 4), torch.arange(rows)
        torch.testing.assert_close(run(x, ids), plain(x, ids))
    assert seen == [2, 2, 4, 8]
    seen.clear()
    run.warmup(calls=1)
    assert seen == [2, 4, 8]
    seen.clear()
    run.warmup(calls=2, batch=2)
    assert seen == [2, 2]
    with pytest.raises(ExportError, match=r"batch in 1\.\.8"):
        magi_train.load(file, buckets=(16,))
    with pytest.raises(ExportError, match="'rows' is no dynamic size"):
        run.warmup(rows=3)
    run = magi_train.load(file, buckets=(2, 4))
    with pytest.raises(ExportError, match="the batch is 5, and the largest bucket 4"):
        run(torch.randn(5, 4), torch.arange(5))


def test_buckets_refuse_results_without_a_batch(tmp_path):
    class Total(nn.Module):
        def forward(self, x):
            return x.sum(), x

    path = tmp_path / "model.pt2"
    magi_train.export(Total(), (torch.ones(2, 3),), path, dynamic="batch")
    with pytest.raises(ExportError, match=r"output\.0|0 is float32 \[\]"):
        magi_train.load(path, buckets=(4,))
    magi_train.export(Total(), (torch.ones(2, 3),), path)
    with pytest.raises(ExportError, match="need a file with a dynamic batch"):
        magi_train.load(path, buckets=(4,))


class Recorder:
    """A device whose recording runs the function again, into the same memory.

    Attributes:
        current: The caller's stream.
        renewed: Failed captures.
        waits: (stream, the stream that it waits for).
    """

    current, renewed = "first", 0

    def __init__(self, device):
        self.device, self.waits = device, []

    def busy(self):
        return False

    def behind(self, stream):
        if stream not in (None, self.current):
            self.waits.append((self.current, stream))
        return self.current

    def renewals(self):
        return self.renewed

    def new_pool(self):
        pass

    def capture(self, function):
        results, made_at = function(), self.renewed

        def replay():
            if made_at != self.renewed:
                raise RuntimeError("Offset increment outside graph capture")
            for old, new in zip(results, function(), strict=True):
                old.copy_(new)

        for result in results:
            result.zero_()  # a recording has computed nothing yet
        return results, replay


def test_replay_gives_results_of_their_own(file, monkeypatch):
    with pytest.raises(ExportError, match="cannot be replayed as CUDA graphs"):
        magi_train.load(file, cuda_graphs=True)
    monkeypatch.setitem(device_graphs.makers, "cpu", Recorder)
    plain, run = magi_train.load(file), magi_train.load(file, cuda_graphs=True)
    inputs = [(torch.randn(n, 4), torch.arange(n)) for n in (2, 2, 2, 3, 2, 3)]
    got = [run(*pair) for pair in inputs]
    assert len(run._run._recorded) == 2
    for pair, result in zip(inputs, got, strict=True):
        torch.testing.assert_close(result, plain(*pair))
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda pair: run(*pair), inputs * 8))
    assert all(torch.equal(a, b) for a, b in zip(again, got * 8, strict=True))


def test_a_call_waits_for_one_on_another_stream(file, monkeypatch):
    """Else it would overwrite the inputs of a replay that runs still."""
    monkeypatch.setitem(device_graphs.makers, "cpu", Recorder)
    run = magi_train.load(file, cuda_graphs=True)
    graphs = run._run._graphs
    for stream in ("first", "first", "first", "second", "second", "first"):
        graphs.current = stream
        run(torch.randn(2, 4), torch.arange(2))
    assert graphs.waits == [("second", "first"), ("first", "second")]


def test_a_failed_capture_voids_the_graphs_before(file, monkeypatch):
    monkeypatch.setitem(device_graphs.makers, "cpu", Recorder)
    plain, run = magi_train.load(file), magi_train.load(file, cuda_graphs=True)
    pair = torch.randn(2, 4), torch.arange(2)
    for renewed in (0, 0, 0, 1, 1):
        run._run._graphs.renewed = renewed
        torch.testing.assert_close(run(*pair), plain(*pair))
    assert len(run._run._recorded) == 1


class Timed(Recorder):
    """Says that a call takes as long as it is told to; plain ones count as 10 ms."""

    pools = replays = 0
    replay_ms = 0.0

    def capture(self, function):
        results, replay = super().capture(function)

        def counted():
            self.replays += 1
            replay()

        return results, counted

    def mark(self):
        return self.replays

    def milliseconds(self, marks):
        return [self.replay_ms if marks[1] > marks[0] else 10.0]

    def new_pool(self):
        self.pools += 1


@pytest.mark.parametrize(("replay_ms", "kept"), [(9.4, True), (9.6, False)])
def test_a_graph_stays_where_it_gains(file, monkeypatch, replay_ms, kept):
    monkeypatch.setitem(device_graphs.makers, "cpu", Timed)
    monkeypatch.setattr(Timed, "replay_ms", replay_ms)
    plain, run = magi_train.load(file), magi_train.load(file, cuda_graphs="auto")
    graphs = run._run._graphs
    for n in (2, 2, 2, 3, 2, 3, 3):
        pair = torch.randn(n, 4), torch.arange(n)
        torch.testing.assert_close(run(*pair), plain(*pair))
    assert len(run._run._recorded) == (2 if kept else 0)
    assert graphs.pools == (2 if kept else 4), "the memory of what is dropped is given back"
    before = graphs.replays
    run(*pair)
    assert graphs.replays == before + kept, "dropped for good"


@pytest.mark.parametrize("how", [True, "auto"])
def test_what_cannot_be_recorded(file, monkeypatch, caplog, how):
    def capture(self, function):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(device_graphs.makers, "cpu", Timed)
    monkeypatch.setattr(Timed, "capture", capture)
    plain, run = magi_train.load(file), magi_train.load(file, cuda_graphs=how)
    pair = torch.randn(2, 4), torch.arange(2)
    run(*pair)
    if how is True:
        with pytest.raises(RuntimeError, match="not permitted"):
            run(*pair)
        return
    for _ in range(3):
        torch.testing.assert_close(run(*pair), plain(*pair))
    assert caplog.text.count("run without a CUDA graph: operation not permitted") == 1


class Counting(nn.Module):
    """Counts its calls, in a buffer or in an input."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, calls):
        (self.calls if self.inside else calls).add_(1)
        return x + self.calls + calls


@pytest.mark.parametrize("inside", [False, True])
def test_what_a_replay_would_not_write_is_refused(tmp_path, monkeypatch, inside):
    monkeypatch.setitem(device_graphs.makers, "cpu", Recorder)
    path, inputs = tmp_path / "model.pt2", (torch.zeros(3), torch.zeros(()))
    magi_train.export(Counting(inside), inputs, path)
    magi_train.load(path)
    with pytest.raises(
        ExportError, match="'auto' times" if inside else "writes to its input calls"
    ):
        magi_train.load(path, cuda_graphs="auto")
    if not inside:
        with pytest.raises(ExportError, match="writes to its input calls"):
            magi_train.load(path, cuda_graphs=True)


def test_how_to_replay_is_true_false_or_auto(file):
    magi_train.load(file, cuda_graphs=0)
    with pytest.raises(ValueError, match="True, False or 'auto', got 'on'"):
        magi_train.load(file, cuda_graphs="on")


class Halved(nn.Module):
    """Adds up pairs of rows, so that their number must be even."""

    def forward(self, x):
        return x.unflatten(1, (x.shape[1] // 2, 2)).sum(2)


def test_a_size_that_a_number_must_divide_is_checked(tmp_path):
    """Machine code does not ask: it would add up what is there, without the last row."""
    path, sizes = tmp_path / "model.pt2", {"x": {1: torch.export.Dim.AUTO(min=3, max=64)}}
    magi_train.export(
        Halved(), (torch.ones(2, 6, 4),), path, target="program", dynamic_shapes=sizes
    )
    run = magi_train.load(path)
    assert str(run.contract.sizes()["x_1"]) == "x_1 in 4..64 by 2"
    x = torch.randn(2, 8, 4)
    assert torch.equal(run(x), Halved()(x))
    for rows in (7, 2):
        with pytest.raises(ExportError, match=r"x_1 in 4\.\.64 by 2, 4\]: got \[2, ., 4\], whose"):
            run(torch.ones(2, rows, 4))
    with pytest.raises(ExportError, match=r"x_1 in 4\.\.64 by 2; got 5"):
        run.contract.example(x_1=5)
