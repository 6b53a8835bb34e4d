"""A loader of machine code that crashes must not take the user's process with it."""

import pytest

from magi_train.core.errors import ExportError
from magi_train.exporter import machine_code

CRASH = "import os, signal, sys; print(sys.argv[1]); os.kill(os.getpid(), signal.SIGSEGV)"


def test_a_loader_that_dies_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "LOAD", CRASH)
    with pytest.raises(ExportError, match=r"its loader ends with SIGSEGV here; export with target"):
        machine_code.check_loader(tmp_path / "model.pt2")


def test_what_the_other_process_does_not_know_is_left_to_the_real_load(tmp_path, monkeypatch):
    """Such as operators that only the user's process has registered."""
    monkeypatch.setattr(machine_code, "LOAD", "raise OSError('no schema for my::op')")
    machine_code.check_loader(tmp_path / "model.pt2")


def test_old_versions_of_torch_are_checked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(machine_code, "check_loader", asked.append)
    monkeypatch.setattr(machine_code.compat, "aoti_compile", lambda *args, **rest: None)
    for old in (False, True):
        monkeypatch.setattr(machine_code.compat, "AOTI_LOADER_MAY_CRASH", old)
        machine_code.compile_program(None, tmp_path / "model.pt2", {})
    assert asked == [tmp_path / "model.pt2"]
