"""Build a base model from its folder or its name on the hub: only its shapes, or with its weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from tunerkit.errors import TunerkitError, shown
from tunerkit_transformers.pretrained import LOADING, OWN_CODE, ModelError, closest_folder, is_path, reason_of, tried
from tunerkit_transformers.run_folder import irregular

_PASS = "pass the folder of the model, or its name on the hub (org/name), with --base"


@attrs.frozen
class Base:
    """A base model, and the class that builds it.

    Attributes:
        source: A folder, or a name on the hub.
        kind: The name of a class of transformers, such as ``"AutoModelForCausalLM"``; for a folder of diffusers, of one
            of its classes.
        labels: The number of classes of a head; 0 for the folder's own.
        revision: The commit, branch or tag of the hub.
        seed: The seed of modules that the weights' files lack.
    """

    source: str
    kind: str
    labels: int = 0
    revision: str | None = None
    seed: int = 0


def skeleton(base: Base) -> nn.Module:
    """Return the model on the meta device: names, types and shapes, without reading a weight.

    Raises:
        ModelError: There is no such folder, or no such model can be built from its config.
    """
    with refusing(base), torch.random.fork_rng(devices=[]), torch.device("meta"):
        kind = _class_of(base)
        if diffusers_class(base.source):
            return _module(kind.from_config(kind.load_config(base.source)))
        config = config_of(base.source, base.revision, **_labels(base))
        is_auto = base.kind.startswith("Auto")
        return _module(kind.from_config(config, **OWN_CODE) if is_auto else kind(config))


def whole(base: Base, *, dtype: torch.dtype | str = torch.float32) -> nn.Module:
    """Return the model with its weights on the CPU, in eval mode.

    Args:
        base: The model.
        dtype: The dtype of the weights; ``"auto"`` keeps the files' own.

    Raises:
        ModelError: There is no such folder, or its weights cannot be loaded.
    """
    # Modules that the files lack are drawn from the seed, not from the caller's random state.
    with refusing(base), torch.random.fork_rng(devices=[]):
        torch.manual_seed(base.seed)
        kind = _class_of(base)
        if diffusers_class(base.source):
            plain = {} if dtype == "auto" else {"torch_dtype": dtype}
            return _module(kind.from_pretrained(base.source, **plain)).eval()
        head = {**_labels(base), "ignore_mismatched_sizes": True} if base.labels else {}
        revised = {} if base.revision is None else {"revision": base.revision}
        return _module(kind.from_pretrained(base.source, dtype=dtype, **OWN_CODE, **revised, **head)).eval()


def config_of(source: str, revision: str | None = None, **settings: Any) -> Any:
    """Return transformers' config of a model, with some settings replaced."""
    import transformers

    revised = {} if revision is None else {"revision": revision}
    return transformers.AutoConfig.from_pretrained(source, **OWN_CODE, **revised, **settings)


def diffusers_class(source: str) -> str:
    """Return the diffusers class named in a folder's config; "" if it is not a folder of diffusers."""
    try:
        found = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    name = found.get("_class_name") if isinstance(found, dict) else None
    return name if isinstance(name, str) else ""


def refuse_other_type(source: str, base: str) -> None:
    """Raise `ModelError` if two folders have models of different types, which transformers would load without error."""
    types = []
    for each in (source, base):
        with refusing(Base(each, "")):
            types.append(diffusers_class(each) or config_of(each).model_type)
    if types[0] != types[1]:
        raise ModelError(
            f"{source} is a model of type {types[0]}, and the base, {base}, of type {types[1]}; pass the model that "
            "the adapter was merged into"
        )


def refuse_missing(source: str, revision: str | None = None) -> None:
    """Raise `ModelError` if ``source`` is not a folder with a model and cannot be a name on the hub."""
    folder = Path(source).expanduser()
    if not source or "\0" in source:
        raise ModelError(f"expected the folder of a base model, got {shown(source)}; {_PASS}")
    if not folder.exists() and is_path(source, revision):
        hint = closest_folder(source)
        raise ModelError(f"{source}: there is no such folder{hint}{' P' if hint else '; p'}{_PASS[1:]}")
    if folder.exists() and not folder.is_dir():
        what = irregular(folder) or "a file"
        raise ModelError(f"{source} is {what}; pass the folder that has config.json and the weights, with --base")
    if (folder / "model_index.json").is_file():
        raise ModelError(
            f"{source} is the folder of a whole pipeline; pass the folder of the adapted part, such as "
            f"{folder / 'unet'}, with --base"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{source}: the folder has no config.json, so it holds no model; {_PASS}")


@contextmanager
def refusing(base: Base) -> Iterator[None]:
    """Inside the block, convert a library's error about a base model to a `ModelError` that names the model."""
    refuse_missing(base.source, base.revision)
    try:
        yield
    except TunerkitError:
        raise
    except LOADING as problem:
        kind = f" as {base.kind}" if base.kind else ""
        raise ModelError(
            f"cannot load {base.source!r}{kind}{tried(base.source)}: {reason_of(problem)}; pass the folder of the "
            "adapter's base model with --base"
        ) from problem


def _class_of(base: Base) -> Any:
    import transformers

    if name := diffusers_class(base.source):
        import diffusers

        return getattr(diffusers, name)
    return getattr(transformers, base.kind)


def _labels(base: Base) -> dict[str, int]:
    return {"num_labels": base.labels} if base.labels else {}


def _module(found: Any) -> nn.Module:
    if not isinstance(found, nn.Module):
        raise TypeError(f"its class builds a {type(found).__name__}, not a torch module")
    return found
