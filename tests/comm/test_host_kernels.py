"""The C kernels of int8 blocks, beside the same code in tensors; and memory that is used again."""

import subprocess
from unittest import mock

import pytest
import torch
from torch import nn

import magi_train
from magi_train import CommConfig, Config
from magi_train.comm.codecs import host_kernels, two_shot
from magi_train.comm.host_memory import KEPT_ROUNDS, HostMemory
from magi_train.core import compat
from tests.ranks import values

FORMAT = two_shot.FORMATS["int8"]
CPU = torch.device("cpu")


@pytest.fixture
def kernels():
    """Return the kernels, which every machine with a compiler must have."""
    found = host_kernels.kernels()
    if found is None and any(map(host_kernels.shutil.which, ("g++", "gcc", "clang"))):
        pytest.fail("there is a compiler, but no kernels")
    return found or pytest.skip("no compiler")


def coded(x, residual, scale):
    """Return what is encoded, what rounding took away, and what is decoded and added to ones."""
    rows, elements = x.shape
    wire = torch.zeros(rows, FORMAT.row_bytes(elements) + 4, dtype=torch.uint8)
    rest, out, total = torch.empty_like(x), torch.empty_like(x), torch.ones(1, elements)
    FORMAT.encode(x, wire, HostMemory(), residual, scale, rest)
    FORMAT.decode(wire, out)
    FORMAT.add(wire[1:], total, HostMemory())
    return wire, rest, out, total


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("kept", [False, True])
def test_kernels_and_tensors_agree(kept, scale, kernels):
    """Bit for bit in what travels; torch fuses multiplication and addition in the rest."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3 * 256, generator=g) * torch.logspace(-40, 4, 3).repeat_interleave(256)
    x[0, :256], x[1, 5] = 0, 1e-44
    residual = torch.randn(2, 3 * 256, generator=g) if kept else None
    used = mock.Mock(return_value=kernels)
    with mock.patch.object(two_shot, "kernels", used):
        built = coded(x, residual, scale)
    assert used.call_count == 3, "to encode, to decode and to add"
    with mock.patch.object(two_shot, "kernels", return_value=None):
        plain = coded(x, residual, scale)
    assert torch.equal(built[0], plain[0]), "what travels"
    assert torch.equal(built[2], plain[2]), "what is decoded"
    largest = built[2].abs().view(2, -1, 256).amax(2).repeat_interleave(256, 1)
    for i, room in ((1, largest), (3, 1 + largest[1])):
        assert ((built[i] - plain[i]).abs() <= torch.finfo(torch.float32).eps * room).all()
    assert built[1].abs().max() > 0


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
@pytest.mark.parametrize("built", [True, False])
def test_what_is_not_finite_is_seen_in_the_scale(built, bad, kernels):
    x = torch.ones(2, 512)
    x[1, 300] = bad
    with mock.patch.object(two_shot, "kernels", return_value=kernels if built else None):
        wire, _, out, _ = coded(x, None, 1.0)
    assert FORMAT.scales(wire, 512).isfinite().tolist() == [[True, True], [True, False]]
    assert out[0].isfinite().all()
    assert not out[1, 256:].isfinite().any()


class Wrong:
    """Kernels with a defect: the rest is off, or all is rounded down and the rest too large."""

    def __init__(self, right, defect):
        self.right, self.defect, self.decode = right, defect, right.decode

    def encode(self, x, residual, factor, rest, values, scales, tiny):
        self.right.encode(x, residual, factor, rest, values, scales, tiny)
        rest += scales.repeat_interleave(host_kernels.BLOCK)
        if self.defect == "values":
            values -= 1


@pytest.mark.parametrize("defect", ["rest", "values"])
def test_kernels_with_a_defect_are_not_used(defect, kernels):
    host_kernels._try(kernels)
    with pytest.raises(ValueError, match="does not decode what it encodes"):
        host_kernels._try(Wrong(kernels, defect))


def test_kernels_are_built_beside_those_of_another_source(tmp_path, kernels):
    (tmp_path / "magi_train").mkdir()
    host_kernels.kernels.cache_clear()
    try:
        with mock.patch.object(compat, "cache_dir", return_value=str(tmp_path)):
            assert host_kernels.kernels() is not None
    finally:
        host_kernels.kernels.cache_clear()
    (made,) = (tmp_path / "magi_train").iterdir()
    assert made.suffix == ".so"


def test_without_a_compiler_tensors_do_it(tmp_path):
    failed = subprocess.CalledProcessError(1, "cc")
    places = mock.patch.object(compat, "cache_dir", return_value=str(tmp_path))
    host_kernels.kernels.cache_clear()
    try:
        with places, mock.patch.object(host_kernels.subprocess, "run", side_effect=failed):
            assert host_kernels.kernels() is None
            _, rest, out, _ = coded(torch.ones(2, 256), None, 1.0)
        assert (out + rest == 1).all()
    finally:
        host_kernels.kernels.cache_clear()


def test_memory_is_used_again_once_nobody_holds_it():
    memory = HostMemory()
    first = memory.empty(4, 8, dtype=torch.float32, device=CPU)
    where, view = first.data_ptr(), first[1:, 2]
    first.fill_(7)
    del first
    second = memory.empty(16, dtype=torch.int64, device=CPU)
    second.zero_()
    assert second.data_ptr() != where
    assert (view == 7).all(), "a view keeps its memory"
    del view
    third = memory.empty(32, dtype=torch.float32, device=CPU)
    assert third.data_ptr() == where
    assert third.is_contiguous()


def test_memory_that_is_no_longer_asked_for_is_let_go():
    """What a user kept of many steps, and sizes of another plan; what each step needs stays."""
    memory = HostMemory()
    kept = [memory.empty(32, device=CPU) for _ in range(20)]
    where = {each.data_ptr() for each in kept}
    del kept
    for _ in range(2 * KEPT_ROUNDS):
        pair = [memory.empty(32, device=CPU), memory.empty(32, device=CPU)]
        assert {each.data_ptr() for each in pair} < where
        memory.empty(64, device=CPU)
        del pair
        memory.end_round()
    assert {size: len(storages) for size, storages in memory._kept.items()} == {128: 2, 256: 1}
    for _ in range(KEPT_ROUNDS - 1):
        memory.empty(32, device=CPU)
        memory.end_round()
    assert {size: len(storages) for size, storages in memory._kept.items()} == {128: 2, 256: 1}
    memory.empty(32, device=CPU)
    memory.end_round()
    assert {size: len(storages) for size, storages in memory._kept.items()} == {128: 1}


def keeps_gradients_of_many_steps(rank, _, comm):
    """Return how many pieces of memory each of ours has while the user has 30 gradients."""
    model = nn.Linear(64, 64)
    model = magi_train.prepare(model, config=Config(tier="eager", comm=comm))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kept = []
    for _ in range(30):
        model(torch.ones(2, 64)).square().mean().backward()
        kept += [p.grad for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    reducer = model._magi_runtime.reducer
    owners = (reducer, reducer.compressor, reducer.outer)
    memories = [o._memory for o in owners if o is not None]
    return [sum(map(len, memory._kept.values())) for memory in memories], memories[-1]._round


@pytest.mark.parametrize("more", [{}, {"compression": "int8"}, {"outer_steps": 1}])
def test_what_a_user_keeps_of_many_steps_is_not_kept_by_us(more, two_ranks):
    for pieces, rounds in values(two_ranks(keeps_gradients_of_many_steps, CommConfig(**more))):
        assert max(pieces) <= 20
        assert rounds >= 29, "of each step"


def test_memory_that_others_can_read_is_not_used_again():
    """Shared with another process, as in a queue, or held as a storage."""
    memory = HostMemory()
    first = memory.empty(32, device=CPU).share_memory_()
    where = first.data_ptr()
    del first
    second = memory.empty(32, device=CPU)
    assert second.data_ptr() != where
    where, held = second.data_ptr(), second.untyped_storage()
    del second
    third = memory.empty(32, device=CPU)
    assert third.data_ptr() != where
    assert held.data_ptr() == where
