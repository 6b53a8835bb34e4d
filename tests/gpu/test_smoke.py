"""`magi run` on 1, 2 and 4 GPUs: Lightning, DeepSpeed, transformers' Trainer, a DDP script."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.close import tolerance

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.parametrize(
        "gpus",
        [
            pytest.param(
                n, marks=pytest.mark.skipif(torch.cuda.device_count() < n, reason=f"needs {n} GPUs")
            )
            for n in (1, 2, 4)
        ],
    ),
]


def run(folder, gpus, mode, *options):
    """Return the losses of each training of a mode of the script."""
    out = folder / "losses.json"
    script = str(ROOT / "tests/gpu/smoke_script.py")
    command = ["-m", "magi_train.cli", "run", "--nproc", str(gpus), *options, script, mode, out]
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


def agree(got, want, dtype):
    """Losses of steps that follow each other: nearer than half precision, as sums are float32."""
    assert len(got) == len(want) > 2
    limit = tolerance(dtype) if dtype == torch.float32 else tolerance(dtype, 1)
    assert got == pytest.approx(want, rel=limit)
    assert got[-1] < 0.97 * got[0], "it learns little"


def test_lightning_in_each_precision(tmp_path, gpus):
    found = run(tmp_path, gpus, "lightning")
    for name in [n for n in found if n.endswith(" magi")]:
        precision = name.split()[0]
        dtypes = {"32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}
        agree(found[name], found[f"{precision} ddp"], dtypes[precision.split("-")[0]])
    assert len(found) == 10


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_deepspeed(tmp_path, gpus):
    found = run(tmp_path, gpus, "deepspeed")
    for stage in (2, 3):
        agree(found[f"zero-{stage} magi"], found["ddp"], torch.float32)


def test_the_trainer_of_transformers(tmp_path, gpus):
    found = run(tmp_path, gpus, "huggingface")
    agree(found["magi"], found["ddp"], torch.bfloat16)


def test_a_ddp_script(tmp_path, gpus):
    (plain,) = run(tmp_path, gpus, "ddp").items()
    (ours,) = run(tmp_path, gpus, "ddp", "--replace-ddp").items()
    assert (plain[0].split(".")[0], ours[0].split(".")[0]) == ("torch", "magi_train")
    agree(ours[1], plain[1], torch.bfloat16)
