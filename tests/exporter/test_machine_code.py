"""A loader of machine code that crashes must not take the user's process with it."""

import pytest
import torch
from torch import nn

import magi_train
from magi_train.core.errors import ExportError
from magi_train.exporter import machine_code

INPUTS = (torch.randn(4, 8), torch.randn(4, 8))


class Added(nn.Module):
    """Adds a part of a product, which patterns of Inductor (2.13) take for the whole."""

    def forward(self, x, y):
        return torch.add(y, x @ x.new_ones(8, 8), alpha=0.1)


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
    monkeypatch.setattr(machine_code, "check_code", lambda file, program: None)
    program = torch.export.export(Added(), INPUTS)
    for old in (False, True):
        monkeypatch.setattr(machine_code.compat, "AOTI_LOADER_MAY_CRASH", old)
        machine_code.compile_program(program, tmp_path / "model.pt2", {})
    assert asked == [tmp_path / "model.pt2"]


@pytest.mark.parametrize("way", ["program", "compiled", "pt2"])
def test_a_part_of_a_product_is_added(tmp_path, way):
    path = tmp_path / "model.pt2"
    magi_train.export(Added(), INPUTS, path, target="pt2" if way == "pt2" else "program")
    run = magi_train.load(path, compile=way == "compiled")
    torch.testing.assert_close(run(*INPUTS), Added()(*INPUTS))
    if way == "program":  # one operation, which rounds once
        assert not [n for n in run._run.graph.nodes if n.target is torch.ops.aten.mul.Tensor]


def test_machine_code_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    program = torch.export.export(Added(), INPUTS)
    for wrong in (0.0, 0.1):
        result = Added()(*INPUTS) + wrong
        monkeypatch.setattr(machine_code.compat, "aoti_load", lambda _, r=result: lambda *_: [r])
        if not wrong:
            machine_code.check_code(tmp_path / "model.pt2", program)
            continue
        with pytest.raises(ExportError, match=r"as machine code, result 0 is off by .*'program'"):
            machine_code.check_code(tmp_path / "model.pt2", program)


class Counts(nn.Module):
    """Writes to its second input."""

    def forward(self, weight, count):
        count.view(1)[0:].add_(1)
        return weight * count


@pytest.mark.parametrize("functional", [False, True])
def test_only_inputs_that_are_written_to_are_copied_for_the_check(
    tmp_path, monkeypatch, functional
):
    weight, count = torch.randn(8), torch.zeros(())
    program = torch.export.export(Counts(), (weight, count))
    program = program.run_decompositions() if functional else program
    given = []

    def run(*tensors):
        given.extend(tensors)
        return [Counts()(*tensors)]

    monkeypatch.setattr(machine_code.compat, "aoti_load", lambda _: run)
    machine_code.check_code(tmp_path / "model.pt2", program)
    assert given[0].data_ptr() == weight.data_ptr(), "a decoder's weights are inputs"
    assert float(count) == 0.0
    monkeypatch.setattr(machine_code.compat, "aoti_load", lambda _: lambda w, c: [w * (c + 1)])
    with pytest.raises(ExportError, match="result 1 is off"):
        machine_code.check_code(tmp_path / "model.pt2", program)


def test_code_that_does_not_fit_beside_its_program_is_not_run(tmp_path, monkeypatch, caplog):
    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(machine_code.compat, "aoti_load", full)
    machine_code.check_code(tmp_path / "model.pt2", torch.export.export(Added(), INPUTS))
    assert "the device has no room" in caplog.text
