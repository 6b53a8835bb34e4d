"""A device on the CPU that "replays" by running again, into the memory of the first results.

As on a real device a replay overwrites whatever was handed out before, so every hazard shows as
wrong numbers; and what was freed by a backward is gone. Capturing has no effect on the random
numbers and the buffers that it is told about.
"""

import contextlib
import itertools

import torch


class FakeGraphs:
    """See magi_train.core.device_graphs.DeviceGraphs.

    Attributes:
        buffers: Restored after a capture, which must have no effect.
        now: Milliseconds; a test moves it.
        fail: Raised by the captures that follow, after they have run.
        free: Bytes of memory beside the graphs, which take none.
    """

    def __init__(self, device=None, buffers=()):
        self.device = torch.device("cpu")
        self.buffers, self.now, self.fail = list(buffers), 0.0, None
        self.captures = self.replays = self.pools = self.renewed = 0
        self.capturing = False
        self.current, self.free = 0, 0

    def capture(self, function):
        before = [b.clone() for b in self.buffers]
        with torch.random.fork_rng():
            results = function()
        for b, old in zip(self.buffers, before, strict=True):
            b.data.copy_(old)
        self.captures += 1
        if self.fail:
            self.renewed += 1
            raise self.fail
        for x in results:
            if x is not None:
                x.data.fill_(
                    7
                )  # a capture computes nothing, and writes nothing as autograd sees it

        made_at = self.renewed

        def replay():
            if made_at != self.renewed:
                raise RuntimeError("Offset increment outside graph capture")
            self.replays += 1
            for old, new in zip(results, function(), strict=True):
                if old is not None:
                    old.data.copy_(new.detach())

        return results, replay

    def busy(self):
        return self.capturing

    def stream(self):
        return self.current

    def renewals(self):
        return self.renewed

    def mark(self):
        return self.now

    def milliseconds(self, marks):
        return [b - a for a, b in itertools.pairwise(marks)]

    def reserved(self):
        return 0

    def room(self, pools):
        return self.free

    def random_state(self):
        return torch.get_rng_state()

    @contextlib.contextmanager
    def randomly(self, state):
        with torch.random.fork_rng():
            torch.set_rng_state(state)
            yield

    def new_pool(self):
        self.pools += 1
