"""The text of generated code, to compare."""

from collections.abc import Callable
from typing import Any

from torch._inductor.utils import run_and_get_code


def code_of(fn: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return what `fn` returns and the code of its graphs, without what numbers a compilation."""
    result, codes = run_and_get_code(fn)
    assert codes, "a compilation has code, also if that is taken from the cache"
    lines = [code.splitlines() for code in codes]
    return result, ["\n".join(x for x in each if not x.startswith("# AOT ID")) for each in lines]
