"""Statistics of the data at an adapter's targets, in bounded memory: the inputs' second moment and the gradient."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tunerkit.plugin import AdapterError, BaseLayer, Factors, Statistics, StatisticsRequest, Tuner, autocast_off

Loss: TypeAlias = Callable[[Any, Any], Tensor]
# A sketch has this many times the rows that are asked for. Without that, a Nyström approximation has no bound on its
# error, and the gradient's system is badly conditioned.
_OVERSAMPLING = 2
_NOISE = 1e-7  # of the largest eigenvalue: what sums of fp32 products leave where there is nothing


def measure(
    tuner: Tuner, request: StatisticsRequest, bases: Mapping[str, BaseLayer], batches: Iterable[Any], loss: Loss | None
) -> tuple[dict[str, Statistics], int]:
    """Measure the data at each target, on batches that are one call of a model in eval mode each.

    Return the statistics by target path, and the number of batches.
    """
    sketches = _sketches(tuner, request, bases)
    handles = [each.base.module.register_forward_hook(each.hook, with_kwargs=True) for each in sketches.values()]
    count = 0
    try:
        for batch in batches:
            count += 1
            if request.gradients:
                _add_gradients_(list(sketches.values()), loss_of(tuner.model, batch, loss))
            else:
                with torch.no_grad():
                    _run(tuner.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise AdapterError("there is no batch to calibrate on: batches is empty, or an iterator that is used up")
    if idle := [path for path, sketch in sketches.items() if not sketch.rows]:
        raise AdapterError(
            f"{len(idle)} targets never ran on these batches: {_few(idle)}; give batches that use them, or "
            "exclude them from the targets"
        )
    if wrong := [path for path, sketch in sketches.items() if not sketch.is_finite()]:
        raise AdapterError(
            f"the statistics at {_few(wrong)} contain NaN or inf, so the model's activations or gradients do; "
            "check the batches, or load the model in float32 or bfloat16"
        )
    return {path: sketch.statistics() for path, sketch in sketches.items()}, count


def _few(paths: list[str]) -> str:
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def _sketches(tuner: Tuner, request: StatisticsRequest, bases: Mapping[str, BaseLayer]) -> "dict[str, _Sketch]":
    found: dict[str, _Sketch] = {}
    for target in tuner.targets:
        base = bases.get(target.path)
        if base is None or base.lends or not base.has_weight:
            raise AdapterError(
                f"the inputs of {target.path!r} cannot be seen: its {type(target.module).__name__} is not called with "
                "them; exclude it from the targets"
            )
        found[target.path] = _Sketch(base, request, seed=len(found))
    return found


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """Run a model on a batch and return the loss. Raises `AdapterError` if there is none, or it is not finite."""
    output = _run(model, batch)
    value = loss(output, batch) if loss is not None else getattr(output, "loss", output)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise AdapterError(
            f"the method wants gradients, and the model returned {type(value).__name__} instead of a loss; add labels "
            "to the batches, or pass loss=..., a function of the output and the batch"
        )
    if not bool(value.isfinite()):
        raise AdapterError(f"the loss of a batch is {value.item()}; check the batches")
    return value


class _Sketch:
    """The sums over the data at one target, in memory that depends on the rank alone.

    Four sums are taken. Each is a derivative through `BaseLayer.project_in` and `project_out`, so every kind of base
    layer works, and no input is needed as a matrix. Ω and Ψ are random.

    - Ω C (2k, in), with C = Σ x xᵀ: the derivative of Σ ⟨Q x, Ω x⟩ by Q. It gives a Nyström approximation of C.
    - Σ x (in,): the derivative of Σ ⟨1, q x⟩ by q. Without n times the outer product of the mean, C is centred.
    - G Ωᵀ (out, k), with G the gradient by W: the derivative of the loss by P = 0, if P Ω x is added to the output.
    - Ψᵀ G (2k, in): the derivative of the loss by Q = 0, if Ψ Q x is added. With G Ωᵀ it gives an approximation of G:
      Tropp et al., "Practical sketching algorithms for low-rank matrix approximation" (2017), Algorithm 4.
    """

    def __init__(self, base: BaseLayer, request: StatisticsRequest, seed: int) -> None:
        self.base, self.request = base, request
        self.rows, self.counting = 0, True
        # Each target has random matrices of its own, the same in each run.
        generator = torch.Generator().manual_seed(seed)
        device = base.dense().device

        def drawn(rows: int, columns: int) -> Tensor:
            random = torch.randn(columns, min(rows, columns), generator=generator, dtype=torch.float64)
            basis: Tensor = torch.linalg.qr(random).Q
            return basis.T.float().contiguous().to(device)

        out, into = base.out_features, base.in_features
        self.inputs = drawn(_OVERSAMPLING * request.inputs, into)
        self.moment = torch.zeros_like(self.inputs, dtype=torch.float64)
        self.total = torch.zeros(1, into, device=device, dtype=torch.float64)  # Σ x
        self.squares = torch.zeros((), device=device, dtype=torch.float64)  # Σ ‖x‖²
        self.omega = drawn(request.gradients, into)  # Ω (k, in)
        self.psi = drawn(_OVERSAMPLING * request.gradients, out).T.contiguous()  # Ψ (out, 2k)
        self.p = torch.zeros(out, len(self.omega), device=device, requires_grad=True)
        self.q = torch.zeros(self.psi.shape[1], into, device=device, requires_grad=True)
        self.by_p, self.by_q = torch.zeros_like(self.p), torch.zeros_like(self.q)  # G Ωᵀ and Ψᵀ G

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Count one call of the layer, and add the probes P and Q, which are 0, to its output: a forward hook."""
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        x = x.float() if x.is_floating_point() else x
        with autocast_off(output.device):
            if self.counting:
                if self.request.inputs:
                    self._add_inputs_(x.detach())
                else:
                    self.rows += output.numel() // self.base.out_features
            if self.request.gradients:
                probes = self.base.project_out(self.base.project_in(x, self.omega), self.p)
                probes = probes + self.base.project_out(self.base.project_in(x, self.q), self.psi)
                output = output + probes.to(output.dtype)
        return output

    def _add_inputs_(self, x: Tensor) -> None:
        # Inside a checkpoint, saved tensors would be dropped, and computed again with another call of the layer.
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            q = self.inputs.clone().requires_grad_()
            h = self.base.project_in(x, q)
            (found,) = torch.autograd.grad(h, q, grad_outputs=h.detach())
            one = torch.ones_like(self.total, dtype=q.dtype).requires_grad_()
            each = self.base.project_in(x, one)
            (total,) = torch.autograd.grad(each, one, grad_outputs=torch.ones_like(each))
        self.rows += each.numel()  # a grouped convolution has one for each group
        self.moment += found
        self.total += total
        # A squared patch is the patch of squares; an id stands for a row with a single 1.
        self.squares += self.base.project_in(x * x if x.is_floating_point() else x, one.detach()).double().sum()

    def is_finite(self) -> bool:
        sums = (self.moment, self.total, self.squares, self.by_p, self.by_q)
        return all(bool(each.isfinite().all()) for each in sums)

    def statistics(self) -> Statistics:
        """Return the approximations, in fp32. The sums must be finite."""
        gradients = _product(self.by_p, self.by_q, self.psi) if self.request.gradients else None
        if not self.request.inputs:
            return Statistics(rows=self.rows, inputs=None, gradients=gradients)
        omega, mean = self.inputs.double(), self.total / self.rows
        centred = self.moment - (omega @ mean.T) @ self.total
        return Statistics(
            rows=self.rows,
            inputs=_root(omega, self.moment)[: self.request.inputs],
            gradients=gradients,
            centred=_root(omega, centred, float(self.squares))[: self.request.inputs],
            variance=float((self.squares - self.total @ mean.T).clamp(min=0)),
        )


def _add_gradients_(sketches: list[_Sketch], loss: Tensor) -> None:
    """Run a backward pass. A model that checkpoints activations calls its layers again there, which does not count."""
    for each in sketches:
        each.counting = False
    found = torch.autograd.grad(loss, [probe for each in sketches for probe in (each.p, each.q)], allow_unused=True)
    for each, by_p, by_q in zip(sketches, found[::2], found[1::2], strict=True):
        if by_p is not None:  # the target ran
            each.by_p += by_p
            each.by_q += by_q
        each.counting = True


def _root(omega: Tensor, moment: Tensor, total: float = 0.0) -> Tensor:
    """S with Sᵀ S = Yᵀ (Ω Yᵀ)⁺ Y, for Y = Ω C; its rows are orthogonal, the longest first.

    ``total`` is what C is a difference of: where the two cancel, rounding is left.
    """
    core = moment @ omega.T
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = values > _NOISE * torch.clamp(values[-1], min=10 * total)
    scaled = torch.where(kept, values.clamp(min=1e-300).rsqrt(), 0.0)
    _, sigma, directions = torch.linalg.svd(scaled[:, None] * (vectors.T @ moment), full_matrices=False)
    root: Tensor = sigma[:, None] * directions
    return root.float().contiguous()


def _product(by_p: Tensor, by_q: Tensor, psi: Tensor) -> Factors:
    """P (out, k) and Q (k, in) with P Q = U (Ψᵀ U)⁺ Z, where U is an orthonormal basis of G Ωᵀ and Z = Ψᵀ G."""
    basis = torch.linalg.qr(by_p.double()).Q
    q = torch.linalg.pinv(psi.double().T @ basis) @ by_q.double()
    return Factors(q=q.float(), p=basis.float())
