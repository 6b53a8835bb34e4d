"""What CUDA is asked for to capture a graph, on a stand-in for it; tests/gpu has the device."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from magi_train.core import compat, device_graphs
from magi_train.core.device_graphs import CudaGraphs


class Cuda:
    """Stands for torch.cuda: notes what runs, and that no two threads capture, or wait for it."""

    def __init__(self):
        self.streams, self.log = threading.local(), []
        self._busy = threading.Lock()

    def CUDAGraph(self):
        return self

    def replay(self):
        pass

    def Stream(self, device):
        return "side"

    def graph_pool_handle(self):
        return (0, 1)

    def current_stream(self, device):
        return self

    def set_stream(self, stream):
        self.log.append("stream")

    def wait_stream(self, stream):
        self.log.append(("wait", stream))

    @contextlib.contextmanager
    def alone(self):
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("operation not permitted when stream is capturing")
        try:
            time.sleep(0.02)
            yield
        finally:
            self._busy.release()

    def graph(self, graph, pool, stream, capture_error_mode):
        return self.alone()

    def synchronize(self, device):
        with self.alone():
            pass


@pytest.fixture
def cuda(monkeypatch):
    made = Cuda()
    monkeypatch.setattr(device_graphs.torch, "cuda", made)
    monkeypatch.setattr(device_graphs, "_renewals", device_graphs.Counter())
    monkeypatch.setattr(compat, "end_failed_capture", lambda *_: made.log.append("end"))
    return made


def test_one_captures_at_a_time(cuda):
    """Servers load several models, and each captures when its thread comes to it."""
    devices = [CudaGraphs(torch.device("cuda", 0)) for _ in range(4)]

    def capture(device):
        results, _ = device.capture(lambda: [None])
        device.new_pool()
        return results

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(capture, devices)) == [[None]] * 4


def test_a_capture_that_fails_is_taken_back_and_counted_for_all(cuda, monkeypatch):
    taken = []
    monkeypatch.setattr(
        CudaGraphs, "_generator", lambda _: type("Generator", (), {
            "clone_state": lambda self: "another",
            "graphsafe_set_state": lambda self, state: taken.append(state),
        })(),
    )  # fmt: skip
    one, two, third = (CudaGraphs(torch.device("cuda", index)) for index in (0, 0, 1))

    def fails():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        one.capture(fails)
    assert cuda.log == ["stream", "end"]
    assert taken == ["another"]
    assert [each.renewals() for each in (one, two, third)] == [1, 1, 0]


def test_a_stream_waits_for_another_one_only(cuda):
    device = CudaGraphs(torch.device("cuda", 0))
    assert device.behind(None) is cuda
    assert device.behind(cuda) is cuda
    assert not cuda.log
    assert device.behind("other") is cuda
    assert cuda.log == [("wait", "other")]
