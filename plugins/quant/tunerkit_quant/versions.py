"""The oldest version of each library with which its kind works."""

import re
from importlib import metadata


def too_old(distribution: str, oldest: tuple[int, ...]) -> str | None:
    """Return why an installed distribution is too old, as the end of a sentence about a layer; None if it is not.

    Args:
        distribution: Its name.
        oldest: The first numbers of the oldest version that works.
    """
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return f"needs {distribution}, which is not installed: install {distribution}>={_text(oldest)}"
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[: len(oldest)])
    if numbers < oldest:
        return f"needs {distribution}>={_text(oldest)}, and {found} is installed: upgrade it"
    return None


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
