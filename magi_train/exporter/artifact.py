"""Artifact: the file on disk. Written beside its place and renamed, read with its manifest first.

Every target carries the same JSON manifest: in the `extra` folder of torch's archive ("program" and
"pt2" are zip files), in the metadata of an ONNX model, behind an ExecuTorch program. It is read
without torch's loaders, so that "made by another torch" and "for another machine" are said before
anything tries to run.
"""

import json
import os
import platform
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from magi_train.core.errors import ExportError

MANIFEST = "magi_manifest.json"
FORMAT = 2
_CPU_LEVELS = ("DEFAULT", "AVX2", "AVX512")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context that gives a name to write to; afterwards it becomes `path`, or leaves nothing.

    The name is in a folder of its own beside `path`; other files in it (an ONNX model's weights)
    move first, so that nobody sees a model whose weights are missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield folder / path.name
        for other in sorted(folder.iterdir()):
            if other.name != path.name:
                os.replace(other, path.parent / other.name)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def hardware(device: str) -> dict[str, str]:
    """Return what compiled code depends on: the processor, or the accelerator's architecture."""
    if device == "cpu":
        level = torch.backends.cpu.get_cpu_capability()
        return {"machine": platform.machine(), "instructions": level}
    found = {"machine": platform.machine()}
    if device == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found |= {"name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
    return found


def append_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Put the manifest into an archive that torch wrote, or behind a file that is none."""
    with zipfile.ZipFile(path, "a") as archive:
        root = next(iter(archive.namelist()), "magi").split("/")[0]
        archive.writestr(f"{root}/extra/{MANIFEST}", json.dumps(manifest))


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a file.

    Raises:
        ExportError: It is missing, cut short, or nothing that magi-train wrote.
    """
    if not path.is_file():
        raise ExportError(f"{path} does not exist; magi_train.export() writes such a file")
    try:
        if path.suffix == ".onnx":
            manifest = json.loads(_onnx_metadata(path))
        else:
            with zipfile.ZipFile(path) as archive:
                name = next(n for n in archive.namelist() if n.endswith(f"extra/{MANIFEST}"))
                manifest = json.loads(archive.read(name))
    except StopIteration:
        raise ExportError(
            f"{path} has no {MANIFEST}: it is cut short, or no artifact of magi-train; copy it "
            "again; if torch alone wrote it, torch.export.load reads it"
        ) from None
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"{path} is damaged or cut short ({type(error).__name__}: {error}), or no artifact of "
            "magi-train; copy it again, or export again"
        ) from error
    if manifest.get("format") != FORMAT:
        raise ExportError(
            f"{path} has format {manifest.get('format')!r}, and this magi-train reads {FORMAT}; "
            "export again with this version"
        )
    return manifest


def _onnx_metadata(path: Path) -> str:
    try:
        import onnx
    except ImportError as error:
        raise ExportError(
            f"{path}: reading it needs the package onnx; pip install 'magi-train[onnx]'"
        ) from error
    model = onnx.load(str(path), load_external_data=False)
    return str(next(p.value for p in model.metadata_props if p.key == MANIFEST))


def check_host(path: Path, manifest: Mapping[str, Any]) -> None:
    """Make sure that this torch and this machine can run a file.

    Raises:
        ExportError: They cannot; says what the file needs and what is here.
    """
    target, device = manifest["target"], manifest["contract"]["device"]
    made, needs = manifest["versions"]["torch"], manifest["hardware"]
    ours = torch.__version__
    if target == "pt2" and _minor(made) != _minor(ours):
        raise ExportError(
            f"{path} is machine code made with torch {made}, and this is torch {ours}, for which "
            "such code does not hold; export again with this torch, or with target='program'"
        )
    if target == "program" and _minor(made) > _minor(ours):
        raise ExportError(
            f"{path} was written by torch {made}, and this is torch {ours}, which is older; use "
            f"torch {made.split('+')[0]} or newer, or export again with this torch"
        )
    if target == "onnx":
        return
    accelerator = torch.accelerator.current_accelerator()
    if device != "cpu" and getattr(accelerator, "type", "") != device:
        here = accelerator or "no accelerator"
        raise ExportError(f"{path} is for {device!r}, and here is {here}; export again for it")
    if target == "pt2":
        _check_code(path, needs, hardware(device))


def _check_code(path: Path, needs: Mapping[str, str], have: Mapping[str, str]) -> None:
    levels = [h.get("instructions", "") for h in (needs, have)]
    lower = all(x in _CPU_LEVELS for x in levels) and (
        _CPU_LEVELS.index(levels[0]) <= _CPU_LEVELS.index(levels[1])
    )
    for key in ("machine", "capability", "instructions"):
        same = needs.get(key) == have.get(key) or (key == "instructions" and lower)
        if not same:
            raise ExportError(
                f"{path} is machine code for {key} {needs.get(key)}, and this machine has "
                f"{have.get(key)}; export again on this kind of machine, or with target='program'"
            )


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)
