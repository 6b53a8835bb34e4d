"""Seeds, fresh compiler state, and the environment as it was: what every test starts from."""

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # before torch: else it tries the compiler

import pytest
import torch

from tests.ranks import RankPool

logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two gloo ranks that are kept from test to test."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    before = dict(os.environ)
    yield
    # a Trainer leaves LOCAL_RANK behind, and the next one would wait for ranks it does not start
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def idle_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Generated code runs, but its C++ kernels do nothing: for tests of plans and of code."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: lambda *args: None)
    PyCodeCache.cache_clear()
    yield
    PyCodeCache.cache_clear()  # modules that hold these kernels are kept by the text of their code
