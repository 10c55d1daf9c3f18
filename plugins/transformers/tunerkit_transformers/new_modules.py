"""Find modules that ``from_pretrained`` did not load, by transformers' marks; embeddings of added tokens; and heads."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from tunerkit.plugin import NewModules
from tunerkit.plugin.trainers import base_modules, is_named
from tunerkit_transformers.transformers_private import is_built, is_loaded, version

_PRETRAINED_MODEL = "transformers.modeling_utils.PreTrainedModel"
_LOADER = "from_pretrained"

# Each module by its path, and its own parameters that may have marks.
_Owned = Mapping[str, tuple[nn.Module, Sequence[nn.Parameter]]]


def find_new(model: nn.Module, blocks: Collection[str], heads: Collection[str]) -> NewModules | None:
    """Find the modules of a model that ``from_pretrained`` did not load, and the embeddings to which tokens were added.

    Args:
        model: The model.
        blocks: The paths of the modules in numbered blocks.
        heads: The paths of the output heads, and of the modules inside them.

    Returns:
        The modules that are or may be new; None if there are none.
    """
    places = dict(base_modules(model))
    if resized := _resized_heads(places):
        return NewModules(loader="timm.create_model", whole=resized)
    longer = tuple(_longer(places))
    whole, partly, unclear, replaced = _unloaded(places, blocks, heads)
    if not (longer or whole or partly or unclear or replaced):
        return None
    return NewModules(
        loader=_LOADER, whole=tuple(dict.fromkeys((*whole, *longer))), partly=partly, heads=unclear, replaced=replaced
    )


_Paths = tuple[str, ...]


def _resized_heads(places: Mapping[str, nn.Module]) -> _Paths:
    """Return the heads of a timm model whose checkpoint has another number of classes: timm initialized them."""
    match places[""]:
        case nn.Module(num_classes=int(classes), pretrained_cfg={"num_classes": int(loaded)}) if classes != loaded:
            heads = {id(head) for head in named_heads(places[""])}
            return tuple(path for path, module in places.items() if id(module) in heads and [*module.parameters()])
    return ()


def _unloaded(
    places: Mapping[str, nn.Module], blocks: Collection[str], heads: Collection[str]
) -> tuple[_Paths, _Paths, _Paths, _Paths]:
    """Return the modules that are entirely new, those partly new, heads that may be new, and `_replaced` modules."""
    owned = {path: (module, _own(module)) for path, module in places.items()}
    marks = {path: [is_loaded(parameter) for parameter in own] for path, (_, own) in owned.items()}
    if not any(map(any, marks.values())):
        return (), (), _task_heads(places, heads), ()
    if all(map(all, marks.values())):
        return (), (), (), ()
    if replaced := _replaced(owned, blocks):
        return (), (), _task_heads(places, heads), replaced
    return *_unmarked(places, marks), (), ()


def _replaced(owned: _Owned, blocks: Collection[str]) -> _Paths:
    """Return the modules in numbered blocks with parameters that lost their mark; if any, no mark can be trusted.

    Copying, moving or replacing a parameter drops its mark. A parameter that ``from_pretrained`` did not find has no
    mark either, and is recognized by three signs: transformers initialized its module, its values were written in
    place, and no loaded parameter was.
    """
    inside = {path: owned[path] for path in owned if path in blocks}
    new = {path: (module, [p for p in own if not is_loaded(p)]) for path, (module, own) in inside.items()}
    unmarked = {path: found for path, found in new.items() if found[1]}
    if not unmarked:
        return ()
    untouched = not any(version(p) for _, own in inside.values() for p in own if is_loaded(p))
    return tuple(
        path
        for path, (module, own) in unmarked.items()
        if not (untouched and is_built(module) and all(map(version, own)))
    )


def _unmarked(places: Mapping[str, nn.Module], marks: Mapping[str, list[bool]]) -> tuple[_Paths, _Paths]:
    """Return the outermost modules without any mark, and modules with some unmarked parameters."""
    known = [path for path, own in marks.items() if any(own) or _is_away(places[path])]
    mixed = {above for path in known for above in _upwards(path)}
    partly = tuple(path for path, own in marks.items() if path in mixed and not all(own))
    whole = [path for path, own in marks.items() if own and path not in mixed]
    outermost = {next(top for top in reversed([*_upwards(path)]) if top not in mixed) for path in whole}
    return tuple(path for path in places if path in outermost), partly


def _upwards(path: str) -> Iterator[str]:
    """Yield the path, its parent, and so on, up to the model's own path ""."""
    yield path
    while path:
        path = path.rpartition(".")[0]
        yield path


def _own(module: nn.Module) -> list[nn.Parameter]:
    """Return the module's own parameters that can have a mark: not those that offloading or packing replaced."""
    if _is_away(module) or _is_computed(module):
        return []
    return [p for p in module.parameters(recurse=False) if type(p) is nn.Parameter and p.is_floating_point()]


def _is_away(module: nn.Module) -> bool:
    """Whether the module's weights are on the meta device."""
    return any(p.is_meta for p in module.parameters(recurse=False))


def _is_computed(module: nn.Module) -> bool:
    """Whether a module of transformers computes its weight at construction, so that no checkpoint contains it."""
    return isinstance(module, nn.Embedding) and type(module).__name__.endswith("SinusoidalPositionalEmbedding")


def _task_heads(places: Mapping[str, nn.Module], heads: Collection[str]) -> _Paths:
    """Return the outermost heads of a transformers model, except output embeddings: pretrained files have these."""
    if not any(is_named(type(module), _PRETRAINED_MODEL) for module in places.values()):
        return ()
    known = {id(head) for head in named_heads(places[""])}
    filled = [path for path in places if path in heads and next(places[path].parameters(), None) is not None]
    tasks = [path for path in filled if not any(id(part) in known for part in places[path].modules())]
    return tuple(path for path in tasks if not any(above and path.startswith(f"{above}.") for above in tasks))


def _longer(places: Mapping[str, nn.Module]) -> Iterator[str]:
    """Return the paths of embeddings to which tokens were added, and of output embeddings with one row a token."""
    grown = list(_grown_embeddings(places.values()))
    rows = {embedding.num_embeddings for embedding in grown}
    heads = [head for head in named_heads(places[""]) if _rows(head) in rows] if grown else []
    longer = {id(module) for module in (*grown, *heads)}
    return (path for path, module in places.items() if id(module) in longer)


def _rows(head: nn.Module) -> int | None:
    match head:
        case nn.Linear(out_features=rows):  # an engine may have emptied its weight
            return rows
    weight = dict(head.named_parameters(recurse=False)).get("weight")
    return None if weight is None else weight.shape[0]


def _grown_embeddings(modules: Collection[nn.Module]) -> Iterator[nn.Embedding]:
    """Yield the token embeddings that ``resize_token_embeddings`` enlarged after the model was built.

    The call updates the config and the outer model, but not the ``vocab_size`` attribute of an inner model, such as
    `LlamaModel`. Without such an attribute, as in BERT, an enlargement cannot be detected. Classes that always build
    more rows than the vocabulary has, such as Mllama's, do not change the config, so they are not reported.
    """
    for module in modules:
        built = vars(module).get("vocab_size")
        if isinstance(built, int) and is_named(type(module), _PRETRAINED_MODEL):
            transformer: Any = module
            embedding, config = transformer.get_input_embeddings(), transformer.config.get_text_config()
            if isinstance(embedding, nn.Embedding) and embedding.num_embeddings == config.vocab_size > built:
                yield embedding


def named_heads(model: nn.Module) -> list[nn.Module]:
    """Return the output heads from ``get_output_embeddings`` (transformers) and ``get_classifier`` (timm)."""
    questions: list[object] = []
    match model:
        case nn.Module(get_output_embeddings=question):  # transformers
            questions.append(question)
    match model:
        case nn.Module(get_classifier=question):  # timm
            questions.append(question)
    if not questions:
        return []
    # A child module may have the name of either method.
    answers = [ask() for ask in questions if callable(ask) and not isinstance(ask, nn.Module)]
    heads = [head for answer in answers for head in (answer if isinstance(answer, list | tuple) else [answer])]
    return [head for head in heads if isinstance(head, nn.Module)]
