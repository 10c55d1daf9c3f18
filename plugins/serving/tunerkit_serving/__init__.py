"""What engines take of an adapter: rules from their sources, and versions of it for a running one."""

import importlib
from typing import TYPE_CHECKING, Any

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
from tunerkit_serving.printing import (
    agreement_as_json as agreement_as_json,
    agreement_as_text as agreement_as_text,
    as_json as as_json,
    as_text as as_text,
)

if TYPE_CHECKING:
    from tunerkit_serving.agreement import Agreement as Agreement, check_rollout as check_rollout
    from tunerkit_serving.publishing import Publisher as Publisher, publisher as publisher
    from tunerkit_serving.rollouts import Rollout as Rollout, RolloutError as RolloutError, rollout as rollout
    from tunerkit_serving.server import (
        Answer as Answer,
        Draw as Draw,
        Listing as Listing,
        PublishError as PublishError,
        Sampling as Sampling,
        Server as Server,
        ServerGone as ServerGone,
    )
    from tunerkit_serving.sglang_http import SglangServer as SglangServer
    from tunerkit_serving.vllm_http import VllmServer as VllmServer
    from tunerkit_serving.vllm_in_process import VllmInProcess as VllmInProcess

_PLACES = {  # only what talks to a server needs HTTP
    **dict.fromkeys(("Agreement", "check_rollout"), "agreement"),
    **dict.fromkeys(("Publisher", "publisher"), "publishing"),
    **dict.fromkeys(("Rollout", "RolloutError", "rollout"), "rollouts"),
    **dict.fromkeys(("Answer", "Draw", "Listing", "PublishError", "Sampling", "Server", "ServerGone"), "server"),
    "SglangServer": "sglang_http",
    "VllmServer": "vllm_http",
    "VllmInProcess": "vllm_in_process",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
