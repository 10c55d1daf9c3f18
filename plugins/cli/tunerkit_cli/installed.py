"""What is installed, what is missing, and which plugins do not work."""

import platform
from collections.abc import Iterator, Sequence
from importlib import metadata

import attrs
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import tunerkit
from tunerkit.errors import VerbError
from tunerkit.extras import install

# The extras that users choose; the others are for those who work on tunerkit itself.
EXTRAS = (
    *("verbs", "adalora", "lora", "methods", "peft", "gguf", "diffusers", "serving", "quant", "quantisers"),
    *("deepspeed", "transformers", "distributed", "cli", "lm", "vision", "embedding", "metrics", "tensorboard"),
    *("experts", "plot", "testing"),
)


@attrs.frozen
class Part:
    """One distribution that tunerkit or an extra asks for, and the installed version, None if it is missing."""

    extra: str
    requirement: Requirement
    version: str | None

    @property
    def problem(self) -> str:
        """What is wrong, or an empty string."""
        if self.version is None:
            return "missing"
        wanted = self.requirement.specifier
        return "" if wanted.contains(self.version, prereleases=True) else f"needs {wanted}"

    @property
    def cure(self) -> str:
        """What to do about the problem."""
        if self.version is None or self.requirement.name.startswith("tunerkit-"):
            return f"{self.extra}: {install(self.extra)}"
        return f'{self.requirement.name}: pip install --upgrade "{self.requirement.name}{self.requirement.specifier}"'


def show(console: Console, problems: Sequence[str] = ()) -> bool:
    """Print versions, devices, plugins, libraries and ``problems``, and return whether every plugin works."""
    console.print(f"tunerkit {tunerkit.__version__}, Python {platform.python_version()}, {escape(platform.platform())}")
    console.print(f"devices: {', '.join(devices())}")
    console.print(methods_table("Plugins"))
    found = list(parts())
    table = Table("part", "distribution", "version", "", title="Libraries", title_justify="left")
    for part in found:
        extra = part.extra or "tunerkit itself"
        table.add_row(extra, escape(part.requirement.name), part.version or "-", escape(part.problem))
    console.print(table)
    # Below the table, where no command is cut or broken into lines.
    for cure in dict.fromkeys(part.cure for part in found if part.problem):
        console.print(cure, soft_wrap=True, markup=False, highlight=False)
    problems = [*problems]
    for name in dir(tunerkit):
        try:
            getattr(tunerkit, name)
        except VerbError as error:  # of another distribution
            problems.append(str(error))
    for problem in problems:
        console.print(f"[bold red]{escape(problem)}[/]", soft_wrap=True)
    return not problems and all(info.error is None for info in tunerkit.methods().values())


def devices() -> list[str]:
    """Describe the CPU, and the accelerators that torch can use."""
    import torch

    found = [f"CPU with {torch.get_num_threads()} threads"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        count = torch.accelerator.device_count()
        names = [torch.cuda.get_device_name(i) for i in range(count)] if accelerator.type == "cuda" else [""] * count
        found += [f"{accelerator.type}:{number} {name}".rstrip() for number, name in enumerate(names)]
    return found


def parts() -> Iterator[Part]:
    """Yield what tunerkit and each extra in `EXTRAS` ask for, each once, and what those ask for that are ours."""
    found: dict[str, Part] = {}
    for extra in ("", *EXTRAS):
        for requirement in _asked("tunerkit", extra):
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                version = None
            found.setdefault(requirement.name, Part(extra, requirement, version))
    yield from found.values()


def _asked(distribution: str, extra: str) -> Iterator[Requirement]:
    """What a distribution asks for, itself or for one extra, and what those of our own distributions ask for."""
    try:
        texts = metadata.requires(distribution) or ()
    except metadata.PackageNotFoundError:
        return
    for each in map(Requirement, texts):
        if (each.marker is None) if not extra else (each.marker is not None and each.marker.evaluate({"extra": extra})):
            if each.name != "tunerkit":
                yield each
            if each.name.startswith("tunerkit-"):
                for inner in ("", *sorted(each.extras)):
                    yield from _asked(each.name, inner)


def methods_table(title: str | None = None) -> Table:
    """The installed methods, with the errors of those that failed to load."""
    table = Table("method", "distribution", "version", "error", title=title, title_justify="left")
    for name, info in tunerkit.methods().items():
        table.add_row(*map(escape, (name, info.distribution, info.version, info.error or "")))
    return table
