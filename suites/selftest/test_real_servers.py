"""Real servers with a tiny model answer greedily as the reference does, speculating or not."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from harness.implementations.tiny import checkpoint, gguf, tiny
from harness.reference import ReferenceModel, build
from harness.spec import load

httpx = pytest.importorskip("httpx2")
pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

SPEC, TOKENS = "llama-3.1-8b", 24
LLAMA, VLLM = os.environ.get("MOE_HARNESS_LLAMA_SERVER", ""), os.environ.get("MOE_HARNESS_VLLM", "")
READY_S = 300
"""No server needs longer to load the model, on two busy cores."""
MARGIN = 1e-3
"""Logits of float32 differ from the reference's by 1e-4 at most (`test_tiny`): a closer call is no error."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and its draft, in both formats."""
    root = tmp_path_factory.mktemp("tiny")
    for name, noise in (("model", 0.0), ("draft", 0.1)):
        model = tiny(SPEC, load(SPEC).architecture, noise=noise)
        checkpoint.write(model, root / name)
        gguf.write(model, root / name / "model.gguf")
    return root


@contextmanager
def started(command: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """The server's URL once it is healthy; the server is ended afterwards."""
    env = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    env.pop("PYTHONPATH", None)
    with log.open("w") as output, subprocess.Popen(command, env=env, stdout=output, stderr=output) as server:
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + READY_S
            while not healthy(url):
                assert server.poll() is None, f"the server ended: {log.read_text()[-2000:]}"
                assert time.monotonic() < deadline, f"the server is not ready: {log.read_text()[-2000:]}"
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()


def healthy(url: str) -> bool:
    """Whether requests can be sent."""
    try:
        return bool(httpx.get(f"{url}/health", timeout=2).status_code == 200)
    except httpx.HTTPError:
        return False


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def greedy(model: ReferenceModel, prompt: Sequence[int]) -> tuple[list[int], float]:
    """The reference's answer, its end excluded, and the least margin between its best two tokens."""
    tokens, least = list(prompt), float("inf")
    with torch.no_grad():
        for _ in range(TOKENS):
            best = model.forward(torch.tensor([tokens]))[0, -1, 1:].topk(2)  # without the end, token 0
            least = min(least, float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]) + 1)
    return tokens[len(prompt) :], least


def test_answers_are_the_references(folder: Path, server: tuple[str, ...], tmp_path: Path) -> None:
    """Token for token, for every prompt whose margins are above what float32 costs; and most are."""
    kind, *command = server
    reference = build(tiny(SPEC, load(SPEC).architecture).architecture, dtype=torch.float64)
    reference.load_weights(tiny(SPEC, load(SPEC).architecture).weights)
    port, compared = free_port(), 0
    filled = [word.replace("FOLDER", str(folder)) for word in command]
    with started([*filled, "--port", str(port)], port, tmp_path / "log") as url:
        for length in (1, 3, 8, 17, 33, 64, 70):
            prompt = torch.randint(
                1, 128, (length,), generator=torch.Generator().manual_seed(length)
            ).tolist()
            expected, margin = greedy(reference, prompt)
            if margin > MARGIN:
                assert asked(url, kind, prompt) == expected
                compared += 1
    assert compared >= 5


def asked(url: str, kind: str, prompt: Sequence[int]) -> list[int]:
    """The server's tokens, its end banned as in `greedy`."""
    body = {"prompt": list(prompt), "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    if kind == "llama":
        answer = httpx.post(f"{url}/completion", json={**body, "n_predict": TOKENS, "return_tokens": True})
        return list(answer.raise_for_status().json()["tokens"])
    more = {"model": "tiny", "allowed_token_ids": list(range(1, 128)), "return_token_ids": True}
    answer = httpx.post(f"{url}/v1/completions", json={**body, **more}, timeout=60)
    return list(answer.raise_for_status().json()["choices"][0]["token_ids"])


LLAMA_COMMAND = (
    "llama", LLAMA, "-m", "FOLDER/model/model.gguf", "-c", "2048", "-np", "2", "-t", "1",
    "-ctk", "f32", "-ctv", "f32", "-fa", "off",
)  # fmt: skip
VLLM_COMMAND = (
    "vllm", VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", "FOLDER/model",
    "--served-model-name", "tiny", "--dtype", "float32", "--block-size", "32", "--max-model-len", "256",
    "--max-num-seqs", "4", "--enforce-eager",
)  # fmt: skip
DRAFTED = ("--spec-type", "draft-simple", "-md", "FOLDER/draft/model.gguf", "-ctkd", "f32", "-ctvd", "f32")
SPECULATED = '{"method": "draft_model", "model": "FOLDER/draft", "num_speculative_tokens": 3}'


@pytest.fixture(
    params=[
        pytest.param(LLAMA_COMMAND, id="llama.cpp"),
        pytest.param((*LLAMA_COMMAND, *DRAFTED), id="llama.cpp-draft"),
        pytest.param(VLLM_COMMAND, id="vllm"),
        pytest.param((*VLLM_COMMAND, "--speculative-config", SPECULATED), id="vllm-draft"),
    ]
)
def server(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """A kind and a command, for the programs that the environment names."""
    if not request.param[1]:
        pytest.skip("MOE_HARNESS_LLAMA_SERVER or MOE_HARNESS_VLLM does not name a program")
    return request.param
