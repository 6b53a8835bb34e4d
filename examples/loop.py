"""A plain loop, in one process (python -m) or on many (magi run -m)."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import magi_train


def main() -> float:
    """Fit a line; return the last loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = magi_train.prepare(model, optimizer)
    step = magi_train.prepare_step(lambda x, y: (model(x) - y).square().mean(), model)
    x = torch.randn(512, 8)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    many = torch.distributed.is_initialized()
    loader = DataLoader(data, 32, sampler=DistributedSampler(data) if many else None)
    for _ in range(5):
        for batch in loader:
            loss = step(*batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if not many or torch.distributed.get_rank() == 0:
        print(f"loss {loss.item():.4f}")
        print(magi_train.report(model))
    if many:
        torch.distributed.destroy_process_group()
    return loss.item()


if __name__ == "__main__":
    main()
