"""Half precision under Lightning, which its CPU does not have, against strategy="ddp"."""

import pytest
import torch

from tests.close import difference, tolerance
from tests.integrations.lightning_features import dataset, model_class

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def train(strategy, precision, folder):
    import lightning.pytorch as pl

    pl.seed_everything(3, verbose=False)
    model = model_class(pl)()
    trainer = pl.Trainer(
        strategy=strategy, precision=precision, accelerator="gpu", devices=1, max_epochs=2,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, use_distributed_sampler=False,
        gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(dataset(), 4))
    return {n: p.detach().float() for n, p in model.state_dict().items()}


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "bf16-mixed"])
def test_half_precision(tmp_path, precision):
    theirs = train("auto", precision, tmp_path)  # one device: a group would outlive the test
    ours = train("magi", precision, tmp_path)
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    assert difference(ours, theirs) < tolerance(dtype, 64)
