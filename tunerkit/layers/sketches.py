"""Approximations of matrices that are too large to keep, from sums over the data: inputs' second moment, gradient."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tunerkit.layers.base import BaseLayer
from tunerkit.layers.fused import autocast_off
from tunerkit.records import Factors, Statistics, StatisticsRequest

# The inputs' sketch and the second one of a gradient have this many times the rows that are asked for. Without that, a
# Nyström approximation has no bound on its error, and the gradient's system is badly conditioned.
_OVERSAMPLING = 2
_NOISE = 1e-7  # of the largest eigenvalue: what sums of fp32 products leave where there is nothing


class Sketch:
    """What is summed up at one target.

    Nothing here needs the input as a matrix: `BaseLayer.project_in` and its derivative are enough, so each kind of base
    layer works. With C = Σ x xᵀ and a random Ω (k, in), Y = Ω C is the derivative of Σ ⟨Q x, Ω x⟩ by Q. With G, the
    gradient by W, G Ωᵀ is the derivative of the loss by a P that is 0 beside Q = Ω, and Ψᵀ G that by a Q that is 0
    beside P = Ψ. All three are sums over the data. Sources: Nyström approximation; Tropp et al., "Practical sketching
    algorithms for low-rank matrix approximation" (2017), Algorithm 4.

    Args:
        base: The base layer.
        request: What to measure.
        generator: Draws Ω and Ψ, on the CPU.

    Attributes:
        counting: Whether calls are counted. Set it to False for a backward pass: a model that checkpoints activations
            calls the layer again there.
    """

    def __init__(self, base: BaseLayer, request: StatisticsRequest, generator: torch.Generator) -> None:
        self.base = base
        self.rows = 0
        self.counting = True
        device = base.dense().device
        out, into = base.out_features, base.in_features

        def drawn(rows: int, columns: int) -> Tensor:
            random = torch.randn(columns, min(rows, columns), generator=generator, dtype=torch.float64)
            basis: Tensor = torch.linalg.qr(random).Q
            return basis.T.float().contiguous().to(device)

        self._rank = request.inputs
        self._inputs = drawn(_OVERSAMPLING * request.inputs, into) if request.inputs else None
        self._moment = None if self._inputs is None else torch.zeros_like(self._inputs, dtype=torch.float64)
        self._omega = drawn(request.gradients, into) if request.gradients else None
        self._psi = drawn(_OVERSAMPLING * request.gradients, out).T.contiguous() if request.gradients else None
        # The probes: their gradients are the sums.
        self.p = nn.Parameter(torch.zeros(out, len(self._omega), device=device)) if self._omega is not None else None
        self.q = nn.Parameter(torch.zeros(self._psi.shape[1], into, device=device)) if self._psi is not None else None

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add one call of the layer to the sums: a forward hook. It returns the output with the probes, which add 0."""
        x = args[0] if args else next(iter(kwargs.values()))
        wide = x.float() if x.is_floating_point() else x
        if self.counting:
            self.rows += output.numel() // self.base.out_features
        with autocast_off(output.device):
            if self.counting and self._inputs is not None and self._moment is not None:
                self._add_inputs(wide.detach(), self._inputs, self._moment)
            if self.p is not None and self.q is not None and self._omega is not None and self._psi is not None:
                probes = self.base.project_out(self.base.project_in(wide, self._omega), self.p)
                probes = probes + self.base.project_out(self.base.project_in(wide, self.q), self._psi)
                output = output + probes.to(output.dtype)
        return output

    def _add_inputs(self, x: Tensor, omega: Tensor, moment: Tensor) -> None:
        # Inside a checkpoint, saved tensors would be dropped, and computed again with another call of the layer.
        kept = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        with torch.enable_grad(), kept:
            q = omega.clone().requires_grad_()
            h = self.base.project_in(x, q)
            (found,) = torch.autograd.grad(h, q, grad_outputs=h.detach())
        moment += found

    def is_finite(self) -> bool:
        """Return whether the sums are free of NaN and inf."""
        sums = (self._moment, *(probe.grad for probe in (self.p, self.q) if probe is not None))
        return all(bool(each.isfinite().all()) for each in sums if each is not None)

    def statistics(self) -> Statistics:
        """Return the approximations, in fp32. The sums must be finite."""
        inputs = None
        if self._inputs is not None and self._moment is not None:
            inputs = _root(self._inputs.double(), self._moment)[: self._rank]
        gradients = None
        if self.p is not None and self.q is not None and self._psi is not None:
            gradients = _product(self.p, self.q, self._psi)
        return Statistics(rows=self.rows, inputs=inputs, gradients=gradients)


def _root(omega: Tensor, moment: Tensor) -> Tensor:
    """S with Sᵀ S = Yᵀ (Ω Yᵀ)⁺ Y, for Y = Ω C; its rows are orthogonal, the longest first."""
    core = moment @ omega.T
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = values > _NOISE * values[-1].clamp(min=0)
    scaled = torch.where(kept, values.clamp(min=1e-300).rsqrt(), 0.0)
    _, sigma, directions = torch.linalg.svd(scaled[:, None] * (vectors.T @ moment), full_matrices=False)
    root: Tensor = sigma[:, None] * directions
    return root.float().contiguous()


def _product(p: nn.Parameter, q: nn.Parameter, psi: Tensor) -> Factors:
    """P (out, k) and Q (k, in) with P Q = U (Ψᵀ U)⁺ Z, where U is an orthonormal basis of G Ωᵀ and Z = Ψᵀ G."""
    zeros = [torch.zeros_like(each) if each.grad is None else each.grad for each in (p, q)]
    basis = torch.linalg.qr(zeros[0].double()).Q
    q_small = torch.linalg.pinv(psi.double().T @ basis) @ zeros[1].double()
    return Factors(q=q_small.float(), p=basis.float())
