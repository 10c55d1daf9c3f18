"""A Trainer's precision: accelerate's autocast is around the model's forward while it trains, and only then."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

# What accelerate leaves on a model: its own forward, the one that this replaces, and that the model was prepared.
_FORWARD, _REPLACED, _PREPARED = "forward", "_original_forward", "_is_accelerate_prepared"


class Precision:
    """The precision of a trainer, and what accelerate puts around the model's forward for it.

    Accelerate leaves its autocast, and its conversion of outputs to fp32, on the model for good. A model that was
    trained would so compute in bf16, and the same adapter on a model that was loaded in fp32. And the next trainer of
    the model would train in this one's precision, because a model is prepared only once.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._taken: dict[str, Any] = {}

    @contextmanager
    def around_training(self) -> Iterator[None]:
        """At the end of the block, take off what accelerate has put on the model in it, or before."""
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
        """Run the trainer's evaluation ``loop`` in the trainer's precision, and leave the model as it was.

        While the trainer trains, accelerate's autocast is around the model anyway. Before, the loop puts it there.
        After that, the trainer would evaluate in the model's own dtype, so it is put back.
        """
        state = vars(self.trainer.model)
        if _REPLACED in state:
            return loop(*args, **kwargs)
        with self.around_training():
            state.update(self._taken)
            return loop(*args, **kwargs)


def _exchanged(state: dict[str, Any], before: dict[str, Any], *names: str) -> dict[str, Any]:
    """Give the names in ``state`` the values that they had ``before``, or none; return those that they had."""
    taken = {name: state.pop(name) for name in names if name in state}
    state.update({name: before[name] for name in names if name in before})
    return taken
