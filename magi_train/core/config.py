"""Config and its parts, FusionConfig, CommConfig, ShardingConfig: every knob on one page.

All are frozen and keyword-only; a part that is None is left as PyTorch does it. `Config()` keeps
the function that is trained: no rounding coarser than what autocast does already; `precision` and
`CommConfig.compression` are the settings that do.
"""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Tier = Literal["graph", "region", "eager"]
Compression = Literal[
    "safe", "balanced", "aggressive", "bfloat16", "int8", "fp8", "hierarchical", "powersgd"
]
Lowering = Literal["inductor", "aot_eager"]
CudaGraphs = Literal["auto", "on", "off"]
Precision = Literal["autocast", "fp8"]
Engine = Literal["replicate", "fsdp2", "deepspeed", "auto"]


def _check_choice(owner: str, name: str, value: object, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{owner}.{name} must be one of {choices}, got {value!r}")


def link_from_text(text: str) -> tuple[float, float] | None:
    """Return (latency in seconds, seconds a byte) of "300us 1gbit"; None for anything else."""
    found = re.fullmatch(r"(\d+\.?\d*) ?us,? (\d+\.?\d*) ?gbit", text.strip().lower())
    if found is None or not float(found[2]):
        return None
    return float(found[1]) * 1e-6, 8e-9 / float(found[2])


def _check_positive(owner: str, name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{owner}.{name} must be positive, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """Which rewrites of the captured graph run before autograd, and what the optimizer runs."""

    attention: bool = True
    """Drop attention masks that are proven causal or all-true, and feed grouped keys and values
    to the attention op without repeating them. Sliding windows become windowed attention on CUDA,
    in bf16 and fp16."""

    padding: bool = True
    """Train batches whose padding masks are all ones without these masks, in a captured form of
    their own, and batches whose `position_ids` pack sequences with variable-length attention; other
    batches take the other form. Looks at tensors on the host only: on the CPU, in Lightning's
    transfers, and in `magi_train.to_device`. False: one form for all."""

    loss: bool = True
    """Compute a linear and the cross-entropy of its logits in chunks of tokens, so that the full
    logits never exist, where nothing else reads them (a step that returns only the loss)."""

    loss_chunk_mib: float = 8192.0
    """MiB that the logits of one chunk may take, in the dtype of the matmul and float32 together;
    at most 8 chunks. Losses that fit one chunk are left alone, but for those that a kernel takes
    (in bfloat16 on CUDA). Smaller saves memory, and costs one read and write of the weight's
    gradient per chunk. With Config.memory_budget_gib it is at most 2048."""

    optimizer: bool = True
    """Let one kernel take the steps of torch's Adam, AdamW and SGD on CUDA devices. What it cannot
    take, torch does; the report says why."""

    weight_shadows: bool = True
    """Keep the low-precision copies of weights that autocast would make in every step; the
    optimizer's kernel writes them. Costs 2 bytes a weight, saves 6 bytes of traffic a step."""

    projections: bool | None = None
    """Run linears of one input whose shadows are neighbours (query, key, value; gate, up) as one
    product, and their backward too where that moves fewer bytes. Parameters stay as they are. None:
    on with `Config(precision="fp8")`, where wide products gain most, else off, as it gained nothing
    on the models it was measured on; with `tune` it stays only if it gains."""

    patches: bool | None = None
    """Run convolutions of few input channels whose windows do not overlap, the stem of vision
    transformers, as matrix products over patches. Parameters stay as they are. None: on
    accelerators, where the result is bfloat16 or float16. True: wherever it can be done."""

    narrow_erf: bool | None = None
    """Compute the `1 + erf(z)` of GELU to the precision of the bfloat16 or float16 that it is
    rounded to (relative error 8e-6), in generated code. None: on CUDA devices, where the exact one
    costs more than reading and writing; not with a memory budget, whose plans take each operation
    for traffic."""

    packed_dropout: bool | None = None
    """Draw the masks of large dropouts by a kernel of their own, eight elements of one call of
    Philox, and keep 1 bit an element for the backward in place of a byte, in generated code. Other
    random bits from the same seeds. None: on CUDA devices. True: wherever code is generated."""

    relu_masks: bool | None = None
    """Let the backward of a ReLU behind a BatchNorm compute its mask from the norm's input, which
    is read there anyway, in generated code: one tensor less to read. None: on CUDA devices. True:
    wherever code is generated."""

    max_pool: bool | None = None
    """Let a kernel take the backward of max-pooling over images, where generated code has the
    channels innermost, and do not keep its input. None: on CUDA devices. True: wherever code is
    generated."""

    narrow_gradients: bool = False
    """Leave the gradients of weights in bfloat16 where autocast's backward made them so, if the
    optimizer's kernel takes them: the same values in half the memory. `.grad` is bfloat16 then;
    backwards add up in float32, but clipping and other in-place changes round to bfloat16. For one
    rank and the GRAPH tier."""

    def __post_init__(self) -> None:
        _check_positive("FusionConfig", "loss_chunk_mib", self.loss_chunk_mib)


SWITCHES = {
    "canonicalize_attention": "attention",
    "use_weight_shadows": "weight_shadows",
    "merge_projections": "projections",
    "patch_convolutions": "patches",
}
"""Of passes that `Config(tune=True)` measures: row in the report, and FusionConfig field."""


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    """How gradients travel between ranks."""

    bucket_mib: float | None = None
    """Size at which a bucket is full. None: what is best for the measured link, or, without one, a
    sixteenth of the gradients, 8 to 128 MiB. Larger hides latency, smaller starts earlier."""

    link: str = "auto"
    """What sizes of buckets are chosen for. "measure": latency and bandwidth between the ranks,
    timed at the start in under 2 seconds and remembered for these hosts. "auto": the same, where
    gradients take over 4 MiB and do not stay inside of one host's NCCL. "300us 1gbit": a link
    with that latency and bandwidth of an all-reduce. "off": no link; the plan then never follows a
    measurement, so sums of three or more ranks are rounded alike in every run. Where hooks reduce
    on the CPU, the first steps' backwards improve the plan once."""

    compression: Compression | None = "safe"
    """How float32 gradients travel. None: as they are. "safe": weights whose gradients bfloat16
    holds exactly, because autocast's backward made them so, in bfloat16: sums over micro-batches
    and over ranks are made in float32 and rounded once; all others, and all without autocast, as
    they are; on GPUs for two ranks, or with `copy_engines`, as NCCL rounds the partial sums of
    more. "bfloat16": all in half the bytes. "int8": a quarter of the bytes, with error
    feedback. "fp8": the same in e4m3. "hierarchical": as they are
    inside of a node, int8 between nodes. "powersgd": matrices as factors of `low_rank` columns with
    error feedback. "balanced" is "int8", or "hierarchical" for several nodes of several ranks.
    "aggressive" is "powersgd", for links under 1 Gbit/s; compare losses. Codecs with error feedback
    leave parameters of one dimension in float32 and small ends of the model in bfloat16, and keep
    residuals: up to 12 bytes a weight."""

    node_size: int | None = None
    """Ranks in a node, the same in all nodes, which follow each other. None: as the launcher says
    (LOCAL_WORLD_SIZE), else by host names. Only "hierarchical" and "balanced" ask."""

    low_rank: int = 4
    """Columns of the factors for "powersgd". More: more bytes, smaller error."""

    trial: bool = True
    """Let the levels "balanced" and "aggressive" prove themselves: 15 of the first 18 steps go in
    turns with the level's codec, in bfloat16 and as they are, and the more exact one stays unless
    the other makes the slowest rank's step over 3 % faster. A codec that is named is not tried. On
    GPUs these steps are synchronised."""

    outer_steps: int | None = None
    """For links under 1 Gbit/s, and another algorithm (DiLoCo): no gradients are sent; after so
    many steps each, ranks exchange how far their weights have come, in `compression`'s codec, and
    take one outer step of SGD with Nesterov momentum. Between exchanges ranks hold different
    weights: call `magi_train.exchange_weights(model)` on all ranks before saving or evaluating.
    Compare losses; 50 to 500 is usual. None: gradients are averaged in every step."""

    outer_lr: float = 0.7
    """Of the outer step; 1 with `outer_momentum` 0 is the plain mean of the ranks' weights."""

    outer_momentum: float = 0.9
    """Of the outer step."""

    early_step: bool = False
    """Let `optimizer.step()` begin with the gradients that have arrived while others are on their
    way, which hides it behind a slow link; the same bits. On the CPU, where hooks send gradients
    (tier "eager" or "region"), for an optimizer that is given to `prepare` and updates each weight
    by itself. Until its bucket has arrived, a `.grad` is a tensor subclass that any operation on it
    waits for, so clipping and GradScaler are right, and hide nothing. Not for a compiled step."""

    check_replicas: int | None = None
    """Compare the weights of all ranks after the backward of every so many synchronised steps, and
    fail with the first parameter that differs. Reads the weights once and sends 8 bytes for each
    parameter. None: never."""

    copy_engines: bool = False
    """Let GPUs of one host average gradients through each other's memory: copy engines carry the
    bytes, and "safe" shortens them on more than two GPUs. Takes 128 MiB of each, outside of
    PyTorch's allocator. On two H200s it was 2 % slower than NCCL; more were not tried. What codecs
    encode goes through NCCL in any case."""

    in_graph: bool = True
    """Put the all-reduces into a captured backward graph, where they overlap with it by plan.
    False: gradient hooks start them in every tier."""

    broadcast_buffers: bool = True
    """Take rank 0's buffers (BatchNorm statistics) at the first forward in training mode of a step,
    and after every synchronised backward."""

    def __post_init__(self) -> None:
        _check_positive("CommConfig", "bucket_mib", self.bucket_mib)
        _check_positive("CommConfig", "low_rank", self.low_rank)
        _check_positive("CommConfig", "node_size", self.node_size)
        _check_positive("CommConfig", "outer_steps", self.outer_steps)
        _check_positive("CommConfig", "outer_lr", self.outer_lr)
        if not 0 <= self.outer_momentum < 1:
            raise ValueError(
                "CommConfig.outer_momentum must be at least 0 and less than 1, got "
                f"{self.outer_momentum}"
            )
        if self.outer_steps is not None and self.check_replicas is not None:
            raise ValueError(
                "CommConfig.check_replicas compares weights that outer_steps lets differ between "
                "exchanges; remove one of the two"
            )
        _check_positive("CommConfig", "check_replicas", self.check_replicas)
        if self.link not in ("auto", "measure", "off") and link_from_text(self.link) is None:
            raise ValueError(
                "CommConfig.link must be 'auto', 'measure', 'off', or a latency and a bandwidth as "
                f"in '300us 1gbit', got {self.link!r}"
            )
        _check_choice("CommConfig", "compression", self.compression, (None, *get_args(Compression)))


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How a model that is not replicated is spread over the ranks; see `Config.engine`."""

    device_memory_gib: float | None = None
    """GiB that "auto" may count on for each rank. None: the memory of the CUDA device; without one
    "auto" is an error."""

    activation_share: float = 0.25
    """The part of that memory that "auto" leaves for activations and work space; what a replica
    keeps all the time has to fit into the rest."""

    reshard_after_forward: bool = True
    """Free the gathered weights of a block after its forward, and gather them again for its
    backward. False keeps them: less communication, the memory of all weights."""

    gather_dtype: Literal["bfloat16"] | None = None
    """The dtype in which weights are gathered and used. "bfloat16", half the bytes, is for training
    under autocast to it, where it changes only what autocast leaves in float32 (norms, biases).
    None: the dtype in which they are kept."""

    offload: bool = False
    """Keep the sharded weights, their gradients and the optimizer's state in host memory; the
    optimizer's step runs there. For "deepspeed" below stage 3: gradients and optimizer state."""

    zero_stage: Literal[1, 2, 3] | None = None
    """What "deepspeed" shards: 1 the optimizer's state, 2 gradients too, 3 weights too. None: what
    `deepspeed` says, else 2."""

    deepspeed: str | dict[str, Any] | None = field(default=None, hash=False)
    """DeepSpeed's own settings for "deepspeed": the name of a JSON file, or in Python what it would
    hold. Where it contradicts a setting of ours, that is an error."""

    def __post_init__(self) -> None:
        _check_positive("ShardingConfig", "device_memory_gib", self.device_memory_gib)
        _check_choice("ShardingConfig", "zero_stage", self.zero_stage, (None, 1, 2, 3))
        if not isinstance(self.deepspeed, str | dict | type(None)):
            raise TypeError(
                "ShardingConfig.deepspeed must be the name of a JSON file or a dict, got "
                f"{type(self.deepspeed).__name__}"
            )
        if not 0 <= self.activation_share < 1:
            raise ValueError(
                "ShardingConfig.activation_share must be at least 0 and less than 1, got "
                f"{self.activation_share!r}"
            )
        _check_choice("ShardingConfig", "gather_dtype", self.gather_dtype, (None, "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to do to a training step."""

    engine: Engine = "replicate"
    """Where weights live. "replicate": whole on every rank. "fsdp2": sharded over the ranks by
    torch's `fully_shard`, block by block, for models that do not fit otherwise. "deepspeed":
    DeepSpeed's ZeRO, see `ShardingConfig.zero_stage`. "auto": "replicate" if weights, gradients and
    optimizer state fit on every rank, else "fsdp2"; the report says which, with the bytes."""

    tier: Literal["auto"] | Tier = "auto"
    """How much of the model to capture. "auto" takes the highest tier that all ranks reach;
    a named tier is forced, and a model that cannot reach it is an error."""

    fusion: FusionConfig | None = field(default_factory=FusionConfig)
    """Rewrites to fewer and cheaper kernels; None for none."""

    precision: Precision = "autocast"
    """What linears compute in. "autocast": what they are given, so bfloat16 under autocast to it.
    "fp8": bfloat16 linears that are large enough to gain run in 8-bit floating point, forward and
    backward, with a scale for each tensor; coarser numbers, so compare losses. Weights, gradients
    and optimizer are unchanged. Where the GPU has no fp8 products it is "autocast", and a warning
    says so."""

    memory_budget_gib: float | Literal["auto"] | None = None
    """GiB that a training step may take at its peak on each rank: parameters, gradients, optimizer
    state, buffers and activations. What does not fit is recomputed in the backward, the cheapest
    first; gradients do not change. "auto": the memory of the CUDA device less a margin. None: no
    limit, PyTorch's own choice, which recomputes only what is free. Resets the device's peak
    statistics once, in the second step."""

    offload_activations: bool = False
    """Under `memory_budget_gib` on CUDA devices: let activations wait in pinned memory of the host
    where that costs less time than recomputing, which is as far as copies hide beside kernels;
    gradients do not change. The ranks of a host may pin a quarter of its memory together for a
    step, in blocks that are powers of two, and keep it between steps. False: what does not fit is
    recomputed."""

    comm: CommConfig = field(default_factory=CommConfig)
    """Buckets and wire format of gradients."""

    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    """How a model is spread over the ranks where the engine does that."""

    shard_optimizer: bool = False
    """Keep the optimizer's state (moments, momentum) on each rank for its own part of the weights
    only; ranks update their parts and gather the weights before `step()` returns. For optimizers of
    torch.optim that treat elements one by one. `state_dict()` stays whole, and every rank must call
    it."""

    lowering: Lowering = "inductor"
    """What runs the captured graphs. "aot_eager" keeps every pass but generates no code: for
    debugging and for hosts without a C++ compiler."""

    dynamic: bool | None = None
    """As in torch.compile: None turns a size dynamic once it has changed, False never does."""

    cuda_graphs: CudaGraphs | bool = "auto"
    """Replay forward and backward of the GRAPH tier as CUDA graphs, on one rank, with static sizes.
    "auto": only if steps turn out to be faster so; "on" (True): without measuring; "off" (False):
    never. Holds the memory of one forward and backward for itself; what outlives its step is
    copied. The report says what was measured, or why nothing is replayed. Under a memory budget
    nothing is."""

    tune: bool = False
    """Measure the fusion passes on the first steps of the GRAPH tier, each in turns of seven, and
    drop those without which the slowest rank is faster. Costs a compilation for each pass that did
    something, and device synchronisations in these steps; later processes remember."""

    timeout_seconds: float = 600.0
    """How long ranks wait for each other outside of a collective before they give up."""

    run_folder: str | None = None
    """Where rank 0 keeps the run's report with the record of its steps, `magi_report.json`, brought
    up to date every ten seconds; `magi explain FOLDER` shows it. None: nowhere by itself."""

    progress: bool = True
    """Show on rank 0's terminal what is being compiled and how far, and in the window's title how
    the steps go. Nothing is shown where stderr is no terminal."""

    def __post_init__(self) -> None:
        _check_choice("Config", "engine", self.engine, get_args(Engine))
        _check_choice("Config", "tier", self.tier, ("auto", *get_args(Tier)))
        switch = {True: "on", False: "off"}
        if isinstance(self.cuda_graphs, bool):
            object.__setattr__(self, "cuda_graphs", switch[self.cuda_graphs])
        _check_choice("Config", "cuda_graphs", self.cuda_graphs, get_args(CudaGraphs))
        _check_choice("Config", "lowering", self.lowering, get_args(Lowering))
        _check_choice("Config", "precision", self.precision, get_args(Precision))
        _check_positive("Config", "timeout_seconds", self.timeout_seconds)
        for name, kind in (
            ("fusion", (FusionConfig, type(None))),
            ("comm", CommConfig),
            ("sharding", ShardingConfig),
        ):
            if not isinstance(getattr(self, name), kind):
                got = type(getattr(self, name)).__name__
                raise TypeError(f"Config.{name} must be a {name.title()}Config, got {got}")
        if self.cuda_graphs == "on" and self.memory_budget_gib is not None:
            raise ValueError(
                "Config.cuda_graphs is 'on', but Config.memory_budget_gib is set, which plans the "
                "memory of one step, not of a pool for graphs beside it; remove one of the two"
            )
        if self.memory_budget_gib != "auto":
            if isinstance(self.memory_budget_gib, str):
                got = repr(self.memory_budget_gib)
                raise ValueError(
                    f"Config.memory_budget_gib must be a number of GiB, 'auto' or None, got {got}"
                )
            _check_positive("Config", "memory_budget_gib", self.memory_budget_gib)
        if self.offload_activations and self.memory_budget_gib is None:
            raise ValueError(
                "Config.offload_activations is True, but Config.memory_budget_gib is None, and "
                "activations wait on the host only as far as a budget asks for it; set "
                "memory_budget_gib to a number of GiB or 'auto'"
            )
        for name, wanted in (
            ("memory_budget_gib", self.memory_budget_gib is not None),
            ("precision='fp8'", self.precision == "fp8"),
        ):
            if self.tier == "eager" and wanted:
                raise ValueError(
                    f"Config.{name} needs a captured graph, but Config.tier is 'eager'; remove one "
                    "of the two"
                )

        if self.comm.early_step:
            self._check_early_step()
        if self.comm.outer_steps is not None:
            self._check_outer_loop()
        if self.engine in ("fsdp2", "deepspeed"):
            self._check_sharded()
        given = [n for n in ("zero_stage", "deepspeed") if getattr(self.sharding, n) is not None]
        if given and self.engine != "deepspeed":
            raise ValueError(
                f"ShardingConfig.{given[0]} is for Config(engine='deepspeed'), but Config.engine "
                f"is {self.engine!r}; set the engine, or leave it out"
            )

    def _check_early_step(self) -> None:
        """Refuse what steps or sends in another way."""
        wrong = {
            "tier='graph'": (self.tier == "graph", "whose graph waits for its gradients"),
            "shard_optimizer=True": (self.shard_optimizer, "whose step ends with a collective"),
            "outer_steps": (self.comm.outer_steps is not None, "which sends no gradients"),
        }
        for name, (is_given, why) in wrong.items():
            if is_given:
                raise ValueError(
                    f"CommConfig.early_step does not go with {name}, {why}; remove one of the two"
                )

    def _check_outer_loop(self) -> None:
        """Refuse what needs equal weights in every step, or plans for all memory."""
        wrong = {
            f"engine={self.engine!r}": self.engine != "replicate",
            "shard_optimizer=True": self.shard_optimizer,
            "memory_budget_gib": self.memory_budget_gib is not None,
        }
        given = [name for name, is_given in wrong.items() if is_given]
        if given:
            raise ValueError(
                f"CommConfig.outer_steps does not go with {', '.join(given)}: ranks hold whole "
                "weights of their own between exchanges, and two more copies; remove one of the two"
            )

    def _check_sharded(self) -> None:
        """Refuse what needs whole weights, or a graph of the whole model, or gradients of ours."""
        compression, fsdp2 = self.comm.compression, self.engine == "fsdp2"
        wrong = {
            "tier='graph'": self.tier == "graph" and fsdp2,
            "shard_optimizer=True": self.shard_optimizer,
            "comm.early_step=True": self.comm.early_step,
            "memory_budget_gib": self.memory_budget_gib is not None,
            "precision='fp8'": self.precision == "fp8",
            "cuda_graphs='on'": self.cuda_graphs == "on",
            "tune=True": self.tune,
            f"comm.compression={compression!r}": compression not in (None, "safe", "bfloat16"),
            "comm.check_replicas": self.comm.check_replicas is not None and not fsdp2,
            "sharding.gather_dtype": self.sharding.gather_dtype is not None and not fsdp2,
            "sharding.reshard_after_forward=False": not (
                self.sharding.reshard_after_forward or fsdp2
            ),
        }
        given = [name for name, is_given in wrong.items() if is_given]
        why = "a weight is whole only while its block runs, and blocks are captured one by one"
        if not fsdp2:
            why = "DeepSpeed keeps and sends weights, gradients and optimizer state by itself"
        if given:
            raise ValueError(
                f"Config.engine is {self.engine!r}, which does not go with {', '.join(given)}: "
                f"{why}; leave these at their defaults, or use engine='replicate'"
            )

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> "Config":
        """Return the Config that a TOML file describes; a YAML file where pyyaml is installed.

        Raises:
            SettingError: The file is missing, or has an unknown key or a wrong value; names it.
        """
        from magi_train.core import settings  # which is built on this module

        return settings.apply(Config(), settings.read_file(path))[0]

    def as_dict(self) -> dict[str, Any]:
        """Return all settings as plain JSON values, nested as the parts are."""
        return dataclasses.asdict(self)
