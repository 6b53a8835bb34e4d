"""Does fp8 train? Validation losses of one model in bf16, in our fp8 and in torchao's, same tokens.

    python -m benchmarks.fp8_training --commit HASH --output benchmarks/results/NAME.json

A Llama of 146 M parameters learns the demo's corpus (examples/corpus.py: the source of Python's
standard library) for 1000 steps of 16 384 tokens, from the same weights, in the same order, with
fp32 weights and AdamW. Whatever it was trained in, it is validated by a fresh model in bf16 on the
same windows, so that the figures compare weights. `--all` runs every linear that fits in fp8, gain
or not: the worst case for the numbers. On the CPU a toy is trained, to try the script.

| variant | linears |
|---|---|
| bf16 | magi_train, Config() |
| fp8 | magi_train, Config(precision="fp8") |
| torchao | torch.compile, torchao's tensorwise float8 linears, all but the head |
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import records
from examples import corpus
from examples.model import small_llama

SIZES: dict[str, dict[str, int]] = {
    "cuda": {"layers": 12, "width": 1024, "heads": 16, "length": 512, "batch": 32, "steps": 1000,
             "vocabulary": 8192, "windows": 512},
    "cpu": {"layers": 2, "width": 64, "heads": 4, "length": 64, "batch": 4, "steps": 20,
            "vocabulary": 512, "windows": 16},
}  # fmt: skip
SEED, LEARNING_RATE = 20, 1e-3


def build(size: dict[str, int], device: str) -> nn.Module:
    """Return an unmodified Llama, always with the same weights."""
    torch.manual_seed(SEED)
    with torch.device(device):
        return small_llama(size, size["vocabulary"])


def batches(tokens: Tensor, size: dict[str, int], steps: int) -> Tensor:
    """Return windows of `length` + 1 tokens, `[steps, batch, length + 1]`, always the same."""
    g = torch.Generator().manual_seed(SEED)
    last = len(tokens) - size["length"] - 1
    starts = torch.randint(0, last, (steps, size["batch"]), generator=g)
    return tokens[starts.unsqueeze(-1) + torch.arange(size["length"] + 1)]


def loss_of(model: Any, batch: Tensor) -> Tensor:
    """Return the mean loss of predicting each next token."""
    targets = batch[:, 1:].contiguous()
    return model(input_ids=batch[:, :-1], labels=targets, shift_labels=targets).loss  # type: ignore[no-any-return]


def validate(state: dict[str, Tensor], windows: Tensor, size: dict[str, int], device: str) -> float:
    """Return the loss of trained weights, in bf16 and uncompiled."""
    model = build(size, device)
    model.load_state_dict(state)
    model.eval()
    total = 0.0
    parts = windows.split(size["batch"])
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        for part in parts:
            total += float(loss_of(model, part.to(device))) * len(part)
    return total / len(windows)


def trainee(variant: str, model: nn.Module, optimizer: Any) -> tuple[Any, Any, Any]:
    """Return the function from a batch to its loss, the optimizer, and what can be reported."""
    if variant == "torchao":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        convert_to_float8_training(
            model,
            config=Float8LinearConfig.from_recipe_name("tensorwise"),
            module_filter_fn=lambda _, name: "lm_head" not in name,
        )
        step = torch.compile(
            lambda batch: loss_of(model, batch),
            backend="inductor" if torch.cuda.is_available() else "aot_eager",
        )
        return step, optimizer, None
    import magi_train

    config = magi_train.Config(
        precision="fp8" if variant == "fp8" else "autocast",
        lowering="inductor" if torch.cuda.is_available() else "aot_eager",
    )
    prepared, optimizer = magi_train.prepare(model, optimizer, config=config)
    step = magi_train.prepare_step(lambda batch: loss_of(prepared, batch), prepared)
    return step, optimizer, prepared


def train(variant: str, text: corpus.Corpus, size: dict[str, int], device: str) -> dict[str, Any]:
    """Train one variant; return its losses."""
    torch._dynamo.reset()
    model = build(size, device)
    parameters = sum(p.numel() for p in model.parameters())
    adam = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    step, optimizer, prepared = trainee(variant, model, adam)
    steps = size["steps"]
    warm = max(steps // 15, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * max(i - warm, 0) / steps)),
    )
    data = batches(text.train, size, steps)
    windows = batches(text.validation, {**size, "batch": size["windows"]}, 1)[0]
    start, losses, curve = time.perf_counter(), [], {}
    for i in range(steps):
        with torch.autocast(device, torch.bfloat16):
            loss = step(data[i].to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if (i + 1) % max(steps // 4, 1) == 0:
            state = {n: p.detach() for n, p in model.state_dict().items()}
            curve[i + 1] = validate(state, windows, size, device)
    result = {
        "variant": variant,
        "parameters": parameters,
        "steps": steps,
        "tokens": data[..., 1:].numel(),
        "seconds": time.perf_counter() - start,
        "train_loss": float(torch.stack(losses[-steps // 10 :]).mean()),
        "validation_loss": curve[max(curve)],
        "validation_curve": curve,
    }
    if prepared is not None:
        import magi_train

        report = magi_train.report(prepared)
        plans = [row.plan for row in report.rows if row.name == "fp8_linears"]
        result |= {
            "tier": report.tier,
            "fp8_products": sum(plan["products"] for plan in plans if plan),
            "left_alone": [plan["left_alone"] for plan in plans if plan],
            "notes": report.notes,
        }
    return result


def main() -> None:
    """Train all variants, print the losses, write JSON."""
    parser = records.parser_of(__doc__)
    parser.add_argument("--variants", nargs="+", default=["bf16", "fp8", "torchao"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--all", action="store_true", help="fp8 wherever it fits")
    parser.add_argument("--folder", type=Path, default=Path("fp8_training_data"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = {**SIZES[device]}
    size["steps"] = options.steps or size["steps"]
    from magi_train.core import hardware
    from magi_train.fusion import fp8_match

    if device == "cpu":  # it has the product, only no gain from it
        hardware.no_fp8_because = lambda _: ""
    if options.all or device == "cpu":
        fp8_match.MACHINE = fp8_match.Machine(1.0, 2.0, 1e12, 0.0)
    corpus.prepare(options.folder, size["vocabulary"])
    text = corpus.load(options.folder)
    rows = []
    for variant in options.variants:
        try:
            rows.append(train(variant, text, size, device))
        except Exception as error:
            rows.append({"variant": variant, "failed": repr(error)[-600:]})
        print(json.dumps(rows[-1]), flush=True)
    records.save("fp8_training", options, size=size, all=options.all, rows=rows)
    base = next((r["validation_loss"] for r in rows if r.get("variant") == "bf16"), math.nan)
    for row in rows:
        if "failed" in row:
            print(f"{row['variant']:8} failed: {row['failed']}")
        else:
            ratio = row["validation_loss"] / base - 1
            print(f"{row['variant']:8} validation {row['validation_loss']:.4f} ({ratio:+.2%}) "
                  f"training {row['train_loss']:.4f} in {row['seconds']:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
