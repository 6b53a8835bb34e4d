"""Peak memory and seconds of a long-sequence step: ours under two budgets, beside its peers.

    python -m benchmarks.memory --commit HASH --output benchmarks/results/NAME.json

Llama-1B on one sequence of 32768 tokens, on one GPU: benchmarks/train_step.py with the variants
that trade time for memory. Its options hold here too; later ones win.
"""

import sys

from benchmarks import train_step

VARIANTS = (
    "fold-masks+compile", "magi:memory_budget_gib=35", "magi:memory_budget_gib=27", "magi",
    "magi:memory_budget_gib=35,offload_activations=true",
    "magi:memory_budget_gib=27,offload_activations=true",
    "liger-loss+checkpoint+block-compile", "checkpoint+block-compile", "block-compile",
)  # fmt: skip


def main() -> None:
    """Run the table of train_step on this case."""
    asked = sys.argv[1:]
    sys.argv[1:] = ["--case", "llama-1b-32k", "--seconds", "300", "--variants", *VARIANTS, *asked]
    train_step.main()


if __name__ == "__main__":
    main()
