"""Trains a small Llama of transformers on every rank, without us and with; writes what it saw.

Usage: magi run --nproc N smoke_script.py lightning|deepspeed|huggingface|ddp OUTPUT
Runs on CPUs too, where there is no GPU. OUTPUT holds {name of a training: losses of rank 0}.
"""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")
STEPS = 8


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).train()


def tokens(step, rank=RANK):
    """Return a rank's batch of a step: two take turns, for losses that fall."""
    draw = torch.Generator().manual_seed(100 * (step % 2) + rank)
    return torch.randint(0, 512, (4, 64), generator=draw)


def optimizer_of(model):
    """Return what trains in half precision too: squares of gradients are too small for it."""
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)


def looped(model, optimizer, autocast=False):
    losses = []
    for i in range(STEPS):
        batch = tokens(i).to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def lightning(folder):
    """Each precision under DDP and under us."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = llama(), []

        def training_step(self, batch, batch_idx):
            return self.model(input_ids=batch, labels=batch, use_cache=False).loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.losses.append(float(outputs["loss"]))

        def configure_optimizers(self):
            return optimizer_of(self)

    def fit(strategy, precision):
        data = torch.cat([tokens(i, rank) for i in range(STEPS) for rank in range(RANKS)])
        trainer = pl.Trainer(
            strategy=strategy, precision=precision, accelerator="gpu" if CUDA else "cpu",
            devices=RANKS, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        module = Module()
        trainer.fit(module, torch.utils.data.DataLoader(data, 4))
        return module.losses

    return {
        f"{precision} {strategy}": fit(strategy, precision)
        for precision in (PRECISIONS if CUDA else PRECISIONS[:1])
        for strategy in ("ddp", "magi")
    }


def deepspeed(folder):
    """ZeRO-2 and ZeRO-3, run by DeepSpeed, against DDP."""
    import magi_train
    from magi_train import Config, ShardingConfig

    if not CUDA:
        from tests.distributed.test_deepspeed import quick

        quick()
    model = DistributedDataParallel(llama().to(DEVICE))
    found = {"ddp": looped(model, optimizer_of(model))}
    for stage in (2, 3):
        twin = llama().to(DEVICE)
        config = Config(engine="deepspeed", sharding=ShardingConfig(zero_stage=stage))
        prepared, optimizer = magi_train.prepare(twin, optimizer_of(twin), config=config)
        found[f"zero-{stage} magi"] = looped(prepared, optimizer)
        magi_train.save_checkpoint(f"{folder}/{stage}", prepared, optimizer)
    return found


def huggingface(folder):
    """The Trainer of transformers in bfloat16, with DDP and with `attach`."""
    from magi_train import Config
    from tests.integrations.huggingface_script import losses, make

    found = {}
    for name in ("ddp", "magi"):
        options = {"use_cpu": not CUDA, "bf16": CUDA, "per_device_train_batch_size": 1}
        trainer = make(f"{folder}/{name}", name == "magi", config=Config(), **options)
        trainer.train()
        found[name] = losses(trainer)
    return found


def ddp(_):
    """A loop as tutorials have it, which --replace-ddp gives to us."""
    model = DistributedDataParallel(llama().to(DEVICE))
    return {type(model).__module__: looped(model, optimizer_of(model), autocast=CUDA)}


def main():
    mode, output = sys.argv[1:]
    warnings.simplefilter("ignore")
    if CUDA:
        torch.cuda.set_device(DEVICE)
    if mode in ("deepspeed", "ddp"):
        dist.init_process_group("nccl" if CUDA else "gloo")
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        if dist.is_initialized():
            dist.broadcast_object_list(shared, device=DEVICE)
        found = globals()[mode](shared[0])
        if dist.is_initialized():
            dist.barrier()
    if RANK == 0:
        Path(output).write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
