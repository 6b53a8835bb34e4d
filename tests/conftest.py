"""Seeds, fresh compiler state, and one thread: what every test starts from."""

import logging

import pytest
import torch

logging.getLogger("torch._dynamo").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
