"""What `magi run` starts on each rank: the user's script, with its exceptions recorded.

Usage: python -m magi_train.integrations.bootstrap [--replace-ddp] [--module] -- SCRIPT [ARGS ...]
"""

import os
import runpy
import sys

from torch.distributed.elastic.multiprocessing.errors import record


def _replace_ddp() -> None:
    """Make the name DistributedDataParallel mean ours, wherever scripts look for it."""
    import torch

    from magi_train.api import DataParallel

    torch.nn.parallel.DistributedDataParallel = DataParallel  # type: ignore[misc, assignment]
    torch.nn.parallel.distributed.DistributedDataParallel = DataParallel  # type: ignore[misc, assignment]


@record
def main() -> None:
    """Run the script as __main__, with its own arguments and its folder first on sys.path."""
    split = sys.argv.index("--")
    options, (script, *arguments) = sys.argv[1:split], sys.argv[split + 1 :]
    from magi_train.integrations import _autoload

    _autoload.register()
    if "--replace-ddp" in options:
        _replace_ddp()
    sys.argv = [script, *arguments]
    if "--module" in options:
        sys.path[0] = os.getcwd()
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(script))
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
