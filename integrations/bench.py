"""`magi bench`: a training step beside its peers, of a module of one's own or of a library's.

    magi bench package.module:build      build() returns (module, batch), and a loss and an
                                         optimizer if it likes to, as for `magi explain --fits`
    magi bench --case llama-1b           a case by name, or timm/NAME, torchvision/NAME,
                                         transformers/TYPE

Each peer runs in processes of its own, twice: first with empty compile caches, which gives all
figures and the cold start-up, then once more for the warm one. The seed, the batches, the loss, the
optimizer and the precision are the same; integrations/peers.py says what a peer is, and
integrations/figures.py what is measured. A peer that is missing or fails is a row that says why.
"""

import argparse
import contextlib
import dataclasses
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from magi_train.core.errors import MagiError
from magi_train.core.hardware import peak_flops
from magi_train.fits import FORM
from magi_train.fits_command import load_build
from magi_train.integrations import peers, records
from magi_train.integrations.bench_rank import FLOPS, Spec
from magi_train.integrations.cases import CASES, case_of
from magi_train.integrations.figures import utilisation
from magi_train.integrations.parts import PARTS
from magi_train.integrations.ranks import run_ranks

Row = dict[str, Any]
RANK = ["-m", "magi_train.integrations.bench_rank"]
FLOPS_SECONDS = 600.0
QUICK_STEPS = 2
COLUMNS = ("step_ms", "step_ms_p10", "step_ms_p90", "back_to_back_ms", "samples_per_second_per_gpu",
           "mfu", "peak_gib", "exposed_comm_ms", "without_sync_ms", "joules_per_step",
           "start_up_cold_s", "start_up_warm_s", "loss")  # fmt: skip
"""Of the table for people; the record has more."""


def command(arguments: Sequence[str]) -> int:
    """Run `magi bench`; return 0 if ours was measured and its loss agrees.

    Raises:
        MagiError: An option, a peer's name or the module is of no use.
    """
    options = _parser().parse_args(arguments)
    if bool(options.build) == bool(options.case):
        raise MagiError(f"give a module's function, or --case with one of {', '.join(CASES)}")
    if options.steps < 2 or options.warm_up < 1 or options.nproc < 1:
        raise MagiError(
            "--steps must be 2 or more, --warm-up and --nproc 1 or more; got "
            f"{options.steps}, {options.warm_up} and {options.nproc}"
        )
    if options.case:
        case_of(options.case)
    else:  # a wrong name is an error, not a row for each peer; and it may register peers
        load_build(options.build)
    for peer in options.peers:
        peers.parse(peer)
    spec = Spec(
        options.case or options.build, bool(options.case), options.nproc, options.steps,
        options.warm_up, options.autocast or ("bfloat16" if options.case else "none"),
        options.kernels,
    )  # fmt: skip
    sys.stderr.write("magi bench: operations of a step\n")
    counted = count(spec)
    rows = []
    for peer in options.peers:
        sys.stderr.write(f"magi bench: {peer}\n")
        sys.stderr.flush()
        rows.append(row(peer, spec, counted, options.seconds, not options.cold_only))
    given = shlex.join(["magi", "bench", *arguments])
    record = {**records.head("bench", options.commit), "command": given, "case": spec.what,
              **settings_of(spec), **counted, "rows": rows}  # fmt: skip
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    text = json.dumps(record, indent=2) if options.json else table(rows, options.tolerance)
    sys.stdout.write(text + "\n")
    return 0 if agrees(rows, options.tolerance) else 1


def _parser() -> argparse.ArgumentParser:
    parts = "\n".join(f"  {each.name:15} {each.what}" for each in PARTS.values())
    parser = argparse.ArgumentParser(
        prog="magi bench", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="peers are 'eager' and these, joined by '+'; 'magi' takes settings, as in "
        f"magi:precision=fp8,tune=true\n{parts}\n\ncases: {', '.join(CASES)}\n\n"
        "magi bench --mine train.py compares a whole script with and without magi; "
        "magi bench --inference model.pt2 measures an exported file. Both have a --help.",
    )  # fmt: skip
    add = parser.add_argument
    add("build", nargs="?", help=f"script.py:function or package.module:function; {FORM}")
    add("--case", help="a library's model by name, in place of a function")
    add("--peers", nargs="+", default=[*peers.DEFAULT], help="default: %(default)s")
    add("--nproc", type=int, default=1, help="ranks, a GPU each (default: %(default)s)")
    add("--steps", type=int, default=20, help="timed steps, twice (default: %(default)s)")
    add("--warm-up", type=int, default=20, help="steps before (default: %(default)s)")
    add("--autocast", choices=("none", "bfloat16", "float16"),
        help="default: bfloat16 for cases, none for a function")  # fmt: skip
    add("--cold-only", action="store_true", help="leave the second run out")
    add("--kernels", action="store_true", help="list the longest kernels (one GPU)")
    add("--tolerance", type=float, default=0.02, help="relative difference of the last losses")
    add("--seconds", type=float, default=900, help="limit for one run (default: %(default)s)")
    add("--commit", help="of the measured code, where it is not this checkout's")
    add("--output", type=Path, help="JSON file to write")
    add("--json", action="store_true", help="print JSON")
    return parser


def settings_of(spec: Spec) -> dict[str, Any]:
    """Return what a record says about the run."""
    return {"ranks": spec.ranks, "autocast": spec.autocast, "warm_up": spec.warm_up,
            "loss_after": spec.warm_up + 2 * spec.steps}  # fmt: skip


# -- rows ----------------------------------------------------------------------------------------


def count(spec: Spec) -> dict[str, Any]:
    """Return the FLOPs and samples of a step of a rank, or why they could not be counted."""
    rows, why = _run(spec, FLOPS, 1, FLOPS_SECONDS, {"CUDA_VISIBLE_DEVICES": ""})
    return rows[0] if rows else {"model_flops": None, "no_model_flops": why.splitlines()[-1][-200:]}


def row(
    peer: str,
    spec: Spec,
    counted: Mapping[str, Any],
    seconds: float,
    warm_start: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Row:
    """Return a peer's row: its figures, or why there are none.

    Args:
        peer: Its name.
        spec: What is measured.
        counted: From `count`.
        seconds: Limit for one run.
        warm_start: Whether to run it once more, for the start-up with filled caches.
        environment: Of its ranks.
    """
    done: Row = {"variant": peer, "ranks": spec.ranks}
    on_gpu = torch.cuda.is_available()
    why = peers.why_not(peer, spec.ranks, on_gpu)
    if not why and on_gpu and torch.cuda.device_count() < spec.ranks:
        why = f"{spec.ranks} ranks need as many GPUs, there are {torch.cuda.device_count()}"
    if why:
        return done | {"failed": why}
    with tempfile.TemporaryDirectory(prefix="magi_bench_", ignore_cleanup_errors=True) as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        caches |= environment or {}
        rows, why = _run(spec, peer, spec.ranks, seconds, caches)
        if not rows:
            return done | {"failed": why}
        done |= together(rows)
        done["start_up_cold_s"] = done.pop("start_up_s")
        if warm_start:
            quick = dataclasses.replace(spec, steps=QUICK_STEPS, kernels=False)
            again, why = _run(quick, peer, spec.ranks, seconds, caches)
            if again:
                warmed = together(again)["warm_up_s"] - spec.warm_up * done["step_ms"] / 1e3
                done["start_up_warm_s"] = max(0.0, warmed)
            else:
                done["no_warm_start"] = why
    flops, peak = counted.get("model_flops"), peak_flops(done.pop("gpu", ""))
    if flops and peak:
        done["mfu"] = utilisation(flops, done["back_to_back_ms"] / 1e3, peak)
    return done


def _run(
    spec: Spec, peer: str, ranks: int, seconds: float, environment: Mapping[str, str]
) -> tuple[list[Row], str]:
    """Run a peer once; return the rows of its ranks, or none and why."""
    with tempfile.TemporaryDirectory(prefix="magi_bench_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        path = folder / "spec.json"
        path.write_text(json.dumps(asdict(dataclasses.replace(spec, folder=name))))
        why = run_ranks([*RANK, str(path), peer], ranks, folder, seconds, environment)
        if why:
            return [], why
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            files = [folder / f"row_{rank}.json" for rank in range(ranks)]
            return [json.loads(file.read_text()) for file in files], ""
        return [], "a rank ended well and left no row"


def together(rows: Sequence[Row]) -> Row:
    """Return the ranks' rows as one: the slowest rank's times, the most memory, the mean loss."""
    slowest = max(rows, key=lambda each: each["step_ms"])
    found = {**slowest, **{k: v for k, v in rows[0].items() if k == "report"}}
    for name in ("peak_gib", "reserved_gib", "start_up_s", "warm_up_s", "first_step_s"):
        if all(name in each for each in rows):
            found[name] = max(each[name] for each in rows)
    for name in ("first_loss", "loss", "joules_per_step"):
        if all(name in each for each in rows):
            found[name] = statistics.fmean(each[name] for each in rows)
    return found


# -- what they say together ------------------------------------------------------------------------


def agrees(rows: Sequence[Row], tolerance: float) -> bool:
    """Return whether ours was measured, and its last loss is that of the first peer measured."""
    mine = next((r for r in rows if peers.is_ours(r["variant"]) and "loss" in r), None)
    theirs = next((r for r in rows if not peers.is_ours(r["variant"]) and "loss" in r), None)
    if mine is None:
        return False
    if theirs is None:
        return True
    a, b = mine["loss"], theirs["loss"]
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def table(rows: Sequence[Row], tolerance: float) -> str:
    """Return the rows as text, and what they say."""
    columns = [c for c in COLUMNS if any(c in r for r in rows)]
    wide = max(len(str(r["variant"])) for r in rows)
    lines = [f"{'':{wide}} " + " ".join(f"{c:>{max(9, len(c))}}" for c in columns)]
    for each in rows:
        if "failed" in each:
            why = f"failed: {each['failed'].splitlines()[-1][-200:]}"
        else:
            why = " ".join(
                f"{each[c]:{max(9, len(c))}.4g}" if c in each else " " * max(9, len(c))
                for c in columns
            )
        lines.append(f"{each['variant']:{wide}} {why}")
    timed = [r for r in rows if "failed" not in r]
    mine = [r for r in timed if peers.is_ours(r["variant"])]
    theirs = [r for r in timed if r not in mine]
    if theirs and mine:
        best = min(theirs, key=lambda r: r["back_to_back_ms"])
        for each in mine:
            times = best["back_to_back_ms"] / each["back_to_back_ms"]
            lines.append(f"{each['variant']} is {times:.3f} times as fast as {best['variant']}, "
                         "the best peer, back to back")  # fmt: skip
        same = "agrees with" if agrees(rows, tolerance) else "DIFFERS from"
        lines.append(f"its last loss {same} that of {theirs[0]['variant']} "
                     f"(tolerance {tolerance:g})")  # fmt: skip
    return "\n".join(lines)
