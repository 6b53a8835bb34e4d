"""Settings, parameters, gradients and a float64 step: what tests of the fused optimizer share."""

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from magi_train.fusion.kernels.adamw import AdamSettings, adamw_reference
from magi_train.fusion.kernels.sgd import SgdSettings, sgd_reference

ADAM = {
    "AdamW": (AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "AdamW, ascending": (AdamW, {"lr": 1e-2, "maximize": True, "eps": 1e-3}),
    "AMSGrad": (AdamW, {"lr": 1e-2, "amsgrad": True, "betas": (0.5, 0.6)}),
    "Adam, L2": (Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    "Adam, no first moment": (Adam, {"lr": 1e-2, "betas": (0.0, 0.9)}),
}
PLAIN = {
    "SGD": (SGD, {"lr": 0.1}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
}
ALL = {**ADAM, **PLAIN}


def parameters(sizes=(3, 40), device="cpu"):
    g = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(n, generator=g).to(device)) for n in sizes]


def give_gradients(params, step, dtype=torch.float32, scale=1.0):
    g = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad_dtype = None
        p.grad = (torch.randn(p.shape, generator=g) * scale).to(p.device, dtype)


def reference_step(kind, settings, masters, grads, states, scalars):
    """Take a step with the kernel file's own reference, in the dtype of `masters`."""
    group = kind([nn.Parameter(torch.zeros(1))], **settings).param_groups[0]
    for p, g, state in zip(masters, grads, states, strict=True):
        if kind is SGD:
            names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
            sgd_reference(p, g, state, SgdSettings(**{n: group[n] for n in names}), scalars)
            continue
        if not state:
            state["step"] = torch.zeros(())
            for moment in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                state[moment] = torch.zeros_like(p)
        names = ("lr", "eps", "weight_decay", "amsgrad", "maximize")
        chosen = AdamSettings(
            **{n: group[n] for n in names}, beta1=group["betas"][0], beta2=group["betas"][1],
            decoupled=group["decoupled_weight_decay"])  # fmt: skip
        adamw_reference(p, g, state, chosen, scalars)
