"""Wheel and sdist: complete, each file once, and the wheel trains from another folder."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("comm", "fusion", "memory", "integrations")
BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # both calls write their own
build_meta.build_sdist(folder)
build_meta.build_wheel(folder)
"""
IMPORTS = """
import importlib, sys
for name in sys.argv[1:]:
    sys.stdout.write(importlib.import_module(name).__file__ + "\\n")
"""
TRAINS = """
import torch, magi_train
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
config = magi_train.Config(lowering="aot_eager", memory_budget_gib=1.0)
model, optimizer = magi_train.prepare(model, torch.optim.AdamW(model.parameters()), config=config)
losses = []
for _ in range(3):
    loss = model(torch.ones(4, 8)).sub(1).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
assert losses == sorted(losses, reverse=True), losses
assert magi_train.report(model).tier == "graph", magi_train.report(model).reason
print("trained")
"""
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")


def run(folder, *command, **more):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=folder, env=env,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the folder with both, made from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=LEFT_OUT)
    run(folder / "source", "-c", BUILD, str(folder))
    return folder


def sources():
    """Return the files that are installed, by their place in the wheel."""
    found = {}
    for top in ("magi_train", *PARTS):
        for path in (ROOT / top).rglob("*"):
            inside = path.relative_to(ROOT)
            linked = top == "magi_train" and inside.parts[1] in PARTS
            if path.suffix in (".py", ".typed") and not linked:
                place = inside if top == "magi_train" else Path("magi_train", inside)
                found[str(place)] = path.read_bytes()
    return found


@pytest.mark.full
def test_the_wheel_holds_each_file_once(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if ".dist-info/" not in n]
        assert sorted(names) == sorted(sources())
        assert {name: archive.read(name) for name in names} == sources()
        entry = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "magi = magi_train.cli:main" in archive.read(entry).decode()


@pytest.mark.full
def test_the_sdist_is_complete(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tops = (*PARTS, "tests", "docs", "examples", "benchmarks")
    wanted = {str(p.relative_to(ROOT)) for top in tops for p in (ROOT / top).rglob("*")
              if p.suffix in (".py", ".md", ".json")}  # fmt: skip
    wanted |= {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt", "mkdocs.yml"}
    assert wanted - names == set()


@pytest.mark.full
def test_the_wheel_trains_from_another_folder(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(ROOT / "tests", tmp_path / "elsewhere" / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "elsewhere")
    path = f"{tmp_path / 'site'}{os.pathsep}{tmp_path / 'elsewhere'}"
    site = tmp_path / "site"
    modules = sorted(place.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                     for place in sources() if place.endswith(".py"))  # fmt: skip
    assert {"magi_train.memory.engine", "magi_train.comm.plan", "magi_train.fusion"} <= {*modules}
    where = run(tmp_path / "elsewhere", "-c", IMPORTS, *modules, PYTHONPATH=path).split()
    assert len(where) == len(modules)
    outside = [each for each in where if not Path(each).is_relative_to(site / "magi_train")]
    assert not outside, "the wheel lacks them"
    assert "trained" in run(tmp_path / "elsewhere", "-c", TRAINS, PYTHONPATH=path)
    tests = ["tests/test_public_api.py", "tests/comm/test_plan.py", "tests/comm/test_schedule.py"]
    command = ["-m", "pytest", "-q", "-o", "pythonpath=", "-p", "no:cacheprovider", *tests]
    assert "passed" in run(tmp_path / "elsewhere", *command, PYTHONPATH=path)
