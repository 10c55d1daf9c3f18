"""LoRA's starts that PEFT takes out of the base weight: PiSSA's and OLoRA's, computed again from the base.

PEFT keeps W − scale · B₀ A₀ as the base, and saves A and B alone. So ΔW = scale · (B A − B₀ A₀).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from tunerkit.errors import first, shown
from tunerkit.plugin import Factors, FileError

STARTS: Final = ("pissa", "olora")
_FULL: Final = (torch.float32, torch.float64)
_AWAY: Final = " has no weights"


class NeedsWeightsError(FileError, NotImplementedError):
    """The base's values are needed, and it is on the meta device.

    It derives from the class of torch's own error for that: where the command meets one, it loads the base's values.
    """


def start_of(kind: str, module: nn.Module, rank: int, scale: float) -> Factors:
    """Return A₀ (r, in) and B₀ (out, r), of a module that `refuse_bases` has accepted. An embedding's are zeros."""
    held: Any = module.weight
    weight: Tensor = held.detach().to(torch.float32)  # on its device, which may be much faster
    if isinstance(module, nn.Embedding):  # which PEFT starts as without PiSSA
        return Factors(q=torch.zeros(rank, len(weight)), p=torch.zeros(weight.shape[1], rank))
    if kind == "olora":
        q, r = torch.linalg.qr(weight)
        return Factors(q=r[:rank].cpu(), p=q[:, :rank].cpu())
    if not isinstance(module, nn.Linear):  # Conv1D holds its transpose
        weight = weight.T
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (sigma[:rank] / scale).sqrt()
    return Factors(q=(root[:, None] * vh[:rank]).cpu(), p=(u[:, :rank] * root).cpu())


def refuse_bases(kind: str, source: object, modules: Mapping[str, nn.Module], paths: Sequence[str]) -> None:
    """Raise `FileError` if the start cannot be computed again from the weights that the model holds."""
    if wrong := [*_obstacles(kind, modules, paths)]:
        title = (
            f"{source}: 'init_lora_weights' is {shown(kind)}, so PEFT has subtracted a part of the base's weights, and "
            "that is computed again from a base in full precision. Load the base with its weights, in float32, as in "
            "from_pretrained(..., dtype=torch.float32), and the adapter onto that with tunerkit.load(model, folder): "
            "tunerkit.from_folder leaves a base in the dtype that it is stored in. Or convert the adapter in PEFT: "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...). Here:"
        )
        is_away = any(each.endswith(_AWAY) for each in wrong)
        raise (NeedsWeightsError if is_away else FileError)("\n- ".join([title, *first(wrong)]))


def _obstacles(kind: str, modules: Mapping[str, nn.Module], paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        module = modules.get(path)
        if module is None:
            continue  # as core will say
        weight = getattr(module, "weight", None)
        transposes = type(module).__name__ == "Conv1D"
        if not (isinstance(module, nn.Linear | nn.Embedding) or (transposes and kind == "pissa")):
            yield f"{path} is a {type(module).__name__}, for which PEFT has no such start"
        elif not isinstance(weight, Tensor) or type(weight.detach()) is not Tensor or not weight.is_floating_point():
            yield f"{path} is quantised"
        elif weight.is_meta:
            yield f"{path}{_AWAY}"
        elif weight.dtype not in _FULL:
            yield f"{path} is in {str(weight.dtype).removeprefix('torch.')}"
