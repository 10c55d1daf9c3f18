"""LoRA+'s learning rates (Hayou et al., arXiv 2402.12354): a check of the optimizer."""

import math

from torch.optim import Optimizer

from tunerkit.errors import warn
from tunerkit.plugin import Tuner
from tunerkit_lora.config import LoraConfig


def warn_of_others(tuner: Tuner, optimizer: Optimizer) -> None:
    """Warn of the first target where B's initial learning rate is not ``lr_ratio`` times A's."""
    assert isinstance(tuner.config, LoraConfig)
    ratio, found = tuner.config.lr_ratio, dict[int, float]()
    for group in optimizer.param_groups:
        rate = group.get("initial_lr", group.get("lr"))  # a warmup starts at 0
        found |= {} if rate is None else {id(parameter): float(rate) for parameter in group["params"]}
    for path, adapter in tuner.adapters().items():
        a, b = (found.get(id(adapter.get_parameter(name))) for name in ("a", "b"))
        if a is not None and b is not None and not math.isclose(b, ratio * a, rel_tol=1e-3):
            warn(
                f"adapter {tuner.name!r} has lr_ratio={ratio:g}, but the optimizer trains A at a learning rate of "
                f"{a:g} and B at {b:g} at {path!r}; build it from tunerkit.param_groups(model, lr=...)"
            )
            return
