"""How gradients travel: one plan, executed inside the backward graph or by gradient hooks."""
