"""What `magi run` starts on each rank: the user's script, with its fate told to the launcher.

Usage: python -m magi_train.integrations.bootstrap [--replace-ddp] [--module] [--preflight]
       [--own-view] [--fold] [--folder=FOLDER] -- SCRIPT [ARGS ...]

--folder: where rank_files.py writes. --own-view: each rank sees one GPU, its own. --fold: leave
tracebacks to the launcher. Options rather than variables of the environment: processes that the
script starts must not take them for theirs.
"""

import os
import runpy
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from magi_train.integrations import _autoload
from magi_train.integrations.rank_files import RankFiles, print_one_line


def replace_ddp() -> None:
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
    folder = next((o.partition("=")[2] for o in options if o.startswith("--folder=")), None)
    files = RankFiles(Path(folder), int(os.environ["RANK"])) if folder else None
    if "--fold" in options:
        sys.excepthook = print_one_line
    try:
        if "--preflight" in options:
            from magi_train.integrations.preflight import check

            place = Path(folder) if folder else None
            check(own_view="--own-view" in options, folder=place)
        if files is not None:
            files.start()
        _autoload.register()
        if "--replace-ddp" in options:
            replace_ddp()
        run_script(script, arguments, as_module="--module" in options)
    except Exception as error:
        if files is not None:
            files.record(error)
        raise
    finally:
        if files is not None:
            files.close()


def run_script(script: str, arguments: list[str], as_module: bool = False) -> None:
    """Run a script, or a module by its name, as `python script arguments` would."""
    sys.argv = [script, *arguments]
    if as_module:
        sys.path[0] = os.getcwd()
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(script))
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
