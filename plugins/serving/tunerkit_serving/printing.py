"""Findings as text and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path

import attrs

from tunerkit_serving.findings import Finding


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
