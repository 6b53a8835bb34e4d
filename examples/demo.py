"""`make demo`: train a small Llama with strategy="magi" and with strategy="ddp", compare, export.

Usage: python -m examples.demo [--size tiny|cpu|cuda] [--folder runs/demo]

The text is the source of Python's standard library. Both strategies see the same seed, data and
order. Ends with one table; everything it measured is in FOLDER/demo.json.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import magi_train
from examples import corpus
from examples.demo_train import SIZES, VOCABULARY, CodeModel

CHECK_EXPORTED = """
import sys, torch, magi_train
run = magi_train.load(sys.argv[1])
tokens, wanted = torch.load(sys.argv[2])
with torch.no_grad():
    got = run(tokens)
print(float((got - wanted).abs().max() / wanted.abs().max()))
"""


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--size", choices=SIZES, default=default)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    begin, console = time.perf_counter(), Console()
    devices = max(torch.cuda.device_count(), 1) if torch.cuda.is_available() else 2
    folder = options.folder / options.size
    console.rule(f"text and tokenizer, model size {options.size!r} on {devices} {default} ranks")
    corpus.prepare(folder, VOCABULARY[options.size])
    train, validation = corpus.split_text()
    trigram = corpus.trigram_bits_per_byte(train.encode(), validation.encode())
    results = {}
    for strategy in ("magi", "ddp"):
        console.rule(f'Trainer(strategy="{strategy}", devices={devices})')
        results[strategy] = _train(strategy, options.size, folder, devices)
    console.rule("sample, export, load in a new process")
    model, data = _trained(folder, options.size)
    console.print(_sample(model, data), markup=False, highlight=False)
    error = _export(model, data, folder, SIZES[options.size]["length"])
    report = magi_train.Report.load(folder / "magi_report.json")
    summary = {
        **results,
        "trigram_bits_per_byte": trigram,
        "export_relative_error": error,
        "wall_seconds": time.perf_counter() - begin,
    }
    (folder / "demo.json").write_text(json.dumps(summary, indent=2))
    _show(console, summary, report)
    console.print(f"report: {folder / 'magi_report.json'}    figures: {folder / 'demo.json'}")
    sys.exit(0 if _holds(console, summary, options.size) else 1)


def _train(strategy: str, size: str, folder: Path, devices: int) -> dict[str, float]:
    command = [sys.executable, "-m", "examples.demo_train", "--strategy", strategy]
    command += ["--size", size, "--folder", str(folder), "--devices", str(devices)]
    subprocess.run(command, check=True)
    return json.loads((folder / f"{strategy}.json").read_text())  # type: ignore[no-any-return]


def _trained(folder: Path, size: str) -> tuple[CodeModel, corpus.Corpus]:
    """Load magi's checkpoint into the plain model: the names are the same."""
    data = corpus.load(folder)
    model = CodeModel(SIZES[size], len(data.token_bytes), data.token_bytes)
    checkpoint = torch.load(folder / "magi.ckpt", map_location="cpu", weights_only=True)
    model.load_state_dict(checkpoint["state_dict"], strict=True)
    return model.eval(), data


@torch.no_grad()
def _sample(model: CodeModel, data: corpus.Corpus, count: int = 80) -> str:
    """Continue a line of Python."""
    torch.manual_seed(0)
    ids = torch.tensor([data.tokenizer.encode("def read(self, size):\n").ids])
    for _ in range(count):
        probabilities = (model(ids)[0, -1] / 0.7).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)[None]], 1)
    return str(data.tokenizer.decode(ids[0].tolist()))


def _export(model: CodeModel, data: corpus.Corpus, folder: Path, length: int) -> float:
    """Export, load in a new process; return the largest relative difference of the logits."""
    tokens = data.validation[: 2 * length].view(2, length)
    path = folder / "model.pt2"
    magi_train.export(model, (tokens,), path)
    with torch.no_grad():
        torch.save((tokens, model(tokens)), folder / "expected.pt")
    command = [sys.executable, "-c", CHECK_EXPORTED, str(path), str(folder / "expected.pt")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def _show(console: Console, summary: dict[str, Any], report: magi_train.Report) -> None:
    magi, ddp = summary["magi"], summary["ddp"]
    table = Table(title=f"{magi['parameters'] / 1e6:.1f} M parameters")
    for name in ("", "magi", "ddp", "magi / ddp"):
        table.add_column(name, justify="left" if not name else "right")
    rows = {
        "validation, bits a byte": ("bits_per_byte", ".4f"),
        "tokens a second": ("tokens_per_second", ".0f"),
        "step, seconds": ("step_seconds", ".3f"),
        "start-up to first step, seconds": ("start_up_seconds", ".1f"),
        "peak memory of rank 0, MiB": ("peak_memory_mib", ".0f"),
    }
    for title, (key, form) in rows.items():
        a, b = magi[key], ddp[key]
        table.add_row(title, f"{a:{form}}", f"{b:{form}}", f"{a / b:.3f}")
    table.add_section()
    table.add_row("byte trigram, bits a byte", f"{summary['trigram_bits_per_byte']:.4f}")
    table.add_row("exported logits, rel. error", f"{summary['export_relative_error']:.1e}")
    table.add_row("tier", report.tier.upper(), "", report.reason)
    console.print(table)
    passes = Table(title="what each pass did")
    for name in ("pass", "stage", "plan"):
        passes.add_column(name)
    for row in report.rows:
        passes.add_row(row.name, row.stage, row.summary())
    console.print(passes)


def _holds(console: Console, summary: dict[str, Any], size: str) -> bool:
    """Check what the demo promises, and say how.

    Both strategies compute the same function, so their losses differ only by what rounding grows to
    over the run. That must stay below what another choice of validation text would change: two
    standard errors of the mean over validation windows, of the difference of two such means.
    """
    magi, ddp = summary["magi"], summary["ddp"]
    apart = abs(magi["bits_per_byte"] - ddp["bits_per_byte"])
    noise = 2 * math.hypot(magi["standard_error"], ddp["standard_error"])
    checks = {
        f"both strategies agree: |difference| {apart:.5f} <= {noise:.5f} bits a byte": apart
        <= noise,
        f"exported logits are the same: {summary['export_relative_error']:.1e} <= 1e-4": (
            summary["export_relative_error"] <= 1e-4
        ),
    }
    if size != "tiny":  # a dozen steps teach nothing
        text = f"better than a byte trigram: {magi['bits_per_byte']:.3f}"
        checks[f"{text} < {summary['trigram_bits_per_byte']:.3f} bits a byte"] = (
            magi["bits_per_byte"] < summary["trigram_bits_per_byte"]
        )
    for text, held in checks.items():
        console.print(f"{'holds ' if held else 'FAILS '} {text}", style="green" if held else "red")
    console.print(f"the demo took {summary['wall_seconds']:.0f} s")
    return all(checks.values())


if __name__ == "__main__":
    main()
