"""The contenders: the frozen floor, PEFT's LoRA and AdaLoRA, and ours, each with its own training."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import attrs
import peft
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import tunerkit
from benchmarks.speed.marks import Marks
from benchmarks.speed.models import Output, Workload
from benchmarks.speed.settings import GAMMA, Settings

FLOOR = "frozen floor"
PEFT_LORA = "PEFT LoRA"
PEFT_LORA_AGAIN = "PEFT LoRA again"
PEFT_ADALORA = "PEFT AdaLoRA"
PEFT_ADALORA_BARE = "PEFT AdaLoRA, no regulariser"
PEFT_ADALORA_FINAL = "PEFT AdaLoRA, final phase"
LORA = "LoRA"
ADALORA = "AdaLoRA"
ADALORA_GAMMA = "AdaLoRA, regulariser"
ADALORA_TURNED = "AdaLoRA, exact_svd"
ADALORA_MASKED = "AdaLoRA, final phase, masks kept"
ADALORA_SHRUNK = "AdaLoRA, shrunk"

_SOON = 6  # the step of the last allocation, for contenders that are measured after it


@attrs.define(eq=False)
class Contender:
    """A model in training. ``call`` computes the output of a batch, ``model`` is wrapped; the floor has no optimizer.

    ``allocate`` is the function that a user of PEFT must call after each step, with the step number from 1.
    """

    name: str
    model: nn.Module
    call: Callable[[Tensor, Tensor], Output]
    workload: Workload
    optimizer: Optimizer | None = None
    allocate: Callable[[int], None] | None = None
    steps: int = 0

    def pass_through(self) -> None:
        """Forward and backward."""
        x = self.workload.x.detach().requires_grad_()
        with self.workload.precision():
            loss = self.call(x, self.workload.target).loss
        loss.backward()

    def step(self) -> None:
        """One whole training step."""
        self.pass_through()
        self.steps += 1
        if self.optimizer is None:
            return
        self.optimizer.step()
        if self.allocate is not None:
            self.allocate(self.steps)
        self.optimizer.zero_grad()

    def take(self, steps: int) -> None:
        """Several whole steps."""
        for _ in range(steps):
            self.step()

    def trained(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]


@attrs.frozen
class Schedule:
    """AdaLoRA's schedule; after the last allocation, at ``final_step``, ranks are final."""

    total_steps: int
    final_step: int
    delta_t: int


def build(name: str, workload: Workload, settings: Settings, marks: Marks | None = None) -> Contender:
    """The contender of that name, before its first step, or trained past its last allocation if the name says so.

    ``marks`` measures AdaLoRA's work in the optimizer's step hooks.
    """
    if name == FLOOR:
        base = workload.model()
        return Contender(name, base, base, workload)
    model = wrap(name, workload.model(), workload, settings)
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-3, fused=True)
    contender = Contender(name, model, called(name, model), workload, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _connect(contender, _schedule(name, settings), marks)
        if name in (PEFT_ADALORA_FINAL, ADALORA_MASKED, ADALORA_SHRUNK):
            contender.take(_SOON + 1)
    return contender


def build_all(names: Iterable[str], workload: Workload, settings: Settings) -> dict[str, Contender]:
    """Several contenders by name."""
    return {name: build(name, workload, settings) for name in names}


def wrap(name: str, model: nn.Module, workload: Workload, settings: Settings) -> nn.Module:
    """``model`` with the adapters of the named contender, all at the same initial rank and scale."""
    if name.startswith("PEFT"):
        return _peft_model(name, model, workload, settings)
    config = our_config(name, workload, settings)
    return tunerkit.wrap(model, "lora" if name == LORA else "adalora", config, seed=settings.seed)


def called(name: str, model: nn.Module) -> nn.Module:
    """The module whose forward is timed.

    PEFT adds its regulariser in the model just below `PeftModel`; `PeftModel` without a task type bypasses it. Both of
    PEFT's methods are called there, which is cheaper than through `PeftModel`, to PEFT's advantage.
    """
    if not isinstance(model, peft.PeftModel):
        return model
    inner: nn.Module = model.base_model
    return inner.get_submodule("model") if name == PEFT_ADALORA_BARE else inner


def is_adalora(name: str) -> bool:
    """Whether a contender allocates."""
    return "AdaLoRA" in name


def our_config(name: str, workload: Workload, settings: Settings) -> dict[str, object]:
    """Our settings, as a mapping."""
    shared: dict[str, object] = {"targets": list(workload.targets), "alpha": 2.0 * settings.init_rank}
    if name == LORA:
        return {**shared, "rank": settings.init_rank}
    schedule = _schedule(name, settings)
    return {
        **shared,
        "init_rank": settings.init_rank,
        "target_rank": settings.target_rank,
        "t_init": 0,
        "t_final": schedule.total_steps - schedule.final_step,
        "delta_t": schedule.delta_t,
        "gamma": GAMMA if name == ADALORA_GAMMA else 0.0,
        "exact_svd": name == ADALORA_TURNED,
        "shrink": name != ADALORA_MASKED,
    }


def _peft_model(name: str, model: nn.Module, workload: Workload, settings: Settings) -> nn.Module:
    torch.manual_seed(settings.seed)
    # PEFT warns that a model without a transformers config is unusual, and that r is not used.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: nn.Module = peft.get_peft_model(model, _peft_config(name, workload, settings))
    return wrapped


def _peft_config(name: str, workload: Workload, settings: Settings) -> "peft.PeftConfig":
    targets, alpha = list(workload.targets), 2 * settings.init_rank
    if not is_adalora(name):
        return peft.LoraConfig(r=settings.init_rank, lora_alpha=alpha, target_modules=targets)
    schedule = _schedule(name, settings)
    return peft.AdaLoraConfig(
        init_r=settings.init_rank,
        target_r=settings.target_rank,
        lora_alpha=alpha,
        target_modules=targets,
        tinit=0,
        tfinal=schedule.total_steps - schedule.final_step,
        deltaT=schedule.delta_t,
        total_step=schedule.total_steps,
        orth_reg_weight=0.0 if name == PEFT_ADALORA_BARE else GAMMA,
    )


def _schedule(name: str, settings: Settings) -> Schedule:
    if name in (PEFT_ADALORA_FINAL, ADALORA_MASKED, ADALORA_SHRUNK):
        # The training ends long after the last allocation, so no measured step is past its end.
        return Schedule(total_steps=1_000_000, final_step=_SOON, delta_t=2)
    return Schedule(settings.lasting, final_step=settings.lasting * 3 // 4, delta_t=settings.delta_t)


def _connect(contender: Contender, schedule: Schedule, marks: Marks | None) -> None:
    """Attach our adapters, or register the call of PEFT's allocator."""
    model, optimizer = contender.model, contender.optimizer
    assert optimizer is not None
    if isinstance(model, peft.PeftModel):
        if is_adalora(contender.name):
            inner: Any = model.base_model
            allocate: Callable[[int], None] = inner.update_and_allocate
            contender.allocate = allocate if marks is None else marks.around(allocate)
        return

    def attach() -> None:
        tunerkit.attach(model, optimizer, total_steps=schedule.total_steps)

    attach() if marks is None else marks.bracket(optimizer, attach)
