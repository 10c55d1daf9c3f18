"""The format that this plugin brings."""

from collections.abc import Iterable

from tunerkit import Format, hookimpl
from tunerkit_peft.describing import describe
from tunerkit_peft.files import sniff
from tunerkit_peft.options import PeftOptions
from tunerkit_peft.reading import read
from tunerkit_peft.writing import write


@hookimpl
def tunerkit_formats() -> Iterable[Format]:
    """Register the format."""
    return [Format("peft", sniff=sniff, read=read, write=write, options=PeftOptions, describe=describe)]
