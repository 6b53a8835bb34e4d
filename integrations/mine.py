"""`magi bench --mine train.py`: the user's script with and without magi, side by side.

The script is not changed. Runs take turns, each in processes of its own: without, with, without,
with. Both start from the same seeds, so that their losses can be compared step by step. What is
said at the end follows from three numbers: do the losses agree, how much faster is a step, and is
that more than parts of one kind's runs differ among themselves.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from magi_train.core.errors import MagiError
from magi_train.integrations.probe import Seen, Spec
from magi_train.integrations.ranks import stop

GAIN = 1.03
"""How much faster a step must be to be worth it."""
LAUNCHER_SECONDS = 40.0
"""How long `magi run` may take to end its ranks, which are sessions of their own."""
SMALLER = 0.9
"""The part of the memory that may remain for magi to be worth it where it is not faster."""


@dataclass(frozen=True)
class Side:
    """What runs of one kind gave, over all rounds and ranks.

    Attributes:
        step_ms: Median of the timed steps, of the slowest rank.
        parts_ms: The same of each half of each round.
        p10_ms: A tenth of the steps is faster.
        p90_ms: A tenth is slower.
        peak_gib: Of the rank that needs most.
        start_up_s: Of each round; the first one may compile what the next finds in caches.
        losses: Of rank 0's steps, of the first round.
    """

    step_ms: float
    parts_ms: list[float]
    p10_ms: float
    p90_ms: float
    peak_gib: float
    start_up_s: list[float]
    losses: list[float | None]


@dataclass(frozen=True)
class Agreement:
    """How the losses compare; differences are relative to the larger of the two.

    Attributes:
        agree: Whether the median and the mean of the last quarter are within the tolerance.
        compared: Steps of which both losses are known.
        median: Of the steps' differences.
        worst: Of them.
        late: Difference between the means of the last quarter of the steps.
    """

    agree: bool
    compared: int
    median: float
    worst: float
    late: float


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        use: "yes", "no" or "cannot say".
        why: A sentence.
        speed: How many times faster a step is.
        memory: Which part of the memory it takes.
        pays_after: Steps until a longer start-up is made up for; None where it never is.
    """

    use: str
    why: str
    speed: float
    memory: float
    pays_after: int | None


def command(arguments: Sequence[str]) -> int:
    """Run `magi bench --mine`; return 0 if the losses agree, else 1.

    Raises:
        MagiError: A run failed, or the script has no step to measure.
    """
    options = _parser().parse_args(arguments)
    for name, least in (("steps", 3), ("warm_up", 1), ("rounds", 1)):
        if getattr(options, name) < least:
            raise MagiError(
                f"--{name.replace('_', '-')} must be {least} or more, got {getattr(options, name)}"
            )
    if not Path(options.script).is_file():
        raise MagiError(f"there is no script {options.script!r}")
    runs: dict[bool, list[list[Seen]]] = {False: [], True: []}
    for turn in range(options.rounds):
        for magi in (False, True):
            with_or_not = "with" if magi else "without"
            sys.stderr.write(f"magi bench: round {turn + 1} of {options.rounds}, {with_or_not}\n")
            runs[magi].append(_run(options, magi))
    plain, ours = side(runs[False]), side(runs[True])
    agreement = compare(plain.losses, ours.losses, options.tolerance)
    verdict = judge(plain, ours, agreement)
    seen = runs[True][0][0]
    if options.json:
        found: dict[str, Any] = {
            "without": plain,
            "with": ours,
            "losses": agreement,
            "verdict": verdict,
        }
        text = json.dumps({k: asdict(v) for k, v in found.items()} | _captured(seen), indent=2)
    else:
        text = as_text(plain, ours, agreement, verdict, seen, options.tolerance)
    sys.stdout.write(text + "\n")
    return 0 if agreement.agree else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="magi bench --mine", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # fmt: skip
    add = parser.add_argument
    add("--mine", action="store_true", help=argparse.SUPPRESS)
    add("--steps", type=int, default=30, help="timed in each run (default: %(default)s)")
    add("--warm-up", type=int, default=15, help="steps before (default: %(default)s; CUDA graphs "
        "are chosen in the first 13)")  # fmt: skip
    add("--rounds", type=int, default=2, help="runs of each kind (default: %(default)s)")
    add("--nproc", type=int, help="ranks, started by `magi run`; without it the script runs as "
        "`python script` would")  # fmt: skip
    add("--tolerance", type=float, default=0.02,
        help="relative difference of losses that still agree (default: %(default)s); with dropout "
        "the two draw other numbers, so switch it off to compare closely")  # fmt: skip
    add("--seconds", type=float, default=1800, help="limit for one run (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")
    add("script", help="the training script; it must not start ranks itself")
    add("arguments", nargs=argparse.REMAINDER, help="what the script takes")
    return parser


def _run(options: Any, magi: bool) -> list[Seen]:
    """Run the script once; return what each rank saw."""
    with tempfile.TemporaryDirectory(prefix="magi_bench_") as name:
        folder, ranks = Path(name), options.nproc or 1
        spec = Spec(name, magi, options.warm_up, options.steps, time.time(), ranks)
        path = folder / "spec.json"
        path.write_text(json.dumps(asdict(spec)))
        start = [sys.executable, "-m"]
        if options.nproc is not None:
            start += ["magi_train.cli", "run", "--nproc", str(ranks), "--no-preflight", "-m"]
        probe = ["magi_train.integrations.probe", str(path), options.script, *options.arguments]
        with (folder / "log").open("w+") as log:
            process = subprocess.Popen([*start, *probe], stdout=log, stderr=log,
                                       start_new_session=True)  # fmt: skip
            try:
                status = process.wait(options.seconds)
            except subprocess.TimeoutExpired:
                raise MagiError(
                    f"{options.script} took more than --seconds {options.seconds:g}; give fewer "
                    "--steps or more time"
                ) from None
            finally:
                stop(process, LAUNCHER_SECONDS)
        seen = [Seen(**json.loads(p.read_text())) for p in sorted(folder.glob("rank_*.json"))]
        kind = "with" if magi else "without"
        for each in seen:
            if each.error:
                raise MagiError(f"{options.script}, run {kind} magi: {each.error}")
        if status or len(seen) != ranks:
            end = "\n".join((folder / "log").read_text().strip().splitlines()[-15:])
            hint = (
                "; give --nproc, and ranks are started" if "variable RANK expected" in end else ""
            )
            raise MagiError(
                f"{options.script}, run {kind} magi, ended with {status}{hint}; its last lines:\n"
                f"{end}"
            )
        return seen


def side(rounds: Sequence[Sequence[Seen]]) -> Side:
    """Return runs of one kind, `rounds[round][rank]`, as one."""
    slowest = [max(ranks, key=lambda seen: statistics.median(seen.seconds)) for ranks in rounds]
    steps = [1e3 * s for seen in slowest for s in seen.seconds]
    tenths = statistics.quantiles(steps, n=10)
    return Side(
        statistics.median(steps),
        [1e3 * statistics.median(half) for seen in slowest for half in _halves(seen.seconds)],
        tenths[0],
        tenths[-1],
        max(seen.peak_gib for ranks in rounds for seen in ranks),
        [max(seen.start_up_seconds for seen in ranks) for ranks in rounds],
        rounds[0][0].losses,
    )


def _halves(seconds: Sequence[float]) -> list[Sequence[float]]:
    middle = len(seconds) // 2
    return [seconds[:middle], seconds[middle:]]


def compare(
    one: Sequence[float | None], other: Sequence[float | None], tolerance: float
) -> Agreement:
    """Compare losses step by step; without a pair to compare they do not agree."""
    pairs = [(a, b) for a, b in zip(one, other, strict=False) if a is not None and b is not None]
    if not pairs:
        return Agreement(False, 0, math.nan, math.nan, math.nan)
    apart = [_apart(a, b) for a, b in pairs]
    last = pairs[-max(1, len(pairs) // 4) :]
    late = _apart(statistics.fmean(a for a, _ in last), statistics.fmean(b for _, b in last))
    median = statistics.median(apart)
    return Agreement(
        median <= tolerance and late <= tolerance, len(pairs), median, max(apart), late
    )


def _apart(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def judge(plain: Side, ours: Side, agreement: Agreement) -> Verdict:
    """Return whether to use it."""
    speed, memory = plain.step_ms / ours.step_ms, ours.peak_gib / plain.peak_gib
    gain = (plain.step_ms - ours.step_ms) / 1e3
    more = ours.start_up_s[-1] - plain.start_up_s[-1]
    pays = max(0, math.ceil(more / gain)) if gain > 0 else None
    noise = max(max(s.parts_ms) / min(s.parts_ms) for s in (plain, ours))
    if not agreement.compared:
        use, why = "cannot say", "backward is called on no single number, so no loss is known"
    elif not agreement.agree:
        use, why = "no", "the losses differ by more than the tolerance"
    elif max(speed, 1 / speed) <= noise and noise > GAIN:
        use = "cannot say"
        why = (
            f"steps of one kind drift by {noise - 1:.0%}, as much as the two differ: more --rounds"
        )
    elif speed >= GAIN:
        use, why = "yes", f"a step is {speed:.2f} times as fast"
    elif memory <= SMALLER and speed >= 1 / GAIN:
        use, why = "yes", f"a step needs {memory:.0%} of the memory and is as fast"
    else:
        use, why = "no", f"a step is {speed:.2f} times as fast; {GAIN} would be worth it"
    return Verdict(use, why, speed, memory, pays)


def as_text(
    plain: Side, ours: Side, agreement: Agreement, verdict: Verdict, seen: Seen, tolerance: float
) -> str:
    """Return the answer for people."""
    lines = [f"{'':12} {'step ms':>9} {'p10':>9} {'p90':>9} {'peak GiB':>9} {'start-up s':>14}"]
    for name, each in (("without", plain), ("with magi", ours)):
        starts = ", ".join(f"{s:.1f}" for s in each.start_up_s)
        lines.append(f"{name:12} {each.step_ms:9.3f} {each.p10_ms:9.3f} {each.p90_ms:9.3f} "
                     f"{each.peak_gib:9.3f} {starts:>14}")  # fmt: skip
    if seen.device != "cuda":
        lines.append("peak: of the process on the host, compiling included")
    lines.append(
        f"losses of {agreement.compared} steps {'agree' if agreement.agree else 'DIFFER'}: median "
        f"{agreement.median:.2g}, last quarter {agreement.late:.2g}, worst step "
        f"{agreement.worst:.2g} (tolerance {tolerance:g})"
    )
    because = f", because {seen.reason}" if seen.reason else ""
    lines.append(f"captured: tier {seen.tier.upper()}{because}")
    lines.append(f"use it: {verdict.use}; {verdict.why}")
    if verdict.use == "yes":
        lines.append(f"how: {seen.how}")
    if verdict.use == "yes" and verdict.pays_after:
        lines.append(f"the longer start-up is made up for after {verdict.pays_after} steps")
    return "\n".join(lines)


def _captured(seen: Seen) -> dict[str, str]:
    return {
        "way": seen.way,
        "how": seen.how,
        "tier": seen.tier,
        "reason": seen.reason,
        "device": seen.device,
    }
