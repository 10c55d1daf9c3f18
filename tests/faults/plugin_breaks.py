"""Sixty ways in which an installed plugin can be broken: the text of its module, and what must still hold."""

import attrs

HEAD = """
import asyncio, attrs, math, sys, torch
import tunerkit
from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method, State, hookimpl
from torch import nn
"""
METHOD = """
@attrs.frozen
class Config(AdapterConfig):
    rank: int = 1

class Shift(Adapter):
    reads_output = reads_weight = False
    def __init__(self, base):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(base.out_features))
    def forward(self, base, x, y):
        return y + base.shape_bias(self.v).to(y.dtype)

@hookimpl
def tunerkit_methods():
    return [Method("broken", Config)]

@hookimpl
def tunerkit_build_adapter(base, config):
    return Shift(base)

@hookimpl
def tunerkit_delta(adapter):
    return Delta(bias=adapter.v)
"""
HOSTILE = """
class Hostile(Exception):
    def __str__(self):
        raise ValueError("no text")
"""
UNPRINTABLE = """
class Unprintable:
    def __repr__(self):
        raise ValueError("no repr")
    __str__ = __repr__
"""


@attrs.frozen
class Break:
    """One broken plugin.

    Attributes:
        name: What is wrong.
        text: The module.
        during: When it does wrong: at ``"import"``, in ``"anybody"``'s use of any method, or in a use of its own.
    """

    name: str
    text: str
    during: str


def _hook(name: str, arguments: str, body: str) -> str:
    return f"\n@hookimpl\ndef tunerkit_{name}({arguments}):\n    {body}\n"


def _without(hook: str) -> str:
    """The method's text without one hook, which a break defines itself."""
    parts = METHOD.split("@hookimpl\n")
    return "@hookimpl\n".join(part for part in parts if not part.startswith(f"def tunerkit_{hook}("))


_AT_IMPORT = {
    "an import of nothing": "import a_module_that_nobody_has",
    "a syntax error": "def (",
    "a division by zero": "1 / 0",
    "sys.exit": "sys.exit(3)",
    "CancelledError": "raise asyncio.CancelledError",
    "GeneratorExit": "raise GeneratorExit",
    "a BaseException of its own": "class Own(BaseException): ...\nraise Own('own')",
    "a skip of pytest": "import pytest\npytest.skip('skipped', allow_module_level=True)",
    "MemoryError": "raise MemoryError",
    "RecursionError": "def f(): return f()\nf()",
    "an exception group": "raise BaseExceptionGroup('group', [KeyboardInterrupt()])",
    "an error whose text raises": HOSTILE + "raise Hostile",
    "an error of 10 MB": "raise ValueError('x' * 10**7)",
    "no hook at all": "x = 1",
    "use of the registry": "tunerkit.methods()",
    "itself replaced by a class": "class P:\n    @hookimpl\n    def tunerkit_methods(self): ...\n"
    "sys.modules[__name__] = P",
    "itself unhashable": "class P:\n    __hash__ = None\nsys.modules[__name__] = P()",
    "attributes that raise": "class P:\n    @property\n    def x(self): raise SystemExit\nsys.modules[__name__] = P()",
    "a misspelt hook": METHOD + _hook("dleta", "adapter", "return None"),
    "an unmarked hook": "def tunerkit_methods():\n    return []\n" + _hook("base_layers", "", "return []"),
    "an unknown argument": METHOD + _hook("finish", "tunre", "return None"),
    "a hook wrapper": METHOD + "\n@hookimpl(wrapper=True)\ndef tunerkit_base_layers():\n    return (yield)\n",
}
_METHODS = {
    "methods that are text": "return 'broken'",
    "methods that are a number": "return 3",
    "a method that is text": "return ['broken']",
    "methods that raise": "raise KeyError('method')",
    "methods that exit": "raise SystemExit(3)",
    "methods that raise between": "yield Method('broken', Config)\n    raise ValueError('between')",
    "endless methods": "while True:\n        yield Method('broken', Config)",
    "a method whose name is None": "return [Method(None, Config)]",
    "a method whose name is a list": "return [Method(['broken'], Config)]",
    "a method whose name is two words": "return [Method('two words', Config)]",
    "a method whose name has no text": "return [Method(Unprintable(), Config)]",
    "a method twice": "return [Method('broken', Config)] * 2",
    "a config that is no class": "return [Method('broken', 3)]",
    "a config of another kind": "return [Method('broken', dict)]",
}
_ANYBODY = {
    "base layers that are a number": _hook("base_layers", "", "return 3"),
    "base layers that are garbage": _hook("base_layers", "", "return [3, None, 'x', dict]"),
    "base layers that raise": _hook("base_layers", "", "raise ValueError('layers')"),
    "base layers that exit": _hook("base_layers", "", "raise SystemExit(3)"),
    "base layers that interrupt": _hook("base_layers", "", "raise asyncio.CancelledError"),
    "a kind whose matches raises": "class Kind(BaseLayer):\n    @classmethod\n    def matches(cls, module): 1 / 0\n"
    "    @property\n    def in_features(self): return 1\n    @property\n    def out_features(self): return 1\n"
    "    def matrix(self): ...\n    def add(self, *a): ...\n" + _hook("base_layers", "", "return [Kind]"),
    "weight readers that are garbage": _hook("weight_readers", "", "return [3, ('a', 'b')]"),
    "weight readers that exit": _hook("weight_readers", "", "raise SystemExit(3)"),
    "default targets that are garbage": _hook("default_targets", "", "return 'targets'"),
    "default targets that raise": HOSTILE + _hook("default_targets", "", "raise Hostile"),
    "a watcher that raises": _hook("ranks_changed", "tuner, change", "raise ValueError('watcher')"),
    "a watcher that exits": _hook("ranks_changed", "tuner, change", "raise SystemExit(3)"),
}
_OWN = {
    ("wrap", "an adapter that is None"): ("build_adapter", "base", "return None"),
    ("wrap", "an adapter that is another module"): ("build_adapter", "base", "return nn.Linear(2, 2)"),
    ("wrap", "an adapter that raises"): ("build_adapter", "base", "raise KeyError('build')"),
    ("wrap", "an adapter that exits"): ("build_adapter", "base", "raise SystemExit(3)"),
    ("merge", "a delta that is None"): ("delta", "adapter", "return None"),
    ("merge", "a delta of another shape"): ("delta", "adapter", "return Delta(weight=torch.ones(2, 2))"),
    ("merge", "a delta that is a number"): ("delta", "adapter", "return Delta(weight=3.0)"),
    ("merge", "a delta without values"): ("delta", "adapter", "return Delta(bias=adapter.v.to('meta'))"),
    ("merge", "a delta of complex numbers"): ("delta", "adapter", "return Delta(bias=adapter.v * 1j)"),
    ("merge", "a delta that raises"): ("delta", "adapter", "raise IndexError('delta')"),
    ("train", "a start that raises"): ("start", "tuner, total_steps", "raise IndexError('start')"),
    ("train", "ranks that are a number"): ("after_step", "tuner, step", "return 3"),
    ("train", "ranks of unknown targets"): ("after_step", "tuner, step", "return {'nowhere': 1}"),
    ("train", "ranks that are text"): ("after_step", "tuner, step", "return {'0': 'one', '2': 'two'}"),
    ("train", "ranks that are negative"): ("after_step", "tuner, step", "return {'0': -1, '2': -1}"),
    ("train", "a step that raises"): ("after_step", "tuner, step", "raise ZeroDivisionError('step')"),
    ("train", "a step that exits"): ("after_step", "tuner, step", "raise SystemExit(3)"),
    ("train", "withheld parameters that are text"): ("before_step", "tuner, step", "return 'parameters'"),
    ("finish", "final ranks that are garbage"): ("finish", "tuner", "return ['rank']"),
    ("budget", "a budget that is text"): ("budget", "tuner, step", "return 'much'"),
    ("budget", "a budget that is negative"): ("budget", "tuner, step", "return -3"),
    ("state", "a state that is a dict"): ("state", "tuner", "return {'a': 1}"),
    ("state", "a state that JSON cannot hold"): ("state", "tuner", "return State(tensors={}, values={'a': object()})"),
    ("state", "a state of NaN"): ("state", "tuner", "return State(tensors={}, values={'a': math.nan})"),
    ("state", "tensors that are lists"): ("state", "tuner", "return State(tensors={'a': [1]}, values={})"),
    ("restore", "a restore that raises"): ("restore", "tuner, state", "raise KeyError('restore')"),
}

BREAKS = (
    *(Break(name, HEAD + text, "import") for name, text in _AT_IMPORT.items()),
    *(
        Break(name, HEAD + UNPRINTABLE + _without("methods") + _hook("methods", "", body), "import")
        for name, body in _METHODS.items()
    ),
    *(Break(name, HEAD + METHOD + text, "anybody") for name, text in _ANYBODY.items()),
    *(
        Break(name, HEAD + _without(hook) + _hook(hook, arguments, body), during)
        for (during, name), (hook, arguments, body) in _OWN.items()
    ),
)
