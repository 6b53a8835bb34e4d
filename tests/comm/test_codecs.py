"""Codecs in one process: N of them are driven side by side, and the collectives are played."""

import pytest
import torch
from torch import nn

from magi_train.comm.codecs import two_shot
from magi_train.comm.codecs.compressor import KINDS
from magi_train.comm.codecs.low_rank import orthonormal
from magi_train.comm.codecs.two_shot import TwoShot
from magi_train.comm.host_memory import HostMemory
from magi_train.comm.plan import BLOCK, plan_buckets
from magi_train.core.config import CommConfig
from tests.close import tolerance

LOSSY = ("bfloat16", "int8", "fp8", "hierarchical", "powersgd")
WITH_FEEDBACK = ("int8", "fp8", "hierarchical", "powersgd")
SHAPES = ((3, 5), (48, 40), (40, 48, 1), (64, 96))
LARGEST = {"int8": 127.0, "fp8": 448.0}
RANKS, NODE = 3, 2


def make(codec, ranks=None, shapes=SHAPES):
    """Return the codecs of all ranks for one bucket of matrices; "hierarchical": nodes of two."""
    hierarchical = codec == "hierarchical"
    ranks, node = ranks or (6 if hierarchical else RANKS), NODE if hierarchical else 1
    kept = [s for s in shapes if codec != "powersgd" or s != (3, 5)]
    named = [(f"p{i}", nn.Parameter(torch.zeros(s))) for i, s in enumerate(kept)]
    config = CommConfig(compression=codec, bucket_mib=1, low_rank=4)
    plan = plan_buckets(named, config, ranks, node_size=node)
    (bucket,) = [b for b in plan.buckets if b.codec == codec]
    kind = KINDS.get(codec, TwoShot)
    return [kind(bucket, rank, ranks) for rank in range(ranks)]


def play(generators):
    """Run the exchanges of all ranks; return what each returned."""
    values, results = [None] * len(generators), []
    while not results:
        requests = []
        for generator, value in zip(generators, values, strict=True):
            try:
                requests.append(generator.send(value))
            except StopIteration as stop:
                results.append(stop.value)
        assert not (requests and results), "ranks want different numbers of collectives"
        if requests:
            (among,) = {r.among for r in requests}
            for ranks in groups(among, len(requests)):
                for r, value in zip(ranks, collective([requests[r] for r in ranks]), strict=True):
                    values[r] = value
    return results


def groups(among, ranks):
    """Return who talks to whom."""
    everybody = list(range(ranks))
    if among == "all":
        return [everybody]
    nodes = [everybody[i : i + NODE] for i in everybody[::NODE]]
    return nodes if among == "node" else [list(each) for each in zip(*nodes, strict=True)]


def collective(requests):
    """Return what each rank of a group gets."""
    (kind,) = {r.kind for r in requests}
    sent = [r.tensor for r in requests]
    assert all(t.is_contiguous() for t in sent)
    if kind == "all_to_all":
        assert all(len(t) == len(sent) for t in sent)
        return [torch.stack([t[r] for t in sent]) for r in range(len(sent))]
    result = torch.cat(sent) if kind == "all_gather" else torch.stack(sent).sum(0)
    assert all(r.out is None or r.out.numel() == result.numel() for r in requests)
    return [result.clone() for _ in sent]


def names(codec):
    return {s.name for s in codec.bucket.slots}


def exchange(codecs, gradients, scale=1.0, used=None):
    """Exchange `gradients` (one dict a rank); return each rank's flat tensor."""
    flats = []
    for codec, mine in zip(codecs, gradients, strict=True):
        flat = torch.zeros(codec.bucket.numel)
        for slot in codec.bucket.slots:
            if slot.name in mine:
                slot.view(flat).copy_(mine[slot.name] * scale)
        flats.append(flat)
    parts = zip(codecs, flats, gradients, strict=True)
    play([c.exchange(f, set(g), scale) for c, f, g in parts])
    return flats


def random_gradients(codecs, step=0):
    """Return different gradients for each rank, some parameters much larger than others."""
    result = []
    for rank, codec in enumerate(codecs):
        generator = torch.Generator().manual_seed(100 * step + rank)
        result.append(
            {
                s.name: torch.randn(s.shape, generator=generator) * 10 ** (-2 * i)
                for i, s in enumerate(codec.bucket.slots)
            }
        )
    return result


def mean_of(gradients, name):
    return torch.stack([g[name].double() for g in gradients]).mean(0)


def cut(codec, flat):
    return {s.name: s.view(flat).clone() for s in codec.bucket.slots}


@pytest.mark.parametrize("codec", LOSSY)
def test_all_ranks_decode_the_same_bits(codec):
    codecs = make(codec)
    first, *others = exchange(codecs, random_gradients(codecs))
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(
        first[codecs[0].bucket.flags_offset :] > 0, torch.ones(len(names(codecs[0]))) > 0
    )


@pytest.mark.parametrize("codec", ["bfloat16", "int8", "fp8", "hierarchical"])
def test_each_shot_rounds_once(codec):
    codecs = make(codec)
    gradients = random_gradients(codecs)
    got = cut(codecs[0], exchange(codecs, gradients)[0])
    for name, value in got.items():
        want = mean_of(gradients, name)
        largest = max(float(g[name].abs().max()) for g in gradients)
        step = {
            "bfloat16": torch.finfo(torch.bfloat16).eps / 2,
            "int8": 0.5 / 127,
            "hierarchical": 0.5 / 127,
            "fp8": torch.finfo(torch.float8_e4m3fn).eps / 2,
        }[codec]
        worst = float((value.double() - want).abs().max())
        assert 0 < worst <= 2 * step * largest * (1 + tolerance(torch.float32, RANKS)), name


def test_low_rank_is_exact_where_the_gradient_is():
    codecs = make("powersgd")
    gradients = []
    for rank, codec in enumerate(codecs):
        g = torch.Generator().manual_seed(rank)
        thin = {s.name: (s.shape, s.shape[0], s.numel() // s.shape[0]) for s in codec.bucket.slots}
        gradients.append(
            {
                name: (torch.randn(n, 1, generator=g) @ torch.randn(1, m, generator=g)).view(shape)
                for name, (shape, n, m) in thin.items()
            }
        )
    got = cut(codecs[0], exchange(codecs, gradients)[0])
    for name, value in got.items():  # the mean of three matrices of rank 1, with 4 columns
        want = mean_of(gradients, name)
        worst = float((value.double() - want).abs().max() / want.abs().max())
        assert worst <= tolerance(torch.float32)


@pytest.mark.parametrize("codec", WITH_FEEDBACK)
def test_nothing_is_lost_but_delayed_while_the_loss_scale_changes(codec):
    """What ranks got in all steps, and the residual, add up to the exact sum."""
    codecs = make(codec)
    total = {n: torch.zeros(()).double() for n in names(codecs[0])}
    want = dict(total)
    for step, scale in enumerate((65536.0, 65536.0, 1.0, 2.0, 2.0)):
        gradients = random_gradients(codecs, step)
        got = cut(codecs[0], exchange(codecs, gradients, scale)[0])
        for c in codecs:
            assert c.finite
            c.commit()
        for n in total:
            total[n] = total[n] + got[n].double() / scale
            want[n] = want[n] + mean_of(gradients, n)
    rest = cut(codecs[0], play([c.mean_residual() for c in codecs])[0])
    for n in total:
        assert rest[n].abs().max() > 0
        off = (total[n] + rest[n] - want[n]).abs().max() / want[n].abs().max()
        assert off <= tolerance(torch.float32), n


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("codec", WITH_FEEDBACK)
def test_a_step_that_is_not_finite_leaves_no_trace(codec, bad):
    ours, twins = make(codec), make(codec)
    for step in range(4):
        gradients = random_gradients(ours, step)
        if step == 2:
            gradients[1][f"p{len(SHAPES) - 2}"].view(-1)[7] = bad
        flats = exchange(ours, gradients)
        if step == 2:
            assert not any(f.isfinite().all() for f in flats)
            assert not any(c.finite for c in ours)
            for c in ours:
                c.discard()
            continue
        assert torch.equal(flats[0], exchange(twins, gradients)[0])
        for c in (*ours, *twins):
            c.commit()


@pytest.mark.parametrize("codec", WITH_FEEDBACK)
def test_a_parameter_without_gradient_keeps_its_residual(codec):
    codecs = make(codec)
    exchange(codecs, random_gradients(codecs))
    for c in codecs:
        c.commit()
    before = cut(codecs[0], play([c.mean_residual() for c in codecs])[0])
    gradients = random_gradients(codecs, 1)
    slots = codecs[0].bucket.slots
    nobody, somebody = slots[0].name, slots[1].name
    for g in gradients:
        del g[nobody]
    del gradients[1][somebody]
    flat = exchange(codecs, gradients)[0]
    for c in codecs:
        c.commit()
    after = cut(codecs[0], play([c.mean_residual() for c in codecs])[0])
    assert (flat[codecs[0].bucket.flags_offset :] > 0).tolist() == [s.name != nobody for s in slots]
    assert torch.equal(before[nobody], after[nobody])
    want = (
        sum(g[somebody].double() for g in gradients if somebody in g) / len(codecs)
        + before[somebody]
    )
    got = cut(codecs[0], flat)[somebody] + after[somebody].double()
    assert (got - want).abs().max() / want.abs().max() <= tolerance(torch.float32)


@pytest.mark.parametrize("codec", WITH_FEEDBACK)
def test_without_a_gradient_in_the_first_step_nothing_is_sent_nor_kept(codec):
    codecs = make(codec)
    gradients = random_gradients(codecs)
    nobody = codecs[0].bucket.slots[0].name
    for g in gradients:
        del g[nobody]
    assert not cut(codecs[0], exchange(codecs, gradients)[0])[nobody].any()
    for c in codecs:
        c.commit()
    assert not cut(codecs[0], play([c.mean_residual() for c in codecs])[0])[nobody].any()


@pytest.mark.parametrize("codec", WITH_FEEDBACK)
def test_what_was_loaded_is_kept_and_sent(codec):
    codecs = make(codec)
    mean = torch.zeros(codecs[0].bucket.flags_offset)
    for slot in codecs[0].bucket.slots:
        slot.view(mean).fill_(0.25)
    for c in codecs:
        c.load_residual(mean)
    nobody, sent, *_ = (s.name for s in codecs[0].bucket.slots)
    gradients = [{n: torch.zeros_like(v) for n, v in g.items()} for g in random_gradients(codecs)]
    for g in gradients:
        del g[nobody]
    got = cut(codecs[0], exchange(codecs, gradients)[0])
    for c in codecs:
        c.commit()
    rest = cut(codecs[0], play([c.mean_residual() for c in codecs])[0])
    assert (rest[nobody] == 0.25).all()
    assert (got[sent] + rest[sent] - 0.25).abs().max() <= 0.25 * tolerance(torch.float32)
    assert got[sent].abs().max() > 0


@pytest.mark.parametrize("codec", WITH_FEEDBACK)
def test_state_goes_to_another_number_of_ranks(codec):
    three, two = make(codec), make(codec, ranks=4 if codec == "hierarchical" else 2)
    exchange(three, random_gradients(three))
    for c in three:
        c.commit()
    rest = cut(three[0], play([c.mean_residual() for c in three])[0])
    for c in two:
        mean = torch.zeros(c.bucket.flags_offset)
        for slot in c.bucket.slots:
            slot.view(mean).copy_(rest[slot.name])
        for name, basis in three[0].bases():
            c.load_basis(name, basis)
        c.load_residual(mean)
    again = cut(two[0], play([c.mean_residual() for c in two])[0])
    bases = [dict(c.bases()) for c in (three[0], two[0])]
    assert bases[0].keys() == bases[1].keys()
    for name in rest:
        worst = (again[name] - rest[name]).abs().max() / rest[name].abs().max()
        assert worst <= tolerance(torch.float32, 2)
        if codec == "powersgd":
            assert torch.equal(bases[0][name], bases[1][name])


@pytest.mark.parametrize("codec", WITH_FEEDBACK)
def test_zeros_and_denormals_are_harmless(codec):
    codecs = make(codec)
    for fill in (0.0, 1e-42, 1e-35):
        gradients = [
            {n: torch.full_like(v, fill) for n, v in g.items()} for g in random_gradients(codecs)
        ]
        flats = exchange(codecs, gradients)
        assert all(f.isfinite().all() for f in flats)
        assert all(c.finite for c in codecs)
        for c in codecs:
            c.commit()
    gradients = random_gradients(codecs, 1)
    flat = exchange(codecs, gradients)[0]
    assert all(v.abs().max() > 0 for v in cut(codecs[0], flat).values()), "the way back is open"


def test_directions_of_low_rank_have_length_one_however_small_gradients_are():
    codecs = make("powersgd", shapes=((40, 24), (40, 24)))
    gradients = [{n: v * 1e-6 for n, v in g.items()} for g in random_gradients(codecs)]
    exchange(codecs, gradients)
    for c in codecs:
        c.commit()
        for _, basis in c.bases():
            assert (basis.norm(dim=0) - 1).abs().max() <= tolerance(torch.float32, 24)
    rest = cut(codecs[0], play([c.mean_residual() for c in codecs])[0])
    assert all(v.any() for v in rest.values())


def test_a_basis_of_another_rank_is_made_anew():
    given, fresh = make("powersgd")[0], make("powersgd")[0]
    fresh.load_residual(torch.zeros(fresh.bucket.flags_offset))
    want = {name: basis.clone() for name, basis in fresh.bases()}
    assert want.keys() == names(given)
    first, *others = want
    given.load_basis(first, torch.ones(want[first].shape[0], 1))
    given.load_basis(others[0], torch.ones_like(want[others[0]]))
    found = dict(given.bases())
    assert (found.pop(others[0]) == 1).all()
    assert all(torch.equal(basis, want[name]) for name, basis in found.items())


def test_as_many_collectives_as_the_plan_counts():
    for codec in LOSSY:
        codecs = make(codec)
        flats = [torch.zeros(c.bucket.numel) for c in codecs]
        exchanges = [c.exchange(f, names(c), 1.0) for c, f in zip(codecs, flats, strict=True)]
        seen = [counted(each) for each in exchanges]
        play([each for each, _ in seen])
        assert {count[0] for _, count in seen} == {codecs[0].bucket.collectives()}


def counted(generator):
    """Return a generator that does the same, and where it counts what it yields."""
    count = [0]

    def run():
        value = None
        while True:
            try:
                request = generator.send(value)
            except StopIteration as stop:
                return stop.value
            count[0] += 1
            value = yield request

    return run(), count


def test_gram_schmidt_with_rows_that_are_nearly_parallel():
    g = torch.Generator().manual_seed(0)
    p = torch.randn(2, 4, 50, generator=g)
    p[:, 1] = p[:, 0] + 1e-4 * p[:, 1]
    p[1, 2] = 0
    p[0, 3] = 3 * p[0, 2] - p[0, 0]  # but for rounding, nothing of its own
    product = orthonormal(p) @ orthonormal(p).mT
    want = torch.eye(4).repeat(2, 1, 1)
    want[1, 2, 2] = want[0, 3, 3] = 0
    assert (product - want).abs().max() <= tolerance(torch.float32, 50)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_pieces_for_the_cache_are_the_whole(rows, residual, monkeypatch):
    """Encoded and decoded in pieces of some blocks, without the kernel, which needs none."""
    form, blocks, found = two_shot.FORMATS["fp8"], 301, []
    x = torch.randn(rows, blocks * BLOCK)
    old = torch.randn_like(x) if residual else None
    for chunk in (2**30, 7 * rows * BLOCK):
        monkeypatch.setattr(two_shot, "CHUNK", chunk)
        wire = torch.zeros(rows, form.row_bytes(x.shape[1]), dtype=torch.uint8)
        rest, out = torch.full_like(x, 7.0), torch.full_like(x, 7.0)
        form.encode(x, wire, HostMemory(), old, 2.0, rest)
        form.decode(wire, out)
        found.append((wire, rest, out))
    assert all(map(torch.equal, *found))
    want = x if old is None else x + 2 * old
    assert (rest + out - want).abs().max() <= tolerance(torch.float32, 1) * want.abs().max()


def test_blocks_do_not_mix_parameters():
    (codec, *_), gradients = make("int8"), random_gradients(make("int8"))
    assert all(s.offset % BLOCK == 0 for s in codec.bucket.slots)
    assert codec.bucket.flags_offset % (BLOCK * RANKS) == 0
    codecs = make("int8")
    got = cut(codecs[0], exchange(codecs, gradients)[0])
    smallest = codecs[0].bucket.slots[-1].name  # a millionth of the largest
    want = mean_of(gradients, smallest)
    assert (got[smallest] - want).abs().max() < 0.05 * want.abs().max()


def test_only_what_crosses_between_nodes_is_rounded():
    """Ranks of a node that cancel each other leave nothing, though each alone would be rounded."""
    codecs = make("hierarchical")
    gradients = random_gradients(codecs)
    for rank in range(0, len(codecs), NODE):
        gradients[rank + 1] = {n: -g for n, g in gradients[rank].items()}
    flats = exchange(codecs, gradients)
    assert all(not f[: codecs[0].bucket.flags_offset].any() for f in flats)


def test_what_a_node_did_not_use_is_kept_where_another_rank_of_it_did():
    """A parameter counts as used by a node if one of its ranks has a gradient."""
    codecs = make("hierarchical")
    exchange(codecs, random_gradients(codecs))
    for c in codecs:
        c.commit()
    name = codecs[0].bucket.slots[0].name
    kept = [c._kept[0].clone() for c in codecs]
    gradients = random_gradients(codecs, 1)
    for rank in (1, 2, 3):  # half of the first node, and all of the second
        del gradients[rank][name]
    exchange(codecs, gradients)
    for c in codecs:
        c.commit()
    slot = codecs[0].bucket.slots[0]
    for rank, (codec, old) in enumerate(zip(codecs, kept, strict=True)):
        for low, high in codec._ranges([slot], codec.start, codec.length):
            same = torch.equal(codec._kept[0][low:high], old[low:high])
            assert same == (rank in (2, 3))
