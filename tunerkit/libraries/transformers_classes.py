"""Classes of transformers that core treats in a way of their own, by qualified name: core never imports them."""

from torch import Tensor, nn

from tunerkit.libraries.accelerate import forward_name
from tunerkit.libraries.torch_private import own_parameters

CONV1D = "transformers.pytorch_utils.Conv1D"
FALCON_LINEAR = "transformers.models.falcon.modeling_falcon.FalconLinear"
TRAINER = "transformers.trainer.Trainer"


def derives_from(candidate: object, name: str) -> bool:
    """Whether the class of ``candidate`` is the one of that qualified name, or derives from it."""
    return any(f"{cls.__module__}.{cls.__qualname__}" == name for cls in type(candidate).__mro__)


def is_scaled_embedding(module: nn.Module) -> bool:
    """Whether this is one of the twenty-odd classes whose forward is ``super().forward(ids) * self.embed_scale``.

    A further parameter means a further row that the forward puts in (T5Gemma2's end-of-image token): not ours.
    """
    match module:
        case nn.Embedding(embed_scale=float() | int() | Tensor()):
            name = forward_name(module)
            named = name.startswith("transformers.") and name.endswith("ScaledWordEmbedding")
            return named and list(own_parameters(module)) == ["weight"]
    return False
