"""Losses of TRL's trainers on a CPU: logits are computed only at positions with a label."""

import inspect
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunerkit.plugin.trainers import inside
from tunerkit_transformers.head_weights import around_forward_, forward_of_trl
from tunerkit_transformers.reference import Reference

_MARK: Final = "_tunerkit_scores_learned"
_NOT_LEARNED: Final = -100
# The logits of a larger batch, beyond 512 MiB in fp32, are left to TRL, which computes them in parts.
_MOST: Final = 2**27
_AT_ONCE: Final = 2**18  # logits that fit a core's cache
# Nodes whose backward does not read the values that they returned, and views of those.
_PRODUCTS: Final = ("MmBackward0", "AddmmBackward0")
_VIEWS: Final = ("UnsafeViewBackward0", "ViewBackward0")
_TRITON: Final = ("cuda", "xpu")  # where TRL leaves out the positions that are not learned
_TRAINERS: Final = ("SFTTrainer", "DPOTrainer")  # their losses take log-probabilities at temperature 1


def obstacle(trainer: Any) -> str | None:
    """Return why `score_learned_` cannot replace a trainer's loss (a sentence fragment); None if it can."""
    if not any(kind.__name__ in _TRAINERS and kind.__module__.startswith("trl.") for kind in type(trainer).__mro__):
        return f"{type(trainer).__name__} is neither TRL's SFTTrainer nor its DPOTrainer"
    if (device := trainer.args.device.type) != "cpu":
        does_so = "computes logits at the learned positions alone" if device in _TRITON else "is not replaced"
        return f"on {device}, TRL's own {does_so}"
    if forward_of_trl(trainer.model) is None or _output() is None:
        return "this version of TRL computes its losses in another way"
    if not takes_positions(type(trainer.model)):
        return f"the forward of {type(trainer.model).__name__} takes no mask of positions (logits_to_keep)"
    return None


def score_learned_(trainer: Any) -> None:
    """Make a TRL trainer's loss compute logits only at positions with a label; call `obstacle` first.

    The forward of the model's class computes them, so the head's adapters apply. The reference model is changed too.
    """
    models = (trainer.model, vars(trainer).get("ref_model"))
    for inner in [inside(model) for model in models if model is not None]:
        source = inner.source if isinstance(inner, Reference) else inner
        if forward_of_trl(inner) is not None and takes_positions(type(source)):
            around_forward_(inner, _MARK, _scored_or_run)


def is_scored(trainer: Any) -> bool:
    """Whether `score_learned_` has replaced a trainer's loss."""
    return hasattr(trainer.model.forward, _MARK)


def takes_positions(kind: type[nn.Module]) -> bool:
    """Whether the class's forward accepts a mask as ``logits_to_keep``, like the models of transformers."""
    function = inspect.unwrap(kind.forward)
    return "logits_to_keep" in inspect.signature(function).parameters and "slice_logits_to_keep" in function.__globals__


def _output() -> Any:
    """Return the class of TRL's forward outputs; None if this version of TRL does not have it."""
    import trl.trainer.utils

    return vars(trl.trainer.utils).get("FusedCausalLMOutput")


def _scored_or_run(run: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Replaces TRL's forward: compute a loss from the labeled positions; pass any other call on to ``run``."""
    labels = kwargs.get("labels")
    if not kwargs.get("fused_lm_head") or labels is None or labels.device.type != "cpu":
        return run(*args, **kwargs)
    if kwargs.get("shift_labels") is not None or kwargs.get("output_router_logits"):
        return run(*args, **kwargs)
    learned = labels[:, 1:] != _NOT_LEARNED  # (batch, length - 1)
    if int(learned.sum()) * model.config.get_text_config().vocab_size > _MOST:
        return run(*args, **kwargs)
    inputs = {name: value for name, value in kwargs.items() if name not in ("fused_lm_head", "labels")}
    items = inputs.pop("num_items_in_batch", None)
    # The token after a position is its label, so the last position has none.
    inputs["logits_to_keep"] = torch.nn.functional.pad(learned, (0, 1))
    logits = type(model).forward(model, *args, **inputs).logits  # (learned, vocabulary)
    scores: Any = _Scores
    with torch.autocast("cpu", enabled=False):  # which would round their sums
        found = dict(zip(_FIELDS, scores.apply(logits, labels[:, 1:][learned], may_overwrite(logits)), strict=True))
    placed = {name: each.new_zeros(learned.shape).masked_scatter(learned, each) for name, each in found.items()}
    loss = -found["log_probs"].sum() / (learned.sum().clamp(min=1) if items is None else items)
    return _output()(loss=loss, label_mask=learned, **placed)


def may_overwrite(logits: Tensor) -> bool:
    """Whether the probabilities may take the place of the logits: of a plain head in fp32, no backward reads them."""
    node = logits.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return node is not None and node.name() in _PRODUCTS and logits.dtype in (torch.float32, torch.float64)


_FIELDS: Final = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class _Scores(torch.autograd.Function):
    """Computes the log-probability of each label, with gradient, and the statistics that TRL logs."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, overwrite: bool) -> tuple[Tensor, ...]:
        """Return the tensors (n,) named in `_FIELDS`, in fp32 or wider, for logits (n, vocabulary), labels (n,).

        With ``overwrite``, the probabilities take the place of the logits, which are the largest tensor of a step.
        """
        count, size = logits.shape
        dtype = torch.promote_types(logits.dtype, torch.float32)
        found = [torch.empty(count, dtype=dtype) for _ in _FIELDS[:-1]]
        found.append(torch.empty(count, dtype=torch.bool))
        rows = max(1, _AT_ONCE // size)
        more = count if ctx.needs_input_grad[0] else min(rows, count)
        kept = logits.detach() if overwrite else torch.empty((more, size), dtype=dtype)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            z, own = logits[part].to(dtype, copy=overwrite), labels[part]
            p = kept[part if ctx.needs_input_grad[0] else slice(len(z))]
            greatest, best = z.max(-1)
            torch.exp(torch.sub(z, greatest[:, None], out=p), out=p)
            total = p.sum(-1)
            p.div_(total[:, None])
            log_z = total.log_().add_(greatest)
            found[0][part] = z.gather(-1, own[:, None])[:, 0] - log_z
            found[1][part] = log_z - torch.linalg.vecdot(p, z)
            found[2][part] = torch.linalg.vecdot(p, p).log_()
            found[3][part] = z.mean(-1)
            found[4][part] = best == own
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(kept, labels)
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(*found[1:])
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the logits, ``grad`` · (one-hot label − p), which overwrites p."""
        p, labels = ctx.saved_tensors
        p.mul_(-grad[:, None]).scatter_add_(1, labels[:, None], grad[:, None])
        return p.to(ctx.dtype), None, None
