"""How ranks are found inside of a SLURM job, so that two launchers never start each other's ranks.

| started by | what `magi run` does |
|---|---|
| `srun` with several tasks a node | srun has made the ranks: this process becomes one |
| `srun` with one task a node | starts this node's ranks; they meet at the job's first node |
| a batch script or `salloc`, no srun | starts ranks on this node only, and says so |

Only SLURM_* variables are read. Options that are given win.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Allocation:
    """What SLURM says about this process.

    Attributes:
        job: Job id.
        nodes: Nodes of the step, or of the job outside of a step.
        tasks: Processes that srun started; 0 outside of a step.
        head: The first node.
        rank: This task among all; and `local_rank` on its node.
        node: Number of this node.
    """

    job: int
    nodes: int
    tasks: int
    head: str
    rank: int
    local_rank: int
    node: int

    @property
    def makes_ranks(self) -> bool:
        """Whether srun has started a process for each rank."""
        return self.tasks > self.nodes

    @property
    def port(self) -> int:
        """A port that all tasks of the job arrive at by themselves."""
        return 20000 + self.job % 20000

    def environment(self) -> dict[str, str]:
        """Return what torchrun would set for this rank; only where `makes_ranks`."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.tasks),
            "LOCAL_WORLD_SIZE": str(self.tasks // self.nodes),
            "MASTER_ADDR": self.head,
            "MASTER_PORT": str(self.port),
        }


def allocation(environment: Mapping[str, str]) -> Allocation | None:
    """Return this process's place in a SLURM job, None outside of one."""
    if "SLURM_JOB_ID" not in environment:
        return None

    def number(*names: str, default: int = 0) -> int:
        return next((int(environment[n]) for n in names if n in environment), default)

    lists = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    return Allocation(
        job=number("SLURM_JOB_ID"),
        nodes=number("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES", default=1),
        tasks=number("SLURM_STEP_NUM_TASKS"),
        head=first_host(next((environment[n] for n in lists if n in environment), "localhost")),
        rank=number("SLURM_PROCID"),
        local_rank=number("SLURM_LOCALID"),
        node=number("SLURM_NODEID"),
    )


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's compressed list: `gpu[03-05,9],login` gives gpu03."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes
