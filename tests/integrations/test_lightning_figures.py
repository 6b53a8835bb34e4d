"""Lightning: the run's record beside the trainer's files, and figures for its loggers."""

import pytest
import torch

from magi_train import Config, Report


def fit(folder, **options):
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers.logger import DummyLogger

    from magi_train.integrations.lightning import strategy_class

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, _):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class Kept(DummyLogger):
        def __init__(self):
            super().__init__()
            self.rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append((step, dict(metrics)))

    kept = Kept()
    strategy = strategy_class("lightning.pytorch")(config=Config(tier="eager"), **options)
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_epochs=1, logger=kept,
        log_every_n_steps=2, default_root_dir=folder, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.ones(32, 4), batch_size=4))
    return kept.rows


@pytest.mark.filterwarnings("ignore")  # Lightning's, about toy sizes
def test_figures_reach_the_logger_when_asked(tmp_path):
    rows = [(step, m) for step, m in fit(tmp_path, log_figures=True) if "magi/step_seconds" in m]
    assert [step for step, _ in rows] == [2, 4, 6]
    assert all(m["magi/step_seconds"] > 0 for _, m in rows)
    assert all(m["magi/peak_memory_gib"] > 0 for _, m in rows)
    found = Report.load(tmp_path)
    assert found.steps.count == 7
    assert found.steps.samples == 24
    assert len(found.steps.loss) == 8


@pytest.mark.filterwarnings("ignore")
def test_the_logger_is_left_alone_unless_asked(tmp_path):
    rows = fit(tmp_path, report_path=None)
    assert not any(name.startswith("magi/") for _, m in rows for name in m)
    assert not (tmp_path / "magi_report.json").exists()
