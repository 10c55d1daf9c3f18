"""Base models of transformers and their processors, loaded by task: from a folder, or by a name of the hub."""

import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Final

import attrs
from safetensors import SafetensorError

from tunerkit.errors import TunerkitError, closest, cut, shown
from tunerkit_transformers.run_folder import irregular
from tunerkit_transformers.task_classes import CAUSAL, EMBEDDING, TASKS, TEXT, TaskClasses

if TYPE_CHECKING:  # torch is imported where a model is loaded: what a task is, and that a folder is missing, needs none
    import torch

# Without it, transformers asks at the terminal whether to run the code that a folder or the hub brings along.
OWN_CODE: Final[Mapping[str, Any]] = {"trust_remote_code": False}
_TIMM: Final = "timm_wrapper"  # the model type of timm's models in transformers
_CLOSE = 0.6  # how alike a mistyped name is to the right one, as difflib measures it


class ModelError(TunerkitError):
    """A base model or its processor cannot be loaded for a task."""


@attrs.frozen(eq=False)
class Pretrained:
    """A base model with its processor.

    Attributes:
        model: The model.
        processor: Its tokenizer or image processor.
        source: The requested folder or hub name.
        revision: The loaded commit of the hub; None for a folder.
        heads: The paths of a classifier's head that the checkpoint contains. It may be for other classes, so name it in
            ``train_modules``. Empty for a new head, which `tunerkit.wrap` finds, and for language models.
        quantisation: The quantization at loading, one of `QUANTISATIONS`; None without quantization.
    """

    model: Any
    processor: Any
    source: str
    revision: str | None
    heads: tuple[str, ...]
    quantisation: str | None = None


def classes_of(task: str) -> TaskClasses:
    """Return the classes of a task. Raises `ModelError` with the closest name if there is no such task."""
    if task not in TASKS:
        raise ModelError(f"there is no task {task!r}{closest(task, TASKS)}; the tasks are {', '.join(TASKS)}")
    return TASKS[task]


def load_pretrained(
    task: str,
    source: str,
    *,
    labels: Sequence[str] = (),
    ordered: bool = True,
    revision: str | None = None,
    dtype: "torch.dtype | str" = "float32",
    seed: int = 0,
    processor_from: str | Path | None = None,
    quantisation: str | None = None,
    attn_implementation: str | None = None,
) -> Pretrained:
    """Load a base model for a task, with a head for ``labels`` that ``seed`` initializes if it is new.

    Args:
        task: One of `TASKS`.
        source: A local folder, or a name on the hub.
        labels: The names of the classes, in the order of the logits; none for language models.
        ordered: Whether the classes must have this order. If not, a checkpoint with the same classes keeps the order
            for which its head was trained.
        revision: The commit, branch or tag of the hub.
        dtype: The dtype of the base's weights; ``"auto"`` keeps the checkpoint's.
        seed: The seed of new modules.
        processor_from: The folder of the processor, if it is not the model's.
        quantisation: How to quantize the model as it is loaded, see `quantising`; None loads it as it is.
        attn_implementation: How it computes attention; None lets transformers choose.

    Raises:
        QuantisationError: The quantization is unknown, or bitsandbytes is not installed.
        ModelError: There is no such folder, the model is of another kind, or transformers cannot load it.
    """
    import torch

    from tunerkit_transformers.quantising import pack_stacks_, quantising

    task_classes = classes_of(task)
    refuse_missing(source, revision)
    version = {} if revision is None else {"revision": revision}
    config = _config_of(source, version)
    check_kind(task, source, config)
    if not ordered:
        labels = _in_order_of(config, labels)
    # Without it, RoBERTa's tokenizer takes a word that stands alone for the middle of another one.
    whole = {"add_prefix_space": True} if task == "token-classification" else {}
    if processor_from is None or config.model_type == _TIMM:  # saving timm's writes nothing: the model's config has it
        processor = _load_processor(task_classes, source, {**version, **whole})
    else:
        processor = _load_processor(task_classes, processor_from, whole)
    classifies = bool(labels) or task_classes.problem is not None
    packed = {}
    if quantisation is not None:
        packed = quantising(quantisation, dtype, _heads_of_class(task_classes, config) if classifies else ())
    settings = {"dtype": dtype, **OWN_CODE, **version, **packed, **_head_settings(task_classes, labels, config)}
    settings |= {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    # Modules that the checkpoint lacks are drawn from the seed, not from the caller's random state.
    with torch.random.fork_rng(devices=[]), _quietly() as transformers:
        torch.manual_seed(seed)
        model = _loading(
            f"{source!r} as {task_classes.what}",
            lambda: getattr(transformers, task_classes.model).from_pretrained(source, **settings),
        )
    if quantisation == "nf4":
        pack_stacks_(model)
    if task == EMBEDDING and _is_new(getattr(model, "pooler", None)):  # nothing reads it, so nothing would train it
        model.pooler = None
    if task_classes.problem is not None:
        model.config.problem_type = task_classes.problem
    if task_classes.processor == TEXT:
        _settle_padding(source, processor, model)
    heads = loaded_heads(model) if labels or task_classes.problem else ()
    return Pretrained(model, processor, source, _commit_of(source, revision), heads, quantisation)


def _is_new(module: Any) -> bool:
    """Whether ``from_pretrained`` found no weight of a module."""
    from tunerkit_transformers.transformers_private import is_loaded  # imports torch

    return module is not None and not any(map(is_loaded, module.parameters()))


def _load_processor(task_classes: TaskClasses, source: str | Path, settings: Mapping[str, Any]) -> Any:
    import transformers

    what = "image processor" if "Image" in task_classes.processor else "tokenizer"
    kind = getattr(transformers, task_classes.processor)
    processor = _loading(f"the {what} of {str(source)!r}", lambda: kind.from_pretrained(source, **OWN_CODE, **settings))
    if task_classes.processor == TEXT and set(processor.get_vocab()) <= set(processor.all_special_tokens):
        raise ModelError(  # transformers builds an empty tokenizer from the config alone
            f"{source}: the model has no tokenizer (there is no tokenizer.json, and no other vocabulary); save the "
            "tokenizer into the same folder"
        )
    return processor


def _head_settings(task_classes: TaskClasses, labels: Sequence[str], config: Any) -> dict[str, Any]:
    names = dict(enumerate(labels))
    settings: dict[str, Any] = {}
    if names:
        settings |= {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    if names and config.model_type == _TIMM:  # whose config would keep the checkpoint's number
        settings["num_labels"] = len(names)
    if names or task_classes.problem is not None:
        settings["ignore_mismatched_sizes"] = True  # a head for other classes is replaced by a new one
    if task_classes.problem == "regression":
        settings["num_labels"] = max(1, len(labels))
    return settings


def _in_order_of(config: Any, labels: Sequence[str]) -> Sequence[str]:
    """Return the labels in the checkpoint's order if it has the same classes, else unchanged."""
    own = [str(name) for _, name in sorted(config.id2label.items())]
    return own if sorted(own) == sorted(labels) else labels


def _settle_padding(source: str, tokenizer: Any, model: Any) -> None:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {source!r} has neither a padding nor an end token; add a pad_token")
        tokenizer.pad_token = tokenizer.eos_token  # decoders have none; padding is masked out anyway
    model.config.pad_token_id = tokenizer.pad_token_id


def check_kind(task: str, source: str, config: Any) -> None:
    """Raise `ModelError` if a model of this config cannot be trained for ``task``; the error lists possible tasks."""
    wanted = classes_of(task)
    if _fits(wanted, config):
        return
    what = (getattr(config, "architectures", None) or [type(config).__name__.removesuffix("Config")])[0]
    possible = [name for name, classes in TASKS.items() if _fits(classes, config)]
    instead = f"a model of this type is for {', '.join(possible)}" if possible else "no task is for this type of model"
    raise ModelError(
        f"{source!r} is a {what} (model type {config.model_type}), not {wanted.what}; {instead}: pass another --model "
        "or another --task"
    )


def _fits(classes: TaskClasses, config: Any) -> bool:
    """Whether transformers has a model of the task's class for this config; for generation, it must be a decoder."""
    import transformers

    if type(config) not in getattr(transformers, classes.mapping):
        return False
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder
    if classes is TASKS[EMBEDDING]:  # whose mapping has models of images too
        return not config.is_encoder_decoder and (encoder or _fits(TASKS["causal-lm"], config))
    # Each token of an encoder sees those after it; transformers loads one as a causal model all the same.
    return not (classes.mapping == CAUSAL and encoder and not config.to_dict().get("is_decoder"))


def _config_of(source: str, revised: Mapping[str, str]) -> Any:
    import transformers

    values, _ = _loading(
        f"the config of {source!r}{tried(source)}",
        lambda: transformers.PreTrainedConfig.get_config_dict(source, **revised),
    )
    if values.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"{source}: config.json has the model type {shown(values.get('model_type'))}, which transformers "
            f"{transformers.__version__} does not know; update transformers, or pass another model"
        )
    return _loading(
        f"the config of {source!r}", lambda: transformers.AutoConfig.from_pretrained(source, **OWN_CODE, **revised)
    )


def loaded_heads(model: Any) -> tuple[str, ...]:
    """Return the paths of the model's heads if the checkpoint contains one; else (), since `wrap` finds new heads."""
    from tunerkit_transformers import transformers_private

    heads = _heads(model)
    loaded = any(all(map(transformers_private.is_loaded, parameters)) for parameters in heads.values())
    return tuple(heads) if loaded else ()


def _heads(model: Any) -> dict[str, list[Any]]:
    """Return the parameters of each head, by the head's path: modules outside the pretrained part, or timm's heads."""
    from tunerkit_transformers.new_modules import named_heads

    heads = {name: child for name, child in model.named_children() if name != model.base_model_prefix}
    if not any(next(child.parameters(), None) is not None for child in heads.values()):
        # timm's models have their head inside of that part.
        known = {id(head) for head in named_heads(getattr(model, model.base_model_prefix, model))}
        heads = {name: module for name, module in model.named_modules() if id(module) in known}
    parameters = {name: [*head.parameters()] for name, head in heads.items()}
    return {name: own for name, own in parameters.items() if own}


def _heads_of_class(task_classes: TaskClasses, config: Any) -> tuple[str, ...]:
    """Return the paths of the heads of the task's model for a config; the model is built on the meta device."""
    import torch
    import transformers

    with torch.device("meta"):
        return tuple(_heads(getattr(transformers, task_classes.model).from_config(config, **OWN_CODE)))


@contextmanager
def _quietly() -> Iterator[Any]:
    """Inside the block, transformers logs only errors, without its warning that the head is new."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield transformers
    finally:
        transformers.logging.set_verbosity(before)


def quiet() -> None:
    """Let transformers log only errors, and turn off the progress bars of transformers and datasets."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # it would break the progress of training
    try:
        import datasets
    except ModuleNotFoundError:  # only the command needs it
        return
    datasets.disable_progress_bars()


def _commit_of(source: str, revision: str | None) -> str | None:
    """Return the commit of the files read from the hub; None for a folder."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    if Path(source).is_dir():
        return None
    return extract_commit_hash(cached_file(source, "config.json", revision=revision), None)


def refuse_missing(source: str, revision: str | None = None) -> None:
    """Raise `ModelError` if a base model's name must be a folder's, and there is no such folder with a model."""
    folder = Path(source).expanduser()
    if not folder.exists() and is_path(source, revision):
        hint = closest_folder(source)
        download = "" if looks_local(source) else f"; if this is one, download it first: hf download {source}"
        raise ModelError(
            f"{source}: no such folder{hint}{' Pass' if hint else '; pass'} the folder of a model, or its name on the "
            f"hub (org/name){download}"
        )
    if folder.exists() and not folder.is_dir():
        raise ModelError(
            f"{source} is {irregular(folder) or 'a file'}; pass the folder that has config.json and the weights"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{source}: the folder has no config.json, so it holds no model that transformers can load")


def looks_local(source: str) -> bool:
    """Whether a base model's name must be a local path: names on the hub are ``name`` or ``org/name``."""
    return source.startswith((".", "~", os.sep)) or source.count("/") > 1 or "\\" in source


def is_path(source: str, revision: str | None = None) -> bool:
    """Whether the name of a missing folder is a mistyped path and not a name on the hub, which may be slow to query.

    This includes a name ``a/b`` if ``a`` is a folder here, or resembles one with a model in ``b``; unless the hub's
    cache has the name, or a revision is given.
    """
    if looks_local(source):
        return True
    first, _, second = source.partition("/")
    if not second or revision is not None or _is_cached(source):
        return False
    near = difflib.get_close_matches(first, _inside(Path()), n=3, cutoff=_CLOSE)
    return Path(first).is_dir() or any(Path(each, second, "config.json").is_file() for each in near)


def _is_cached(source: str) -> bool:
    """Whether the local cache of the hub has the model's config."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(source, "config.json"), str)
    except HFValidationError:  # no name on the hub
        return False


def closest_folder(source: str) -> str:
    """Return a hint with the model folder that is closest to a mistyped path; "" if none is close."""
    return closest_path(source, lambda place: os.path.isfile(place / "config.json"))


def closest_path(source: str, wanted: Callable[[Path], bool] = os.path.exists) -> str:
    """Return a hint with the wanted path that is closest to a mistyped one, compared part by part; "" if none is."""
    place, *parts = Path(os.path.abspath(os.path.expanduser(source))).parents[::-1]
    folders = [(each.name, os.path.isdir) for each in parts]
    for part, fits in (*folders, (os.path.basename(os.path.abspath(source)), wanted)):
        known = fits(place / part)
        close = [part] if known else difflib.get_close_matches(part, _inside(place, fits), 1, _CLOSE)
        if not close:
            return ""
        place /= close[0]
    here = Path.cwd()
    return f"; did you mean {str(place.relative_to(here) if place.is_relative_to(here) else place)!r}?"


def _inside(place: Path, fits: Callable[[Path], bool] = os.path.isdir) -> list[str]:
    """The names in a folder that fit, such as those of folders; none if it cannot be read."""
    try:
        return [name for name in os.listdir(place) if fits(place / name)]
    except OSError:
        return []


def tried(source: str) -> str:
    """Return a remark on the search for a model that is not a local folder; "" for a folder."""
    if Path(source).expanduser().is_dir():
        return ""
    cache = "the hub's cache has it" if _is_cached(source) else "the hub's cache on this machine does not have it"
    return f" (no such folder here{closest_folder(source)}; {cache})".replace("?;", "?")


_LIBRARIES = (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError, AttributeError, SafetensorError)
LOADING = (*_LIBRARIES, UnpicklingError, EOFError)  # the exceptions of loading a model


def reason_of(problem: BaseException) -> str:
    """Return the reason why a model cannot be loaded, in one line."""
    if isinstance(problem, UnpicklingError | EOFError):
        return (
            "its weights are a pickle that is damaged or holds more than tensors; it is not read, since that may run "
            "any code; save them as safetensors with the program that wrote them"
        )
    if "trust_remote_code" in str(problem):
        return (
            "it brings code of its own, which tunerkit does not run; if you trust it, load it with transformers, and "
            "the adapter with tunerkit.load(model, path)"
        )
    return cut(" ".join(str(problem).split()) or type(problem).__name__, 600)


def _loading(what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except LOADING as problem:
        raise ModelError(f"cannot load {what}: {reason_of(problem)}") from problem
