"""Train a small Llama on the standard library's source under one Lightning strategy.

Started twice by examples/demo.py, once with strategy="magi", once with strategy="ddp". Everything
else is the same: seed, data, order. Writes what it measured to FOLDER/STRATEGY.json and the weights
to FOLDER/STRATEGY.ckpt.
"""

import argparse
import json
import math
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples import corpus
from examples.model import small_llama

SEED = 20
WARM_UP_STEPS = 10
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"layers": 4, "width": 256, "heads": 8, "length": 256, "batch": 4, "steps": 480},
    "cuda": {"layers": 12, "width": 768, "heads": 12, "length": 512, "batch": 32, "steps": 600},
    "tiny": {"layers": 2, "width": 64, "heads": 4, "length": 64, "batch": 4, "steps": 12},
}
VOCABULARY = {"cpu": 2048, "cuda": 8192, "tiny": 512}


class Windows(Dataset[Tensor]):
    """Windows of `length` + 1 tokens; `shuffled` ones start anywhere, in an order that is fixed."""

    def __init__(self, tokens: Tensor, length: int, count: int, *, shuffled: bool) -> None:
        self.tokens, self.length = tokens, length
        last = len(tokens) - length - 1
        g = torch.Generator().manual_seed(SEED)
        self.starts = (
            torch.randint(0, last, (count,), generator=g)
            if shuffled
            else torch.arange(0, last, length)[:count]
        )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Tensor:
        start = int(self.starts[i])
        return self.tokens[start : start + self.length + 1]


class CodeModel(pl.LightningModule):
    """An unmodified Llama, its loss and its validation in bits per byte."""

    def __init__(self, size: dict[str, Any], vocabulary: int, token_bytes: Tensor) -> None:
        super().__init__()
        self.model = small_llama(size, vocabulary)
        self.steps = size["steps"]
        self.token_bytes = token_bytes.tolist()
        self.window_losses: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits, `[batch, length, vocabulary]`."""
        return self.model(input_ids=tokens).logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of predicting each next token."""
        targets = batch[:, 1:].contiguous()
        loss = self.model(input_ids=batch[:, :-1], labels=targets, shift_labels=targets).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Keep each window's nats and bytes."""
        logits = self(batch[:, :-1]).float()
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        ).view(batch.shape[0], -1)
        sizes = torch.tensor(self.token_bytes, device=batch.device)[batch[:, 1:]]
        self.window_losses.append(torch.stack([nats.sum(1), sizes.sum(1).float()], 1))

    def on_validation_epoch_end(self) -> None:
        """Log bits per byte over all ranks."""
        mine = torch.cat(self.window_losses)
        self.window_losses.clear()
        every = self.all_gather(mine).reshape(-1, 2).double()
        bits = every[:, 0].sum() / every[:, 1].sum() / math.log(2)
        per_window = every[:, 0] / every[:, 1] / math.log(2)
        self.log("bits_per_byte", bits, prog_bar=True)
        self.log("standard_error", per_window.std() / math.sqrt(len(per_window)))

    def configure_optimizers(self) -> Any:
        """AdamW, linear warm-up, cosine decay."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95)
        )
        warm = max(self.steps // 15, 1)

        def rate(step: int) -> float:
            done = (step - warm) / max(self.steps - warm, 1)
            return min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * min(max(done, 0), 1)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Clock(pl.Callback):
    """Start-up time, seconds of each step, and peak memory."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note when a step ended."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def measured(self) -> dict[str, float]:
        """Return the figures of this rank."""
        steps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)][WARM_UP_STEPS:]
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss()
        return {
            "start_up_seconds": self.ends[0] - self.begin,
            "step_seconds": statistics.median(steps),
            "train_seconds": self.ends[-1] - self.ends[0],
            "peak_memory_mib": peak / 2**20,
        }


def peak_rss() -> int:
    """Return the largest resident memory of this process, in bytes.

    On Linux from /proc: getrusage's figure is inherited from the process that started this one.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Train, validate, write results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", required=True)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--devices", type=int, required=True)
    options = parser.parse_args()
    size = SIZES[options.size]
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    data = corpus.load(options.folder)
    pl.seed_everything(SEED, verbose=False)
    model = CodeModel(size, len(data.token_bytes), data.token_bytes)
    length, batch = size["length"], size["batch"]
    count = size["steps"] * batch * options.devices
    train = Windows(data.train, length, count, shuffled=True)
    held_out = Windows(
        data.validation, length, 96 if options.size == "cpu" else 512, shuffled=False
    )
    clock = Clock()
    trainer = pl.Trainer(
        strategy=options.strategy,
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=options.devices,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        max_steps=size["steps"],
        gradient_clip_val=1.0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        default_root_dir=options.folder,
    )
    trainer.fit(
        model,
        DataLoader(train, batch, num_workers=0),
        DataLoader(held_out, 8, num_workers=0),
    )
    trainer.save_checkpoint(options.folder / f"{options.strategy}.ckpt")
    if trainer.is_global_zero:
        figures = clock.measured()
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        tokens = batch * length * options.devices
        figures |= {
            "parameters": float(sum(p.numel() for p in model.parameters())),
            "tokens_per_second": tokens / figures["step_seconds"],
            "bits_per_byte": metrics["bits_per_byte"],
            "standard_error": metrics["standard_error"],
            "train_loss": metrics["train_loss"],
        }
        (options.folder / f"{options.strategy}.json").write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
