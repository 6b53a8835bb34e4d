"""What importing costs: `import magi_train`, and torch's entry point in every `import torch`."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from magi_train.integrations.on_import import when_imported

ROOT = Path(__file__).parents[2]
MEASURE = """
import json, sys, time
start = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - start
before = set(sys.modules)
start = time.perf_counter()
from magi_train.integrations._autoload import register
register()
entry_seconds = time.perf_counter() - start
start = time.perf_counter()
import magi_train
magi_train.Config()
import_seconds = time.perf_counter() - start + entry_seconds
names = {name for name in set(sys.modules) - before if name.partition(".")[0] != "magi_train"}
names -= set(sys.stdlib_module_names) | {n for n in names if n.startswith("__editable__")}
print(json.dumps([torch_seconds, entry_seconds, import_seconds, sorted(names)]))
"""


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_costs_what_torch_costs():
    out = run(MEASURE, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    torch_seconds, entry_seconds, import_seconds, names = json.loads(out)
    assert entry_seconds < 0.020
    assert import_seconds < 0.1 * torch_seconds
    assert not names, "a package was imported that the user did not ask for"


def test_the_entry_point_survives_a_broken_installation(tmp_path):
    """A Lightning that fails in its middle, and a package of ours without the registration."""
    broken = tmp_path / "pytorch_lightning" / "strategies"
    broken.mkdir(parents=True)
    (broken.parent / "__init__.py").write_text("import pytorch_lightning.strategies\n")
    (broken / "__init__.py").write_text("")
    code = (
        f"import sys, warnings; sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.modules['magi_train.integrations._register'] = None\n"
        "from magi_train.integrations._autoload import register; register()\n"
        "import torch\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import pytorch_lightning\n"
        "print([str(w.message) for w in caught])\n"
    )
    assert "could not register its strategies" in run(code)


def test_two_that_wait_for_one_module_are_both_called(tmp_path, monkeypatch):
    (tmp_path / "waited_for.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    called = []
    when_imported({"waited_for": lambda _: called.append("first")})
    when_imported({"waited_for": lambda _: called.append("second")})
    importlib.import_module("waited_for")
    assert sorted(called) == ["first", "second"]
