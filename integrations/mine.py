"""`magi bench --mine train.py`: the user's script with and without magi, side by side.

The script is not changed. Runs take turns, each in processes of its own: without, with, without,
with; with --peers others come between, which edit or compile the script's module as
integrations/peers.py says. All start from the same seeds, so that their losses can be compared step
by step. verdict.py says what follows.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from magi_train.core.errors import MagiError
from magi_train.integrations.peers import OURS, why_not
from magi_train.integrations.probe import Seen, Spec
from magi_train.integrations.ranks import stop
from magi_train.integrations.script_peer import check_for_scripts
from magi_train.integrations.verdict import Agreement, Side, Verdict, compare, judge, side

WITHOUT = "without"

LAUNCHER_SECONDS = 40.0
"""How long `magi run` may take to end its ranks, which are sessions of their own."""


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
    given = options.peers.split(",") if options.peers else []
    failed = {peer: why for peer in given if (why := _why_not(peer, options.nproc or 1))}
    runs: dict[str, list[list[Seen]]] = {WITHOUT: [], **{peer: [] for peer in given}, OURS: []}
    for turn in range(options.rounds):
        for name in [each for each in runs if each not in failed]:
            told = "with" if name == OURS else name
            sys.stderr.write(f"magi bench: round {turn + 1} of {options.rounds}, {told}\n")
            try:
                runs[name].append(_run(options, name))
            except MagiError as error:
                if name not in given:
                    raise
                failed[name] = str(error)
    found = Found(
        {name: side(rounds) for name, rounds in runs.items() if name not in failed}, failed,
        runs[OURS][0][0], options.tolerance,
    )  # fmt: skip
    text = json.dumps(as_dict(found), indent=2) if options.json else as_text(found)
    sys.stdout.write(text + "\n")
    return 0 if found.agreements[OURS].agree else 1


def _why_not(peer: str, ranks: int) -> str:
    """Return why a peer cannot run here, "" if nothing is known against it.

    Raises:
        MagiError: There is no such peer, or it is none for a script.
    """
    check_for_scripts(peer)
    return why_not(peer, ranks, torch.cuda.is_available())


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
    add("--peers", metavar="PEER,...", help="run it with these, too: compile, block-compile, "
        "liger+block-compile and the like")  # fmt: skip
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


def _run(options: Any, peer: str) -> list[Seen]:
    """Run the script once; return what each rank saw."""
    with tempfile.TemporaryDirectory(prefix="magi_bench_") as name:
        folder, ranks = Path(name), options.nproc or 1
        chosen = "" if peer == WITHOUT else peer
        spec = Spec(name, chosen, options.warm_up, options.steps, time.time(), ranks)
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
        kind = {OURS: "with magi", WITHOUT: "without magi"}.get(peer, f"with {peer}")
        for each in seen:
            if each.error:
                raise MagiError(f"{options.script}, run {kind}: {each.error}")
        if status or len(seen) != ranks:
            end = "\n".join((folder / "log").read_text().strip().splitlines()[-15:])
            hint = (
                "; give --nproc, and ranks are started" if "variable RANK expected" in end else ""
            )
            raise MagiError(
                f"{options.script}, run {kind}, ended with {status}{hint}; its last lines:\n{end}"
            )
        return seen


@dataclass(frozen=True)
class Found:
    """What the runs gave.

    Attributes:
        sides: By "without", a peer's name or "magi", in this order.
        failed: Why there is no side of a peer.
        seen: By rank 0 of the first run with magi.
        tolerance: Of losses.
    """

    sides: dict[str, Side]
    failed: dict[str, str]
    seen: Seen
    tolerance: float

    @property
    def agreements(self) -> dict[str, Agreement]:
        """Return how the losses of each side compare with those without."""
        plain = self.sides[WITHOUT].losses
        others = {name: each for name, each in self.sides.items() if name != WITHOUT}
        return {n: compare(plain, each.losses, self.tolerance) for n, each in others.items()}

    @property
    def verdict(self) -> Verdict:
        """Return whether to use it: beside the fastest side that is not ours and trains alike."""
        agree = self.agreements
        alike = [n for n in self.sides if n == WITHOUT or (n != OURS and agree[n].agree)]
        best = min(alike, key=lambda name: self.sides[name].step_ms)
        found = judge(self.sides[best], self.sides[OURS], agree[OURS])
        return replace(found, why=f"{found.why} (beside {best})") if best != WITHOUT else found


def as_dict(found: Found) -> dict[str, Any]:
    """Return the answer as JSON has it."""
    agreements, seen = found.agreements, found.seen
    theirs: dict[str, Any] = {
        name: {**asdict(found.sides[name]), "agreement": asdict(agreements[name])}
        for name in found.sides
        if name not in (WITHOUT, OURS)
    }
    theirs |= {name: {"failed": why} for name, why in found.failed.items()}
    captured = {n: getattr(seen, n) for n in ("way", "how", "tier", "reason", "device")}
    return {
        "without": asdict(found.sides[WITHOUT]),
        "with": asdict(found.sides[OURS]),
        "peers": theirs,
        "losses": asdict(agreements[OURS]),
        "verdict": asdict(found.verdict),
        **captured,
    }


def as_text(found: Found) -> str:
    """Return the answer for people."""
    seen, verdict, agreements = found.seen, found.verdict, found.agreements
    named = {WITHOUT: "without", OURS: "with magi"}
    wide = max(12, *(len(name) for name in (*found.sides, *found.failed)))
    lines = [f"{'':{wide}} {'step ms':>9} {'p10':>9} {'p90':>9} {'peak GiB':>9} {'start-up s':>14}"]
    for name, each in found.sides.items():
        starts = ", ".join(f"{s:.1f}" for s in each.start_up_s)
        lines.append(f"{named.get(name, name):{wide}} {each.step_ms:9.3f} {each.p10_ms:9.3f} "
                     f"{each.p90_ms:9.3f} {each.peak_gib:9.3f} {starts:>14}")  # fmt: skip
    lines += [f"{n:{wide}} failed: {why.splitlines()[-1]}" for n, why in found.failed.items()]
    if seen.device != "cuda":
        lines.append("peak: of the process on the host, compiling included")
    for name, same in agreements.items():
        lines.append(
            f"losses of {same.compared} steps {'agree' if same.agree else 'DIFFER'}: median "
            f"{same.median:.2g}, last quarter {same.late:.2g}, worst step "
            f"{same.worst:.2g} (tolerance {found.tolerance:g})"
            + (f" [{name}]" if name != OURS else "")
        )
    because = f", because {seen.reason}" if seen.reason else ""
    lines.append(f"captured: tier {seen.tier.upper()}{because}")
    lines.append(f"use it: {verdict.use}; {verdict.why}")
    if verdict.use == "yes":
        lines.append(f"how: {seen.how}")
    if verdict.use == "yes" and verdict.pays_after:
        lines.append(f"the longer start-up is made up for after {verdict.pays_after} steps")
    return "\n".join(lines)
