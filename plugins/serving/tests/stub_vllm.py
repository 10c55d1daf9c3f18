"""A server on localhost with vLLM's routes for adapters, and its words: 0.32, as it was run."""

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

BASE = "base"


class StubVllm(ThreadingHTTPServer):
    """What a test sets decides how it misbehaves; what it is asked is kept in ``asked``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[str] = []
        self.adapters: dict[str, str] = {}
        self.paths: dict[str, str] = {}
        self.routes = True  # whether it was started to load adapters while it runs
        self.says: tuple[int, str] | None = None  # what it says instead of loading
        self.max_rank = 512
        self.ignores = False  # whether adapters are dead
        self.shift = 0.0  # of another base
        self.forgets = False  # whether another replica answers than the one that loaded
        self.dies_after_load = False
        self.breaks = 0  # how many connections are closed without an answer
        self.free = threading.Event()  # unset, it holds back all answers
        self.free.set()
        self.key: str | None = None
        self.model: nn.Module | None = None  # a base that answers; None for numbers that depend on the adapter alone
        self.nets: dict[str, nn.Module] = {}
        self.computing = threading.Lock()  # held while a model answers: threads that compute at once slow one another
        self.tokenizer: Any = None  # for chats
        self.processed = False  # whether log-probabilities are at the temperature of the request

    def serve(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Answer with a copy of a base model, to which peft adds the adapters."""
        self.model, self.tokenizer = copy.deepcopy(model).eval(), tokenizer
        self.nets = {BASE: self.model}

    def count(self, route: str) -> int:
        """How often a route was asked for."""
        return sum(route in each for each in self.asked)

    def answer(self, verb: str, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        """The status and the answer."""
        if (verb, route) == ("GET", "/v1/models"):
            base = {"id": BASE, "root": "/models/base", "parent": None}
            return 200, {
                "object": "list",
                "data": [base, *({"id": n, "root": self.paths[n], "parent": BASE} for n in self.adapters)],
            }
        if (verb, route) == ("POST", "/v1/completions"):
            return self._completed(body) if self.model is None else self._drawn(body)
        if (verb, route) == ("POST", "/v1/chat/completions"):
            ids = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=True)
            return 200, {"prompt_token_ids": ids["input_ids"]}
        if self.routes and (verb, route) == ("POST", "/v1/load_lora_adapter"):
            return self._loaded(body["lora_name"], Path(body["lora_path"]))
        if self.routes and (verb, route) == ("POST", "/v1/unload_lora_adapter"):
            name = body["lora_name"]
            if self.adapters.pop(name, None) is None:
                return 404, _error(404, f"The lora adapter '{name}' cannot be found.")
            return 200, f"Success: LoRA adapter '{name}' removed successfully."
        return 404, {"detail": "Not Found"}

    def _loaded(self, name: str, folder: Path) -> tuple[int, Any]:
        if self.says is not None:
            return self.says[0], _error(*self.says)
        if name in self.adapters:
            return 400, _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not (folder / "adapter_config.json").is_file():
            return 404, _error(404, f"Loading lora {name} failed: No adapter found for {folder}")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            return 400, _error(400, f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.")
        tensors = load_file(folder / "adapter_model.safetensors")
        if not self.forgets:
            self.adapters[name] = str(sum(float((tensors[b]).abs().sum()) for b in tensors if ".lora_B." in b))
            self.paths[name] = str(folder)
            if self.model is not None:
                self.nets[name] = _with_adapter(self.model, folder)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _completed(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, prompt = body["model"], body["prompt"]
        if name not in (BASE, *self.adapters):
            return 404, _error(404, f"The model `{name}` does not exist.")
        change = 0.0 if self.ignores or name == BASE else float(self.adapters[name])
        scores = [-1.0 - self.shift - change - 0.01 * prompt[0]] * body["max_tokens"]
        answer = {"token_ids": [prompt[0]] * len(scores), "logprobs": {"token_logprobs": scores}}
        return 200, {"choices": [{"index": index, **answer} for index in range(body["n"])]}

    def _drawn(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, prompt = body["model"], body["prompt"]
        if name not in (BASE, *self.adapters):
            return 404, _error(404, f"The model `{name}` does not exist.")
        net = self.nets[BASE if self.ignores else name]
        with self.computing, torch.no_grad():
            choices = [self._choice(net, prompt, body, index) for index in range(body["n"])]
        return 200, {"choices": choices}

    def _choice(self, net: nn.Module, prompt: list[int], body: dict[str, Any], index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed((body["seed"] or 0) + index)
        tokens: list[int] = []
        logprobs: list[float] = []
        new, cache = prompt, None
        while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in body["stop_token_ids"]):
            found = net(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True)
            last, cache = found.logits[0, -1].float().log_softmax(-1), found.past_key_values
            cold = (last / (body["temperature"] or 1e-6)).log_softmax(-1)
            new = [int(torch.multinomial(cold.exp(), 1, generator=generator))]
            tokens += new
            is_cold = self.processed and body["temperature"] > 0  # the likeliest token's are at temperature 1
            logprobs.append(float((cold if is_cold else last)[new[0]]))
        return {"index": index, "token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}


def _with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload().eval()


def _error(code: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}


class _Handler(BaseHTTPRequestHandler):
    server: StubVllm

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def _handle(self, verb: str) -> None:
        stub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        stub.asked.append(f"{verb} {self.path} {body.decode()}")
        stub.free.wait()
        if stub.breaks:
            stub.breaks -= 1
            self.close_connection = True
            return
        answer: Any
        if stub.key is not None and self.headers.get("Authorization") != f"Bearer {stub.key}":
            status, answer = 401, {"error": "Unauthorized"}
        else:
            status, answer = stub.answer(verb, self.path, json.loads(body) if body else {})
        if stub.dies_after_load and "/load_lora" in self.path:
            stub.breaks = 1000
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


@contextmanager
def running(stub: StubVllm | None = None) -> Iterator[StubVllm]:
    """A stub that answers inside the block."""
    with stub or StubVllm() as stub:
        thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield stub
        finally:
            stub.shutdown()
            thread.join()


def perturb_(model: torch.nn.Module) -> None:
    """Change what is trained, as a training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def save_base(folder: Path) -> Path:
    """Save a random decoder that has the tokens of a probe, with its tokenizer; return the folder.

    Its heads are as small as vLLM's attention takes them on a CPU.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.support.tiny_models import save_tiny_llama

    config = AutoConfig.from_pretrained(save_tiny_llama(folder), vocab_size=64, head_dim=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
