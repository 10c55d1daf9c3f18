"""A stub of vLLM for each test, and a small base that it answers with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from plugins.serving.tests.stub_vllm import StubVllm, running, save_base


@pytest.fixture
def stub() -> Iterator[StubVllm]:
    """A server whose numbers depend on the adapter alone."""
    with running() as stub:
        yield stub


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small decoder with its tokenizer."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def engine(stub: StubVllm, folder: Path) -> StubVllm:
    """A server that computes with that decoder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stub.serve(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    return stub
