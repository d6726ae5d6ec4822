"""The Triton kernels: every test of this folder once more on the interpreter, and what only a GPU shows."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from light_core.engine.requests import EngineRequest
from light_core.engine.sampling import Sampler
from light_core.sampling_params import SamplingParams

FOLDER = Path(__file__).parent
FILES = ("test_sampler.py", "test_errors.py", "test_logprobs.py", "test_state.py")
INTERPRETED = os.environ.get("SAMPLER_BACKEND") == "interpreter"
# numpy warns where the interpreter computes with infinities and NaN, as kernels do on purpose.
ALLOWED = ("-W", "ignore::RuntimeWarning:triton.runtime.interpreter", "-W", "ignore::UserWarning:triton.knobs")


@pytest.mark.skipif(INTERPRETED, reason="runs in the process that this test starts")
@pytest.mark.parametrize("file", FILES)
def test_kernels_on_the_interpreter(file: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--color=no", "-p", "no:cacheprovider", *ALLOWED, str(FOLDER / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "SAMPLER_BACKEND": "interpreter"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_a_step_never_waits_for_the_device(make_sampler: Callable[[int, int], Sampler], backend: str) -> None:
    rows, vocab = 8, 1000
    sampler = make_sampler(rows, vocab)
    logits = torch.randn((rows, vocab), device="cuda")
    every = np.arange(rows, dtype=np.int32)
    params = SamplingParams(top_p=0.9, top_k=50, frequency_penalty=0.5, logit_bias={3: 1.0}, logprobs=4, max_tokens=None, min_tokens=3)
    waiting = []
    try:
        torch.cuda.set_sync_debug_mode("error")
        for n in range(6):
            for row in range(n, rows, 6):
                sampler.admit(row, EngineRequest(row, np.array([1, 2], np.int32), params, frozenset({5}), row))
            waiting.append(sampler.sample(logits, sampler.prepare(every, np.full(rows, n, np.int32))).to_host())
            waiting.append(sampler.prompt_logprobs(logits, torch.zeros(rows, dtype=torch.int32, device="cuda"), 3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(one.result() for one in waiting)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9, "min_p": 0.001}, {"temperature": 20.0, "top_p": 0.9}],
)
def test_large_vocabularies_agree_with_the_reference(
    make_sampler: Callable[[int, int], Sampler], backend: str, params: dict[str, float]
) -> None:
    from light_core.engine import hooks
    from light_core.ops import KernelRegistry, Machine, OpTable

    rows, vocab = 300, 128_256
    registry = KernelRegistry()
    hooks.light_register_kernels(registry)
    registry.finish()
    kernels = make_sampler(rows, vocab)
    reference = Sampler(OpTable(registry, Machine("cuda"), "bfloat16", dict.fromkeys(hooks.OPS, "reference")), rows, vocab, "cuda")
    logits = (3 * torch.randn((rows, vocab), device="cuda")).bfloat16()
    kernels.profile(logits)
    every = np.arange(rows, dtype=np.int32)
    results = []
    for sampler in (kernels, reference):
        for row in range(rows):
            sampler.admit(row, EngineRequest(row, np.array([1], np.int32), SamplingParams(**params), seed=row))
        results.append(sampler.sample(logits, sampler.prepare(every, np.zeros(rows, np.int32))).result().token_ids)
    # float32 sums in another order move the border between two tokens by about 1e-6 of the mass, which in a flat
    # distribution over 128k tokens is a tenth of a token: some rows end at the next token that is kept.
    differs = np.flatnonzero(results[0] != results[1])
    assert len(differs) <= 0.05 * rows
    assert (np.abs(results[0][differs].astype(np.int64) - results[1][differs]) < 64).all()
