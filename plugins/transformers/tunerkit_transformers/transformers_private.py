"""The private names of transformers: a Trainer's methods for weights and states, and marks of parameters and models.

The file also has the one private name of torch that the marks need. Nothing here imports transformers. If a release
renames one, test_transformers_private.py reports it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

Method = Callable[..., None]
# Attributes of a model: the class sets the first to False, and peft's adapters set it to True on the instance.
HAS_ADAPTERS, IS_QUANTISED = "_hf_peft_config_loaded", "is_quantized"
# The attribute of a parameter that `from_pretrained` loaded, and of a module that transformers initialized.
LOADED = "_is_hf_initialized"
# The module with the calls for peft's adapters that every model inherits.
ADAPTER_CALLS = "transformers.integrations.peft"


def replace_(
    trainer: Any, *, save: Method, save_states: Method, load: Method, load_best: Method, load_states: Method
) -> None:
    """Replace methods on the instance. Each function gets the trainer's own method, then the method's arguments."""
    trainer._save = partial(save, trainer._save)
    trainer._save_optimizer_and_scheduler = partial(save_states, trainer._save_optimizer_and_scheduler)
    trainer._load_from_checkpoint = partial(load, trainer._load_from_checkpoint)
    trainer._load_best_model = partial(load_best, trainer._load_best_model)
    trainer._load_optimizer_and_scheduler = partial(load_states, trainer._load_optimizer_and_scheduler)


def overridden(kind: Any, base: Any) -> list[str]:
    """Return the names of the methods on weights that the Trainer class ``kind`` overrides from ``base``."""
    own = (kind._save, kind._load_from_checkpoint, kind._load_best_model)
    originals = (base._save, base._load_from_checkpoint, base._load_best_model)
    return [original.__name__ for method, original in zip(own, originals, strict=True) if method is not original]


def losses(trainer: Any) -> dict[str, float]:
    """Return a Trainer's sums of losses, up to the last log entry and after it; empty before training."""
    if "_tr_loss" not in vars(trainer or object):
        return {}
    logged, since, last = trainer._total_loss_scalar, float(trainer._tr_loss), trainer._globalstep_last_logged
    return {"logged": logged, "since": since, "last_logged": last}


def set_losses_(trainer: Any, found: object) -> bool:
    """Restore sums that `losses` returned, and return whether ``found`` was valid."""
    match found:
        case {"logged": float(logged), "since": float(since), "last_logged": int(last)}:
            trainer._total_loss_scalar, trainer._globalstep_last_logged = logged, last
            trainer._tr_loss.fill_(since)
            return True
    return False


def is_loaded(parameter: nn.Parameter) -> bool:
    """Whether ``from_pretrained`` read the parameter from a checkpoint. A deep copy of a model loses these marks."""
    return bool(vars(parameter).get(LOADED, False))


def is_built(module: nn.Module) -> bool:
    """Whether transformers has marked the module as initialized: its values were drawn, computed or loaded."""
    return bool(vars(module).get(LOADED, False))


def version(parameter: nn.Parameter) -> int | None:
    """Return torch's counter of in-place changes of a parameter; None for an inference tensor, which has none."""
    return None if parameter.is_inference() else parameter._version


def sample_by_(trainer: Any, sampler: Callable[[Any], Any]) -> None:
    """Make a Trainer draw its training rows with the sampler that ``sampler`` returns for the data set."""
    trainer._get_train_sampler = sampler
