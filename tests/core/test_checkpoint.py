"""Checkpoints of plain modules; of sharded ones: tests/distributed/test_fully_shard.py."""

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from magi_train import MagiError, checkpoint, load_checkpoint, plain_state_dict, save_checkpoint
from tests.ranks import values

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def filled(number):
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, number)
    return module


def number_in(folder):
    return float(plain_state_dict(folder)["weight"].mean())


SGD = functools.partial(torch.optim.SGD, momentum=0.9, dampening=0.5)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.ASGD, SGD])
def test_saving_before_the_first_step_changes_nothing(kind, tmp_path):
    def trained(folder):
        torch.manual_seed(0)
        module = nn.Linear(4, 4)
        optimizer = kind(module.parameters(), lr=0.1)
        if folder is not None:
            save_checkpoint(folder, module, optimizer)
            assert not optimizer.state
            load_checkpoint(folder, module, optimizer)
            assert not optimizer.state
        module(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        return module

    want, got = trained(None), trained(tmp_path / "first")
    assert all(map(torch.equal, got.parameters(), want.parameters()))


class Late(nn.Module):
    """`late` has a gradient from the fourth step on, `never` has none."""

    def __init__(self):
        super().__init__()
        self.first, self.late, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def train_on(self, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            h = self.first(torch.full((2, 4), step + 1.0))
            (self.late(h) if step >= 3 else h).square().sum().backward()
            optimizer.step()


def late():
    torch.manual_seed(0)
    module = Late()
    return module, torch.optim.AdamW(module.parameters(), lr=0.1)


def saved_and_continued(folder, module, optimizer, saved_at, end):
    """Train, save on the way; return the weights at the end."""
    module.train_on(optimizer, range(saved_at))
    save_checkpoint(folder, module, optimizer)
    module.train_on(optimizer, range(saved_at, end))
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("saved_at", [2, 4])
@pytest.mark.parametrize("before", [[], [0], [4]], ids=["fresh", "less", "more"])
def test_parameters_without_optimizer_state_have_none_afterwards(saved_at, before, tmp_path):
    want = saved_and_continued(tmp_path / "run", *late(), saved_at, 6)
    module, optimizer = late()
    module.train_on(optimizer, before)  # leaves gradients
    load_checkpoint(tmp_path / "run", module, optimizer)
    with_state = {n for n, p in module.named_parameters() if p in optimizer.state}
    assert with_state == {n for n, _ in module.named_parameters() if n[0] in "fl"[: saved_at // 2]}
    assert (module.first.weight.grad is not None) == bool(before)
    module.train_on(optimizer, range(saved_at, 6))
    assert all(map(torch.equal, module.parameters(), want))


@pytest.mark.parametrize("before", [[], [0]], ids=["fresh", "running"])
def test_state_of_frozen_parameters_is_there_when_they_are_trained_again(before, tmp_path):
    want = saved_and_continued(tmp_path / "run", *late(), 2, 5)
    module, optimizer = late()
    module.train_on(optimizer, before)
    module.first.requires_grad_(False)
    load_checkpoint(tmp_path / "run", module, optimizer)
    assert not module.first.weight.requires_grad
    module.first.requires_grad_(True)
    module.train_on(optimizer, range(2, 5))
    assert all(map(torch.equal, module.parameters(), want))


def compiled_child(module):
    module.first = torch.compile(module.first, backend="eager")


def checkpointed_child(module):
    module.first = checkpoint_wrapper(module.first)


@pytest.mark.parametrize("wrap", [compiled_child, checkpointed_child])
def test_state_of_wrapped_modules_is_read(wrap, tmp_path):
    """Torch leaves the wrapper out of names in checkpoints."""

    def made():
        module, optimizer = late()
        wrap(module)
        return module, optimizer

    want = saved_and_continued(tmp_path / "run", *made(), 2, 4)
    module, optimizer = made()
    load_checkpoint(tmp_path / "run", module, optimizer)
    module.train_on(optimizer, range(2, 4))
    assert all(map(torch.equal, module.parameters(), want))


def test_optimizer_state_of_another_model_is_an_error(tmp_path):
    module, optimizer = late()
    module.train_on(optimizer, range(2))
    save_checkpoint(tmp_path / "run", module, optimizer)
    other = nn.Linear(2, 2)
    with pytest.raises(MagiError, match=r"state of other parameters.* first\.\w+\."):
        load_checkpoint(tmp_path / "run", other, torch.optim.AdamW(other.parameters()))


def test_an_optimizer_of_some_parameters_keeps_its_state_if_loading_fails(tmp_path, monkeypatch):
    module, optimizer = late()
    module.train_on(optimizer, range(2))
    save_checkpoint(tmp_path / "run", module, optimizer)
    some = torch.optim.AdamW(module.first.parameters(), lr=0.1)
    module.train_on(some, range(3))
    before = {p: dict(state) for p, state in some.state.items()}
    monkeypatch.setattr(checkpoint, "get_optimizer_state_dict", lambda *_: 1 / 0)
    some.state.pop(module.first.bias)  # so that torch has to make state
    before.pop(module.first.bias)
    with pytest.raises(ZeroDivisionError):
        load_checkpoint(tmp_path / "run", module, some)
    assert {p: dict(state) for p, state in some.state.items()} == before
    assert all(p.grad is not None for p in module.first.parameters())


def test_what_lies_in_the_place_of_the_folder_is_replaced_time_after_time(tmp_path):
    """A file or a link that another way of saving left there, on its own or set aside."""
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("an earlier kind of checkpoint")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in ("file", "link", "nowhere"):
        for number in (1, 2, 3):
            save_checkpoint(tmp_path / name, filled(number))
            assert number_in(tmp_path / name) == number
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "nowhere", "other"]


def cannot_rename(rank, _, folder):
    save_checkpoint(folder, filled(1))
    own = Path.rename

    def rename(self, target):
        if self.name == ".run.partial":
            raise PermissionError(13, "Permission denied")
        return own(self, target)

    Path.rename = rename
    try:
        save_checkpoint(folder, filled(2))
    except MagiError as error:
        return str(error)
    finally:
        Path.rename = own


def test_a_rename_that_fails_on_rank_0_is_raised_on_all_ranks(tmp_path, two_ranks):
    folder = tmp_path / "run"
    for said in values(two_ranks(cannot_rename, folder)):
        assert f"could not be renamed to {folder}: on rank 0, PermissionError: [Errno 13]" in said
    assert number_in(folder) == 1, "what was there before"
    assert number_in(tmp_path / ".run.partial") == 2


class Remembers(nn.Linear):
    """Holds more than tensors, and adds to its state by a hook."""

    def __init__(self, seen=()):
        super().__init__(2, 2)
        self.seen = seen
        self.register_state_dict_post_hook(lambda _, d, p, *__: d.update({f"{p}more": [1]}))
        self.register_load_state_dict_pre_hook(lambda _, d, p, *__: d.pop(f"{p}more"))

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, seen):
        self.seen = seen


@pytest.mark.parametrize(
    "seen",
    [{0: [1, 2, 3], "a": {"b": torch.ones(2)}}, [torch.ones(1), 2], (1,), 5, {}, torch.ones(3)],
    ids=["mapping", "list", "tuple", "number", "nothing", "tensor"],
)
def test_extra_state_and_what_hooks_add_come_back_as_they_were(seen, tmp_path):
    """Into a module that has seen nothing; torch would write a mapping's keys as text."""
    module, other, plain = Remembers(seen), nn.Sequential(Remembers()), Remembers()
    save_checkpoint(tmp_path / "saved", nn.Sequential(module))
    load_checkpoint(tmp_path / "saved", other)
    nn.Sequential(plain).load_state_dict(plain_state_dict(tmp_path / "saved"))
    for loaded in (other[0], plain):
        assert repr(loaded.seen) == repr(seen)
        assert torch.equal(loaded.weight, module.weight)


def test_extra_state_that_torch_wrote_in_parts_is_put_together(tmp_path):
    """As Lightning's folders hold it, and ours of an earlier version did."""
    module, other = Remembers({"a": [torch.ones(1), {"b": 2}], "c": 3}), Remembers()
    held = {name: value for name, value in module.state_dict().items()}
    dcp.save({"model": held}, checkpoint_id=tmp_path / "saved", no_dist=True)
    load_checkpoint(tmp_path / "saved", other)
    assert repr(other.seen) == repr(plain_state_dict(tmp_path / "saved")["_extra_state"])
    assert repr(other.seen) == repr(module.seen)


def test_a_checkpoint_of_something_else_is_refused_by_name(tmp_path):
    """Without its optimizer, with a layer more, with a layer less, with another shape."""
    saved = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    save_checkpoint(tmp_path / "saved", saved)
    optimizer = torch.optim.AdamW(saved.parameters())
    with pytest.raises(MagiError, match=r"saved was saved without optimizer: load it without"):
        load_checkpoint(tmp_path / "saved", saved, optimizer)
    with pytest.raises(MagiError, match=r"saved holds 1\.bias, which Sequential has not"):
        load_checkpoint(tmp_path / "saved", saved[:1])
    with pytest.raises(MagiError, match=r"does not fit .* Missing key .*2\.weight"):
        load_checkpoint(tmp_path / "saved", nn.Sequential(*saved, nn.Linear(2, 2)))
    with pytest.raises(MagiError, match=r"does not fit .* Size mismatch .*0\.weight"):
        load_checkpoint(tmp_path / "saved", nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
