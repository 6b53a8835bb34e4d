"""Engine fsdp2 on two gloo ranks against DDP; its checkpoints, its choice, and its failures."""

import contextlib
import resource
import signal
import sys
import time

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import magi_train
from magi_train import CommConfig, Config, ShardingConfig
from magi_train.comm import fully_shard
from magi_train.comm.shard_blocks import blocks_to_shard
from tests.close import difference, relative_error, tolerance
from tests.models import MODELS, VOCABULARY, WIDTH, Small, loss_of, tokens
from tests.ranks import run_ranks, values

FSDP2 = Config(engine="fsdp2", lowering="aot_eager")
SECONDS = 40


class Attention(nn.Module):
    """Grouped-query attention that repeats its keys and values, for a pass to undo."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 8, 8).transpose(1, 2).split((4, 2, 2), 1)
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Blocks(nn.Module):
    """An embedding, three equal blocks, a head, and a running mean as of BatchNorm."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Attention() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def reset_parameters(self):
        nn.init.zeros_(self.mean)

    def forward(self, input_ids, labels):
        h = self.embedding(input_ids)
        for block in self.blocks:
            h = h + block(h)
        if self.training:
            self.mean.lerp_(h.detach().float().mean((0, 1)), 0.1)
        logits = self.head(h - self.mean)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def make(name):
    torch.manual_seed(0)
    return (Blocks if name == "blocks" else MODELS[name][0])().train()


def uneven(name, step, rank):
    """Return a batch; rank 1 has fewer rows than rank 0."""
    batch = MODELS["llama" if name == "blocks" else name][1](10 * step + rank)
    return {k: v[: len(v) - rank] for k, v in batch.items()}


def train(model, optimizer, name, rank, steps=3, accumulate=1, bf16=False, first=0):
    """Return losses, whole gradients of the last step before clipping, and the norms."""
    losses, norms, gradients = [], [], {}
    for step in range(first, first + steps):
        for micro in range(accumulate):
            quiet = contextlib.nullcontext() if micro == accumulate - 1 else model.no_sync()
            batch = uneven(name, accumulate * step + micro, rank)
            with quiet, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_of(model(**batch))
                (loss / accumulate).backward()
            losses.append(float(loss.detach()))
        named = [(n.removeprefix("module."), p) for n, p in model.named_parameters()]
        gradients = {n: None if p.grad is None else whole(p.grad).clone() for n, p in named}
        norms.append(float(whole(nn.utils.clip_grad_norm_(model.parameters(), 1.0))))
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, norms


@contextlib.contextmanager
def counted_sums():
    """Collect the sizes of FSDP2's sums of gradients."""
    sizes, own = [], fully_shard._reduce_scatter
    fully_shard._reduce_scatter = lambda out, *args, **more: (
        sizes.append(out.numel()) or own(out, *args, **more)
    )
    try:
        yield sizes
    finally:
        fully_shard._reduce_scatter = own


def state_of(model):
    return {n: whole(v).clone() for n, v in model.state_dict().items()}


def against_ddp(rank, _, names, config, accumulate, bf16):
    results = {}
    for name in names:
        torch._dynamo.reset()
        twin = make(name)
        ddp = DistributedDataParallel(make(name), find_unused_parameters=True)
        sgd = torch.optim.SGD(ddp.parameters(), 0.1, momentum=0.9)
        want = train(ddp, sgd, name, rank, accumulate=accumulate, bf16=bf16)
        if rank:  # prepare() has to take rank 0's
            nn.init.ones_(next(iter(twin.parameters())))
        optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
        model, optimizer = magi_train.prepare(twin, optimizer, config=config)
        with counted_sums() as sums:
            got = train(model, optimizer, name, rank, accumulate=accumulate, bf16=bf16)
        mine, theirs = state_of(model), state_of(ddp.module)
        buffers = {n for n, _ in ddp.module.named_buffers()}
        report = magi_train.report(model)
        plan = next(row.plan for row in report.rows if row.name == "fully_shard")
        stages = [row.name for row in report.rows if row.stage == "pre_grad" and row.plan]
        results[name] = {
            "loss": difference({"": torch.tensor(got[0])}, {"": torch.tensor(want[0])}),
            "norm": difference({"": torch.tensor(got[2])}, {"": torch.tensor(want[2])}),
            "gradient": difference(got[1], want[1]),
            "state": difference(mine, {n: v for n, v in theirs.items() if n not in buffers}),
            "sums": len(sums),
            "tier": report.tier,
            "plan": plan,
            "passes": stages,
            "graphs": sum(row.graphs for row in report.rows if row.stage == "pre_grad"),
            "notes": report.notes,
        }
    return results


@pytest.mark.parametrize(
    ("names", "accumulate"),
    [
        (("blocks",), 2),
        pytest.param(("llama", "unused_frozen_tied"), 2, marks=pytest.mark.full),
        pytest.param(("t5", "gpt2", "bert", "vit", "resnet"), 1, marks=pytest.mark.full),
    ],
)
def test_gradients_and_weights_are_those_of_ddp(names, accumulate, two_ranks):
    blocks = {"blocks": 3, "llama": 2, "gpt2": 2, "bert": 2, "vit": 2}
    for results in values(two_ranks(against_ddp, names, FSDP2, accumulate, False)):
        for name, got in results.items():
            assert got["tier"] == "region"
            for what in ("loss", "norm", "gradient", "state"):
                assert got[what] <= tolerance(torch.float32, 64), (name, what, got[what])
            assert got["plan"]["blocks"] == blocks.get(name, got["plan"]["blocks"]), name
            # one for each block and the root in each of three steps, whatever is accumulated
            assert got["sums"] == 3 * (got["plan"]["blocks"] + 1), name
            held = got["plan"]["weight_bytes_of_this_rank"] / got["plan"]["weight_bytes"]
            assert held < 0.7, (name, held)
        if "blocks" in results:  # the passes ran inside the blocks
            assert results["blocks"]["passes"] == ["canonicalize_attention"]
            assert results["blocks"]["graphs"] >= 1


@pytest.mark.full
def test_weights_gathered_in_bfloat16_are_as_near_to_fp32_as_autocast(two_ranks):
    for ours, ddp in values(two_ranks(in_bfloat16, True)):
        assert 0 < ours <= 1.5 * ddp, (ours, ddp)
    for outcome in two_ranks(in_bfloat16, False):
        assert "ShardingConfig.gather_dtype is 'bfloat16'" in outcome.error


def in_bfloat16(rank, _, bf16):
    def gradients(model, bf16):
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        return train(model, sgd, "blocks", rank, steps=1, bf16=bf16)[1]

    exact = gradients(DistributedDataParallel(make("blocks")), False)
    ddp = gradients(DistributedDataParallel(make("blocks")), True)
    sharding = ShardingConfig(gather_dtype="bfloat16", reshard_after_forward=False)
    config = Config(engine="fsdp2", lowering="aot_eager", sharding=sharding)
    model = magi_train.prepare(make("blocks"), config=config)
    ours = gradients(model, bf16)
    return relative_error(ours, exact), relative_error(ddp, exact)


# -- blocks, choice, settings ------------------------------------------------------------------


def test_blocks_are_found_by_structure():
    class Tied(Blocks):
        def __init__(self):
            super().__init__()
            self.blocks[1].out = self.head_too = nn.Linear(WIDTH, WIDTH)

    assert [len(blocks_to_shard(m)) for m in (Blocks(), Tied(), Small())] == [3, 2, 0]
    model = nn.Sequential(Blocks(), nn.Sequential(*(Attention() for _ in range(2))))
    assert len(blocks_to_shard(model)) == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tier": "graph"}, "tier='graph'"),
        ({"shard_optimizer": True}, "shard_optimizer=True"),
        ({"memory_budget_gib": 1.0}, "memory_budget_gib"),
        ({"comm": CommConfig(compression="int8")}, "comm.compression='int8'"),
    ],
)
def test_settings_that_need_whole_weights_are_refused(settings, words):
    with pytest.raises(ValueError, match=r"Config.engine is 'fsdp2', which does not go with") as e:
        Config(engine="fsdp2", **settings)
    assert words in str(e.value)


def test_one_rank_shards_nothing_and_says_so():
    model = magi_train.prepare(Small(), config=FSDP2)
    model(tokens(0), tokens(1)).backward()
    report = magi_train.report(model)
    assert report.tier == "graph"
    assert any("one rank has nobody to shard with" in note for note in report.notes)


def choice(rank, _, megabytes):
    sharding = ShardingConfig(device_memory_gib=megabytes / 1024)
    config = Config(engine="auto", lowering="aot_eager", sharding=sharding)
    model = Small()
    adam = torch.optim.Adam(model.parameters())
    model, _ = magi_train.prepare(model, adam, config=config)
    total = 4 * sum(p.numel() * p.element_size() for p in model.parameters())
    report = magi_train.report(model)
    is_sharded = any(isinstance(p, DTensor) for p in model.parameters())
    return is_sharded, report.notes[0], total


def test_auto_shards_what_does_not_fit_and_says_why(two_ranks):
    for is_sharded, note, total in values(two_ranks(choice, 64)):
        assert not is_sharded
        assert f"'replicate' is used, as a replica keeps {total} bytes" in note
        assert f"fit into {48 * 2**20}: 75% of the {64 * 2**20} bytes" in note
    for is_sharded, note, _ in values(two_ranks(choice, 0.1)):
        assert is_sharded
        assert "'fsdp2' is used" in note
        assert "do not fit into" in note


def test_auto_needs_to_know_the_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"set ShardingConfig.device_memory_gib"):
        magi_train.prepare(Small(), config=Config(engine="auto"))


# -- weights that come later, and state that was there before ------------------------------------


class Bare(nn.Module):
    """A weight that nothing can fill."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * self.weight


def from_meta(rank, _):
    with torch.device("meta"):
        model = Blocks()
    sizes = [p.numel() for p in model.parameters()]
    adam = torch.optim.AdamW(model.parameters(), 1e-2)
    model, adam = magi_train.prepare(model, adam, config=FSDP2)
    mine = [p.to_local().numel() for p in model.parameters()]
    table = whole(model.embedding.weight.detach())
    losses = [float(loss_and_step(model, adam)) for _ in range(8)]
    try:
        with torch.device("meta"):
            bare = nn.Sequential(nn.Linear(WIDTH, WIDTH), Bare())
        magi_train.prepare(bare, config=FSDP2)
        refused = ""
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    return sum(mine) / sum(sizes), table, losses, refused


def loss_and_step(model, optimizer):
    loss = model(tokens(0), tokens(1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def test_a_model_on_the_meta_device_is_filled_after_the_cut(two_ranks):
    first, second = values(two_ranks(from_meta))
    for part, table, losses, refused in (first, second):
        assert part == pytest.approx(0.5, abs=0.02)
        assert losses[-1] < losses[0] - 0.1
        half = VOCABULARY // 2
        assert not torch.equal(
            table[:half], table[half:]
        )  # each part has random numbers of its own
        assert 0.8 < float(table.std()) < 1.2
        assert refused.startswith("MagiError: 1 (Bare) lies on the meta device"), refused
    assert torch.equal(first[1], second[1])


def with_a_used_optimizer(rank, _):
    plain, twin = make("blocks"), make("blocks")
    # a key's bias has a gradient of rounding noise alone; with this eps Adam does not blow it up
    want = torch.optim.AdamW(plain.parameters(), 1e-2, eps=1e-4)
    have = torch.optim.AdamW(twin.parameters(), 1e-2, eps=1e-4)
    for model, optimizer in ((plain, want), (twin, have), (plain, want)):
        loss_and_step(model, optimizer)
    model, have = magi_train.prepare(twin, have, config=FSDP2)
    loss_and_step(model, have)
    assert all(isinstance(p, DTensor) for p in have.state)
    return difference(state_of(model), state_of(plain))


def test_an_optimizer_that_has_state_keeps_it(two_ranks):
    for got in values(two_ranks(with_a_used_optimizer)):
        assert got <= tolerance(torch.float32, 64), got


# -- checkpoints -------------------------------------------------------------------------------


def prepared(config=FSDP2):
    torch.manual_seed(1)
    model = make("blocks")
    adam = torch.optim.AdamW(model.parameters(), 1e-2)
    return magi_train.prepare(model, adam, config=config)


def saves_and_goes_on(rank, _, folder):
    model, adam = prepared()
    train(model, adam, "blocks", rank)
    magi_train.save_checkpoint(folder, model, adam)
    saved = state_of(model)
    moment = whole(adam.state[model.head.weight]["exp_avg"]).clone()
    want = train(model, adam, "blocks", rank, first=3)
    torch._dynamo.reset()
    model, adam = prepared()
    magi_train.load_checkpoint(folder, model, adam)
    loaded = state_of(model)
    got = train(model, adam, "blocks", rank, first=3)
    same = all(torch.equal(loaded[n], saved[n]) for n in saved)
    return same, want[0] == got[0], saved, moment, full_disk(rank, folder, model)


def full_disk(rank, folder, model):
    """Save while rank 1 cannot write more than 100 bytes into a file."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    try:
        magi_train.save_checkpoint(folder, model)
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        unlimited = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        signal.signal(signal.SIGXFSZ, before)


def test_a_checkpoint_loads_on_as_many_ranks_and_on_one(two_ranks, tmp_path):
    folder = tmp_path / "step_3"
    results = values(two_ranks(saves_and_goes_on, folder))
    for same, goes_on, _, _, error in results:
        assert same
        assert goes_on
        assert error.startswith(f"MagiError: {folder} could not be written: on rank 1, OSError")
    _, _, saved, moment, _ = results[0]
    # what follows reads the first checkpoint: the one that failed has not replaced it
    plain = magi_train.plain_state_dict(folder)
    assert plain.keys() == saved.keys()
    assert all(torch.equal(plain[n], saved[n]) for n in saved)
    make("blocks").load_state_dict(plain)
    model, adam = prepared(Config(lowering="aot_eager"))
    magi_train.load_checkpoint(folder, model, adam)
    assert all(torch.equal(v, saved[n]) for n, v in model.state_dict().items())
    assert torch.equal(adam.state[model.head.weight]["exp_avg"], moment)
    train(model, adam, "blocks", 0)
    magi_train.save_checkpoint(folder, model, adam)  # and back, over the old one
    again = magi_train.plain_state_dict(folder)
    assert all(torch.equal(again[n], v) for n, v in model.state_dict().items())
    with pytest.raises(magi_train.MagiError, match="holds no whole checkpoint"):
        magi_train.plain_state_dict(tmp_path)


def test_a_sharded_optimizer_has_its_own_way(monkeypatch, tmp_path):
    model, adam = prepared(Config(lowering="aot_eager"))
    monkeypatch.setattr("magi_train.checkpoint.is_sharded", lambda optimizer: optimizer is adam)
    for each in (magi_train.save_checkpoint, magi_train.load_checkpoint):
        (tmp_path / ".metadata").touch()
        with pytest.raises(magi_train.MagiError, match=r"saved by its own state_dict\(\)"):
            each(tmp_path, model, adam)


# -- failures ----------------------------------------------------------------------------------


def raises_in_step_three(rank, _):
    model = magi_train.prepare(make("blocks"), config=FSDP2)
    for step in range(6):
        ids = tokens(step) + (1000 if rank == 1 and step == 2 else 0)
        model(ids, tokens(1)).backward()


@pytest.mark.full
def test_a_rank_that_raises_ends_the_other():
    first, second = run_ranks(raises_in_step_three)
    assert second.error.startswith("IndexError")
    assert first.error.startswith("RemoteRankError: rank 1 failed: IndexError"), first.error
    assert abs(first.ended_at - second.ended_at) < SECONDS


def goes_on_after_an_error(_, __):
    model = magi_train.prepare(make("blocks"), config=FSDP2)
    for _ in range(2):
        loss = model(tokens(0), tokens(1))
        loss.register_hook(lambda g: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward()


def test_a_backward_that_raised_is_not_gone_on_from():
    for outcome in run_ranks(goes_on_after_an_error):
        assert outcome.error.startswith("MagiError: the last backward ended with an error that was")


def adds_to_parts(rank, _):
    model = magi_train.prepare(make("blocks"), config=FSDP2)
    said, sums = [], []
    for part in (lambda p: p, whole):
        try:
            sums += [part(p) + torch.ones(p.shape) for p in model.parameters()]
        except RuntimeError as error:
            sys.excepthook(RuntimeError, error, None)  # as at the end of a script
            said += error.__notes__
    return said, len(sums) == len(list(model.parameters()))


def test_weights_outside_of_their_block_are_explained():
    for said, all_added in values(run_ranks(adds_to_parts)):
        (note,) = said
        assert "they are whole in the forward of their block" in note
        assert all_added, "to whole weights one can"


def stops_early(rank, _):
    model = magi_train.prepare(make("blocks"), config=FSDP2)
    for step in range(3 if rank == 0 else 2):
        model(tokens(step), tokens(1)).backward()
    if rank == 1:
        model._magi_runtime.world.close()  # as at the end of a script
        time.sleep(8)  # the process lives on: only its training has ended


@pytest.mark.full
def test_a_rank_that_ends_early_is_named():
    first = run_ranks(stops_early)[0]
    assert "RemoteRankError: ranks [1] ended their program while rank 0 still waits" in first.error
    assert "the weights of a block" in first.error or "rank 0's weights" in first.error


def one_cannot_compile(rank, _, tier):
    torch._dynamo.reset()
    config = Config(engine="fsdp2", lowering="aot_eager", tier=tier)
    model = magi_train.prepare(make("blocks"), config=config)
    if rank == 1:
        model._magi_region.compile_graph = lambda *_, **__: 1 / 0
    model(tokens(rank), tokens(1)).backward()
    gradient = whole(model.head.weight.grad).clone()
    return gradient, magi_train.report(model).notes


def test_a_rank_that_cannot_compile_runs_in_step_uncompiled(two_ranks):
    (gradient, notes), (other, notes_1) = values(two_ranks(one_cannot_compile, "auto"))
    assert torch.equal(gradient, other)
    assert not any("uncompiled" in note for note in notes)
    assert any("blocks of class Attention run uncompiled" in note for note in notes_1)


@pytest.mark.full
def test_and_is_an_error_where_region_is_forced():
    first, second = run_ranks(one_cannot_compile, "region")
    assert second.error.startswith("CaptureError: Config.tier is 'region', but Attention cannot")
    assert first.error.startswith("RemoteRankError: rank 1 failed: CaptureError")


def with_an_old_optimizer(rank, _):
    model = make("blocks")
    adam = torch.optim.AdamW(model.parameters())
    loss_and_step(magi_train.prepare(model, config=FSDP2), adam)


@pytest.mark.full
def test_an_optimizer_of_the_whole_weights_is_refused(two_ranks):
    for outcome in two_ranks(with_an_old_optimizer):
        assert "AdamW was made before the weights were sharded" in outcome.error


def evaluates(rank, _, accumulate):
    """Return the outputs of evaluations between steps, under DDP and sharded."""

    def run(model):
        outputs, optimizer = [], torch.optim.SGD(model.parameters(), 0.1)
        for step in range(3):
            train(model, optimizer, "blocks", rank, 1, accumulate, first=step)
            model.eval()
            with torch.no_grad():
                outputs.append(model(**uneven("blocks", step, rank)))
            model.train()
        return {str(step): output for step, output in enumerate(outputs)}

    want = run(DistributedDataParallel(make("blocks"), find_unused_parameters=True))
    return difference(run(magi_train.prepare(make("blocks"), config=FSDP2)), want)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_rank_evaluates_with_rank_zeros_buffers(accumulate, two_ranks):
    for apart in values(two_ranks(evaluates, accumulate)):
        assert apart <= tolerance(torch.float32, 64)
