"""What an engine does with an adapter: findings, the rules that make them, and an engine as a set of rules."""

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Generic, TypeVar

import attrs

from tunerkit_serving.adapter_folder import Folder
from tunerkit_serving.gguf_header import GgufAdapter

if TYPE_CHECKING:
    from torch import Tensor

Adapter = TypeVar("Adapter", Folder, GgufAdapter)
_NAMED = 3  # keys that a finding spells out; the others are counted


class Severity(StrEnum):
    """What happens, the worst first."""

    REFUSED = "refused"  # the engine reports an error
    WRONG = "wrong"  # it answers, and not as PEFT does
    IGNORED = "ignored"  # it does not read this; the answers do not change
    SLOW = "slow"  # right, at a cost that can be avoided
    FINE = "fine"

    @property
    def is_bad(self) -> bool:
        """Whether the adapter must not be served like this."""
        return self in (Severity.REFUSED, Severity.WRONG)


@attrs.frozen(kw_only=True)
class Finding:
    """One thing that an engine does with this adapter.

    Attributes:
        engine: The engine's name.
        severity: What happens.
        rule: The engine's rule, in one sentence.
        key: The settings or tensors that it applies to.
        source: The file in which the rule stands, and its version.
        mend: The command that avoids it, or for `Severity.FINE` the one that serves the adapter; None if there is none.
    """

    engine: str
    severity: Severity
    rule: str
    key: str
    source: str
    mend: str | None


@attrs.frozen(kw_only=True)
class Rule(Generic[Adapter]):
    """A rule of an engine.

    Attributes:
        severity: What happens where it applies.
        says: The rule, in one sentence.
        source: The file of the engine's source in which it stands.
        finds: Takes the adapter and the largest rank that the server allows, and returns the settings and tensors of
            the adapter that the rule applies to. None means that the rule does not apply.
        mend: Returns the command that avoids it.
        version: Where the rule stands in another version than the engine's.
    """

    severity: Severity
    says: str
    source: str
    finds: Callable[[Adapter, int | None], Iterable[str]]
    mend: Callable[[Adapter], str | None]
    version: str | None = None


@attrs.frozen(kw_only=True)
class Engine:
    """An engine, and what its source says about adapters.

    Attributes:
        name: The name after ``--for``.
        version: What was read.
        folder_rules: Its rules for a folder of PEFT.
        file_rules: Its rules for a GGUF file.
        serves: Returns the command that serves a folder, or a file.
        reads: The file that scales a folder's tensors.
        delta: What the engine adds to each weight if it is given this folder. A module that it leaves out is missing.
    """

    name: str
    version: str
    folder_rules: tuple[Rule[Folder], ...]
    file_rules: tuple[Rule[GgufAdapter], ...]
    serves: Callable[[Folder | GgufAdapter], str]
    reads: str
    delta: Callable[[Folder], "Mapping[str, Tensor]"]

    def check(self, adapter: Folder | GgufAdapter, max_rank: int | None) -> list[Finding]:
        """Apply the rules to an adapter. If none of them is bad, the last finding is `Severity.FINE`.

        Args:
            adapter: What is to be served.
            max_rank: The largest rank that the server was started with; None for the engine's default.

        Returns:
            The findings, the worst first.

        Raises:
            FileError: A pattern of the adapter is malformed.
        """
        if isinstance(adapter, Folder):
            found = [self._finding(rule, adapter, max_rank) for rule in self.folder_rules]
        else:
            found = [self._finding(rule, adapter, max_rank) for rule in self.file_rules]
        findings = [finding for finding in found if finding is not None]
        if not any(finding.severity.is_bad for finding in findings):
            findings.append(self._fine(adapter))
        return sorted(findings, key=lambda finding: list(Severity).index(finding.severity))

    def _finding(self, rule: Rule[Adapter], adapter: Adapter, max_rank: int | None) -> Finding | None:
        keys = list(rule.finds(adapter, max_rank))
        if not keys:
            return None
        more = [f"and {len(keys) - _NAMED} more"] if len(keys) > _NAMED else []
        return Finding(
            engine=self.name,
            severity=rule.severity,
            rule=rule.says,
            key=", ".join(keys[:_NAMED] + more),
            source=f"{rule.source}, {rule.version or self.version}",
            mend=rule.mend(adapter),
        )

    def _fine(self, adapter: Folder | GgufAdapter) -> Finding:
        return Finding(
            engine=self.name,
            severity=Severity.FINE,
            rule="no rule of this engine speaks against this adapter.",
            key=adapter.summary,
            source=f"{self.reads}, {self.version}",
            mend=self.serves(adapter),
        )
