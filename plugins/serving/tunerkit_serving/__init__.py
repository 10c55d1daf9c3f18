"""What engines will refuse or scale wrongly: rules from their sources, over the header of an adapter."""

from tunerkit_serving.adapter_folder import Folder as Folder, read_folder as read_folder
from tunerkit_serving.checking import (
    ENGINES as ENGINES,
    check as check,
    chosen as chosen,
    read as read,
    usual as usual,
)
from tunerkit_serving.findings import Engine as Engine, Finding as Finding, Severity as Severity
from tunerkit_serving.gguf_header import GgufAdapter as GgufAdapter, read_gguf as read_gguf
from tunerkit_serving.printing import as_json as as_json, as_text as as_text
