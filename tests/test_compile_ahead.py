"""Kernels that are compiled ahead: those of the real families compile for an H200, from shapes alone, and start-up compiles
nothing that was not asked for before. Without a GPU, in processes of their own, as Triton's interpreter has no compiler.

The bounds are about kernels, so a change of one is seen here: registers that are spilled, shared memory that is not there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from light_core import LLM, SamplingParams
from light_sdk.testing.absent_gpu import GPUS
from light_sdk.testing.compiling import check_kernels, compiled_kernels

STACK_BYTES = {"_prefix_kernel": 512, "_prefill_kernel": 512}
"""Tiles of 128 queries keep 255 registers and more busy. What they spill is kept in L1, and smaller tiles are slower."""

CONFIGS = Path(__file__).parent / "model_configs"
"""config.json of published models, with two layers."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's, for all models and all of pytest's workers: they have the sampler in common."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "triton"


@pytest.mark.parametrize(
    ("model", "num_steps", "kernels"),
    [
        ("llama-3.1-8b", None, {"_row_kernel", "_tile_kernel", "_decode_kernel", "_prefix_kernel", "_prefill_kernel", "_merge_kernel"}),
        (
            "deepseek-v2-lite",
            4,
            {"_decode_kernel", "_join_keys_kernel", "_prefix_kernel", "up_descriptor_kernel", "down_descriptor_kernel"},
        ),
        pytest.param(
            "deepseek-v2-lite",
            None,
            {"_tile_kernel", "_sort_kernel", "_prefill_kernel", "up_kernel", "down_kernel"},
            marks=pytest.mark.slow,
        ),
        pytest.param("mixtral-8x7b", None, {"_decode_kernel", "_route_tokens_kernel", "_sort_kernel"}, marks=pytest.mark.slow),
        pytest.param("qwen2-vl-7b", None, {"_decode_kernel", "_prefill_kernel", "_rotary_kv_kernel"}, marks=pytest.mark.slow),
    ],
)
def test_kernels_of_real_shapes_compile_for_an_h200_and_none_is_forgotten(
    model: str, num_steps: int | None, kernels: set[str], tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "config.json").write_bytes((CONFIGS / f"{model}.json").read_bytes())
    reports = compiled_kernels(tmp_path, gpu="h200", cache=cache, num_steps=num_steps)
    assert not check_kernels(reports, shared_bytes=GPUS["h200"].shared_bytes, stack_bytes=STACK_BYTES)
    assert kernels | {"_sample_rows", "_token_logprobs", "_rms_norm_kernel"} <= {report.name for report in reports}
    assert all(0 < report.registers <= 255 for report in reports)
    steps = list(dict.fromkeys(report.step for report in reports))
    assert steps[:3] == ["one decode", "the largest step", "512 decodes"], "what start-up needs first is asked for first"


KERNELS = """
import threading

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.compiler.errors import CompilationError
from triton.runtime.autotuner import Config

from light_core.engine.compilation import CompileQueue
from light_core.engine.fakes import fake_device
from light_sdk.testing.absent_gpu import GPUS, absent_gpu


@triton.jit
def copy(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def wrong(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 0, "no such block")


@triton.autotune([Config({"BLOCK": 64}), Config({"BLOCK": 128})], key=["n"])
@triton.jit
def tuned(x_ptr, n, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.program_id(0), n)


compiled = []
knobs.compilation.listener = lambda *, src, **_: compiled.append((src.fn.fn.__name__, threading.current_thread().name))
queue = CompileQueue(2)
launch = triton.runtime.jit.JITFunction.run
launchers = []
with absent_gpu(GPUS["h200"]) as launches:
    driver = triton.runtime.driver.active
    make_launcher = driver.launcher_cls
    driver.launcher_cls = lambda source, metadata: launchers.append(threading.current_thread().name) or make_launcher(source, metadata)
    with fake_device():
        x = torch.empty(4096, dtype=torch.bfloat16, device="cuda:0")
        odd = x.narrow(0, 1, 4095)
        with queue.collecting():
            copy[(4,)](x, x, 4096, BLOCK=1024)
            copy[(4,)](x, x, 4000, BLOCK=1024)  # the same kernel: both lengths are multiples of 16
            copy[(4,)](odd, x, 4096, BLOCK=1024)  # another: the address is not aligned
            wrong[(1,)](x, BLOCK=64)
            tuned[(1,)](x, 4096)
            elsewhere = threading.Thread(target=lambda: copy[(1,)](torch.empty(16), torch.empty(16), 16, BLOCK=16))
            elsewhere.start()
            elsewhere.join()
        assert len(queue.launched) == 4 and queue.launched[0] is queue.launched[1] is not queue.launched[2]
        assert [pending.function for pending in queue.pending] == ["copy", "copy", "wrong"]
        assert len(launches) == 1, "what another thread launches is launched"
        assert triton.runtime.jit.JITFunction.run is launch
        (error,) = queue.finish()
        assert isinstance(error, CompilationError), error
        late = [name for name, thread in compiled if not thread.startswith("compile")]
        assert late == ["copy"], late
        assert sum(name.startswith("compile") for name in launchers) == 2, "Triton may have a C compiler make them"
        compiled.clear()
        copy[(4,)](x, x, 4096, BLOCK=1024)
        copy[(4,)](odd, x, 4000, BLOCK=1024)
        assert len(launches) == 3 and not compiled, compiled
        try:
            wrong[(1,)](x, BLOCK=64)
        except CompilationError as error:
            assert "no such block" in str(error)
        else:
            raise AssertionError("a kernel that does not compile was launched")
        copy[(4,)](odd, odd, 4000, BLOCK=1024)
        assert [name for name, _ in compiled][-1:] == ["copy"], "what nobody asked for is compiled when it is launched"
"""


def test_kernels_that_were_asked_for_are_those_that_are_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    command = [sys.executable, "-W", "ignore", str(tmp_path / "kernels.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


TRACES = """
import gc
import sys
import threading

import torch
import triton
from light_core.config import EngineConfig
from light_core.engine import fakes
from light_core.engine.ahead import AheadCompilation
from light_core.engine.compilation import CompileQueue
from light_core.engine.loading import resolve_model
from light_core.engine.rehearsal import Rehearsal
from light_sdk.ops import counters
from light_sdk.testing.absent_gpu import GPUS, absent_gpu

gpu, launch = GPUS["h200"], triton.runtime.jit.JITFunction.run
config = EngineConfig(model=sys.argv[1], load_format="dummy", dtype="bfloat16")
resolved = resolve_model(config, device="cuda:0")
torch.manual_seed(3)
drawn = torch.rand(1)
torch.manual_seed(3)
queue = CompileQueue(1)
queue._pool.submit = lambda run: queue._pool.__class__.submit(queue._pool, lambda: None)  # compiles nothing: it is not asked for here
with absent_gpu(gpu):
    rehearsal = Rehearsal(resolved, config, gpu.machine)
    ahead = AheadCompilation(rehearsal, queue)
    ahead.collect()
assert len(queue.launched) > 30 and len(queue.pending) > 30
ahead.cancel()
del rehearsal, ahead, queue
gc.collect()
left = [thing for thing in gc.get_objects() if type(thing) is fakes._FakeTensor]
assert not left, gc.get_referrers(left[0])
assert not counters._counters
assert triton.runtime.jit.JITFunction.run is launch
assert torch.get_default_dtype() == torch.float32 and torch.rand(1) == drawn
assert "torch._dynamo" not in sys.modules, "a second of the start"
assert threading.active_count() == 1, threading.enumerate()
"""


def test_nothing_is_left_of_a_rehearsal(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((CONFIGS / "deepseek-v2-lite.json").read_bytes())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-W", "ignore", "-c", TRACES, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


FAMILIES = """
import json
import sys
from pathlib import Path

import transformers as T
from light_core.config import EngineConfig
from light_core.engine.compilation import CompileQueue
from light_core.engine.loading import resolve_model
from light_core.engine.rehearsal import Rehearsal
from light_sdk.testing.absent_gpu import GPUS, absent_gpu

gpu, folder = GPUS["h200"], Path(sys.argv[1])
shape = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
shape |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
clip = T.CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
llama = T.LlamaConfig(**shape, architectures=["LlamaForCausalLM"])
qwen = {"kv_channels": 64, "seq_length": 256, "layer_norm_epsilon": 1e-6, "rotary_pct": 1.0, "rotary_emb_base": 10000, "no_bias": True}
configs = {
    "BloomForCausalLM": T.BloomConfig(vocab_size=1024, hidden_size=256, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "Qwen2ForCausalLM": T.Qwen2Config(**shape),
    "Qwen3ForCausalLM": T.Qwen3Config(**shape, head_dim=64),
    "Qwen3MoeForCausalLM": T.Qwen3MoeConfig(**shape, **experts, head_dim=64),
    "MixtralForCausalLM": T.MixtralConfig(**shape),
    "LlavaForConditionalGeneration": T.LlavaConfig(text_config=llama, vision_config=clip, image_token_index=9),
    "QWenLMHeadModel": {"model_type": "qwen", "use_dynamic_ntk": True, "use_logn_attn": True, **shape, **qwen},
}
with absent_gpu(gpu) as launches:
    for architecture, config in configs.items():
        raw = config if isinstance(config, dict) else json.loads(config.to_json_string())
        (folder / "config.json").write_text(json.dumps(raw | {"architectures": [architecture]}))
        engine = EngineConfig(model=str(folder), load_format="dummy", dtype="bfloat16")
        queue = CompileQueue(1)
        queue._pool.submit = lambda run, pool=queue._pool: type(pool).submit(pool, lambda: None)  # compiles nothing
        with queue.collecting():
            steps = list(Rehearsal(resolve_model(engine, device="cuda:0"), engine, gpu.machine).steps(queue.launched))
        assert len(steps) > 30 and queue.launched, (architecture, steps)
        queue.cancel()
print(*configs)
"""


def test_every_family_can_be_rehearsed(tmp_path: Path) -> None:
    """None reads a tensor on the host in a step. DeepSeek, Llama and Qwen2-VL are above."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-W", "ignore", "-c", FAMILIES, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 7


SERVED = """
import sys

import numpy as np
import torch
from light_core.config import EngineConfig
from light_core.engine.compilation import CompileQueue
from light_core.engine.graphs import padded_size
from light_core.engine.loading import resolve_model
from light_core.engine.pieces import run_layers
from light_core.engine.rehearsal import Rehearsal
from light_core.engine.requests import EngineRequest
from light_core.sampling_params import SamplingParams
from light_core.scheduler import Scheduler
from light_sdk.testing.absent_gpu import GPUS, absent_gpu, fake_gpu


class Pieces:
    def __init__(self, runner):
        self.runner, self.sizes = runner, runner.piece_sizes

    def padded(self, num_tokens):
        return padded_size(self.sizes, num_tokens, self.sizes)

    def run(self, hidden, step):
        return run_layers(self.runner.runtime, self.runner.kv, hidden, step)


gpu, rng = GPUS["h200"], np.random.default_rng(1)
config = EngineConfig(model=sys.argv[1], load_format="dummy", dtype="bfloat16", hf_overrides={"num_hidden_layers": 2})
resolved = resolve_model(config, device="cuda:0")
queue = CompileQueue(1)
queue._pool.submit = lambda run: type(queue._pool).submit(queue._pool, lambda: None)  # compiles nothing: it is not asked for here
limits = resolved.limits
scheduler = Scheduler(
    num_slots=1 << 20,
    max_num_seqs=limits.max_num_seqs,
    max_num_batched_tokens=limits.max_num_batched_tokens,
    max_model_len=limits.max_model_len,
)
requests = np.stack([rng.lognormal(5.8, 1.2, 400).clip(1, 9000), rng.lognormal(2.0, 0.8, 400).clip(1, 40)]).astype(int).T
with absent_gpu(gpu):
    rehearsal = Rehearsal(resolved, config, gpu.machine)
    runner = rehearsal._runner
    with queue.collecting():
        for name in rehearsal.steps(queue.launched):
            pass
        asked_for = [pending.function for pending in queue.pending]
        for row in list(runner.sampler._admitted):
            runner.sampler.release(row)
        runner._pieces = Pieces(runner)
        mixed = 0
        for index in range(3 * len(requests)):
            if index < len(requests):
                (prompt_len, max_tokens), prompt = requests[index], rng.integers(0, 1000, requests[index][0], np.int32)
                scheduler.add(EngineRequest(index, prompt, SamplingParams(max_tokens=int(max_tokens), ignore_eos=True)))
            plan = scheduler.plan() if index % 4 == 0 or index > len(requests) else None
            if plan is None:
                continue
            with fake_gpu():
                if plan.num_decodes < plan.num_tokens:
                    mixed += 1
                    runner.launch(plan)
                else:  # from a graph; who comes and goes is the sampler's
                    for row in plan.released_rows:
                        runner.sampler.release(row)
            later = [pending.function for pending in queue.pending][len(asked_for) :]
            assert not later, (later, plan)
            scheduler.commit(plan, np.zeros(len(plan.sampled), np.int32))
assert mixed > 60, mixed
queue.cancel()
"""


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mixtral-8x7b", "deepseek-v2-lite"])
def test_serving_asks_for_no_kernel_that_was_not_rehearsed(name: str, tmp_path: Path) -> None:
    """Steps of several hundred requests, of which no two are alike: a kernel that only some of them need would make everybody
    wait for a compiler."""
    (tmp_path / "config.json").write_bytes((CONFIGS / f"{name}.json").read_bytes())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-W", "ignore", "-c", SERVED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ on a GPU

STARTED = """
import sys
import torch
from triton import knobs
from light_core import LLM, SamplingParams
from light_core.engine import compilation

compiled, queues = [], []
knobs.compilation.listener = lambda *, src, **_: compiled.append(src.fn.fn.__name__)


class Queue(compilation.CompileQueue):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        queues.append(self)


compilation.CompileQueue = Queue
torch.manual_seed(5)
options = {"max_num_seqs": 64, "max_model_len": 512, "compile_ahead": sys.argv[1] == "ahead"}
llm = LLM("demo", device="cuda", gpu_memory_utilization=0.3, **options)
asked_for, by_start = sum(len(queue.pending) for queue in queues), len(compiled)
prompts = [{"prompt_token_ids": [5, 6, 7] * length} for length in (1, 2, 5, 20, 90, 160)]
llm.generate(prompts[:1], SamplingParams(max_tokens=4), use_tqdm=False)
llm.generate(prompts * 20, [SamplingParams(max_tokens=2 + index % 17, ignore_eos=True) for index in range(120)], use_tqdm=False)
print(asked_for, by_start, len(compiled) - by_start, torch.rand(1).item())
"""


@pytest.mark.gpu
def test_an_engine_compiles_nothing_that_was_not_asked_for_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(how: str) -> list[str]:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / how))
        done = subprocess.run([sys.executable, "-c", STARTED, how], capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-4:]

    (asked_for, by_start, later, drawn), (nothing, without, later_without, drawn_without) = start("ahead"), start("not")
    assert int(asked_for) == int(by_start) >= int(without) > int(nothing) == 0
    assert int(later) == 0 <= int(later_without), "no request waits for a compiler"
    assert drawn == drawn_without, "the host's random numbers are as they would have been"


@pytest.mark.gpu
def test_outputs_and_memory_are_the_same_either_way() -> None:
    def run(compile_ahead: bool) -> tuple[list[int], int]:
        options = {
            "device": "cuda",
            "gpu_memory_utilization": 0.3,
            "max_num_seqs": 64,
            "max_model_len": 512,
            "compile_ahead": compile_ahead,
        }
        llm = LLM("demo", **options)
        try:
            params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
            outputs = llm.generate([{"prompt_token_ids": [5, 6, 7, 8]}], params, use_tqdm=False)
            return outputs[0].outputs[0].token_ids, llm.engine.stats().kv_slots_total
        finally:
            llm.shutdown()

    (tokens, num_slots), (expected, num_expected) = run(True), run(False)
    assert tokens == expected
    assert abs(num_slots - num_expected) <= 0.02 * num_expected


HELPED = """
import sys
from light_core.engine.compile_helper import CompileHelper

helper = CompileHelper(2)
from itertools import islice
from triton import knobs
from light_core.config import EngineConfig
from light_core.engine.compilation import CompileQueue
from light_core.engine.loading import resolve_model
from light_core.engine.rehearsal import Rehearsal
from light_sdk.testing.absent_gpu import GPUS, absent_gpu

gpu = GPUS["h200"]
config = EngineConfig(model=sys.argv[1], load_format="dummy", dtype="bfloat16")
resolved = resolve_model(config, device="cuda:0")
queue = CompileQueue(4, helper)
found = []
knobs.compilation.listener = lambda *, src, cache_hit, **_: found.append((src.name, cache_hit))
with absent_gpu(gpu):
    with queue.collecting():
        assert list(islice(Rehearsal(resolved, config, gpu.machine).steps(queue.launched), 1))
    assert len({pending.result().metadata.name for pending in queue.pending}) >= 5
assert not queue.finish()
assert len(found) == len(queue.pending) >= 8 and all(is_there for _, is_there in found), found
"""


def test_a_helper_compiles_the_kernels_of_a_step(tmp_path: Path) -> None:
    """All of them, so that the engine finds them in Triton's cache."""
    (tmp_path / "config.json").write_bytes((CONFIGS / "llama-3.1-8b.json").read_bytes())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-W", "ignore", "-c", HELPED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
