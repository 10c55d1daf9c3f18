"""The format that this plugin reads and writes."""

from collections.abc import Iterable

from tunerkit.plugin import Format, hookimpl
from tunerkit_gguf.describing import describe
from tunerkit_gguf.options import GgufOptions
from tunerkit_gguf.reading import read, sniff
from tunerkit_gguf.writing import write


@hookimpl
def tunerkit_formats() -> Iterable[Format]:
    """Register the format."""
    return [Format("gguf", sniff=sniff, read=read, write=write, options=GgufOptions, describe=describe)]
