"""Break the source on purpose, once for each row of the fault suite, and see whether the row notices.

Run it in the repository: ``python scripts/mutations.py [row]...``. Each break is made in a temporary copy of the tree.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[1]
COPIED = ("tunerkit", "tests", "plugins", "scripts", "docs", "pyproject.toml")


@attrs.frozen
class Mutation:
    """One break: in ``file``, ``old`` becomes ``new``, and the row must have failures then."""

    row: str
    file: str
    old: str
    new: str


MUTATIONS = (
    Mutation(
        "damaged files",
        "tunerkit/serialization/header.py",
        'if digest(text, tensors) != metadata[f"{KEY}.digest"]:',
        "if False:",
    ),
    Mutation(
        "wrong bases",
        "tunerkit/serialization/fingerprint.py",
        "if name not in resized and not _close(*pair)]",
        "if False]",
    ),
    Mutation(
        "other forwards",
        "tunerkit/serialization/fingerprint.py",
        "if name in found and found[name] != value",
        "if False",
    ),
    Mutation(
        "forged files",
        "tunerkit/serialization/tensor_checks.py",
        "and not {found.dtype, built.dtype} <= _PRECISIONS:",
        "and False:",
    ),
    Mutation(
        "base keys in files",
        "tunerkit/serialization/tensor_checks.py",
        "for name in tensors if name not in used]",
        "for name in tensors if False]",
    ),
    Mutation(
        "NaN",
        "tunerkit/serialization/adapter_file.py",
        "if not allow_nonfinite:",
        "if False:",
    ),
    Mutation(
        "mutated headers",
        "tunerkit/serialization/header.py",
        "except (ValueError, RecursionError) as error:",
        "except ValueError as error:",
    ),
    Mutation(
        "mutated configs", "tunerkit/config.py", "except Exception as error:  #", "except ValueError as error:  #"
    ),
    Mutation(
        "mutated YAML",
        "plugins/cli/tunerkit_cli/settings.py",
        "except Exception as problem:",
        "except yaml.YAMLError as problem:",
    ),
    Mutation(
        "evil pickles and import names",
        "tunerkit/serialization/safetensors_file.py",
        "    except _UNREADABLE as error:\n",
        '    except _UNREADABLE as error:\n        __import__("pickle").loads(path.read_bytes())\n',
    ),
    Mutation(
        "names, traversal, links",
        "tunerkit/injection/preconditions.py",
        "not isinstance(adapter, str) or not re.fullmatch(_NAME, adapter)",
        "not isinstance(adapter, str)",
    ),
    Mutation(
        "kills in mid-save",
        "tunerkit/serialization/atomic_writing.py",
        "        _remove_leftovers(path)\n        _replace(",
        "        _remove_leftovers(path)\n        path.unlink(missing_ok=True)\n        _replace(",
    ),
    Mutation(
        "kills of a command",
        "tunerkit/serialization/formats.py",
        "scratch_in(above, SCRATCH, recover=put_back)",
        "scratch_in(above, SCRATCH)",
    ),
    Mutation(
        "commands without room",
        "plugins/cli/tunerkit_cli/running/training.py",
        "if listing.is_saving and isinstance(problem, OSError | RuntimeError):",
        "if False:",
    ),
    Mutation(
        "failing calls",
        "tunerkit/serialization/atomic_writing.py",
        "            temporary.unlink()\n",
        "            pass\n",
    ),
    Mutation(
        "flushes",
        "tunerkit/serialization/atomic_writing.py",
        "            os.fsync(file.fileno())\n",
        "            pass\n",
    ),
    Mutation(
        "full disk",
        "tunerkit/serialization/atomic_writing.py",
        "# ValueError: the path cannot be encoded\n",
        "# ValueError: the path cannot be encoded\n        return\n",
    ),
    Mutation(
        "two writers and a reader",
        "tunerkit/serialization/atomic_writing.py",
        "        os.replace(temporary, path)\n",
        '        path.write_bytes(b"")\n        __import__("time").sleep(0.005)\n        os.replace(temporary, path)\n',
    ),
    Mutation("umask and modes", "tunerkit/serialization/atomic_writing.py", "os.chmod(temporary, mode)", "pass"),
    Mutation("resume", "plugins/transformers/tunerkit_transformers/resuming.py", 'yield f"has no {name}"', "continue"),
    Mutation(
        "bad gradients",
        "tunerkit/serialization/tensor_checks.py",
        "return [name for name in tensors if name in found and",
        "return [name for name in tensors if False and",
    ),
    Mutation(
        "merge cycles",
        "tunerkit/serialization/merge.py",
        "    _write_(module, slots, originals, apart=False)\n    slots.forget",
        "    _write_(module, slots, {n: 1.001 * t for n, t in originals.items()}, apart=False)\n    slots.forget",
    ),
    Mutation(
        "leaks", "tunerkit/injection/preconditions.py", "torch_private.remove_hooks_(model, enter, note_thread)", "pass"
    ),
    Mutation("threads", "tunerkit/injection/preconditions.py", "if running and", "if False and"),
    Mutation("misuse", "tunerkit/serialization/merge.py", "    if injection.is_merged(model):", "    if False:"),
    Mutation(
        "broken plugins",
        "tunerkit/hooks/loading.py",
        "    except BaseException as error:\n                if",
        "    except Exception as error:\n                if",
    ),
)


def apply(mutation: Mutation, root: Path) -> None:
    """Make the break in a copy of the tree. The old text must stand there once, or the break is out of date."""
    path = root / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} has {mutation.old!r} {text.count(mutation.old)} times, not once")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def is_caught(mutation: Mutation) -> tuple[bool, str]:
    """Whether the row has failures with the break, and the first of them."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        root = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                shutil.copy(source, root / name)
        apply(mutation, root)
        return _run(mutation.row, root)


def _run(row: str, root: Path) -> tuple[bool, str]:
    paths = [str(root), *(str(plugin) for plugin in sorted(root.glob("plugins/*")))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "tests.faults", "--subject", "tunerkit", "--row", row]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("- ")]
    # Without a line the row itself did not run: that is no proof that it notices anything.
    return done.returncode == 1 and bool(lines), lines[0] if lines else done.stderr.strip()[-300:]


def main(rows: Sequence[str]) -> int:
    """Try the breaks, print a table, and say by the exit code whether one was not caught."""
    missed = 0
    print("| row | break | caught | the first failure |\n|---|---|---|---|")
    for mutation in MUTATIONS:
        if rows and mutation.row not in rows:
            continue
        caught, line = is_caught(mutation)
        missed += not caught
        print(f"| {mutation.row} | `{mutation.file}` | {'yes' if caught else 'NO'} | {line[:150]} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
