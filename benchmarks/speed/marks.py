"""Readings of a clock or a counter around a method's work outside the optimizer's update."""

from collections.abc import Callable
from typing import Any

import attrs
from torch.optim import Optimizer


@attrs.define(eq=False)
class Marks:
    """The increase of ``read`` in the last step: in the hooks ``before`` the update, and in those ``after`` it."""

    read: Callable[[], float]
    before: float = 0.0
    after: float = 0.0

    def bracket(self, optimizer: Optimizer, attach: Callable[[], None]) -> None:
        """Call ``attach``, and read before and after the step hooks that it registers (hooks fire in that order)."""
        began = {"before": 0.0, "after": 0.0}

        def begin(phase: str) -> Callable[..., None]:
            def reading(*_: Any) -> None:
                began[phase] = self.read()

            return reading

        def end(phase: str) -> Callable[..., None]:
            def reading(*_: Any) -> None:
                setattr(self, phase, self.read() - began[phase])

            return reading

        optimizer.register_step_pre_hook(begin("before"))
        optimizer.register_step_post_hook(begin("after"))
        attach()
        optimizer.register_step_pre_hook(end("before"))
        optimizer.register_step_post_hook(end("after"))

    def around(self, call: Callable[[int], None]) -> Callable[[int], None]:
        """Wrap ``call`` so that its cost counts as work after the update."""

        def marked(step: int) -> None:
            began = self.read()
            call(step)
            self.after = self.read() - began

        return marked
