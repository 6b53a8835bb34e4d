"""A loader of machine code that crashes must not take the user's process with it."""

import pytest

from magi_train.core.errors import ExportError
from magi_train.exporter import machine_code

CRASH = "import os, signal, sys; print(sys.argv[1]); os.kill(os.getpid(), signal.SIGSEGV)"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (CRASH, r"its loader ends with SIGSEGV here; export with target='program'"),
        ("raise OSError('no such file')", r"cannot load what it compiled: OSError: no such file"),
    ],
)
def test_a_loader_that_dies_is_an_error(tmp_path, monkeypatch, script, message):
    monkeypatch.setattr(machine_code, "LOAD", script)
    with pytest.raises(ExportError, match=message):
        machine_code.check_loader(tmp_path / "model.pt2")


def test_old_versions_of_torch_are_checked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(machine_code, "check_loader", asked.append)
    monkeypatch.setattr(machine_code.compat, "aoti_compile", lambda *args, **rest: None)
    for old in (False, True):
        monkeypatch.setattr(machine_code.compat, "AOTI_LOADER_MAY_CRASH", old)
        machine_code.compile_program(None, tmp_path / "model.pt2", {})
    assert asked == [tmp_path / "model.pt2"]
