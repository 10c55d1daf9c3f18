"""A run for which there is not enough memory ends in one sentence that says what takes less."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tunerkit import TunerkitError
from tunerkit_cli.folder import RunFolder
from tunerkit_transformers.memory_plan import Plan
from tunerkit_transformers.out_of_memory import advice_on, is_out_of_memory


class OutOfMemoryError(TunerkitError):
    """There is not enough memory for a run."""


@contextmanager
def refusing_memory(
    folder: RunFolder, plan: Plan | None = None, *, has_begun: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Turn an error of memory into one that says what to change, and how to go on with a run that has begun."""
    try:
        yield
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
        ways = "--set gradient_checkpointing=true, a smaller --batch-size or --set quantisation=nf4"
        do = f"train with {ways}"
        if has_begun() and folder.has_checkpoint:
            saves = plan is not None and plan.checkpointing > 0
            how = " --set gradient_checkpointing=true" if saves else ", where there is more memory"
            do = f"go on with: tunerkit train --out {shlex.quote(str(folder))} --resume{how}"
        raise OutOfMemoryError(f"out of memory: {advice_on(plan)}; {do}") from problem
