"""Decoders: token for token what transformers' generate gives, from a file."""

import copy
import io
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from magi_train import cli
from magi_train.core import device_graphs
from magi_train.core.errors import ExportError
from magi_train.exporter import ExportConfig, generate
from magi_train.exporter.decoder import export_decoder
from magi_train.exporter.generate import Sampling, load_decoder
from tests.exporter.test_loaded import Recorder
from tests.models import gpt2, llama, tokens

SLOW = pytest.mark.full  # two captures of a model


def ready(model):
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def padded():
    """Return four prompts of 6 tokens, of which two are shorter, and their mask."""
    ids = tokens(3)[:, :6].clone()
    mask = torch.ones_like(ids)
    for row, missing in ((0, 3), (2, 1)):
        mask[row, :missing] = 0
        ids[row, :missing] = 0
    return ids, mask


def compare(model, decoder):
    for prompt in (tokens(1)[:1, :5], tokens(2)[:3, :7], tokens(4)[:2, :1]):
        given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12}
        wanted = model.generate(prompt, do_sample=False, **given)
        assert torch.equal(decoder.generate(prompt, **given), wanted)
    ids, mask = padded()
    given = {"attention_mask": mask, "max_new_tokens": 12}
    greedy = model.generate(ids, do_sample=False, **given)
    assert torch.equal(decoder.generate(ids, **given), greedy)
    torch.manual_seed(5)
    wanted = model.generate(ids, do_sample=True, temperature=0.7, top_k=20, top_p=0.9, **given)
    torch.manual_seed(5)
    assert torch.equal(
        decoder.generate(ids, sampling=Sampling(True, 0.7, 20, 0.9), **given), wanted
    )
    ends = sorted({int(t) for t in greedy[:, 8]})
    wanted = model.generate(ids, do_sample=False, eos_token_id=ends, pad_token_id=7, **given)
    assert torch.equal(decoder.generate(ids, eos=ends, pad=7, **given), wanted)


@SLOW
@pytest.mark.parametrize("target", ["program", "pt2"])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.timeout(900)
def test_token_for_token(make, target, tmp_path):
    model, path = ready(make()), tmp_path / "decoder.pt2"
    report = export_decoder(model, path, length=32, target=target)
    assert report.measured["error_output"] < 1e-5
    weights = sum(t.nbytes for t in model.parameters())
    assert target == "pt2" or path.stat().st_size < 2 * weights + 2**20, "weights are there twice"
    compare(model, load_decoder(path))


def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4))


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "word_embed_proj_dim": 32}
    return OPTForCausalLM(OPTConfig(vocab_size=96, num_attention_heads=4, **sizes))


@pytest.mark.parametrize("make", [bloom, opt])
def test_positions_that_are_read_off_the_mask(make, tmp_path):
    """Bloom's bias and OPT's table of positions are made from the mask, of the whole cache."""
    model = ready(make())
    for weight in model.parameters():
        weight.data.mul_(4)  # so that positions matter
    report = export_decoder(model, tmp_path / "decoder.pt2", length=24)
    assert report.measured["error_decode"] < 1e-5
    ids, mask = padded()
    given = {"attention_mask": mask, "max_new_tokens": 8}
    wanted = model.generate(ids, do_sample=False, **given)
    assert torch.equal(load_decoder(tmp_path / "decoder.pt2").generate(ids, **given), wanted)


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = BertLMHeadModel(BertConfig(vocab_size=96, num_attention_heads=4, **sizes))
    for weight in model.parameters():
        weight.data.mul_(4)
    with pytest.raises(ExportError, match=r"BertLMHeadModel gives other logits .*is_decoder=True"):
        export_decoder(model, tmp_path / "decoder.pt2", length=16)
    assert not [*tmp_path.iterdir()]


def test_a_branch_that_depends_on_the_batch_is_refused(tmp_path, monkeypatch):
    model = ready(llama(num_hidden_layers=1))
    norm = model.model.norm.forward
    branching = lambda x: norm(x) if x.shape[0] % 2 == 0 else 2 * norm(x)  # noqa: E731
    monkeypatch.setattr(model.model.norm, "forward", branching)
    with pytest.raises(ExportError, match=r"LlamaForCausalLM takes another branch .*batch % 2"):
        export_decoder(model, tmp_path / "decoder.pt2", length=16)
    export_decoder(model, tmp_path / "decoder.pt2", length=16, batch=2)


def test_what_generate_would_do_besides_is_noted(tmp_path):
    model = ready(llama(num_hidden_layers=1))
    model.generation_config.repetition_penalty = 1.1
    report = export_decoder(model, tmp_path / "decoder.pt2", length=16)
    assert any("would follow repetition_penalty=1.1 of" in note for note in report.notes)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    torch.manual_seed(0)
    model = ready(llama(num_hidden_layers=1))
    path = tmp_path_factory.mktemp("decoder") / "decoder.pt2"
    return model, path, export_decoder(model, path, length=24, batch=(1, 4))


def test_the_file_holds_the_weights_once(one_layer):
    model, path, _ = one_layer
    held = 0
    with zipfile.ZipFile(path) as archive:
        for name in ("prefill", "decode"):
            inner = zipfile.ZipFile(io.BytesIO(archive.read(f"decoder/{name}.pt2")))
            held += sum(i.file_size for i in inner.infolist() if not i.filename.endswith(".json"))
    assert held < sum(t.nbytes for t in model.parameters()) / 4


@SLOW
def test_one_layer_token_for_token(one_layer):
    model, path, _ = one_layer
    compare(model, load_decoder(path))


@SLOW
def test_generations_at_the_same_time(one_layer, monkeypatch):
    _, path, _ = one_layer
    prompts = [tokens(n)[: 1 + n % 4, : 2 + n % 5] for n in range(8)]
    decoder = load_decoder(path)
    wanted = [decoder.generate(p, max_new_tokens=8) for p in prompts]
    monkeypatch.setitem(device_graphs.makers, "cpu", Recorder)
    replayed = load_decoder(path, cuda_graphs=True)
    for each in (decoder, replayed):
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda p, d=each: d.generate(p, max_new_tokens=8), prompts))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert len(replayed._held) == 4


@SLOW
def test_a_cache_that_is_used_again(one_layer, monkeypatch):
    """What an earlier generation left must not matter, nor on which stream it may still run."""
    _, path, _ = one_layer
    monkeypatch.setitem(device_graphs.makers, "cpu", Recorder)
    decoder, prompt = load_decoder(path, cuda_graphs=True), tokens(1)[:2, :5]
    wanted = decoder.generate(prompt, max_new_tokens=6)
    for each in decoder._held[2].cache:
        each.fill_(torch.nan)
    graphs, held = decoder._replayer, decoder._held[2]
    graphs.current = "second"
    assert torch.equal(decoder.generate(prompt, max_new_tokens=6), wanted)
    assert decoder._held[2] is held
    assert graphs.waits == [("second", "first")]
    graphs.renewed = 1  # by the failed capture of another model, say
    assert torch.equal(decoder.generate(prompt, max_new_tokens=6), wanted)
    assert decoder._held[2] is not held


@SLOW
def test_what_does_not_fit_is_said(one_layer, tmp_path):
    model, path, _ = one_layer
    decoder = load_decoder(path)
    ids = tokens(0)[:, :6]
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    for args, kwargs, words in (
        ((ids.int(),), {}, "must be int64"),
        ((tokens(0, 5),), {}, "takes 1 to 4 prompts, not 5"),
        ((ids,), {"attention_mask": mask}, "padded on the left"),
        ((ids,), {"attention_mask": mask[:, :3]}, r"attention_mask must be \[4, 6\]"),
        ((ids,), {"max_new_tokens": 19}, "do not fit the cache of 24"),
    ):
        with pytest.raises(ExportError, match=words):
            decoder.generate(*args, **kwargs)
    with pytest.raises(ExportError, match="has no CUDA graphs"):
        load_decoder(path, cuda_graphs=True)
    with pytest.raises(ValueError, match="top_p in"):
        Sampling(True, top_p=0.0)
    sliding = copy.deepcopy(model)
    sliding.config.layer_types, sliding.config.sliding_window = ["sliding_attention"], 8
    with pytest.raises(ExportError, match="layer 0 of LlamaForCausalLM keeps a StaticSliding"):
        export_decoder(sliding, tmp_path / "other.pt2", length=16)
    assert not list(tmp_path.iterdir())


@SLOW
def test_generate_from_a_shell(one_layer, capsys):
    model, path, _ = one_layer
    assert cli.main(["generate", str(path), "--prompt", "5 6 7", "--max-new-tokens", "4"]) == 0
    found = [int(n) for n in capsys.readouterr().out.split()]
    given = {"attention_mask": torch.ones(1, 3), "max_new_tokens": 4, "do_sample": False}
    wanted = model.generate(torch.tensor([[5, 6, 7]]), **given)
    assert found == wanted[0].tolist()
    assert cli.main(["generate", str(path), "--prompt", "hello"]) == 2
    assert "needs --tokenizer" in capsys.readouterr().err


@SLOW
def test_a_fixed_batch_in_bfloat16(tmp_path):
    model, path = ready(llama(num_hidden_layers=1)), tmp_path / "decoder.pt2"
    config = ExportConfig(precision="bfloat16", merge_linears=True)
    export_decoder(model, path, length=24, batch=2, config=config)
    decoder = load_decoder(path)
    assert decoder.manifest["decoder"]["cache"][0][1] == "bfloat16"
    assert decoder.generate(tokens(0)[:2, :4], max_new_tokens=5).shape == (2, 9)


@SLOW
def test_a_fixed_batch_repeats_no_heads(tmp_path):
    model, path = ready(llama(num_hidden_layers=1)), tmp_path / "decoder.pt2"
    report = export_decoder(model, path, length=24, batch=2)
    rows = [r.plan for r in report.rows if r.name == "canonicalize_attention" and r.plan]
    assert [len(plan["stacked"]) for plan in rows] == [0, 1], "the decode step alone"
    ids, mask = padded()
    given = {"attention_mask": mask[:2], "max_new_tokens": 12}
    wanted = model.generate(ids[:2], do_sample=False, **given)
    assert torch.equal(load_decoder(path).generate(ids[:2], **given), wanted)


def test_sampling_keeps_what_it_is_told_to():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().expand(4096, 4)
    draw = torch.Generator().manual_seed(0)

    def kept(**given):
        return sorted(set(Sampling(True, **given).next(logits, draw).tolist()))

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=3) == [0, 1, 2]
    assert kept(top_p=0.65) == [0, 1]
    assert kept(top_p=0.01) == kept(top_k=1) == kept(temperature=1e-3) == [0]
    assert Sampling().next(logits, None).unique().tolist() == [0]


@pytest.mark.parametrize("width", [5, generate.PARTS**2, 50257])
def test_the_likeliest_is_the_first_of_the_largest(width):
    logits = torch.randn(6, width).round(decimals=1)
    logits[1, width // 3 :] = torch.nan
    logits[2] = float("-inf")
    logits[3], logits[4, -1], logits[5, 0] = -5.0, 9.0, 9.0
    for rows in (6, 1, 0):
        assert torch.equal(generate.likeliest(logits[:rows]), logits[:rows].argmax(-1))


@SLOW
def test_a_compiled_decode_step_gives_the_same_tokens(one_layer, monkeypatch):
    _, path, _ = one_layer
    monkeypatch.setitem(device_graphs.makers, "cpu", Recorder)
    plain, run = load_decoder(path), load_decoder(path, compile=True, cuda_graphs=True)
    for prompt in (tokens(1)[:2, :5], tokens(2)[:2, :7]):
        given = {"max_new_tokens": 8}
        assert torch.equal(run.generate(prompt, **given), plain.generate(prompt, **given))
    assert run._held.keys() == {2}
