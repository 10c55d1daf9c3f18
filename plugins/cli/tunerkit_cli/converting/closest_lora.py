"""Make the closest LoRA of an adapter of any method: at each target, the largest singular values of what it adds."""

import math
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

import tunerkit
from tunerkit import TunerkitError, hooks, serialization
from tunerkit.injection import slots_of
from tunerkit.plugin import Factors, Foreign, Format, Tuner, biases_of, copies_of, factors_of
from tunerkit_cli.converting.opening import load_adapter, open_adapter
from tunerkit_transformers.bases import Base, skeleton, whole

LORA = "lora"


@attrs.frozen(eq=False)
class Closest:
    """A LoRA's products and biases, and what it leaves out, ‖ΔW − P Q‖_F / ‖ΔW‖_F: of all, and by target."""

    products: Mapping[str, Factors]
    biases: Mapping[str, Tensor]
    error: float
    errors: Mapping[str, float]  # the largest first


def open_closest(source: str, rank: int, *, base: str | None, task: str | None) -> tuple[Tuner, Base, Closest]:
    """Open the closest LoRA of an adapter over its base, whose weights are only read if the method needs them."""
    tuner, chosen = open_adapter(source, base=base, task=task)
    adapts = hooks.registry.get(tuner.method).targets
    if adapts != "weights" or not hooks.has_delta(tuner.method):
        raise TunerkitError(
            f"method {tuner.method!r} adapts {'modules that have no weight' if adapts == 'weights' else adapts}, and a "
            "LoRA weights of layers; merge it instead: tunerkit merge"
        )
    is_empty = any(parameter.is_meta for parameter in tuner.model.parameters())
    if is_empty and any(each.reads_weight is not False for each in tuner.adapters().values()):
        tuner = tunerkit.tuner(load_adapter(whole(chosen, dtype="auto"), source, chosen))
    found, copies = closest(tuner, rank), copies_of(tuner)
    bare, foreign = skeleton(chosen), Foreign(found.products, LORA, copies=copies, biases=found.biases)
    only_read = Format(LORA, sniff=lambda path: True, read=lambda path, model: foreign, write=lambda *_: ())
    serialization.open_unloaded(bare, source, format=only_read)
    return tunerkit.tuner(bare), chosen, found


@torch.no_grad()
def closest(tuner: Tuner, rank: int) -> Closest:
    """The closest products of a rank to what an adapter adds: its largest singular triplets (Eckart and Young)."""
    low = factors_of(tuner) if hooks.adds_products(tuner.method) else {}
    products, biases, left_out, sizes = {}, biases_of(tuner), {}, {}
    for path, adapter in tuner.adapters().items():
        slots = slots_of(tuner.model.get_submodule(path))
        assert slots is not None
        assert slots.base is not None
        if path in low:
            u, s, vh = low[path].triplets()
        else:
            delta = hooks.delta(path, tuner.method, adapter, slots.base)
            if delta.bias is not None:
                own = biases.get(path)
                own = slots.base.bias() if own is None else own
                assert own is not None
                biases[path] = own.detach().cpu() + delta.bias.detach().cpu()
            weight = torch.zeros(1, 1) if delta.weight is None else delta.weight.detach().cpu().float()
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        kept = torch.atleast_2d(s[..., :rank] > 0).any(dim=0).nonzero().flatten()  # by one expert of a stack, or more
        root, q, p = s[..., kept].sqrt(), vh[..., kept, :], u[..., kept]
        products[path] = Factors(q=(root[..., None] * q).float(), p=(p * root[..., None, :]).float())
        sizes[path], left_out[path] = float(s.double().norm()), float(s[..., rank:].double().norm())
    errors = {path: gap / sizes[path] if sizes[path] > 0 else 0.0 for path, gap in left_out.items()}
    error = math.hypot(*left_out.values()) / (math.hypot(*sizes.values()) or 1.0)
    return Closest(products, biases, error, dict(sorted(errors.items(), key=lambda item: -item[1])))
