"""A user's script for transformers' Trainer: a small Llama on a dataset made on the spot.

Usage: huggingface_script.py plain|magi OUTPUT
"""

import json
import sys
from pathlib import Path

import torch

OPTIONS = {
    "num_train_epochs": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": [],
    "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-2, "save_strategy": "no",
}  # fmt: skip


def examples():
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": i, "labels": i} for i in torch.randint(0, 64, (16, 12), generator=g)]


def make(folder, ours, kind=None, config=None, **options):
    """Return a Trainer; `ours` adds the one line, by default without generated code."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads))
    args = TrainingArguments(output_dir=str(folder), **{**OPTIONS, **options})
    data = examples()
    trainer = (kind or Trainer)(model=model, args=args, train_dataset=data, eval_dataset=data[:4])
    if ours:
        from magi_train import Config
        from magi_train.integrations.huggingface import attach

        attach(trainer, config or Config(lowering="aot_eager"))
    return trainer


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def main():
    mode, output = sys.argv[1:]
    torch.set_num_threads(1)
    trainer = make(Path(output).parent / mode, mode == "magi", gradient_accumulation_steps=2)
    trainer.train()
    found = {"losses": losses(trainer), "ranks": trainer.args.world_size}
    found["wrapped"] = type(trainer.model_wrapped).__name__
    if mode == "magi":
        from magi_train.integrations.huggingface import report

        found["tier"] = report(trainer).tier
    if trainer.is_world_process_zero():
        Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
