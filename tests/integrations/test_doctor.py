"""`magi doctor`: each finding, with and without what it looks for."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from magi_train.cli import main
from magi_train.core import compat, hardware, settings
from magi_train.integrations import doctor

ROOT = Path(__file__).parents[2]


def find(area):
    return next(f for f in doctor.diagnose() if f.area == area)


@pytest.fixture
def without(monkeypatch):
    """Return a function that takes distributions away."""
    real = metadata.version

    def hide(*names):
        def version(name):
            if name in names:
                raise metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(metadata, "version", version)

    return hide


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of which the first cannot reach the second, if `peers` says so."""
    peers = SimpleNamespace(reachable=True)
    monkeypatch.setattr(
        hardware, "devices_in_use", lambda: {"gpus": "2 x H200, 140 GiB", "driver": "570.1"}
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: peers.reachable)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return peers


def test_text_and_json_say_the_same(capsys):
    assert main(["doctor", "--json"]) in (0, 1)
    listed = json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == (1 if any(f["status"] == "fail" for f in listed) else 0)
    text = capsys.readouterr().out
    for finding in listed:
        assert finding["status"] in ("ok", "warn", "fail")
        assert finding["area"] in text
        assert finding["do"] in text
    assert {"python", "torch", "triton", "C++ compiler", "GPUs", "tier", "fp8"} <= {
        f["area"] for f in listed
    }


def test_what_is_not_installed_is_said_and_no_error(without, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    without("triton", "lightning", "pytorch-lightning", "transformers", "deepspeed")
    for name in ("triton", "lightning", "pytorch-lightning", "transformers", "deepspeed"):
        assert find(name).found.startswith("not installed: ")
        assert find(name).status == "ok", "on the CPU none of them is needed"


def test_one_lightning_is_enough(without):
    without("lightning")
    areas = [f.area for f in doctor.diagnose()]
    assert "pytorch-lightning" in areas
    assert "lightning" not in areas


def test_two_gpus_that_reach_each_other(gpus):
    assert find("GPUs").found == "2 x H200, 140 GiB; driver 570.1"
    assert find("links").found == "peer-to-peer between all 2 GPUs"
    assert find("tier").found.endswith("compiled to Triton")
    assert find("fp8").found.startswith("possible")
    gpus.reachable = False
    assert find("links").status == "warn"
    assert "between GPUs 0-1" in find("links").found


def test_gpus_without_triton(gpus, without):
    without("triton")
    assert find("triton").status == "warn"
    assert (find("tier").status, find("tier").do[:14]) == ("fail", "install triton")
    assert "torch's" in find("optimizer steps").found


def test_gpus_that_torch_cannot_use(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find("GPUs").status == "fail"
    assert "driver too old?" in find("GPUs").found
    assert "driver for CUDA 13.0" in find("GPUs").do
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "(CUDA_VISIBLE_DEVICES=)" in find("GPUs").found
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in find("GPUs").found


def test_no_nvml(monkeypatch, without):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # its import fails
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    without("nvidia-ml-py")
    assert find("GPUs").found.startswith("none (nvidia-ml-py is not installed)")


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find("C++ compiler").status == "fail"
    assert "aot_eager" in find("C++ compiler").do
    assert find("tier").status == "fail"


def test_a_torch_that_is_too_old_new_or_lacks_names(monkeypatch):
    monkeypatch.setattr(compat, "torch_version", lambda: (2, 4))
    assert (find("torch").status, find("torch").do) == ("fail", "install torch 2.11 or later")
    monkeypatch.setattr(compat, "torch_version", lambda: (9, 0))
    assert find("torch").found.endswith("newer than any that magi-train was run on")
    monkeypatch.setattr(compat, "torch_version", lambda: (2, 13))
    monkeypatch.setattr(compat, "problems", lambda: ("torch.thing",))
    assert (find("torch").status, find("tier").status) == ("warn", "warn")
    assert "it lacks torch.thing" in find("torch").found


def test_settings_and_autoload_of_the_environment(monkeypatch):
    monkeypatch.setenv(settings.VARIABLE, "tier=eager")
    assert find("settings").found == "MAGI_SETTINGS: tier=eager"
    monkeypatch.setenv(settings.VARIABLE, "tierr=eager")
    assert find("settings").status == "fail"
    assert "did you mean 'tier'" in find("settings").found
    assert main(["doctor", "--json"]) == 1
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert find("strategy names").status == "warn"


def test_little_disk(monkeypatch):
    usage = SimpleNamespace(free=2**30, total=2**26, used=0)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    assert find("disk").status == "warn"
    if os.path.isdir("/dev/shm"):
        assert find("/dev/shm").status == "warn"


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "lightning", "pytorch_lightning", "deepspeed",
                                      "transformers", "pynvml", "rich", "yaml"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from magi_train.cli import main
status = main(["doctor"])
import magi_train, torch
model = magi_train.prepare(torch.nn.Linear(4, 1), config=magi_train.Config(lowering="aot_eager"))
model(torch.ones(2, 4)).sum().backward()
print(status, "tier", magi_train.report(model).tier)
"""


@pytest.mark.full
def test_everything_works_without_what_is_optional():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].endswith("tier graph")
    assert "Traceback" not in done.stderr
