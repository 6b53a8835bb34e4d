"""`magi export`, `magi bench` and `magi generate`: the exporter from a shell."""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, get_args

import torch
from torch import Tensor, nn

from magi_train.core.errors import ExportError
from magi_train.exporter.bench import as_table, bench
from magi_train.exporter.generate import Sampling, load_decoder
from magi_train.exporter.loaded import load
from magi_train.exporter.settings import ExportConfig, Precision
from magi_train.exporter.write import Target, export

Commands = Any
"""What argparse's add_subparsers returns."""


def add_parsers(commands: Commands) -> None:
    """Declare the three commands."""
    write = commands.add_parser("export", help="write a checkpoint or module for inference")
    write.add_argument("checkpoint", help="weights; '-' for those that the model is made with")
    write.add_argument("path", help="the file to write")
    _model(write, required=True)
    write.add_argument("--input", action="append", required=True, metavar="NAME=DTYPE[SIZES]",
                       help="an example input, for example input_ids=int64[2,128]")  # fmt: skip
    write.add_argument("--target", choices=get_args(Target), default="program")
    write.add_argument("--dynamic", action="append", metavar="NAME[=LOW:HIGH]",
                       help="batch or sequence; 'auto' tries both")  # fmt: skip
    write.add_argument("--output", action="append", metavar="NAME", help="keep only these results")
    write.add_argument("--precision", choices=get_args(Precision))
    write.add_argument("--without", action="append", default=[], choices=ExportConfig.switches(),
                       metavar="PASS", help=f"of {', '.join(ExportConfig.switches())}")  # fmt: skip
    measure = commands.add_parser(
        "bench", help="measure a training step, your script, or an exported file"
    )
    measure.add_argument("--inference", metavar="PATH", required=True)
    _model(measure, required=False)
    measure.add_argument("--size", action="append", default=[], metavar="NAME=N")
    measure.add_argument("--calls", type=int, default=100)
    measure.add_argument("--cuda-graphs", nargs="?", const=True, default=False, choices=["auto"],
                         help="replay each shape; with 'auto' only where it gains")  # fmt: skip
    measure.add_argument("--compile", action="store_true", help="compile the file's program")
    measure.add_argument("--no-compile", action="store_true", help="no row for torch.compile")
    measure.add_argument("--json", action="store_true", help="print JSON")
    answer = commands.add_parser("generate", help="try an exported decoder")
    answer.add_argument("path")
    answer.add_argument("--cuda-graphs", action="store_true")
    answer.add_argument("--compile", action="store_true", help="compile the decode step")
    answer.add_argument("--prompt", required=True, help="a text, or token numbers with spaces")
    answer.add_argument("--tokenizer", help="a name or folder for transformers; else numbers")
    answer.add_argument("--max-new-tokens", type=int, default=20)
    answer.add_argument("--sample", action="store_true")
    answer.add_argument("--temperature", type=float, default=1.0)
    answer.add_argument("--top-k", type=int, default=0)
    answer.add_argument("--top-p", type=float, default=1.0)
    answer.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    """Run one of the three commands; return the exit status."""
    return {"export": _export, "bench": _bench, "generate": _generate}[options.command](options)


def _model(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--model", required=required, metavar="MODULE:NAME",
                        help="a function or class that makes the module")  # fmt: skip


def _export(options: argparse.Namespace) -> int:
    make = find(options.model)
    module = make() if options.checkpoint == "-" else options.checkpoint
    off: dict[str, Any] = dict.fromkeys(options.without, False)
    config = ExportConfig(precision=options.precision, **off)
    dynamic: Any = dict(map(_limits, options.dynamic)) if options.dynamic else None
    report = export(
        module, dict(map(example, options.input)), options.path, target=options.target,
        dynamic="auto" if dynamic and "auto" in dynamic else dynamic, outputs=options.output,
        model=make, config=config,
    )  # fmt: skip
    sys.stdout.write(f"{report}\nwrote {options.path}\n")
    return 0


def _bench(options: argparse.Namespace) -> int:
    module = find(options.model)() if options.model else None
    loaded = load(options.inference, cuda_graphs=options.cuda_graphs, compile=options.compile)
    sizes = {name: int(n) for name, n in (s.split("=", 1) for s in options.size)}
    if module is not None:
        module.to(loaded.contract.device)
    found = bench(loaded, module, calls=options.calls, compile_peer=not options.no_compile,
                  sizes=sizes)  # fmt: skip
    text = json.dumps([asdict(x) for x in found], indent=2) if options.json else as_table(found)
    sys.stdout.write(text + "\n")
    return 0


def _generate(options: argparse.Namespace) -> int:
    decoder = load_decoder(options.path, cuda_graphs=options.cuda_graphs, compile=options.compile)
    tokenizer = None
    if options.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        ids = tokenizer(options.prompt, return_tensors="pt").input_ids
    elif re.fullmatch(r"\s*\d+(\s+\d+)*\s*", options.prompt):
        ids = torch.tensor([[int(n) for n in options.prompt.split()]])
    else:
        raise ExportError("a prompt of words needs --tokenizer; else give token numbers")
    sampling = Sampling(options.sample, options.temperature, options.top_k, options.top_p)
    device = decoder.manifest["contract"]["device"]
    generator = torch.Generator(device).manual_seed(options.seed)
    found = decoder.generate(ids.to(device), max_new_tokens=options.max_new_tokens,
                             sampling=sampling, generator=generator)[0]  # fmt: skip
    text = tokenizer.decode(found) if tokenizer else " ".join(map(str, found.tolist()))
    sys.stdout.write(f"{text}\n")
    return 0


def find(name: str) -> Callable[[], nn.Module]:
    """Return what "package.module:name" names, looked up from the current folder too.

    Raises:
        ExportError: There is no such module or name.
    """
    home, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(home)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ExportError(
            f"--model {name!r} is not MODULE:NAME of something here: {error}"
        ) from error
    if not callable(found) or isinstance(found, nn.Module):
        raise ExportError(f"--model {name!r} must make a module when called")
    return found


def example(text: str) -> tuple[str, Tensor]:
    """Return name and tensor of "input_ids=int64[2,128]": zeros for integers, else random.

    Raises:
        ExportError: The text has another form; says which is meant.
    """
    found = re.fullmatch(r"(\w+)=(\w+)\[([\d,\s]*)\]", text)
    dtype = getattr(torch, found[2], None) if found else None
    if found is None or not isinstance(dtype, torch.dtype):
        raise ExportError(f"--input must be like input_ids=int64[2,128], got {text!r}")
    shape = [int(n) for n in found[3].split(",") if n.strip()]
    floating = dtype.is_floating_point
    made = torch.randn(shape, dtype=dtype) if floating else torch.zeros(shape, dtype=dtype)
    return found[1], made


def _limits(text: str) -> tuple[str, tuple[int, int | None] | None]:
    name, _, ends = text.partition("=")
    if not ends:
        return name, None
    if not re.fullmatch(r"\d+:\d*", ends):
        raise ExportError(f"--dynamic must be like batch or batch=1:64, got {text!r}")
    low, high = ends.split(":")
    return name, (int(low), int(high) if high else None)
