"""A Trainer's precision: accelerate's autocast wraps the model's forward only during training and evaluation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

# Attributes that accelerate leaves on a model: its forward, the replaced forward, and the mark of a prepared model.
_FORWARD, _REPLACED, _PREPARED = "forward", "_original_forward", "_is_accelerate_prepared"


class Precision:
    """Removes accelerate's wrapper around the model's forward after training.

    Accelerate itself never removes the wrapper, which adds autocast and converts outputs to fp32. So a trained model
    would compute in bf16, but the same adapter in a newly loaded model in fp32. The next trainer would also keep this
    one's precision, because accelerate prepares a model only once.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._taken: dict[str, Any] = {}

    @contextmanager
    def around_training(self) -> Iterator[None]:
        """At the end of the block, remove accelerate's wrapper from the model, even one that was there before."""
        model: Any = self.trainer.model
        state = vars(model)
        before = {name: state[name] for name in (_FORWARD, _REPLACED, _PREPARED) if name in state}
        if (own := before.pop(_REPLACED, None)) is not None:  # an evaluation before attaching has prepared it
            before.pop(_PREPARED, None)
            before.pop(_FORWARD, None)
            if getattr(own, "__func__", None) is not type(model).forward:  # somebody's own forward was there
                before[_FORWARD] = own
        # A model that is sharded, or inside DDP, is not prepared again when this trainer trains once more.
        if state.get(_PREPARED) or self.trainer.model_wrapped is not model:
            state.update(self._taken)
        try:
            yield
        finally:
            if state.get(_REPLACED) is not None:
                self._taken = _exchanged(state, before, _FORWARD, _REPLACED)
            if not self.trainer.is_fsdp_enabled:  # which cannot shard a model twice
                _exchanged(state, before, _PREPARED)

    def evaluate(self, loop: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the trainer's evaluation ``loop`` in the trainer's precision, and restore the model.

        During training, accelerate's wrapper is in place. Before training, the loop adds it. After training, it is
        restored for the loop.
        """
        state = vars(self.trainer.model)
        if _REPLACED in state:
            return loop(*args, **kwargs)
        with self.around_training():
            state.update(self._taken)
            return loop(*args, **kwargs)


def _exchanged(state: dict[str, Any], before: dict[str, Any], *names: str) -> dict[str, Any]:
    """Restore ``names`` in ``state`` to their values in ``before``, or remove them; return the replaced values."""
    taken = {name: state.pop(name) for name in names if name in state}
    state.update({name: before[name] for name in names if name in before})
    return taken
