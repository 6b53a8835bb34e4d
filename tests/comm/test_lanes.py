"""Exchanges on a stream beside the backward's: who waits, and how long memory is held."""

import contextlib

import pytest
import torch

from magi_train.comm.codecs import lanes


class Stream:
    """A CUDA stream as far as an exchange knows one; also its own event."""

    device = torch.device("cuda", 0)

    def __init__(self):
        self.waiting = []

    def wait_stream(self, other):
        self.waiting.append(other)

    def record_event(self):
        return self

    def wait(self, stream):
        stream.waiting.append(self)


class Block:
    """A tensor as far as an exchange knows one."""

    device = Stream.device

    def __init__(self, used_on):
        self.used_on = used_on

    def record_stream(self, stream):
        self.used_on.append(stream)


@pytest.fixture
def current(monkeypatch):
    """A list of the current stream, and the stream of exchanges."""
    streams = [Stream()]
    side = Stream()
    monkeypatch.setattr(lanes, "_side_stream", lambda _: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    return streams, side


@pytest.mark.parametrize("ends", ["waited for", "waited for elsewhere", "never waited for"])
def test_memory_goes_back_to_its_stream_when_that_may_write_it(current, ends):
    streams, side = current
    used_on = []
    exchange = lanes.StreamExchange(lambda: None, Block(used_on))
    assert side.waiting == [streams[0]]
    if ends == "waited for elsewhere":
        streams.append(Stream())
    if ends != "never waited for":
        exchange.wait()
        assert streams[-1].waiting == [side]
    del exchange
    assert used_on == ([] if ends == "waited for" else [side]), "the allocator waits for `side`"
