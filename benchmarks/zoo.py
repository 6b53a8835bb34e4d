"""Every model of transformers that a toy can be made of, and of timm, in every tier beside eager.

    python -m benchmarks.zoo                            # all families, all tiers, no code generated
    python -m benchmarks.zoo causal/llama pair/t5       # these
    python -m benchmarks.zoo image --lowering inductor  # one family, generated code, with speed

A case takes `STEPS` SGD steps in float32 on one rank with the same batches as the plain module, and
compares the losses of all steps, the gradients of the first and the weights after the last. What
float32 itself makes of them is measured: the plain module again, from weights that differ in the
last bit. A case holds when no difference exceeds ten times that noise, or the tolerance of
tests/close.py. Where it does not, the module that Dynamo captured without any pass of ours is the
reference, too: a library's code may do another thing when it is traced. Each case runs in a process
of its own, and what fails is a row that says why.
Nothing here or in the passes knows a model by name but for sizes (`zoo_models.MORE`).
"""

import argparse
import importlib.util
import json
import logging
import multiprocessing
import re
import time
import traceback
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import magi_train
from benchmarks import records, zoo_models
from magi_train import Config
from tests.close import difference, tolerance

STEPS, TIERS = 5, ("eager", "region", "graph", "auto")
NOISE_FACTOR = 10.0


@dataclass
class Trace:
    """What a training run left: losses, first gradients, last weights."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    first_seconds: float = 0.0
    step_seconds: float = 0.0

    def distance(self, other: "Trace") -> dict[str, float]:
        """Return the largest relative differences of losses, gradients and weights."""
        losses = zip(self.losses, other.losses, strict=True)
        return {
            "loss": max(abs(a - b) / max(abs(b), 1e-9) for a, b in losses),
            "gradient": difference(self.gradients, other.gradients),
            "state": difference(self.state, other.state),
        }


def loss_of(out: Any) -> Tensor:
    """Return the loss in a model's output."""
    return out.loss if getattr(out, "loss", None) is not None else out[0]


def train(plain: nn.Module, model: nn.Module, batch: Any, device: str) -> Trace:
    """Train `plain` through `model`, which is itself or its prepared form."""
    trace = Trace()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.02, momentum=0.9)
    for step in range(STEPS):
        words = {name: value.to(device) for name, value in batch(step).items()}
        start = time.perf_counter()
        torch.manual_seed(step)
        loss = loss_of(model(**words))
        loss.backward()
        if step == 0:
            trace.gradients = {
                n: None if p.grad is None else p.grad.detach().clone()
                for n, p in plain.named_parameters()
            }
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trace.losses.append(float(loss))
        trace.step_seconds = time.perf_counter() - start
        trace.first_seconds = trace.first_seconds or trace.step_seconds
    trace.state = {
        n: t.detach().clone() for n, t in plain.state_dict().items() if isinstance(t, Tensor)
    }
    return trace


def _fresh(name: str, device: str, nudge: bool = False) -> tuple[nn.Module, Any]:
    module, batch = zoo_models.build(*name.split("/", 1))
    if nudge:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1 + torch.finfo(torch.float32).eps)
    return module.to(device), batch


def run_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one case: of each tier its parity, start-up and time beside eager."""
    row: dict[str, Any] = {"case": name}
    try:
        module, batch = _fresh(name, options.device)
        want = train(module, module, batch, options.device)
    except Exception as error:
        return row | {"not_built": f"{type(error).__name__}: {_line(error)}"}
    again = train(*_twice(_fresh(name, options.device)), options.device)
    if any(again.distance(want).values()):
        row["eager_differs_from_itself"] = again.distance(want)
    noise = train(*_twice(_fresh(name, options.device, nudge=True)), options.device).distance(want)
    row |= {"parameters": sum(p.numel() for p in module.parameters()), "noise": noise}
    row["eager_step_seconds"] = want.step_seconds
    for tier in options.tiers:
        row[tier] = _run_tier(name, tier, options, want, noise)
    return row


def _twice(built: tuple[nn.Module, Any]) -> tuple[nn.Module, nn.Module, Any]:
    return built[0], built[0], built[1]


def _run_tier(
    name: str, tier: str, options: argparse.Namespace, want: Trace, noise: dict[str, float]
) -> dict[str, Any]:
    torch._dynamo.reset()
    module, batch = _fresh(name, options.device)
    try:
        model = magi_train.prepare(module, config=Config(tier=tier, lowering=options.lowering))
        got = train(module, model, batch, options.device)
    except Exception as error:
        kind = "refused" if isinstance(error, magi_train.MagiError) else "raised"
        text = "" if kind == "refused" else traceback.format_exc()[-3000:]
        return {kind: f"{type(error).__name__}: {_line(error)}", "trace": text}
    report = magi_train.report(model)
    off = got.distance(want)
    limit = tolerance(torch.float32)

    def beyond(off: dict[str, float]) -> dict[str, float]:
        return {k: v for k, v in off.items() if not v <= max(NOISE_FACTOR * noise[k], limit)}

    bad, traced = beyond(off), False
    if bad:
        torch._dynamo.reset()
        module, batch = _fresh(name, options.device)
        alone = train(module, torch.compile(module, backend="eager"), batch, options.device)
        traced = not beyond(got.distance(alone))
    return {
        "tier": report.tier,
        "reason": report.reason,
        "notes": report.notes,
        "plans": {r.name: r.plan for r in report.rows if r.plan},
        "off": off,
        "bad": bad,
        "as_traced": traced,
        "first_seconds": got.first_seconds,
        "speed": want.step_seconds / got.step_seconds,
    }


def _line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:400]


def names(wanted: list[str]) -> list[str]:
    """Return the cases that `wanted` (families or cases; all, if empty) asks for.

    Raises:
        ValueError: One of them is neither.
    """
    families = [*zoo_models.FAMILIES]
    if importlib.util.find_spec("timm"):
        families.append(zoo_models.TIMM)
    cases = [f"{family}/{each}" for family in families for each in zoo_models.model_types(family)]
    for word in wanted:
        if word not in families and word not in cases:
            missing = "" if zoo_models.TIMM in families else "; timm is not installed"
            raise ValueError(
                f"{word!r} is neither a family ({', '.join(families)}) nor FAMILY/MODEL_TYPE of "
                f"what these libraries list{missing}"
            )
    return [c for c in cases if not wanted or c in wanted or c.partition("/")[0] in wanted]


def _worker(pipe: Connection, name: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(run_case(name, options))
    except BaseException as error:  # the row must say so
        pipe.send({"case": name, "raised": f"{type(error).__name__}: {_line(error)}"})


def isolated(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one case in a process of its own, for at most `--timeout` seconds."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_worker, args=(theirs, name, options))
    process.start()
    theirs.close()
    row: dict[str, Any] = {"case": name, "raised": f"nothing came in {options.timeout} s"}
    if ours.poll(options.timeout):
        try:
            row = ours.recv()
        except EOFError:
            process.join()
            row["raised"] = f"the process ended with code {process.exitcode}"
    process.kill()
    process.join()
    return row


def verdict(row: dict[str, Any], tier: str) -> str:
    """Return one word on a tier of a row, and what is wrong."""
    got = row.get(tier, {})
    for kind in ("refused", "raised"):
        if kind in got:
            return f"{kind.upper()} {got[kind][:160]}"
    if got.get("bad"):
        how = "DIFFERS WHEN TRACED " if got["as_traced"] else "DIFFERS "
        return how + ", ".join(f"{k} {v:.1e}" for k, v in got["bad"].items())
    return f"{got.get('tier', '?')} x{got.get('speed', 0):.2f}"


def show(row: dict[str, Any], tiers: list[str]) -> str:
    """Return the row as one line."""
    if "not_built" in row or "raised" in row:
        return f"{row['case']:32} {row.get('raised') or 'no toy: ' + row['not_built'][:100]}"
    return f"{row['case']:32} " + " | ".join(f"{t}: {verdict(row, t)}" for t in tiers)


def short(row: dict[str, Any], tiers: list[str]) -> dict[str, Any]:
    """Return the row for a table: each tier's verdict, largest difference and first step."""
    found = {"case": row["case"], "parameters": row.get("parameters")}
    if "not_built" in row or "raised" in row:
        why = row.get("raised") or f"no toy: {row['not_built']}"
        return found | {tiers[0]: _without_folders(why)[:160]}
    for tier in tiers:
        got, text = row[tier], _without_folders(verdict(row, tier))
        if "off" in got:
            text += f", off {max(got['off'].values()):.0e}, start {got['first_seconds']:.1f} s"
        found[tier] = text
    return found


def _without_folders(text: str) -> str:
    return re.sub(r"[^\s\"]*/site-packages/", "", text)


def main() -> None:
    """Run the cases, print a line each and a count, and write the JSON."""
    parser = records.parser_of(__doc__)
    parser.add_argument("cases", nargs="*", help="families, or family/model_type")
    parser.add_argument("--tiers", nargs="+", default=list(TIERS), choices=TIERS)
    parser.add_argument("--lowering", default="aot_eager", choices=("aot_eager", "inductor"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--details", type=Path, help="JSON file for all that is known of each case")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one case")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    try:
        cases = names(options.cases)
    except ValueError as error:
        parser.error(str(error))
    rows = []
    for name in cases:
        rows.append(isolated(name, options))
        print(show(rows[-1], options.tiers), flush=True)
    trained = [r for r in rows if "not_built" not in r]
    good = [r for r in trained if "raised" not in r and not _wrong(r, options.tiers)]
    print(f"{len(good)} of {len(trained)} models hold in {options.tiers}; {len(rows)} were tried")
    if options.details:
        options.details.write_text(json.dumps(rows, indent=1) + "\n")
    plain = [short(row, options.tiers) for row in rows]
    counts = {"tried": len(rows), "trained": len(trained), "hold": len(good)}
    records.save("zoo", options, rows=plain, lowering=options.lowering, counts=counts)


def _wrong(row: dict[str, Any], tiers: list[str]) -> bool:
    return any((row[t].get("bad") and not row[t]["as_traced"]) or "raised" in row[t] for t in tiers)


if __name__ == "__main__":
    main()
