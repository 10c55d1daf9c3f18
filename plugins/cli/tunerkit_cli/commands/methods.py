"""``tunerkit methods``."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import tunerkit


def methods() -> None:
    """List the installed methods. A plugin that failed to load is listed with its error."""
    table = Table("method", "distribution", "version", "error")
    for name, info in tunerkit.methods().items():
        table.add_row(*map(escape, (name, info.distribution, info.version, info.error or "")))
    Console().print(table)
