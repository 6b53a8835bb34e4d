"""Weights from a state_dict, from files, from Lightning's and from distributed checkpoints."""

import pytest
import torch
from torch import nn

import magi_train
from magi_train.core.errors import ExportError
from magi_train.exporter import sources
from tests.exporter.nets import Heads


@pytest.fixture
def trained():
    torch.manual_seed(3)
    return Heads()


def test_state_dicts_and_files(trained, tmp_path):
    x, path = torch.randn(2, 3, 8), tmp_path / "model.pt2"
    wanted = trained(x)
    state = trained.state_dict()
    prefixed = {f"module.{k}": v for k, v in state.items()}
    torch.save(state, tmp_path / "plain.pt")
    lightning = {"state_dict": {f"net.{k}": v for k, v in state.items()} | {"other": torch.ones(1)}}
    torch.save({**lightning, "epoch": 3, "pytorch-lightning_version": "2"}, tmp_path / "a.ckpt")
    for source in (prefixed, tmp_path / "plain.pt", tmp_path / "a.ckpt"):
        magi_train.export(source, (x,), path, model=Heads)
        torch.testing.assert_close(magi_train.load(path)(x)["scores"], wanted["scores"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_distributed_checkpoint(trained, tmp_path):
    from torch.distributed import checkpoint

    state = {"model": trained.state_dict(), "step": torch.tensor(1)}
    checkpoint.save(state, checkpoint_id=tmp_path / "step_1", no_dist=True)
    loaded = sources.load_module(tmp_path / "step_1", Heads())
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in trained.state_dict().items())
    with pytest.raises(ExportError, match=r"under \['model\.q\.', 'model\.v\.'\]; pass the state"):
        sources.load_module(tmp_path / "step_1", nn.Linear(8, 8))
    with pytest.raises(ExportError, match="lacks 1 of 1 weights"):
        sources.load_module(tmp_path / "step_1", nn.ParameterDict({"w": torch.ones(1)}))
    wider = Heads()
    wider.q = nn.Linear(8, 9)
    with pytest.raises(ExportError, match=r"(?s)does not fit Heads: .*Size mismatch"):
        sources.load_module(tmp_path / "step_1", wider)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="no distributed checkpoint"):
        sources.load_module(tmp_path / "empty", Heads())


def test_what_does_not_fit_is_said(trained, tmp_path):
    state = trained.state_dict()
    with pytest.raises(ExportError, match="holds weights and no code; pass model="):
        magi_train.export(state, (torch.ones(1, 8),), tmp_path / "model.pt2")
    with pytest.raises(ExportError, match=r"must be or make a torch\.nn\.Module, got dict"):
        sources.load_module(state, dict)
    with pytest.raises(ExportError, match=r"lacks 1 of 6 weights, the first 'v\.weight'"):
        sources.load_module({k: v for k, v in state.items() if k != "v.weight"}, Heads)
    with pytest.raises(ExportError, match=r"(?s)does not fit Heads: .*size mismatch"):
        sources.load_module({**state, "v.weight": torch.ones(2, 2)}, Heads)
    with pytest.raises(ExportError, match="does not exist"):
        sources.load_module(tmp_path / "missing.pt", Heads)
    torch.save(trained, tmp_path / "code.pt")  # would run code when read
    with pytest.raises(ExportError, match="cannot be read as weights"):
        sources.load_module(tmp_path / "code.pt", Heads)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ExportError, match="holds a list"):
        sources.load_module(tmp_path / "list.pt", Heads)
    for wrong in (5, lambda x: x):
        with pytest.raises(ExportError, match="takes a module, or weights as a state_dict"):
            sources.load_module(wrong, Heads)
    assert not (tmp_path / "model.pt2").exists()
