"""Capture: how much of a step becomes a graph, decided by all ranks together.

A `Region` is one function of a model which is captured: the module's forward, a whole training
step, Lightning's `training_step`. On its first call with gradients it takes the highest tier that
all ranks reach:

    GRAPH    Dynamo captures the function whole; the collectives are in its backward graph.
    REGION   repeated blocks are compiled (without such, whatever Dynamo can); hooks reduce.
    EAGER    nothing is compiled; hooks reduce.

The vote goes through the store, before the first collective: a rank whose capture fails tells the
others, which have not run anything yet. Dynamo only ever proposes: with `fullgraph=True` either the
whole function is in one graph or our backend is never called.

Later calls may compile again (another shape); such a graph executes the agreed plan, so nothing is
asked. A later call that cannot be captured runs uncompiled on this rank alone, with hooks. The same
holds for further forms of a GRAPH region, for batches of which a fact is known (core/facts.py): a
rank takes them or not as its own batch allows.
"""

import collections
import contextlib
import dataclasses
import itertools
import logging
import math
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import GraphModule, Node

from magi_train.comm.in_graph import PlaceCollectives
from magi_train.comm.reducer import Reducer
from magi_train.core import compat
from magi_train.core.config import Config
from magi_train.core.errors import CaptureError, EagerOnlyError, MagiError
from magi_train.core.facts import Assumptions, Facts, Inputs, Paths
from magi_train.core.graph import example_value, outputs
from magi_train.core.outputs import FindUnused, Outputs
from magi_train.core.passes import (
    CachedPass,
    Pass,
    PassContext,
    Stage,
    registered_passes,
    run_passes,
)
from magi_train.fusion.attention import CanonicalizeAttention, mask_inputs
from magi_train.fusion.dropout import PackDropout
from magi_train.fusion.fp8 import Fp8Linears
from magi_train.fusion.loss import BUDGET_CHUNK_MIB, ChunkLinearCrossEntropy
from magi_train.fusion.max_pool import MaxPoolBackward
from magi_train.fusion.narrow_erf import NarrowErf
from magi_train.fusion.narrow_gradients import SkipGradientCasts
from magi_train.fusion.patches import PatchConvolutions
from magi_train.fusion.projections import MergeProjections
from magi_train.fusion.relu_masks import ReluMasks
from magi_train.fusion.shadow import UseWeightShadows, shadow_graph
from magi_train.lower import lower
from magi_train.memory.blocks import Turn
from magi_train.memory.budget import FitBudget
from magi_train.memory.exhausted import explain, is_exhausted
from magi_train.recording import is_replayed
from magi_train.replay import Replayer, weakly
from magi_train.runtime import Runtime
from magi_train.tune import Tuner

logger = logging.getLogger(__name__)

MIB = 2**20
MISSES = 3
"""Calls in a row that fail to compile regions, or would compile again beyond Dynamo's limit, before
nobody tries any more."""
_region_ordinals = itertools.count()


class _Form(NamedTuple):
    """What a compiled form of a function is for.

    Attributes:
        facts: About its inputs.
        settings: The passes.
        plan: The communication of its backward.
        hooks: Places among the modules' hooks, and how many are there: Dynamo takes no notice.
    """

    facts: Facts
    settings: Config
    plan: str
    hooks: tuple[tuple[int, int], ...]


class _NotTogetherError(Exception):
    """This rank captured the region, another one did not."""


def pre_grad_passes(config: Config, device_type: str, *, budgeted: bool) -> list[Pass[Any]]:
    """Return the passes over the graph before autograd that `config` asks for, in their order.

    Args:
        config: The settings.
        device_type: Where the graph runs.
        budgeted: Whether a memory budget limits the step.
    """
    passes: list[Pass[Any]] = []
    if config.fusion is not None and config.fusion.attention:
        passes.append(CanonicalizeAttention())
    if config.fusion is not None and config.fusion.loss:
        most = min(config.fusion.loss_chunk_mib, BUDGET_CHUNK_MIB if budgeted else math.inf)
        passes.append(ChunkLinearCrossEntropy(int(most * MIB)))
    patches = config.fusion.patches if config.fusion is not None else False
    if device_type != "cpu" if patches is None else patches:
        passes.append(PatchConvolutions(always=patches is True))
    return [*passes, *registered_passes(Stage.PRE_GRAD)]


def narrows_erf(config: Config, device_type: str, *, budgeted: bool) -> bool:
    """Return whether GELU's erf is computed to 16 bits: where `config` asks, else where it gains.

    Args:
        config: The settings.
        device_type: Where the graph runs.
        budgeted: Whether a memory budget limits the step.
    """
    if config.fusion is None or config.lowering != "inductor":
        return False
    if config.fusion.narrow_erf is None:
        return device_type == "cuda" and not budgeted
    return config.fusion.narrow_erf


def generated_code_passes(config: Config, device_type: str) -> list[CachedPass[Any]]:
    """Return the JOINT passes for generated code that run where `config` asks, else on CUDA."""
    if config.fusion is None or config.lowering != "inductor":
        return []
    switches: dict[type[CachedPass[Any]], bool | None] = {
        PackDropout: config.fusion.packed_dropout,
        ReluMasks: config.fusion.relu_masks,
        MaxPoolBackward: config.fusion.max_pool,
    }
    gains = device_type == "cuda"
    return [each() for each, wanted in switches.items() if (gains if wanted is None else wanted)]


class Region:
    """One captured function of a model. Calling it runs the function.

    Args:
        runtime: Of the model whose parameters the function uses.
        function: What to capture.
        name: For messages and the report.
        hooks_because: Why its backward may not reduce by itself, so that REGION is the highest
            tier; "" if it may.

    Raises:
        MagiError: The model's weights are sharded, which a ShardedRegion is for.
    """

    takes_sharded_weights = False

    def __init__(
        self,
        runtime: Runtime,
        function: Callable[..., Any],
        name: str,
        hooks_because: str = "",
    ) -> None:
        if runtime.sharded and not self.takes_sharded_weights:
            raise MagiError(
                f"{name} cannot be captured with engine {runtime.config.engine!r} here; use "
                "magi_train.prepare() or Lightning's strategy='magi_fsdp', or engine='replicate'"
            )
        self.runtime, self.name = runtime, name
        self._hooks_because = hooks_because
        self.tier = ""
        self._ran_once = False
        self._ordinal = next(runtime.region_ordinals)
        runtime.regions.add(self)
        self._function = function
        self._compiled: Callable[..., Any] = function
        fusion = runtime.config.fusion
        self._facts = Assumptions(fusion is not None and fusion.attention and fusion.padding)
        self._variants: dict[_Form, Callable[..., Any]] = {}
        self._hooks: list[Mapping[int, Any]] = []
        self._tuner = Tuner(runtime.config, runtime.world, runtime.report)
        self._inputs, self._assumed = Inputs(), Facts()  # of the call that is running
        self._blocks: list[nn.Module] = []
        self._turn, self._alike = Turn(), False
        self._replayers: list[Replayer] = []
        self._misses = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function, compiled as far as all ranks can."""
        runtime = self.runtime
        if runtime.closed:
            raise MagiError(f"{self.name} was prepared again, or its training has been torn down")
        if not torch.is_grad_enabled():
            with runtime.entered():
                return self._function(*args, **kwargs)
        if compat.forward_mode_is_on():
            return self._uncompiled(args, kwargs)
        recorder, ends_step = runtime.recorder, runtime.reducer.sync
        if not runtime.inside:
            recorder.begin(self._ordinal, ends_step, args, kwargs)
        try:
            output = self._next(args, kwargs) if self.tier else self._first(args, kwargs)
            if not runtime.inside:
                recorder.end(self._ordinal, output)
            return output
        except BaseException as error:
            if not self.tier:
                self._uncompile_blocks()
            if is_exhausted(error):
                explain(error, runtime.memory)
            if not isinstance(error, torch.OutOfMemoryError):  # batch size finders go on
                runtime.world.fail(error)
            raise

    def close(self) -> None:
        """Undo what compiling regions left on the module."""
        self._uncompile_blocks()
        for replayer in self._replayers:
            replayer.close()
        self._replayers = []

    def _uncompile_blocks(self) -> None:
        for block in self._blocks:
            compat.set_compiled_call(block, None)
        self._blocks = []

    # -- the first call --------------------------------------------------------------------------

    def _first(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        runtime = self.runtime
        wanted, reason = runtime.config.tier, ""
        runtime.begin_memory((args, kwargs))
        if compat.problems():
            reason = f"this torch lacks {'; '.join(compat.problems())}"
            self._must_not_be_forced("graph", "region", reason=reason)
        elif self._hooks_because:
            reason = self._hooks_because
            self._must_not_be_forced("graph", reason=reason)
        elif wanted in ("auto", "graph"):
            done, result = self._try_graph(args, kwargs)
            if done:
                return self._take("graph", "", result)
            reason = result
            if compat.enters_a_lock(reason) and not self._ran_once and runtime.memory is None:
                return self._run_once(args, kwargs)
            self._must_not_be_forced("graph", reason=reason)
        never = compat.breaks_at_a_gradient(reason) or EagerOnlyError.ADVICE in reason
        ran: list[Any] = []
        if wanted in ("auto", "region") and not compat.problems() and not never:
            output, why = self._try_region(args, kwargs)
            if not why:
                return self._take("region", reason, output)
            reason, ran = f"{reason + '; then ' if reason else ''}{why}", [output]
            self._must_not_be_forced("region", reason=reason)
        if self.runtime.memory is not None:
            raise CaptureError(
                "Config.memory_budget_gib needs a captured graph, but the EAGER tier was "
                f"reached because {reason}; remove the budget or make the model capturable"
            )
        if self.runtime.fp8:
            self.runtime.report.note(f"{self.name} runs in tier EAGER, without fp8")
        self._compiled = self._function
        output = ran[0] if ran else self._uncompiled(args, kwargs)
        return self._take("eager", reason, output)

    def _run_once(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the first step eagerly: what code does under a lock it does only once."""
        self._ran_once = True
        self.runtime.report.note(
            f"the first step of {self.name} ran eagerly: its code prepares something under a lock"
        )
        self.runtime.reducer.begin(in_graph=False)
        with self.runtime.entered():
            return self._function(*args, **kwargs)

    def _take(self, tier: str, reason: str, output: Any) -> Any:
        self.tier = tier
        if tier == "graph" and self.runtime.config.comm.in_graph:
            self.runtime.reducer.pin_plan()
        report = self.runtime.report
        if not report.tier:
            report.tier, report.reason = tier, reason
        if reason and self.runtime.world.rank == 0:
            logger.warning("magi-train: %s runs in tier %s: %s", self.name, tier.upper(), reason)
        return output

    def _must_not_be_forced(self, *tiers: str, reason: str) -> None:
        if self.runtime.config.tier in tiers:
            raise CaptureError(
                f"Config.tier is {self.runtime.config.tier!r}, but {self.name} cannot be captured "
                f"so: {reason}. Change that line, or use tier='auto'"
            )

    def _vote(self, question: str, objection: str | None, fatal: bool = False) -> str:
        """Return why not all ranks can go on, "" if they can.

        Raises:
            MagiError: A rank met an error that a lower tier would not cure.
        """
        world = self.runtime.world
        answers = world.gather(
            f"{question} of region {self._ordinal}",
            {"objection": objection, "fatal": fatal},
            self.runtime.config.timeout_seconds,
        )
        reasons = [
            (f"on rank {rank}, " if world.size > 1 else "") + answer["objection"]
            for rank, answer in enumerate(answers)
            if answer["objection"] is not None
        ]
        if any(answer["fatal"] for answer in answers) and not fatal:
            raise MagiError(reasons[0])
        return reasons[0] if reasons else ""

    def _try_graph(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """Return (True, output), or (False, why some rank cannot capture the function whole)."""
        backend = _GraphBackend(self, voted=False)
        compiled = self._whole(backend)
        inputs = self._facts.look(args, kwargs)
        self._hooks = compat.hooks_of_modules(self.runtime.module)
        hooks = self._hooks_now()
        self.runtime.reducer.begin(in_graph=self.runtime.config.comm.in_graph)
        try:
            with self.runtime.entered(), self._assuming(inputs, inputs.facts):
                output = compat.call_captured(compiled, args, kwargs, guards_hooks=False)
        except Exception as error:  # Dynamo lets some of its own through, asserts for one
            inner = compat.inner_backend_error(error)
            if isinstance(inner, MagiError):
                raise inner from error
            if isinstance(inner, _NotTogetherError):
                return False, str(inner)
            if backend.voted or is_exhausted(error):
                raise
            return False, self._vote("capture", compat.capture_failure_text(error))
        if not backend.voted:
            why = self._vote("capture", None)
            if why:
                return False, why
        form = _Form(self._facts.key(inputs), self._tuner.settings, self._plan_key(), hooks)
        self._variants[form] = compiled
        return True, output

    def _whole(self, backend: "_GraphBackend") -> Callable[..., Any]:
        return torch.compile(
            self._own_code(), backend=backend, fullgraph=True, dynamic=self.runtime.config.dynamic
        )

    def _own_code(self) -> Callable[..., Any]:
        return own_code(self._function, f"magi_region_{next(_region_ordinals)}")

    @contextlib.contextmanager
    def _assuming(self, inputs: Inputs, assumed: Facts) -> Iterator[None]:
        """While this holds, graphs are compiled under the facts `assumed` about `inputs`."""
        self._inputs, self._assumed = inputs, assumed
        try:
            yield
        finally:
            self._inputs, self._assumed = Inputs(), Facts()

    def _try_region(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, str]:
        """Return the output, and why some rank cannot compile its regions, "" if all can.

        The output stands either way: a failure shows when other code of the function has run.
        """
        blocks = self._blocks = repeated_blocks(self.runtime.module)
        self._compile_regions()
        self.runtime.reducer.begin(in_graph=False)
        output, objection = self._in_regions(args, kwargs)
        why = self._vote("compile regions", objection)
        if blocks and not why:
            self.runtime.report.note(
                f"{len(blocks)} repeated blocks are compiled, the rest is eager"
            )
        return output, why

    def _in_regions(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, str | None]:
        """Return the output of the compiled regions, and why some of them ran uncompiled."""
        failures: list[Exception] = []
        try:
            with self.runtime.entered():
                output = compat.call_captured(self._compiled, args, kwargs, failures=failures)
        except compat.CAPTURE_ERRORS as error:
            inner = compat.inner_backend_error(error)
            raise (inner if isinstance(inner, MagiError) else error) from None
        if not failures:
            return output, None
        why = compat.capture_failure_text(compat.inner_backend_error(failures[0]))
        failures[:] = [CaptureError(why)]  # blocks keep it, and a traceback would keep tensors
        return output, why

    def _compile_regions(self) -> None:
        self._compile_blocks(self._blocks)
        self._compiled = self._function
        if not self._blocks:
            self._compiled = torch.compile(
                self._own_code(),
                backend=RegionBackend(self, 1),
                dynamic=self.runtime.config.dynamic,
            )

    def _compile_blocks(self, blocks: list[nn.Module]) -> None:
        kinds = {(type(b), tuple(tuple(p.shape) for p in b.parameters())) for b in blocks}
        self._alike = len(kinds) == 1
        for kind, same in itertools.groupby(blocks, key=type):
            members = list(same)

            def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return compat.uncompiled_call(block, *args, **kwargs)

            compiled = torch.compile(
                own_code(call, f"magi_{kind.__name__}_{next(_region_ordinals)}"),
                backend=RegionBackend(self, len(blocks)),
                dynamic=self.runtime.config.dynamic,
            )
            for block in members:
                compat.set_compiled_call(block, _Bound(compiled, block, self._turn))

    # -- later calls -----------------------------------------------------------------------------

    def _next(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        reducer = self.runtime.reducer
        if self.runtime.memory is not None and self.runtime.memory.plan_anew():
            self._plan_anew()
        if self._misses >= MISSES or self.tier == "eager":
            self._uncompile_blocks()  # not before: a checkpoint ran them again in the backward
            return self._uncompiled(args, kwargs)
        if self.tier == "region":
            reducer.begin(in_graph=False)
            output, why_not = self._in_regions(args, kwargs)
            self._count(f"some code of {self.name} ran uncompiled", why_not, why_not is not None)
            return output
        reducer.begin(in_graph=self.runtime.config.comm.in_graph)
        inputs = self._facts.look(args, kwargs)
        assumed = self._facts.key(inputs)
        form = _Form(assumed, self._form(), self._plan_key(), self._hooks_now())
        if form not in self._variants:
            self._variants[form] = self._whole(_GraphBackend(self, voted=True))
        compiled = self._variants[form]
        try:
            with self.runtime.entered(), self._assuming(inputs, assumed):
                output = compat.call_captured(compiled, args, kwargs, guards_hooks=False)
            self._count("", None, False)
            return output
        except compat.CAPTURE_ERRORS as error:
            inner = compat.inner_backend_error(error)
            if isinstance(inner, MagiError) and not isinstance(inner, EagerOnlyError):
                raise inner from error
            why = compat.capture_failure_text(inner)
            again = isinstance(error, compat.RecompileLimitHit or ())
            again = again or isinstance(inner, EagerOnlyError)
        self._count(f"some steps of {self.name} ran uncompiled", why, again)
        return self._uncompiled(args, kwargs)

    def _count(self, what: str, why: str | None, again: bool) -> None:
        """Say what ran uncompiled and why, if anything; compile nothing any more once it repeats.

        Args:
            what: Ran uncompiled.
            why: None if all that should be compiled was.
            again: Whether the next call is likely to end like this one.
        """
        self._misses = self._misses + 1 if again else 0
        if why is None or 1 < self._misses < MISSES:
            return
        if self._misses == MISSES:
            what = f"{self.name} runs uncompiled from now on"
        self.runtime.report.note(f"{what}: {why}")
        logger.warning("magi-train: %s: %s", what, why)

    def _uncompiled(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self.runtime.reducer.begin(in_graph=False)
        with self.runtime.entered():
            return self._function(*args, **kwargs)

    def _plan_anew(self) -> None:
        """Forget what is compiled: the next calls compile under another limit."""
        for region in self.runtime.regions:
            region._variants = {}
            if region.tier == "region":
                region._compile_regions()

    def _hooks_now(self) -> tuple[tuple[int, int], ...]:
        """Return where modules have hooks, and how many; for 250 modules this takes 30 us."""
        if not any(self._hooks):
            return ()
        return tuple((i, len(hooks)) for i, hooks in enumerate(self._hooks) if hooks)

    def _plan_key(self) -> str:
        """Return what tells the communication plan that a compiled backward follows from others."""
        reducer = self.runtime.reducer
        return reducer.plan_key if isinstance(reducer, Reducer) else ""

    def _form(self) -> Config:
        """Return the settings to run with now; once they are chosen, forget the other forms."""
        if self._tuner.done:
            return self._tuner.settings
        settings = self._tuner.next()
        if self._tuner.done:
            kept = {form: c for form, c in self._variants.items() if form.settings == settings}
            self._variants = kept
            shadows = settings.fusion is not None and settings.fusion.weight_shadows
            if not shadows and len(self.runtime.regions) == 1:
                self.runtime.shadows.manage([])
        return settings

    def progress(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which a graph of this region is compiled, for all to see."""
        return self.runtime.progress.compiling(self.name)

    # -- backends --------------------------------------------------------------------------------

    def compile_graph(
        self, gm: GraphModule, inputs: Sequence[Any], *, in_graph: bool, shares: int
    ) -> Callable[..., Any]:
        """Run the passes over a captured graph and lower it.

        Args:
            gm: Dynamo's graph.
            inputs: Its example inputs.
            in_graph: Whether its backward reduces the gradients.
            shares: How many blocks the graph serves.
        """
        runtime = self.runtime
        _refuse_other_kinds(gm)
        has_backward = _has_backward(gm)
        self._hooks = compat.hooks_of_modules(runtime.module)  # modules may have been added
        names = parameter_positions(gm, runtime.module)
        stable = {*names, *_buffer_positions(gm, runtime.module)}
        places = self._inputs.places(gm)
        assumed = dict(self._assumed)
        facts = {name: assumed[path] for name, path in places.items() if path in assumed}
        context = PassContext(runtime.device_type, facts=facts)
        before = _mask_places(gm, places)
        settings = self._tuner.settings
        budgeted = runtime.memory is not None and runtime.memory.limits
        passes = pre_grad_passes(settings, runtime.device_type, budgeted=budgeted)
        run_passes(passes, gm, context, runtime.report)
        if places and settings.fusion is not None and settings.fusion.attention:
            after = _mask_places(gm, places)
            advice = self._facts.learn(self._inputs, self._assumed, before, after)
            if advice:
                runtime.report.note(advice)
        collectives = None
        reducer = runtime.reducer
        if in_graph and runtime.config.comm.in_graph and runtime.world.size > 1:
            assert isinstance(reducer, Reducer), "where weights are sharded, hooks reduce"
            trainable = {i: n for i, n in names.items() if n in reducer.planned}
            collectives = PlaceCollectives(reducer.plan, reducer.ordinal, trainable)
        fusion, shadows, shadowed = settings.fusion, None, None
        joint: list[CachedPass[Any]] = [FindUnused()]
        if fusion is not None and fusion.weight_shadows:
            shadowed = shadow_graph(gm, inputs, runtime.shadows, runtime.device_type)
        if shadowed is not None:
            stable |= set(range(len(inputs), len(shadowed[1])))
            gm, inputs, shadows = shadowed
            joint.append(UseWeightShadows(shadows.layout))
            merge = fusion.projections if fusion is not None else False
            if runtime.fp8 if merge is None else merge:
                joint.append(MergeProjections(whole=runtime.fp8))
        if runtime.fp8:
            joint.append(Fp8Linears())
        if narrows_erf(settings, runtime.device_type, budgeted=budgeted):
            joint.append(NarrowErf())
        joint.extend(generated_code_passes(settings, runtime.device_type))
        backward = registered_passes(Stage.BACKWARD)
        narrow = [i for i, x in _examples(gm) if in_graph and runtime.narrow_gradients.takes(x)]
        if narrow:
            backward.insert(0, SkipGradientCasts(narrow))
        if has_backward:
            low = None if shadows is None else getattr(torch, shadows.layout.dtype)
            runtime.compile_steps(low, narrow=bool(narrow))
        limit = None
        if runtime.memory is not None:
            limit = runtime.memory.limit(
                shadow_bytes=runtime.shadows.num_bytes,
                fused=runtime.config.lowering == "inductor",
                blocks=shares,
            )
            limit = dataclasses.replace(limit, two_variants=self._alike)
        compiled, rows = lower(
            gm,
            inputs,
            runtime.config.lowering,
            context=context,
            joint=[*joint, *registered_passes(Stage.JOINT)],
            backward=backward,
            collectives=collectives,
            limit=limit,
            blocks=shares,
            turn=self._turn,
        )
        if shadowed is not None:
            compat.give_up_memory(inputs[-len(shadowed[2].layout.inputs) :])
        for row in rows:
            runtime.report.add(row)
            if runtime.memory is not None and row.name == FitBudget.name:
                bounded = row.plan["planned_gib"] < row.plan["without_gib"]
                runtime.memory.planned(row.plan["planned_gib"], bounded)
        plans = {row.name: row.plan for row in rows}
        if collectives is None and has_backward and FindUnused.name not in plans:
            runtime.report.note(
                f"{self.name}: compiled code came from a cache without the notes that lie beside "
                "it, so outputs that a loss does not use may give zeros where there is no gradient"
            )
        unused = () if collectives is not None else plans.get(FindUnused.name, {}).get("inputs", ())
        compiled = Outputs(compiled, unused)
        if in_graph:
            compiled = self._replaying(compiled, frozenset(stable), unused)
        if shadows is not None:
            read = plans.get(UseWeightShadows.name)
            compiled = shadows.bind(compiled, None if read is None else read.get("weights", ()))
        return compiled

    def _replaying(
        self,
        compiled: Callable[..., Any],
        stable: frozenset[int],
        unused: Sequence[tuple[int, Sequence[int]]],
    ) -> Callable[..., Any]:
        """Return `compiled`, replayed as device graphs where that may be."""
        runtime = self.runtime
        wanted, why = runtime.config.cuda_graphs, ""
        if runtime.memory is not None:
            why = "the memory budget plans one step, not a pool beside it"
        elif runtime.replays is None:
            why = f"there are none on {runtime.device_type}"
        elif runtime.world.size > 1:
            why = "a backward that reduces gradients between ranks is not replayed"
        elif runtime.config.lowering != "inductor" and wanted == "auto":
            why = "without generated code they are not tried"
        if why and (wanted == "on" or runtime.replays is not None):
            runtime.report.note(f"cuda_graphs: {why}")
        if why or runtime.replays is None:
            return compiled
        replayer = Replayer(
            compiled,
            stable,
            runtime.replays,
            measure=wanted == "auto",
            ready=lambda tuner=self._tuner: tuner.done,  # type: ignore[misc]
            report=runtime.report,
        )
        self._replayers.append(replayer)
        return Outputs(weakly(replayer), unused, is_replayed)

    def recall(self, gm: GraphModule, inputs: Sequence[Any]) -> None:
        """Take an earlier process's choice of passes for this graph, where that was asked for."""
        if not self._tuner.done:
            self._tuner.recall(gm, inputs)

    def vote_capture(self) -> None:
        """Tell the others that this rank captured the function; raise if one of them did not."""
        why = self._vote("capture", None)
        if why:
            raise _NotTogetherError(why)

    def vote_compile(self, error: Exception | None) -> None:
        """Tell the others how compilation ended; raise if it failed anywhere."""
        fatal = isinstance(error, MagiError) and not isinstance(error, EagerOnlyError)
        objection = None if error is None else f"compilation failed: {error}"
        why = self._vote("compile", objection, fatal)
        if fatal and error is not None:
            raise error
        if why:
            raise _NotTogetherError(why) from error


class _GraphBackend:
    """Dynamo backend of the GRAPH tier: votes on its first call unless that is done, compiles.

    Dynamo keeps every backend for as long as the process lives: it must not keep the model.
    """

    def __init__(self, region: Region, *, voted: bool) -> None:
        self._region, self.voted = weakref.ref(region), voted

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        region = self._region()
        assert region is not None, "only the region itself calls what this compiles"
        if self.voted:  # another shape: the plan is agreed, nothing to ask
            with region.progress():
                return region.compile_graph(gm, inputs, in_graph=True, shares=1)
        self.voted = True
        region.vote_capture()
        region.recall(gm, inputs)
        try:
            with region.progress():
                compiled = region.compile_graph(gm, inputs, in_graph=True, shares=1)
        except Exception as error:
            region.vote_compile(error)
            raise
        region.vote_compile(None)
        return compiled


class RegionBackend:
    """Dynamo backend of the REGION tier: every graph it is given, collectives left to hooks."""

    def __init__(self, region: Region, shares: int) -> None:
        self._region, self.shares = weakref.ref(region), shares  # weak: see _GraphBackend

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Compile a graph."""
        region = self._region()
        if region is None:  # the blocks have outlived what prepare() returned
            return gm.forward
        with region.progress():
            return region.compile_graph(gm, inputs, in_graph=False, shares=self.shares)


class _Bound:
    """`compiled` with its first argument filled in, or the plain block; tells whose turn it is.

    A checkpoint runs the block again in the backward, and counts what is saved: what the forward
    failed to compile is not compiled there, either.
    """

    def __init__(self, compiled: Callable[..., Any], block: nn.Module, turn: Turn) -> None:
        self.compiled, self.block, self.turn = compiled, block, turn
        self.failures: list[Exception] | None = None  # of the last forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        failures = compat.failures_taken()
        evaluated = failures is None and not torch.is_grad_enabled()
        if compat.forward_mode_is_on() or evaluated:
            return compat.uncompiled_call(self.block, *args, **kwargs)
        before, self.turn.block = self.turn.block, id(self.block)
        try:
            if failures is None and self.failures:
                given = (self.block, *args)
                return compat.call_captured(self.compiled, given, kwargs, failures=self.failures)
            self.failures = failures
            return self.compiled(self.block, *args, **kwargs)
        finally:
            self.turn.block = before


def own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a wrapper with a code object of its own: Dynamo's recompile limit counts by code."""

    def region(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    code = region.__code__.replace(co_name=name)
    return types.FunctionType(code, region.__globals__, name, None, region.__closure__)


def parameter_positions(gm: GraphModule, module: nn.Module) -> dict[int, str]:
    """Return {position among the graph's inputs: name of the parameter}, by identity."""
    return _positions(gm, dict(module.named_parameters()))


def _buffer_positions(gm: GraphModule, module: nn.Module) -> dict[int, str]:
    return _positions(gm, dict(module.named_buffers()))


def _positions(gm: GraphModule, tensors: dict[str, Any]) -> dict[int, str]:
    names = {id(tensor): name for name, tensor in tensors.items()}
    return {i: names[id(x)] for i, x in _examples(gm) if id(x) in names}


def _examples(gm: GraphModule) -> list[tuple[int, Any]]:
    """Return (position, what Dynamo traced with) for each input of the graph."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [(i, compat.live_example(node)) for i, node in enumerate(placeholders)]


def _has_backward(gm: GraphModule) -> bool:
    """Return whether an output of Dynamo's graph needs a gradient, and is no view of an input."""
    given = [example_value(n) for n in gm.graph.find_nodes(op="placeholder")]
    inputs = {compat.storage_key(x) for x in given if isinstance(x, torch.Tensor)}
    values = [example_value(n) for n in outputs(gm.graph) if isinstance(n, Node)]
    return any(
        isinstance(v, torch.Tensor) and v.requires_grad and compat.storage_key(v) not in inputs
        for v in values
    )


def _refuse_other_kinds(gm: GraphModule) -> None:
    """Make sure that compiled code, which makes plain tensors only, is given no other kind.

    Raises:
        EagerOnlyError: An input is of a subclass of Tensor that has methods of its own only.
    """
    for i, x in _examples(gm):
        own = isinstance(x, torch.Tensor) and type(x) not in (torch.Tensor, compat.FakeTensor)
        if own and not isinstance(x, nn.Parameter) and not compat.is_made_of_tensors(x):
            name = compat.source_name(gm.graph.find_nodes(op="placeholder")[i]) or f"input {i}"
            raise EagerOnlyError(
                f"{name} is a {type(x).__name__}, a kind of tensor that compiled code does not "
                f"make (as_subclass(torch.Tensor) gives a plain one); {EagerOnlyError.ADVICE}"
            )


def _mask_places(gm: GraphModule, places: dict[str, str]) -> list[Paths]:
    """Return where the inputs of each mask lie in the call; "%name" for what is not in it."""
    return [frozenset(places.get(n, f"%{n}") for n in names) for names in mask_inputs(gm)]


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that a container holds at least two of, in order.

    Only blocks with submodules count: a row of plain layers is not worth a graph each.
    """
    if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        children = list(module.children())
        kinds = collections.Counter(type(c) for c in children)
        same = [c for c in children if kinds[type(c)] >= 2 and any(c.children())]
        if same:
            return list({id(c): c for c in same}.values())
    blocks = [block for child in module.children() for block in repeated_blocks(child)]
    return list({id(b): b for b in blocks}.values())
