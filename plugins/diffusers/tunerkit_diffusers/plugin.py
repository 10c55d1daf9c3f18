"""The formats of this plugin."""

from collections.abc import Iterable

from tunerkit.plugin import Format, hookimpl
from tunerkit_diffusers import describing, diffusers_reading, kohya_reading, writing
from tunerkit_diffusers.options import DiffusersOptions, KohyaOptions


@hookimpl
def tunerkit_formats() -> Iterable[Format]:
    """Register the formats."""
    return [
        Format(
            "diffusers",
            sniff=diffusers_reading.sniff,
            read=diffusers_reading.read,
            write=writing.write_diffusers,
            options=DiffusersOptions,
            describe=describing.describe_diffusers,
        ),
        Format(
            "kohya",
            sniff=kohya_reading.sniff,
            read=kohya_reading.read,
            write=writing.write_kohya,
            options=KohyaOptions,
            describe=describing.describe_kohya,
        ),
    ]
