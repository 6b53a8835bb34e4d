"""The same under Lightning, where only the strategy's name is ours."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Line(pl.LightningModule):
    """Fits a line."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(devices: int = 2) -> None:
    """Train two epochs and show the report."""
    x = torch.randn(512, 8)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 32)
    trainer = pl.Trainer(
        strategy="magi", accelerator="auto", devices=devices, max_epochs=2, logger=False
    )
    trainer.fit(Line(), loader)
    if trainer.is_global_zero:
        print(trainer.strategy.report)


if __name__ == "__main__":
    main()
