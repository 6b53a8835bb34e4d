"""Nodes: how many ranks share a host, so that a codec can tell fast links from slow ones."""

import os
import platform
from typing import Any

import torch.distributed as dist

from magi_train.comm.codecs import Among
from magi_train.core.config import CommConfig
from magi_train.core.errors import MagiError
from magi_train.core.report import Report
from magi_train.core.world import World

WANT_NODES = ("hierarchical", "balanced")


def node_size(config: CommConfig, world: World, timeout_seconds: float, report: Report) -> int:
    """Return the ranks in a node; 1 if the setting has no use for nodes, or they are not alike.

    As configured, else as the launcher says (LOCAL_WORLD_SIZE), else by host names. Ranks of a node
    follow each other, as launchers number them. A collective.

    Raises:
        MagiError: What is configured does not divide the ranks.
    """
    if world.size == 1 or config.compression not in WANT_NODES:
        return 1
    mine = {"host": platform.node(), "ranks": os.environ.get("LOCAL_WORLD_SIZE", "")}
    answers = world.gather("the nodes of the ranks", mine, timeout_seconds)
    size = config.node_size or _from_launcher(answers) or _from_hosts(answers)
    if size and world.size % size == 0:
        return size
    if config.node_size is not None:
        raise MagiError(
            f"CommConfig.node_size is {size}, which does not divide the {world.size} ranks; give "
            "the ranks of a node, the same for all nodes"
        )
    report.note(
        f"the {world.size} ranks are not in nodes of equal size, one after the other, so gradients "
        "travel as if each rank were a node"
    )
    return 1


def _from_launcher(answers: list[dict[str, str]]) -> int:
    said = {answer["ranks"] for answer in answers}
    (one,) = said if len(said) == 1 else ("",)
    return int(one) if one.isdecimal() and len(answers) % max(int(one), 1) == 0 else 0


def _from_hosts(answers: list[dict[str, str]]) -> int:
    hosts = [answer["host"] for answer in answers]
    size = hosts.count(hosts[0])
    in_rows = [h for h in dict.fromkeys(hosts) for _ in range(size)]
    return size if in_rows == hosts else 0


class Groups:
    """Process groups for collectives among all ranks, within a node, and across nodes.

    Args:
        world: The ranks.
        size: In a node; 1 for no groups but that of all.
        options: For `dist.new_group`; None to use the default group for all.
    """

    def __init__(self, world: World, size: int, options: dict[str, Any] | None) -> None:
        self._groups: dict[Among, Any] = {}
        self._groups["all"] = None if options is None else dist.new_group(**options)
        if size == 1:
            return
        nodes = [list(range(i, i + size)) for i in range(0, world.size, size)]
        places = [list(range(i, world.size, size)) for i in range(size)]
        names: tuple[Among, Among] = ("node", "across")
        for name, divided in zip(names, (nodes, places), strict=True):
            for ranks in divided:  # every rank makes all groups, in one order
                group = dist.new_group(ranks, **(options or {}))
                if world.rank in ranks:
                    self._groups[name] = group

    def among(self, name: Among) -> Any:
        """Return the process group; None for the default one."""
        return self._groups[name]
