"""Findings, and what a comparison with an engine found, as text and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from tunerkit_serving.findings import Finding

if TYPE_CHECKING:
    from tunerkit_serving.agreement import Agreement


def as_text(path: Path, findings: Sequence[Finding]) -> str:
    """Return the findings, a paragraph each.

    Args:
        path: What was checked.
        findings: What was found.

    Returns:
        Lines of text, the last of which says whether the adapter can be served.
    """
    lines: list[str] = []
    for finding in findings:
        lines.append(f"{finding.engine}: {finding.severity.value}: {finding.rule}")
        lines += [f"  found: {finding.key}", f"  source: {finding.source}"]
        lines += [f"  {'serve' if finding.severity == 'fine' else 'mend'}: {finding.mend}"] if finding.mend else []
    bad = list(dict.fromkeys(finding.engine for finding in findings if finding.severity.is_bad))
    end = f"{path}: not for {', '.join(bad)}" if bad else f"{path}: fit for all of them"
    return "\n".join([*lines, end])


def as_json(path: Path, findings: Sequence[Finding]) -> str:
    """Return the findings as a JSON object with ``path``, ``fit`` and ``findings``."""
    fit = not any(finding.severity.is_bad for finding in findings)
    rows = [attrs.asdict(finding) for finding in findings]
    return json.dumps({"path": str(path), "fit": fit, "findings": rows}, indent=2)


def agreement_as_text(found: "Agreement") -> str:
    """Return the figures of a comparison, a line each, and the cause of what differs."""
    template = "equal, or not compared" if found.template_at is None else f"differs from token {found.template_at} on"
    return "\n".join(
        [
            f"version: {found.version}, {found.tokens} tokens",
            f"difference of log-probabilities: {found.mean:.2g} in the mean, {found.largest:.2g} at most",
            f"  without the adapter: {found.base:.2g}; with a perturbed one: {found.perturbed:.2g}, which is "
            f"{found.moved:.2g} from the trainer's own",
            f"importance ratio: {found.ratio:.4f}",
            f"likeliest tokens that are equal, up to the first that differs: {', '.join(map(str, found.greedy))}",
            f"chat template: {template}",
            f"wrong: {found.cause}" if found.cause else "engine and trainer agree",
        ]
    )


def agreement_as_json(found: "Agreement") -> str:
    """Return a comparison as a JSON object with the fields of `Agreement`."""
    return json.dumps(attrs.asdict(found), indent=2)
