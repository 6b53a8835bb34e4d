"""Folders on disk, packages in pyproject.toml, links in magi_train/ and the card's list agree."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
PARTS = [folder for folder in SETUPTOOLS["package-dir"].values() if folder != "magi_train"]


def test_every_package_is_listed():
    found = set()
    for top in ("magi_train", *PARTS):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.resolve().relative_to(ROOT).parts  # a link counts as its folder
            found.add(".".join(parts if parts[0] == "magi_train" else ("magi_train", *parts)))
    assert found == set(SETUPTOOLS["packages"])


def test_every_part_is_linked():
    for part in PARTS:
        assert (ROOT / "magi_train" / part).resolve() == ROOT / part, "a checkout without symlinks"


def test_the_top_level_is_the_one_promised():
    assert {"comm", "fusion", "memory", "integrations"} == set(PARTS)
    for name in ("magi_train", "tests", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        assert (ROOT / name).exists(), name


def test_the_core_install_is_light():
    names = {d.split(">")[0].split(";")[0].strip() for d in PROJECT["project"]["dependencies"]}
    assert names == {"torch", "triton", "nvidia-ml-py"}
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"lightning", "deepspeed", "transformers", "onnx", "dev"} <= set(extras)
    assert any(d.startswith("pytorch-lightning") for d in extras["lightning"])


def test_private_torch_names_live_in_compat_only():
    private = re.compile(
        r"torch\._(?!foreach_copy_|ops\.OpOverload)[a-z]|_execution_engine|_call_impl|_c10d\b"
    )
    for top in ("magi_train", *PARTS):
        for path in (ROOT / top).rglob("*.py"):
            if path.resolve() == ROOT / "magi_train" / "core" / "compat.py":
                continue
            for number, line in enumerate(path.read_text().splitlines(), 1):
                code = line.split("#")[0]
                prose = code.count("`") or code.startswith(("Source:", '"""'))
                assert prose or not private.search(code), f"{path}:{number}: {line.strip()}"
