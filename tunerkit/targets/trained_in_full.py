"""Modules trained in full, as copies: those that the user names, new ones that no checkpoint filled, and biases."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain

from torch import nn

from tunerkit.errors import PluginError, TargetError, warn
from tunerkit.layers import bias_name, has_trainable_bias, torch_private, whole_shape
from tunerkit.paths import CHILD, few, is_under, join, parent
from tunerkit.patterns import is_broad, matcher
from tunerkit.records import NewModules, Target
from tunerkit.targets.eligibility import quantiser_of, refuse, refuse_tied
from tunerkit.targets.scan import Scan, ScannedModule
from tunerkit.targets.selection import matching, unknown

_SHOWN = 5


# --- Modules that the user names --------------------------------------------------------------------------------------


def choose_copies(scanned: Scan, names: tuple[str, ...]) -> tuple[str, ...]:
    """Find the modules that are trained in full, as copies; ``names`` are the patterns of ``train_modules``.

    A container is replaced by the modules in it: it runs all its children, a copy among them, or is never run itself.
    Blocks, and what is in them, are replaced by their layers: see `_parts`.
    """
    chosen: list[str] = []
    whole: list[str] = []
    for path in resolve_modules(scanned, names):
        for part, has_layers in _parts(scanned, path):
            if not is_under(parent(part), whole):
                chosen += copies_at(scanned, part)
                whole += [part] if has_layers else []
    if whole:
        warn(
            f"trained in full as a whole, because they hold parameters beside their layers: {few(whole, shown=5)}. A "
            "copy runs after its original, so one that keeps a cache would fill it twice: train with use_cache=False, "
            "and merge before you generate"
        )
    return tuple(chosen)


def resolve_modules(scanned: Scan, names: Sequence[str]) -> tuple[str, ...]:
    """The modules that patterns match, in the model's order; of nested modules only the outermost."""
    matched = {name: matching(scanned.modules, matcher(name)) for name in names}
    idle = [name for name, modules in matched.items() if not modules]
    refuse(f"train_modules: {unknown(name, scanned, scanned.modules, told=told)}" for told, name in enumerate(idle))
    found = {module.path for modules in matched.values() for module in modules}
    paths = (module.path for module in scanned.modules if module.path in found)
    return tuple(path for path in paths if not is_under(parent(path), found))


def _parts(scanned: Scan, path: str) -> Iterator[tuple[str, bool]]:
    """The paths copied to train a module in full: itself; or its layers, if it is in a block or holds one.

    A copy runs after its original, so attention would add its keys to the cache twice. With each path comes whether it
    holds parameters beside its layers.
    """
    if any(each.in_block for each in scanned.modules if f"{each.path}.".startswith(f"{path}.")):
        yield from _layers(scanned, path)
    else:
        yield path, False


def _layers(scanned: Scan, path: str) -> Iterator[tuple[str, bool]]:
    module = scanned.by_path[path].module
    if _is_layer(module):
        if _has_tensors(module):
            yield path, False
        return
    if torch_private.parameters_of(module):
        yield path, True
    # Through the children: the scan has a module that is held twice before the second module that holds it.
    for name, child in torch_private.own_children(module).items():
        if child is not None and name != CHILD:
            yield from _layers(scanned, join(path, name))


def _is_layer(module: nn.Module) -> bool:
    """Whether no module in it holds parameters, or it calls those in torch's own way."""
    inside = (child for name, child in torch_private.own_children(module).items() if child and name != CHILD)
    return isinstance(module, nn.MultiheadAttention) or all(next(m.parameters(), None) is None for m in inside)


def _has_tensors(module: nn.Module) -> bool:
    return next(chain(module.parameters(), module.buffers()), None) is not None


def copies_at(scanned: Scan, path: str) -> list[str]:
    """The paths copied to train the module at ``path`` in full: itself, or the modules in a container."""
    found = scanned.by_path[path]
    if found.inside_attention or found.reading_owner is not None:
        held = ((parent(own), scanned.by_path[parent(own)].module) for own in found.paths)
        using = (own for own, by in held if by is found.reading_owner or isinstance(by, nn.MultiheadAttention))
        raise TargetError(
            f"train_modules: {path!r} is used directly, bypassing its forward(); name the owner {next(using)!r}"
        )
    leaves = [leaf for leaf, module in _uncontained(path, found.module) if _has_tensors(module)]
    if not leaves:
        raise TargetError(f"train_modules: {path!r} holds nothing to train; leave it out")
    known = {id(each.module) for each in scanned.modules if each.base is not None and each.base.packing is not None}
    packed = [part for part in found.module.modules() if quantiser_of(part) is not None or id(part) in known]
    if packed:
        raise TargetError(
            f"train_modules: {path!r} is or holds a quantised {type(packed[0]).__name__}, whose integers cannot be "
            "trained; adapt it instead (targets), or keep it out of the quantisation"
        )
    return leaves


def _uncontained(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        yield path, module
        return
    if torch_private.parameters_of(module):
        name = type(module).__name__
        raise TargetError(
            f"train_modules: {path!r} is a {name}, a container of which only the modules inside can be trained, with "
            "parameters of its own; name the modules in it"
        )
    for name, child in module.named_children():
        yield from _uncontained(join(path, name), child)


# --- New modules, such as an output head: trained unless the user decides otherwise -----------------------------------


def find_new(scanned: Scan) -> NewModules:
    """Find the modules that are new, by the first library that knows the model."""
    heads = {each.path for each in scanned.modules if each.in_head}
    blocks = {each.path for each in scanned.modules if each.in_block}
    answers = (library.new(scanned.root.module, blocks, heads) for library in scanned.knowledge.libraries)
    found = next((answer for answer in answers if answer is not None), NewModules(loader=""))
    paths = {*found.whole, *found.partly, *found.heads, *found.replaced}
    if missing := sorted(paths - scanned.by_path.keys()):
        raise PluginError(f"a ModelLibrary finds new modules where the model has none: {few(missing, shown=_SHOWN)}")
    return found


def choose_new(
    scanned: Scan,
    new: NewModules,
    copies: tuple[str, ...],
    *,
    targets: str | Sequence[str] | None,
    exclude: Sequence[str],
    adapted: Collection[str] = (),
) -> tuple[str, ...]:
    """Choose the new modules to train in full, if ``train_modules`` has chosen no ``copies``; warn about all others.

    Modules that ``exclude`` names are left alone, and so are those that alone match a plain name in ``targets``, and
    those at ``adapted``, which active adapters have changed already.
    """
    decided = {*copies, *adapted, *_named(scanned, targets, exclude, (*new.whole, *new.heads))}
    partly = [path or "the model itself" for path in new.partly if not _is_decided(path, decided)]
    frozen = [f"only a part of {path} is new" for path in partly]
    trained: dict[str, list[str]] = {}
    for path in new.whole:
        for part, has_layers in _parts(scanned, path):
            if _is_decided(part, decided) or next(scanned.by_path[part].module.parameters(), None) is None:
                continue
            try:
                if has_layers:
                    raise TargetError(f"{part} holds parameters of its own beside its layers")
                own = copies_at(scanned, part)
                refuse_tied(scanned, own)
            except TargetError as error:
                frozen.append(str(error))
            else:
                trained.setdefault(path, []).extend(own)
    if copies:
        frozen += [f"train_modules does not name {path}" for path in trained]
        trained = {}
    _warn_of_trained(scanned, new.loader, trained)
    if frozen:
        warn(
            f"some values were not loaded by {new.loader} and stay frozen: {few(frozen, shown=_SHOWN)}. The saved "
            "adapter fits only a base with the same values: save the base before you wrap it, and load adapters onto "
            "that. To silence this, name the modules in exclude"
        )
    decided.update(trained)
    unclear = (new.heads, new.replaced)
    _warn_of_unknown(new.loader, *([p for p in paths if not _is_decided(p, decided)] for paths in unclear))
    return tuple(chain(*trained.values()))


def trained_elsewhere(new: NewModules, copied: Collection[str]) -> tuple[str, ...]:
    """Find the modules whose values are new, or may be, among those that another adapter trains in full."""
    return tuple(path for path in copied if is_under(path, {*new.whole, *new.heads}))


def _named(
    scanned: Scan, targets: str | Sequence[str] | None, exclude: Sequence[str], new: Collection[str]
) -> Iterator[str]:
    """The paths that ``exclude`` matches, and the ``new`` ones that a plain name in ``targets`` matches alone."""
    for pattern in exclude:
        yield from filter(matcher(pattern), scanned.by_path)
    for name in (targets,) if isinstance(targets, str) else targets or ():
        hits = [] if is_broad(name) else list(filter(matcher(name), scanned.by_path))
        if all(_is_decided(path, new) for path in hits):
            yield from hits


def _is_decided(path: str, decided: Collection[str]) -> bool:
    """Whether the module at ``path`` is at, inside or around one of the modules that the user decided about."""
    return is_under(path, decided) or any(is_under(other, (path,)) for other in decided if path)


def _warn_of_trained(scanned: Scan, loader: str, trained: Mapping[str, Sequence[str]]) -> None:
    """Warn about the new modules that are trained, with their sizes; ``trained`` maps each to its copies."""
    if trained:
        sizes = {
            path: sum(whole_shape(p).numel() for copy in copies for p in scanned.by_path[copy].module.parameters())
            for path, copies in trained.items()
        }
        listed = few([f"{path} ({size:,} parameters)" for path, size in sizes.items()], shown=_SHOWN)
        listed += f", {sum(sizes.values()):,} parameters in all" if len(sizes) > 1 else ""
        warn(
            f"trained in full, as copies, because {loader} did not load their values: {listed}. To freeze one, "
            "name it in exclude, and save the base too, which alone has these values. To choose, set train_modules"
        )


def _warn_of_unknown(loader: str, heads: Sequence[str], replaced: Sequence[str]) -> None:
    """Warn that nothing shows whether ``heads`` are new or, if there are none, the ``replaced`` modules in blocks."""
    if heads or replaced:
        lost = f" (in the blocks, the marks of {few(replaced, shown=_SHOWN)} are missing)" if heads and replaced else ""
        advice = f"train_modules={list(heads[:_SHOWN])}. Otherwise name it in exclude"
        if not heads:
            advice = f"train_modules, or wrap the model as {loader} returns it. Otherwise ignore this"
        warn(
            f"it cannot be seen whether {few(heads or replaced, shown=_SHOWN)} is new: the model was built from a "
            f"config, copied or moved after {loader}{lost}. It stays frozen, and if it is new, the saved adapter fits "
            f"no other base: then set {advice}"
        )


# --- Biases -----------------------------------------------------------------------------------------------------------


def choose_biases(scanned: Scan, bias: str, chosen: tuple[Target, ...], copies: tuple[str, ...]) -> tuple[Target, ...]:
    """Find the modules whose bias is trained: of the targets (``"adapters"``), or of the whole model (``"all"``)."""
    if bias == "none":
        return ()
    adapted = {target.path for target in chosen}
    found, fixed, problems = [], [], []
    for each in (scanned.root, *scanned.modules):
        if is_under(each.path, copies) or (bias == "adapters" and each.path not in adapted):
            continue
        own = torch_private.parameters_of(each.module)
        biases, name = [leaf for leaf in own if "bias" in leaf], bias_name(each.base)
        tied = [other for other in scanned.sharers.get(id(own.get(name)), ()) if other != join(each.path, name)]
        if each.base is not None and each.base.packing is not None and name not in own and each.base.bias() is not None:
            fixed.append(each.path)
        if takes_bias(each) and (bias == "adapters" or (biases == [name] and not tied)):
            found.append(Target(each.path, each.module))
        elif tied and bias == "all":
            problems.append(f"{join(each.path, name)} (tied to {', '.join(tied)})")
        elif bias == "all":
            problems += [f"{join(each.path, other)} (of a {type(each.module).__name__})" for other in biases]
    if fixed:
        warn(
            f"the biases of {len(fixed)} quantised layers are not trained, since their library does not hold them as "
            f"parameters: {few(fixed, shown=5)}"
        )
    if problems:
        way_out = "name their modules in train_modules or set bias='adapters'"
        raise TargetError(f"bias='all' cannot train: {', '.join(problems)}; {way_out}")
    return tuple(found)


def takes_bias(each: ScannedModule) -> bool:
    """Whether core knows where the module adds its bias, so that a trained copy can replace it."""
    return not (each.inside_attention or each.read_and_called) and has_trainable_bias(each.module, each.base)
