"""A user's script: trains a small LightningModule under the strategy it is given. No magi import.

Usage: lightning_script.py NAMESPACE STRATEGY MODE[,MODE] DEVICES OUTPUT

What several modes leave is one list; on one device, as others start processes.

With "A+B" as the strategy, mode "resume" trains the first half under A and the second under B.
"sharded" and "int8" are magi with a setting, so they have to import magi_train.
"""

import importlib
import json
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")


namespace, strategy, modes, devices, output = sys.argv[1:]
mode = ""
loaded = []  # for which parameters a checkpoint gave residuals
pl = importlib.import_module(namespace)


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.unused = nn.Linear(2, 2)
        self.losses = []
        self.automatic_optimization = mode != "manual"

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        if mode == "breaks":
            torch._dynamo.graph_break()
        loss = F.cross_entropy(logits, y)
        self.log("accuracy", (logits.argmax(-1) == y).float().mean(), on_step=True)
        self.log_dict({"loss": loss, "twice": 2 * loss}, on_step=True)
        if mode == "manual":
            self.by_hand(loss, x)
        return loss

    def by_hand(self, loss, x):
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        second.zero_grad()
        self.manual_backward(self(x).square().mean())
        second.step()

    def validation_step(self, batch, batch_idx):
        self.log("validation", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        if mode == "manual":
            parts = (self.a, self.b)
            return [torch.optim.SGD(p.parameters(), lr=0.1, momentum=0.5) for p in parts]
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


class Logs(pl.loggers.Logger):
    """Keeps what it is given."""

    name, version = "kept", "0"

    def __init__(self):
        super().__init__()
        self.seen = []

    def log_hyperparams(self, *_):
        pass

    def log_metrics(self, metrics, step=None):
        self.seen += [(k, float(v)) for k, v in metrics.items() if k != "epoch"]


class Losses(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, *_):
        if isinstance(outputs, dict) and "loss" in outputs:
            module.losses.append(float(outputs["loss"]))


def chosen(name):
    if name not in ("sharded", "int8"):
        return name
    from magi_train import CommConfig, Config
    from magi_train.comm.reducer import Reducer
    from magi_train.integrations.lightning import strategy_class

    if name == "sharded":
        return strategy_class(namespace)(config=Config(shard_optimizer=True))
    load = Reducer.load_compression_state

    def load_and_note(self, state):
        loaded.append(sorted(n for n, s in state.items() if s["residual"].any()))
        load(self, state)

    Reducer.load_compression_state = load_and_note
    return strategy_class(namespace)(config=Config(comm=CommConfig(compression="int8")))


def main():
    torch.set_num_threads(1)
    results = [train(each) for each in modes.split(",")]
    if results[0] is not None:
        Path(output).write_text(json.dumps(results if len(results) > 1 else results[0]))


def train(this):
    """Train in this mode; return what rank 0 has to tell."""
    global mode
    mode = this
    torch._dynamo.reset()
    pl.seed_everything(3, verbose=False)
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(44, 8, generator=g), torch.randint(0, 4, (44,), generator=g)
    )  # the last batch is short

    def trainer(epochs, logs, name):
        return pl.Trainer(
            strategy=chosen(name), accelerator="cpu", devices=int(devices), max_epochs=epochs,
            logger=logs, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, log_every_n_steps=1, num_sanity_val_steps=1,
            accumulate_grad_batches=4 if mode == "accumulate" else 1,
            gradient_clip_val=None if mode == "manual" else 0.5,
            default_root_dir=Path(output).parent,
        )  # fmt: skip

    loader, held_out = DataLoader(data, 6), DataLoader(data, 8)
    logs, model = Logs(), Model()
    halves = strategy.split("+")
    fit = trainer({"four_epochs": 4, "resume": 2}.get(mode, 2), logs, halves[0])
    fit.callbacks.append(Losses())
    fit.fit(model, loader, held_out)
    strict = None
    if mode == "resume":
        path = Path(output).with_suffix(".ckpt")
        fit.save_checkpoint(path)
        plain = Model()
        checkpoint = torch.load(path, weights_only=False)
        state = checkpoint["state_dict"]
        strict = not any(plain.load_state_dict(state, strict=True))
        model = Model()
        fit = trainer(4, logs, halves[-1])
        fit.callbacks.append(Losses())
        fit.fit(model, loader, held_out, ckpt_path=path)
    if not fit.is_global_zero:
        return None
    result = {
        "strategy": type(fit.strategy).__name__,
        "weights": {k: v.flatten().tolist() for k, v in model.state_dict().items()},
        "logged": logs.seen,
        "losses": model.losses,
        "strict_load": strict,
        "carried": loaded,
        "extra": sorted(checkpoint.keys() & {"magi_compression"}) if strict else None,
    }
    if getattr(fit.strategy, "runtime", None) is not None:  # spawned: in the children
        report = fit.strategy.report
        result["report"] = {"tier": report.tier, "reason": report.reason}
    return result


if __name__ == "__main__":
    main()
