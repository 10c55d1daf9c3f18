"""Modules trained in full, as copies: modules that the user names, newly initialized modules, and biases."""

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
    """Return the paths of the modules to copy for the patterns of ``train_modules``.

    A container is replaced by its modules: an nn.Sequential would run its copy as a child, and lists are never called.
    Blocks and modules in blocks are replaced by their layers: see `_parts`.
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
            f"copied as a whole, because they have parameters beside their layers: {few(whole, shown=5)}. A copy runs "
            "after its original, so both would write to a module's cache: train with use_cache=False, and merge before "
            "you generate"
        )
    return tuple(chosen)


def resolve_modules(scanned: Scan, names: Sequence[str]) -> tuple[str, ...]:
    """Return the paths of modules that match patterns, in the model's order; of nested modules, only the outermost."""
    matched = {name: matching(scanned.modules, matcher(name)) for name in names}
    idle = [name for name, modules in matched.items() if not modules]
    refuse(f"train_modules: {unknown(name, scanned, scanned.modules, told=told)}" for told, name in enumerate(idle))
    found = {module.path for modules in matched.values() for module in modules}
    paths = (module.path for module in scanned.modules if module.path in found)
    return tuple(path for path in paths if not is_under(parent(path), found))


def _parts(scanned: Scan, path: str) -> Iterator[tuple[str, bool]]:
    """Yield (path to copy, whether that module has parameters besides its layers) for the module at ``path``.

    The module itself is copied; or its layers, if it is in a block or contains one: a copy runs after its original, so
    a copied attention would add its keys to the cache twice.
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
    # Through the children, not the scan, which has a shared module only under its first parent.
    for name, child in torch_private.own_children(module).items():
        if child is not None and name != CHILD:
            yield from _layers(scanned, join(path, name))


def _is_layer(module: nn.Module) -> bool:
    """Whether the module is copied as a whole: no child has parameters, or it is torch's attention."""
    inside = (child for name, child in torch_private.own_children(module).items() if child and name != CHILD)
    return isinstance(module, nn.MultiheadAttention) or all(next(m.parameters(), None) is None for m in inside)


def _has_tensors(module: nn.Module) -> bool:
    return next(chain(module.parameters(), module.buffers()), None) is not None


def copies_at(scanned: Scan, path: str) -> list[str]:
    """Return the paths to copy for the module at ``path``: ``path``, or the paths of the modules in a container."""
    found = scanned.by_path[path]
    if found.inside_attention or found.reading_owner is not None:
        held = ((parent(own), scanned.by_path[parent(own)].module) for own in found.paths)
        using = (own for own, by in held if by is found.reading_owner or isinstance(by, nn.MultiheadAttention))
        raise TargetError(
            f"train_modules: {path!r} is used directly, bypassing its forward(); name the owner {next(using)!r}"
        )
    leaves = [leaf for leaf, module in _uncontained(path, found.module) if _has_tensors(module)]
    if not leaves:
        raise TargetError(f"train_modules: {path!r} has nothing to train; leave it out")
    known = {id(each.module) for each in scanned.modules if each.base is not None and each.base.packing is not None}
    packed = [part for part in found.module.modules() if quantiser_of(part) is not None or id(part) in known]
    if packed:
        raise TargetError(
            f"train_modules: {path!r} is or contains a quantized {type(packed[0]).__name__}, whose integers cannot be "
            "trained; adapt it instead (targets), or exclude it from quantization"
        )
    return leaves


def _uncontained(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        yield path, module
        return
    if torch_private.parameters_of(module):
        name = type(module).__name__
        raise TargetError(
            f"train_modules: {path!r} is a {name} with its own parameters, and only the modules inside a container can "
            "be trained; name the modules in it"
        )
    for name, child in module.named_children():
        yield from _uncontained(join(path, name), child)


# --- New modules, such as an output head: trained by default ----------------------------------------------------------


def find_new(scanned: Scan) -> NewModules:
    """Return the newly initialized modules, as reported by the first library that knows the model."""
    heads = {each.path for each in scanned.modules if each.in_head}
    blocks = {each.path for each in scanned.modules if each.in_block}
    answers = (library.new(scanned.root.module, blocks, heads) for library in scanned.libraries)
    found = next((answer for answer in answers if answer is not None), NewModules(loader=""))
    paths = {*found.whole, *found.partly, *found.heads, *found.replaced}
    if missing := sorted(paths - scanned.by_path.keys()):
        raise PluginError(f"a ModelLibrary reports new modules that the model lacks: {few(missing, shown=_SHOWN)}")
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
    """Return the new modules to train in full; none if ``train_modules`` names ``copies``. Warn of all others.

    Modules are skipped if they match ``exclude``, are in ``adapted`` (active adapters have changed them already), or
    match a plain name in ``targets`` whose matches are all new.
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
                    raise TargetError(f"{part} has its own parameters beside its layers")
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
            "the saved base. To silence this warning, name the modules in exclude"
        )
    decided.update(trained)
    unclear = (new.heads, new.replaced)
    _warn_of_unknown(new.loader, *([p for p in paths if not _is_decided(p, decided)] for paths in unclear))
    return tuple(chain(*trained.values()))


def trained_elsewhere(new: NewModules, copied: Collection[str]) -> tuple[str, ...]:
    """Return the paths of modules that may be new, among the modules ``copied`` that another adapter trains in full."""
    return tuple(path for path in copied if is_under(path, {*new.whole, *new.heads}))


def _named(
    scanned: Scan, targets: str | Sequence[str] | None, exclude: Sequence[str], new: Collection[str]
) -> Iterator[str]:
    """Yield the paths that match ``exclude``, or a plain name in ``targets`` that matches only modules in ``new``."""
    for pattern in exclude:
        yield from filter(matcher(pattern), scanned.by_path)
    for name in (targets,) if isinstance(targets, str) else targets or ():
        hits = [] if is_broad(name) else list(filter(matcher(name), scanned.by_path))
        if all(_is_decided(path, new) for path in hits):
            yield from hits


def _is_decided(path: str, decided: Collection[str]) -> bool:
    """Whether the module at ``path`` is, contains or is inside one of the modules ``decided``."""
    return is_under(path, decided) or any(is_under(other, (path,)) for other in decided if path)


def _warn_of_trained(scanned: Scan, loader: str, trained: Mapping[str, Sequence[str]]) -> None:
    """Warn of the new modules that are trained, with their sizes; ``trained`` maps each path to its copies."""
    if trained:
        sizes = {
            path: sum(whole_shape(p).numel() for copy in copies for p in scanned.by_path[copy].module.parameters())
            for path, copies in trained.items()
        }
        listed = few([f"{path} ({size:,} parameters)" for path, size in sizes.items()], shown=_SHOWN)
        listed += f", {sum(sizes.values()):,} parameters in all" if len(sizes) > 1 else ""
        warn(
            f"trained in full, as copies, because {loader} did not load their values: {listed}. To freeze one, name it "
            "in exclude, and save the base too, since no other file has these values. To choose, use train_modules"
        )


def _warn_of_unknown(loader: str, heads: Sequence[str], replaced: Sequence[str]) -> None:
    """Warn that the modules ``heads`` may be new; if there are none, warn of the ``replaced`` modules in blocks."""
    if heads or replaced:
        lost = f" ({few(replaced, shown=_SHOWN)} in blocks lost the marks of loading)" if heads and replaced else ""
        advice = f"train_modules={list(heads[:_SHOWN])}. Otherwise name it in exclude"
        if not heads:
            advice = f"train_modules, or wrap the model as {loader} returns it. Otherwise ignore this"
        warn(
            f"{few(heads or replaced, shown=_SHOWN)} may be newly initialized, which cannot be determined: the model "
            f"was built from a config, copied or moved after {loader}{lost}. It stays frozen, so if it is new, the "
            f"saved adapter fits only this base: then set {advice}"
        )


# --- Biases -----------------------------------------------------------------------------------------------------------


def choose_biases(scanned: Scan, bias: str, chosen: tuple[Target, ...], copies: tuple[str, ...]) -> tuple[Target, ...]:
    """Return the modules whose bias is trained: all targets (``"adapters"``), or all modules (``"all"``)."""
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
            f"the biases of {len(fixed)} quantized layers are not trained, since their library does not store them as "
            f"parameters: {few(fixed, shown=5)}"
        )
    if problems:
        way_out = "name their modules in train_modules or set bias='adapters'"
        raise TargetError(f"bias='all' cannot train: {', '.join(problems)}; {way_out}")
    return tuple(found)


def takes_bias(each: ScannedModule) -> bool:
    """Whether core knows how the module adds its bias, so that a trained copy can replace the bias."""
    return not (each.inside_attention or each.read_and_called) and has_trainable_bias(each.module, each.base)
