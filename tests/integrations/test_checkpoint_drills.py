"""Failures around checkpoints under Lightning: a full disk, a file cut short, SIGTERM."""

import os
import pickle
import resource
import signal

import pytest
import torch

import magi_train
from magi_train import Config, MagiError
from magi_train.integrations.options import named_if_damaged
from tests.integrations import lightning_features as features
from tests.models import Small
from tests.ranks import run_ranks, values


def rank_0_is_out_of_disk(rank, _, path):
    feature = features.Feature("magi", os.path.dirname(path))
    model, trainer = feature.Model(), feature.trainer(max_epochs=1)

    class Saves(feature.pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2 and rank == 0:  # from now on it cannot write
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            try:
                trainer.save_checkpoint(path)
            finally:
                if rank == 0:
                    unlimited = resource.RLIM_INFINITY
                    resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))

    trainer.callbacks.append(Saves())
    trainer.fit(model, features.loader())


@pytest.mark.full
def test_rank_0_out_of_disk_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    first, second = run_ranks(rank_0_is_out_of_disk, str(path))
    assert "File too large" in first.error
    assert "rank 0 failed" in second.error or "Connection closed" in second.error
    assert torch.load(path, weights_only=False)["global_step"] == 1


@pytest.mark.full
def test_a_file_cut_short_is_refused_by_name(tmp_path):
    feature = features.Feature("magi", tmp_path, devices=1)
    model, trainer = feature.Model(), feature.trainer(max_epochs=1, use_distributed_sampler=False)
    trainer.fit(model, features.loader())
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    whole = path.read_bytes()
    for size in (len(whole) // 2, 0):
        path.write_bytes(whole[:size])
        again = feature.trainer(max_epochs=2, use_distributed_sampler=False)
        with pytest.raises(MagiError, match=r"last\.ckpt cannot be read as a checkpoint: it"):
            again.fit(feature.Model(), features.loader(), ckpt_path=path)


def test_a_folder_cut_short_is_refused_by_name(tmp_path):
    model = magi_train.prepare(Small(), config=Config(lowering="aot_eager"))
    magi_train.save_checkpoint(tmp_path / "run", model)
    (file,) = (tmp_path / "run").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-100])
    for read in (magi_train.load_checkpoint, lambda f, _: magi_train.plain_state_dict(f)):
        with pytest.raises(MagiError, match=f"{file.name} has .* the checkpoint was cut short"):
            read(tmp_path / "run", model)
    file.unlink()
    with pytest.raises(MagiError, match=f"{file.name} is missing"):
        magi_train.plain_state_dict(tmp_path / "run")
    (tmp_path / "run" / ".metadata").write_bytes(b"")
    with pytest.raises(MagiError, match="metadata was cut short"):
        magi_train.plain_state_dict(tmp_path / "run")


def told_to_end(rank, _, folder):
    from lightning.pytorch.callbacks import OnExceptionCheckpoint

    feature = features.Feature("magi", folder)
    model = feature.Model()

    class Ends(feature.pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:  # as SLURM and torchrun do, on every rank
                os.kill(os.getpid(), signal.SIGTERM)

    save = OnExceptionCheckpoint(folder, "ended")
    trainer = feature.trainer(max_epochs=3, callbacks=[Ends(), save], enable_checkpointing=True)
    try:
        trainer.fit(model, features.loader())
    except BaseException as error:
        ended = type(error).__name__
    return ended, trainer.global_step


@pytest.mark.full
def test_sigterm_saves_and_leaves_on_all_ranks(tmp_path):
    for ended, step in values(run_ranks(told_to_end, str(tmp_path))):
        assert ended == "SIGTERMException"
        assert 2 <= step < 9
    feature = features.Feature("magi", tmp_path, devices=1)
    again = feature.trainer(max_epochs=3, use_distributed_sampler=False)
    again.fit(feature.Model(), features.loader(), ckpt_path=tmp_path / "ended.ckpt")
    assert again.global_step > step


def test_a_file_that_was_written_whole_is_not_called_damaged(tmp_path):
    """Its reader may refuse a class in it, or lack the device it was on."""
    whole, short = tmp_path / "whole.ckpt", tmp_path / "short.ckpt"
    torch.save({"path": tmp_path}, whole)
    short.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(pickle.UnpicklingError), named_if_damaged(whole):
        torch.load(whole, weights_only=True)
    damaged = pytest.raises(MagiError, match=r"short.ckpt cannot be read .* cut short or damaged")
    with damaged, named_if_damaged(short):
        torch.load(short, weights_only=True)
