"""One small training for each feature of Lightning, under the strategy that is asked for."""

import importlib
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

PLAIN = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}


def strategy_named(name, pl):
    """Return what Trainer takes; ours without generated code, which is slow to start."""
    from magi_train import Config
    from magi_train.integrations.lightning import strategy_class

    if name == "ddp":
        return pl.strategies.DDPStrategy(find_unused_parameters=False)
    return strategy_class(pl.__name__)(config=Config(lowering="aot_eager"), report_path=None)


def model_class(pl):
    class Model(pl.LightningModule):
        def __init__(self, batch_size=4, lr=0.1):
            super().__init__()
            self.batch_size, self.lr = batch_size, lr
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
            self.logged_at_end = {}

        def forward(self, x):
            return self.b(torch.tanh(self.a(x.to(self.a.weight.dtype))))

        def loss(self, batch):
            return F.cross_entropy(self(batch[0]).float(), batch[1])

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("train", loss, sync_dist=True, on_epoch=True)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("validation", self.loss(batch), sync_dist=True)

        def test_step(self, batch, batch_idx):
            self.log("test", self.loss(batch), sync_dist=True)

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)

        def train_dataloader(self):
            return DataLoader(dataset(), self.batch_size)

    return Model


def dataset():
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(24, 8, generator=g), torch.randint(0, 4, (24,), generator=g))


def loader(size=4):
    return DataLoader(dataset(), size)


def outcome(model, trainer, **more):
    numbers = {n: float(v) for n, v in trainer.callback_metrics.items()}
    weights = {n: p.detach().clone() for n, p in model.state_dict().items()}
    tier = trainer.strategy.report.tier if hasattr(trainer.strategy, "report") else ""
    return {"weights": weights, "numbers": numbers, "tier": tier, **more}


class Feature:
    """What a feature's function needs: the Lightning, a model's class, and trainers."""

    def __init__(self, strategy, folder, namespace="lightning.pytorch", devices=2):
        warnings.simplefilter("ignore")
        self.pl = importlib.import_module(namespace)
        self.strategy, self.folder, self.devices = strategy, folder, devices
        self.Model = model_class(self.pl)
        self.pl.seed_everything(3, verbose=False)

    def trainer(self, **options):
        given = {"max_epochs": 2, "enable_checkpointing": False, **PLAIN, **options}
        strategy = given.pop("strategy", None) or strategy_named(self.strategy, self.pl)
        return self.pl.Trainer(
            strategy=strategy, accelerator="cpu", devices=self.devices,
            default_root_dir=self.folder, **given,
        )  # fmt: skip

    def fit(self, model=None, **options):
        model = model or self.Model()
        trainer = self.trainer(**options)
        trainer.fit(model, loader(), loader())
        return outcome(model, trainer)


def precision(f, which):
    return f.fit(precision=which)


def clipping(f, how):
    return f.fit(gradient_clip_val=0.01, gradient_clip_algorithm=how)


def accumulation(f):
    return f.fit(accumulate_grad_batches=2)


def schedulers(f):
    class Model(f.Model):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            each = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
            return [optimizer], [
                {"scheduler": each, "interval": "step"},
                {"scheduler": plateau, "monitor": "validation"},
            ]

    return f.fit(Model(), max_epochs=3)


def two_optimizers(f):
    class Model(f.Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for part in self.optimizers():
                part.zero_grad()
                self.manual_backward(self.loss(batch))
                self.clip_gradients(part, gradient_clip_val=0.1)
                part.step()
            for scheduler in self.lr_schedulers():
                scheduler.step()

        def configure_optimizers(self):
            parts = [torch.optim.SGD(p.parameters(), lr=0.1) for p in (self.a, self.b)]
            return parts, [torch.optim.lr_scheduler.ExponentialLR(p, 0.9) for p in parts]

    return f.fit(Model())


def trained(found, model):
    """Leave buffers out: rank 1's own are its own under DDP."""
    kept = dict(model.named_parameters())
    found["weights"] = {n: w for n, w in found["weights"].items() if n in kept}
    return found


def generator_used_twice(f):
    """The discriminator's backward lies between a generator's forward and backward."""

    class Model(f.Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.a, self.norm, self.d = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            made = self.norm(self.a(batch[0]))
            loss = F.softplus(self.d(made.detach())).mean() + F.softplus(-self.d(batch[0])).mean()
            second.zero_grad()
            self.manual_backward(loss)
            second.step()
            first.zero_grad()
            self.manual_backward(F.softplus(-self.d(made)).mean())
            first.step()
            self.log("loss", loss, sync_dist=True)

        def configure_optimizers(self):
            parts = (self.a, self.norm), (self.d,)
            return [torch.optim.SGD(nn.ModuleList(p).parameters(), lr=0.1) for p in parts], []

        def validation_step(self, batch, batch_idx):
            """Nothing: under DDP each rank's statistics are its own in manual optimization."""

    model, options = Model(), {}
    if f.strategy == "ddp":
        options["strategy"] = f.pl.strategies.DDPStrategy(find_unused_parameters=True)
    return trained(f.fit(model, **options), model)


def statistics_in_swa(f):
    """Its last epoch runs no backward; validation sees rank 0's statistics all the same."""

    class Model(f.Model):
        def __init__(self):
            super().__init__()
            self.b = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 4))

    model = Model()
    callback = f.pl.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1)
    return trained(f.fit(model, callbacks=[callback], max_epochs=4), model)


def evaluation(f):
    model, trainer = f.Model(), f.trainer(num_sanity_val_steps=2)
    trainer.fit(model, loader(), loader())
    validated = trainer.validate(model, loader(), verbose=False)[0]
    tested = trainer.test(model, loader(), verbose=False)[0]
    predicted = torch.cat(trainer.predict(model, loader()))
    found = outcome(model, trainer, predicted=predicted)
    found["numbers"] |= {**validated, **tested}
    return found


def evaluation_without_fit(f):
    model = f.Model()
    trainer = f.trainer()
    tested = trainer.test(model, loader(), verbose=False)[0]
    return {"weights": dict(model.state_dict()), "numbers": tested, "tier": "graph"}


def configure_model(f):
    class Model(f.Model):
        def __init__(self):
            super().__init__()
            del self.a

        def configure_model(self):
            if not hasattr(self, "a"):
                self.a = nn.Linear(8, 16)

    return f.fit(Model())


def empty_init(f):
    good = f.Model().state_dict()
    trainer = f.trainer()
    with trainer.init_module(empty_init=True):
        model = f.Model()
    model.load_state_dict(good)
    trainer.fit(model, loader())
    return outcome(model, trainer)


def averaging(f, which):
    if which == "swa":
        callback = f.pl.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1)
    else:
        callback = f.pl.callbacks.EMAWeightAveraging(decay=0.5)
    return f.fit(callbacks=[callback], max_epochs=4)


def learning_rate_finder(f):
    model, trainer = f.Model(), f.trainer(max_epochs=12)
    find = f.pl.tuner.Tuner(trainer).lr_find
    found = find(model, train_dataloaders=loader(), num_training=30, update_attr=True)
    trainer.fit(model, loader())
    result = outcome(model, trainer)
    result["numbers"]["suggestion"] = found.suggestion()
    return result


def batch_size_scaler(f):
    """Lightning refuses it under every distributed strategy; one device is strategy="auto"."""
    refusal = ""
    try:
        f.pl.tuner.Tuner(f.trainer()).scale_batch_size(f.Model(), max_trials=2)
    except ValueError as error:
        refusal = str(error)
    assert "batch size" in refusal
    return {"weights": {}, "numbers": {}, "tier": "graph", "keys": refusal}


def early_stopping(f):
    stop = f.pl.callbacks.EarlyStopping("validation", mode="max", patience=1)
    model, trainer = f.Model(), f.trainer(max_epochs=6, callbacks=[stop])
    trainer.fit(model, loader(), loader())
    result = outcome(model, trainer)
    result["numbers"]["epochs"] = float(trainer.current_epoch)
    return result


def compiled(f, which):
    class Model(f.Model):  # Dynamo cannot capture Lightning's own `log`, under DDP
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    model = Model()
    if which == "module":
        given = torch.compile(model, backend="eager")
    elif which == "submodule":
        model.b, given = torch.compile(model.b, backend="eager"), model
    else:
        model.b.compile(backend="eager")
        given = model
    trainer = f.trainer()
    trainer.fit(given, loader())
    result = outcome(model, trainer)
    result["keys"] = list(model.state_dict())
    return result


def checkpoints(f):
    """One epoch under the other strategy, its checkpoint, one more under this one."""
    path = f"{f.folder}/first-{f.strategy}.ckpt"
    other = "magi" if f.strategy == "ddp" else "ddp"
    first = f.trainer(max_epochs=1, strategy=strategy_named(other, f.pl))
    first.fit(f.Model(), loader(), loader())
    first.save_checkpoint(path)
    model, trainer = f.Model(), f.trainer()
    trainer.fit(model, loader(), loader(), ckpt_path=path)
    result = outcome(model, trainer)
    result["keys"] = sorted(torch.load(path, weights_only=False)["state_dict"])
    return result


def collectives(f):
    trainer = f.trainer(max_epochs=1)
    trainer.fit(f.Model(), loader())
    s, rank = trainer.strategy, dist.get_rank()
    s.barrier("here")
    mine = torch.tensor([float(rank)])
    numbers = {
        "mean": float(s.reduce(mine.clone())),
        "sum": float(s.reduce(mine.clone(), reduce_op="sum")),
        "a number": float(s.reduce(rank)) - rank,
        "broadcast": float(s.broadcast({"rank": rank + 5})["rank"]),
        "all": float(s.reduce_boolean_decision(rank == 0)),
        "any": float(s.reduce_boolean_decision(rank == 0, all=False)),
        "gathered": float(s.all_gather(mine).sum()),
        "replicas": float(s.distributed_sampler_kwargs["num_replicas"]),
    }
    return {"weights": {}, "numbers": numbers, "tier": "graph"}


def fabric(f, method):
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    from magi_train import Config
    from magi_train.integrations.lightning import strategy_class

    strategy = DDPStrategy()
    if f.strategy != "ddp":
        strategy = strategy_class("lightning.fabric")(config=Config(lowering="aot_eager"))
    fabric = Fabric(strategy=strategy, accelerator="cpu", devices=2)
    fabric.launch()
    fabric.seed_everything(3, verbose=False)

    class Model(f.Model):
        def log(self, *_, **__):
            pass

        def other(self, batch):
            return self.loss(batch) / 2

    model = Model()
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    wrapped.mark_forward_method("other")
    batches = fabric.setup_dataloaders(loader())
    for i, batch in enumerate(batches):
        with fabric.no_backward_sync(wrapped, enabled=i % 2 == 0):
            if method == "forward":
                loss = F.cross_entropy(wrapped(batch[0]), batch[1])
            else:
                loss = wrapped.other(batch) if i % 3 else wrapped.training_step(batch, i)
            fabric.backward(loss)
        if i % 2:
            fabric.clip_gradients(wrapped, optimizer, max_norm=0.5)
            fabric.clip_gradients(wrapped, optimizer, clip_val=0.1)
            optimizer.step()
            optimizer.zero_grad()
    path = Path(f.folder) / "fabric.ckpt"
    fabric.save(path, {"model": wrapped, "optimizer": optimizer})
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    nn.init.zeros_(model.a.weight)
    fabric.load(path, {"model": wrapped, "optimizer": optimizer})
    assert torch.equal(saved["a.weight"], model.a.weight)
    reports = getattr(fabric.strategy, "reports", [])
    return {
        "weights": saved,
        "numbers": {"loss": float(fabric.all_reduce(loss.detach()))},
        "tier": reports[0].tier if reports else "",
        "reason": reports[0].reason if reports else "",
        "keys": list(torch.load(path, weights_only=False)["model"]),
    }


def both(rank, world_size, name, *args):
    """Run one feature under DDP and under ours; return both outcomes."""
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        found = {s: globals()[name](Feature(s, shared[0]), *args) for s in ("ddp", "magi")}
        dist.barrier()
    return found
