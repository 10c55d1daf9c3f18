"""Rows about reading files that are damaged, forged or of another base."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tests.faults.harness import Fault, cases, limited, refused, same_state, state_of
from tests.faults.isolation import Case
from tests.faults.subjects import TARGETS, Peft, Subject, net, output
from tunerkit.serialization.header import digest

CONFIG = "adapter_config.json"  # peft's second file


@attrs.frozen
class Original:
    """What was saved: the folder, the adapter's output, and the bytes of each file."""

    folder: Path
    output: Tensor
    files: dict[str, bytes]


def originals(subject: Subject, folder: Path, *, rank: int = 2) -> dict[str, Original]:
    """Save one adapter of each kind."""
    found = {}
    for kind in subject.kinds:
        model = subject.trained(kind, seed=1, rank=rank)
        place = folder / f"original-{kind}"
        subject.save(model, place)
        names = (subject.file, CONFIG) if isinstance(subject, Peft) else (subject.file,)
        found[kind] = Original(place, output(model), {name: (place / name).read_bytes() for name in names})
    return found


# --- Damaged files ----------------------------------------------------------------------------------------------------


def damaged_files(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Change the bytes of a file, and load it. At rank 16 the weights are about as long as the header."""
    saved = originals(subject, folder, rank=16)
    for number, kind, chance in cases("damaged files", subject, count):
        original = saved[kind]
        name = chance.choice(sorted(original.files))
        label, data = damage(original.files[name], chance)
        place = _copy(original, folder / "damaged")
        (place / name).write_bytes(data)
        yield Fault(f"{number}: {kind}, {name}: {label}", _damage_is_seen(subject, place, original))


def damage(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Return a description of a change, and the changed bytes."""
    size, at = len(data), chance.randrange(len(data))
    to = min(size, at + chance.choice((1, 2, 8, 64, 512)))
    junk = chance.randbytes(to - at)
    changes: dict[str, bytes] = {
        f"bit {at * 8} flipped": _put(data, at, bytes([data[at] ^ 1 << chance.randrange(8)])),
        f"bytes {at} to {to} random": _put(data, at, junk),
        f"bytes {at} to {to} zero": _put(data, at, bytes(to - at)),
        f"cut at {at}": data[:at],
        f"bytes {at} to {to} removed": data[:at] + data[to:],
        f"{to - at} bytes inserted at {at}": data[:at] + junk + data[at:],
        f"{to - at} bytes appended": data + junk,
        f"bytes {at} to {to} twice": data[:to] + data[at:],
        "all zero": bytes(size),
        "length of the header changed": _put(data, chance.randrange(8), chance.randbytes(1)),
    }
    while True:
        label = chance.choice([*changes])
        if changes[label] != data:
            return label, changes[label]
        # What is there already is no change: flip a bit instead.
        changes[label] = _put(data, at, bytes([data[at] ^ 1]))


def _put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _damage_is_seen(subject: Subject, place: Path, original: Original) -> str:
    base = net()
    before = state_of(base)
    try:
        loaded = subject.load(place, base=base)
        same = torch.equal(output(loaded), original.output)
    except Exception as error:
        wrong = subject.wrong_error(error)
        unchanged = not subject.strict or same_state(before, state_of(base))
        return wrong or ("" if unchanged else "it was refused, but the base model was changed")
    if not same:
        return "it was loaded without an error, and gives other outputs"
    if not subject.strict:
        return ""  # a byte without a meaning, such as a blank between two settings
    again = place.parent / "again"
    subject.save(loaded, again)
    same = (again / subject.file).read_bytes() == original.files[subject.file]
    return "" if same else "it was loaded without an error, and is saved with another content"


def _copy(original: Original, to: Path) -> Path:
    to.mkdir(exist_ok=True)
    for name, data in original.files.items():
        (to / name).write_bytes(data)
    return to


# --- Wrong bases ------------------------------------------------------------------------------------------------------


def wrong_bases(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Load an adapter into a base model that is not the one it was trained on."""
    saved = originals(subject, folder)
    for number, kind, chance in cases("wrong bases", subject, count):
        label, change = chance.choice(_CHANGES)
        base = change(net(), chance)
        base.eval()
        outcome = refused(subject, lambda base=base, kind=kind: subject.load(saved[kind].folder, base=base), base)  # type: ignore[misc]
        yield Fault(f"{number}: {kind}, {label}", outcome)


def _any_layer(model: nn.Module, chance: random.Random) -> nn.Linear:
    return chance.choice([module for module in model.modules() if isinstance(module, nn.Linear)])


def _changed(change: Callable[[Tensor, random.Random], Tensor]) -> Callable[[nn.Module, random.Random], nn.Module]:
    def apply(model: nn.Module, chance: random.Random) -> nn.Module:
        layer = _any_layer(model, chance)
        parameter = chance.choice((layer.weight, layer.bias))
        with torch.no_grad():
            parameter.copy_(change(parameter, chance))
        return model

    return apply


def _noise(tensor: Tensor, chance: random.Random) -> Tensor:
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    return tensor + 10 ** chance.uniform(-3, 1) * torch.randn(tensor.shape, generator=generator)


def _with_layer(layer: Callable[[nn.Linear], nn.Module]) -> Callable[[Any, random.Random], nn.Module]:
    def apply(model: Any, chance: random.Random) -> nn.Module:
        at = chance.choice((0, 2, 4))
        model[at] = layer(model[at])
        return nn.Sequential(*model)

    return apply


def _without_bias(layer: nn.Linear) -> nn.Module:
    found = nn.Linear(layer.in_features, layer.out_features, bias=False)
    found.weight.data = layer.weight.data
    return found


def _fresh(model: nn.Module, chance: random.Random) -> nn.Module:
    torch.manual_seed(chance.randrange(1, 2**31))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return model


def _wider(model: Any, chance: random.Random) -> nn.Module:
    width = chance.choice((7, 9, 16))
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, 3))


_CHANGES: tuple[tuple[str, Callable[[Any, random.Random], nn.Module]], ...] = (
    ("other values of all layers", _fresh),
    ("noise on one tensor", _changed(_noise)),
    ("one tensor scaled", _changed(lambda tensor, chance: tensor * chance.choice((-1.0, 0.5, 0.99, 1.01, 2.0)))),
    ("one tensor zero", _changed(lambda tensor, _: torch.zeros_like(tensor))),
    ("one tensor reversed", _changed(lambda tensor, _: tensor.flip(0))),
    ("one tensor moved by one", _changed(lambda tensor, _: tensor.roll(1, 0))),
    ("a layer more at the end", lambda model, _: nn.Sequential(*model, nn.Linear(3, 3))),
    ("a layer less at the end", lambda model, _: nn.Sequential(*[*model][:4])),
    ("a layer without its bias", _with_layer(_without_bias)),
    ("another width", _wider),
    ("a norm between the layers", lambda model, _: nn.Sequential(*[*model][:4], nn.LayerNorm(7), model[4])),
    ("an adapted layer that is no longer linear", lambda model, _: nn.Sequential(nn.Identity(), *[*model][1:])),
)


def other_forwards(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Load an adapter into a base with the same weights whose config gives it another forward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 32,
    }  # fmt: skip
    changes: tuple[dict[str, Any], ...] = (
        {"rms_norm_eps": 0.1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
    )

    def build(**settings: Any) -> nn.Module:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings})).eval()

    saved: dict[str, Path] = {}
    for number, kind, _ in cases("other forwards", subject, count):
        if kind not in saved:
            saved[kind] = folder / f"llama-{kind}"
            subject.save(_adapted(subject, kind, build()), saved[kind])
        change = changes[number // len(subject.kinds) % len(changes)]
        base = build(**change)
        outcome = refused(subject, lambda base=base, kind=kind: subject.load(saved[kind], base=base), base)  # type: ignore[misc]
        yield Fault(f"{number}: {kind}, {change}", outcome)


def _adapted(subject: Subject, kind: str, base: nn.Module) -> nn.Module:
    """Wrap any model, where only the file matters and not what the adapter learned."""
    if isinstance(subject, Peft):
        import peft

        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    import tunerkit

    if kind != "adalora":
        return tunerkit.wrap(base, kind, {"targets": ["q_proj", "v_proj"]}, seed=0)
    model = tunerkit.wrap(base, kind, {"targets": ["q_proj", "v_proj"], "target_rank": 2, "init_rank": 2}, seed=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=12)
    model(input_ids=torch.arange(6)[None]).logits.sum().backward()
    optimizer.step()
    return model


# --- Forged files -----------------------------------------------------------------------------------------------------

Fields = dict[str, Any]
Tensors = dict[str, Tensor]


def forge(subject: Subject, original: Original, to: Path, change: Callable[[Fields, Tensors], object]) -> Path:
    """Write a file whose header and tensors were changed, and whose digest is right."""
    to.mkdir(exist_ok=True)
    tensors = safetensors.torch.load_file(original.folder / subject.file)
    if isinstance(subject, Peft):
        fields = json.loads(original.files[CONFIG])
        change(fields, tensors)
        (to / CONFIG).write_text(json.dumps(fields))
        safetensors.torch.save_file(_own(tensors), to / subject.file, {"format": "pt"})
        return to
    with safetensors.safe_open(original.folder / subject.file, framework="pt") as file:
        fields = json.loads(file.metadata()["tunerkit"])
    change(fields, tensors)
    write_signed(to / subject.file, json.dumps(fields), tensors)
    return to


def write_signed(path: Path, text: str, tensors: Tensors) -> None:
    """Write a file with any header text and the digest that fits."""
    metadata = {"tunerkit": text, "tunerkit.digest": digest(text, tensors)}
    safetensors.torch.save_file(_own(tensors), path, metadata)


def _own(tensors: Tensors) -> Tensors:
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def forged_files(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Change tensors and settings so that they contradict each other, sign the file again, and load it."""
    saved = originals(subject, folder)
    changes = {kind: forgeries(subject, kind) for kind in subject.kinds}

    def attack(number: int, kind: str, chance: random.Random) -> Case:
        label, change = changes[kind][number // len(subject.kinds) % len(changes[kind])]

        def call() -> str:
            place = forge(subject, saved[kind], folder / "forged", lambda f, t: change(f, t, chance))
            base = net()
            return refused(subject, lambda: subject.load(place, base=base), base)

        return f"{number}: {kind}, {label}", call

    yield from limited(attack(*case) for case in cases("forged files", subject, count))


Forgery = Callable[[Fields, Tensors, random.Random], object]


def forgeries(subject: Subject, kind: str) -> list[tuple[str, Forgery]]:
    """List what can be wrong with a file of this kind, each with a function that makes it so."""
    found = [*_TENSOR_FORGERIES]
    if isinstance(subject, Peft):
        ranks = (1, 3, 10**7, 2**63, 10**12)
        found += [(f"rank {rank}", _setting(rank, "r")) for rank in ranks]
        found += [("another target", lambda f, t, r: f.update(target_modules=["4"]))]
        return found
    found += _HEADER_FORGERIES
    rank = {"toy-low-rank": ("rank",), "lora": ("rank",), "adalora": ("init_rank",)}.get(kind)
    if rank:
        found += [
            (f"a rank of {len(str(n))} digits", _setting(n, "config", *rank)) for n in (10**7, 10**12, 2**63, 10**400)
        ]
        found += [("rank one more", lambda f, t, r: f["config"].update({rank[0]: f["config"][rank[0]] + 1}))]
    if kind == "adalora":
        found += _ADALORA_FORGERIES
    return found


def _setting(value: object, *path: str) -> Forgery:
    def change(fields: Fields, tensors: Tensors, chance: random.Random) -> None:
        place = fields
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value

    return change


def _one(change: Callable[[Tensor], Tensor]) -> Forgery:
    def apply(fields: Fields, tensors: Tensors, chance: random.Random) -> None:
        name = chance.choice(sorted(tensors))
        tensors[name] = change(tensors[name])

    return apply


def _dropped(fields: Fields, tensors: Tensors, chance: random.Random) -> None:
    del tensors[chance.choice(sorted(tensors))]


def _renamed(fields: Fields, tensors: Tensors, chance: random.Random) -> None:
    name = chance.choice(sorted(tensors))
    tensors[name + "_"] = tensors.pop(name)


def _added(fields: Fields, tensors: Tensors, chance: random.Random) -> None:
    name = chance.choice(sorted(tensors))
    tensors[chance.choice(("stray", name + ".more", "tunerkit", "4.weight.more"))] = torch.ones(2)


def _longer(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[:1]]) if tensor.ndim else tensor.reshape(1)


_TENSOR_FORGERIES: list[tuple[str, Forgery]] = [
    ("a tensor missing", _dropped),
    ("a tensor renamed", _renamed),
    ("a tensor too many", _added),
    ("a tensor with a row more", _one(_longer)),
    ("a tensor with a dimension more", _one(lambda tensor: tensor[None])),
    ("a tensor made flat", _one(lambda tensor: tensor.reshape(-1) if tensor.ndim > 1 else tensor[None])),
    ("a tensor that is empty", _one(lambda tensor: tensor.flatten()[:0])),
    *(
        (f"a tensor of {str(dtype).removeprefix('torch.')}", _one(lambda tensor, d=dtype: tensor.to(d)))  # type: ignore[misc]
        for dtype in (torch.int8, torch.complex64, torch.int64)
    ),
]


def _fingerprint(change: Callable[[Fields, str], object]) -> Forgery:
    def apply(fields: Fields, tensors: Tensors, chance: random.Random) -> None:
        change(fields["base"], chance.choice(sorted(fields["base"])))

    return apply


_HEADER_FORGERIES: list[tuple[str, Forgery]] = [
    ("a target twice", lambda f, t, r: f.update(targets=[*f["targets"], f["targets"][0]])),
    ("a target less", lambda f, t, r: f.update(targets=f["targets"][:1])),
    ("a target more", lambda f, t, r: f.update(targets=[*f["targets"], "4"])),
    ("a copy that has no tensors", lambda f, t, r: f.update(copies=["4"])),
    ("a bias that has no tensor", lambda f, t, r: f.update(biases=["0"])),
    ("a module that does not exist", lambda f, t, r: f.update(targets=[f["targets"][0], "17"])),
    ("a target that is no layer", lambda f, t, r: f.update(targets=[f["targets"][0], "1"])),
    ("the model itself as a target", lambda f, t, r: f.update(targets=[f["targets"][0], ""])),
    ("negative steps", _setting(-1, "steps")),
    ("negative total steps", _setting(-5, "total_steps")),
    ("another kind of file", _setting("state", "kind")),
    ("an unknown method", _setting("gone", "method")),
    ("an empty fingerprint", _setting({}, "base")),
    ("a parameter less in the fingerprint", _fingerprint(lambda base, name: base.pop(name))),
    ("a shape in the fingerprint", _fingerprint(lambda base, name: base[name].update(shape=[1]))),
    ("huge numbers in the fingerprint", _fingerprint(lambda base, name: base[name].update(sample=[10**400] * 4))),
    ("a huge shape in the fingerprint", _fingerprint(lambda base, name: base[name].update(shape=[10**400]))),
    ("a sample too short", _fingerprint(lambda base, name: base[name].update(sample=[1.0]))),
    ("a sample of text", _fingerprint(lambda base, name: base[name].update(sample=["1.0"] * 4))),
]


def _adalora(change: Callable[[Tensors, str], object]) -> Forgery:
    def apply(fields: Fields, tensors: Tensors, chance: random.Random) -> None:
        change(tensors, chance.choice(TARGETS))

    return apply


def _mask_all(tensors: Tensors, at: str) -> None:
    lam = tensors[f"{at}.adapter.lam"]
    tensors[f"{at}.adapter.mask"] = torch.zeros(len(lam) + 1, dtype=torch.bool)


_ADALORA_FORGERIES: list[tuple[str, Forgery]] = [
    ("a mask of another length", _adalora(_mask_all)),
    (
        "a scale λ too many",
        _adalora(lambda t, at: t.update({f"{at}.adapter.lam": torch.ones(len(t[f"{at}.adapter.lam"]) + 1)})),
    ),
    (
        "a mask of numbers",
        _adalora(lambda t, at: t.update({f"{at}.adapter.mask": t[f"{at}.adapter.mask"].float() + 0.5})),
    ),
    (
        "λ where the mask has none",
        _adalora(
            lambda t, at: t.update(
                {
                    f"{at}.adapter.mask": torch.zeros_like(t[f"{at}.adapter.mask"]),
                    f"{at}.adapter.lam": torch.ones_like(t[f"{at}.adapter.lam"]),
                }
            )
        ),
    ),
    (
        "more triplets than the initial rank",
        lambda f, t, r: [
            t.update(
                {
                    f"{at}.adapter.p": torch.ones(t[f"{at}.adapter.p"].shape[0], 9),
                    f"{at}.adapter.q": torch.ones(9, t[f"{at}.adapter.q"].shape[1]),
                    f"{at}.adapter.lam": torch.ones(9),
                    f"{at}.adapter.mask": torch.ones(9, dtype=torch.bool),
                }
            )
            for at in TARGETS
        ],
    ),
]


# --- Base keys --------------------------------------------------------------------------------------------------------


def base_keys(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Add tensors to a file that are named like the base model's own, sign it again, and load it."""
    saved = originals(subject, folder)
    leaves = [name for name, _ in net().named_parameters()]
    forms = (
        "{name}", "base_model.model.{name}", "module.{name}", "_orig_mod.{name}", "model.{name}", ".{name}", "{name}.",
        "base_model.model.{layer}.base_layer.{leaf}", "{layer}.copy.{leaf}", "{layer}.tunerkit.default.{leaf}",
        "{layer}.adapter.{leaf}", "{layer}.parametrizations.{leaf}.original",
    )  # fmt: skip
    for number, kind, chance in cases("base keys", subject, count):
        leaf = leaves[number // len(subject.kinds) % len(leaves)]
        form = chance.choice(forms)
        name = form.format(name=leaf, layer=leaf.rpartition(".")[0], leaf=leaf.rpartition(".")[2])
        value = torch.full_like(net().get_parameter(leaf), 7.0)
        place = forge(subject, saved[kind], folder / "keys", lambda _, t, n=name, v=value: t.update({n: v}))  # type: ignore[misc]
        yield Fault(f"{number}: {kind}, {name}", _base_is_kept(subject, place))


def _base_is_kept(subject: Subject, place: Path) -> str:
    base = net()
    weights = list(base.parameters())
    before = [weight.detach().clone() for weight in weights]
    outcome = refused(subject, lambda: subject.load(place, base=base), base)
    kept = all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    return outcome if kept else "the file replaced weights of the base model"


# --- NaN --------------------------------------------------------------------------------------------------------------


def nan(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Put NaN or infinity into an adapter's weights; then save, load or merge it."""
    saved = originals(subject, folder)
    operations: tuple[str, ...] = ("save", "load", "merge", "merge in float16")
    for number, kind, chance in cases("NaN", subject, count):
        operation = operations[number // len(subject.kinds) % len(operations)]
        value = chance.choice((torch.nan, torch.inf, -torch.inf))
        outcome = _NAN[operation](subject, kind, value, saved[kind], folder, chance)
        yield Fault(f"{number}: {kind}, {value}, {operation}", outcome)


def _poison_(model: nn.Module, value: float, chance: random.Random) -> nn.Module:
    """Put a value into one weight that is trained."""
    trained = [p for name, p in model.named_parameters() if (".tunerkit." in name or "lora_" in name) and p.numel()]
    with torch.no_grad():
        chosen = chance.choice(trained)
        chosen.view(-1)[chance.randrange(chosen.numel())] = value
    return model


def _nan_in_save(s: Subject, kind: str, value: float, original: Original, folder: Path, chance: random.Random) -> str:
    place = _copy(original, folder / "nan")
    model = _poison_(s.trained(kind, seed=2), value, chance)
    outcome = refused(s, lambda: s.save(model, place))
    kept = all((place / name).read_bytes() == data for name, data in original.files.items())
    return outcome or ("" if kept else "the older file was replaced")


def _nan_in_load(s: Subject, kind: str, value: float, original: Original, folder: Path, chance: random.Random) -> str:
    def change(fields: Fields, tensors: Tensors) -> None:
        name = chance.choice([n for n, t in sorted(tensors.items()) if t.is_floating_point() and t.numel()])
        tensors[name].view(-1)[0] = value

    place = forge(s, original, folder / "nan-file", change)
    base = net()
    return refused(s, lambda: s.load(place, base=base), base)


def _nan_in_merge(s: Subject, kind: str, value: float, original: Original, folder: Path, chance: random.Random) -> str:
    model = _poison_(s.trained(kind, seed=2), value, chance)
    return _merge_is_refused(s, model)


def _overflow_in_merge(
    s: Subject, kind: str, value: float, original: Original, folder: Path, chance: random.Random
) -> str:
    base = net().half()
    model = s.trained(kind, seed=2, base=base) if kind != "adalora" else s.load(original.folder, base=base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".tunerkit." in name or "lora_" in name:
                parameter.mul_(0).add_(60_000.0)  # its sums and products are beyond float16's 65,504
        for weight in s.base_weights(model):
            weight.fill_(30_000.0)
    return _merge_is_refused(s, model)


def _merge_is_refused(s: Subject, model: nn.Module) -> str:
    before = [weight.detach().clone() for weight in s.base_weights(model)]
    outcome = refused(s, lambda: s.merge(model))
    kept = all(torch.equal(one, other) for one, other in zip(s.base_weights(model), before, strict=True))
    return outcome or ("" if kept else "merging was refused, but weights were changed")


_NAN: dict[str, Callable[[Subject, str, float, Original, Path, random.Random], str]] = {
    "save": _nan_in_save,
    "load": _nan_in_load,
    "merge": _nan_in_merge,
    "merge in float16": _overflow_in_merge,
}
