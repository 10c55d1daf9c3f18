"""The parts of a pipeline that a file may adapt, and which of them a model is."""

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from torch import nn

from tunerkit.plugin import BaseMismatchError, ConfigError, FileError

TEXT_ENCODERS: Final = ("text_encoder", "text_encoder_2")
COMPONENTS: Final = ("unet", "transformer", *TEXT_ENCODERS)


def components_of(model: nn.Module) -> tuple[str, ...]:
    """Return what a model may be in a pipeline, by its class; nothing for an unknown class."""
    for kind in type(model).__mro__:
        name = kind.__name__
        if name == "CLIPTextModel":
            return ("text_encoder",)
        if name == "CLIPTextModelWithProjection":
            return TEXT_ENCODERS  # the only one of Stable Diffusion 3's, the second of Stable Diffusion XL's
        if kind.__module__.startswith("diffusers."):
            if "UNet" in name:
                return ("unet",)
            if "Transformer" in name:
                return ("transformer",)
    return ()


def component_to_write(model: nn.Module, asked: str, allowed: Iterable[str]) -> str:
    """Return the part of the pipeline that a file is to name.

    Args:
        model: The wrapped model.
        asked: The user's option.
        allowed: What the user may pass instead of ``"auto"``.

    Raises:
        ConfigError: It is ``"auto"`` and the model's class does not tell.
    """
    if asked != "auto":
        return asked
    found = components_of(model)
    if len(found) == 1:
        return found[0]
    may = " or ".join(map(repr, found or allowed))
    raise ConfigError(
        [f"cannot tell which part of a pipeline this {type(model).__name__} is; pass component={may} @ $.component"]
    )


def component_to_read(
    groups: Mapping[str, Collection[str]], model: nn.Module, known: Collection[str], file: object
) -> str:
    """Return the part of the pipeline in a file that a model is.

    Args:
        groups: The names of the adapted modules in the file, by part; ``""`` stands for names without a part.
        model: The model.
        known: The names of the model's own modules, as the file would spell them.
        file: The file, for messages.

    Raises:
        BaseMismatchError: The file adapts other parts only.
        FileError: The file adapts several parts, and the model may be more than one of them.
    """
    refuse_mixed(groups, file)
    may = components_of(model) or COMPONENTS
    fitting = [part for part in groups if part in ("", *may)]
    if not fitting:
        raise BaseMismatchError(
            f"{file} adapts {' and '.join(map(repr, groups))} of a pipeline, and this {type(model).__name__} is "
            f"{' or '.join(map(repr, may))}; load it onto that part, such as pipeline.{next(iter(groups))}"
        )
    if len(fitting) > 1:
        fitting = [part for part in fitting if set(groups[part]) <= set(known)] or fitting
    if len(fitting) > 1:
        parts = " and ".join(map(repr, fitting))
        raise FileError(
            f"{file} adapts {parts}, and this {type(model).__name__} may be either; keep the tensors of one of them in "
            "the file"
        )
    return fitting[0]


def refuse_mixed(groups: Mapping[str, Collection[str]], file: object) -> None:
    """Raise `FileError` if some names in a file begin with a part of the pipeline and others do not."""
    if "" in groups and len(groups) > 1:
        raise FileError(
            f"{file}: {next(iter(groups['']))!r} begins with no part of a pipeline, and other names in the file do; "
            f"expected names that begin with one of {', '.join(COMPONENTS)}"
        )


def is_flattened_text_model(model: nn.Module) -> bool:
    """Check whether a text encoder lacks the level ``text_model``, which its names in every file have.

    transformers 5 removed that level from ``CLIPTextModel``. diffusers removes it from the names when it loads them.
    """
    names = (kind.__name__ for kind in type(model).__mro__)
    return "CLIPTextModel" in names and "text_model" not in dict(model.named_children())
