"""The checks that every model family passes: inherit `FamilyConformance` in a plugin's tests.

    class TestConformance(FamilyConformance):
        plugins = ("light_mine.hooks",)

        def configs(self):
            return {"base": MineConfig(vocab_size=101, hidden_size=64, …), "tied": …}

Each check runs for each configuration, against transformers' model of the same random weights. Sequences are up to 55
tokens long: give configurations with an original length of 32, or a window of 8, and they cross it. A check that
cannot hold for a family is named in `exempt` with the reason, and is reported as skipped; removing or overriding one
in any other way is an error.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from light_core.errors import CheckpointError
from light_core.plugins import ModelRuntime
from light_core.types import Step
from light_sdk.testing.driver import Driver, DriverRequest
from light_sdk.testing.loading import load_model
from light_sdk.testing.reference import MAX_MODEL_LEN, NUM_OUTPUT, PREFIX_LEN, Trace, create_model, create_prompts, save_model, trace

__all__ = ["Case", "FamilyConformance"]

TOLERANCE = 1e-4
"""Largest difference of float32 logits. Those of the tiny models are a few units large and rounding moves them by about
1e-5; anything computed differently moves them by more than 1e-2."""


@dataclass(frozen=True, eq=False)
class Case:
    """One configuration: its checkpoint, its references, and the family bound to it.

    Attributes:
        name: of the configuration.
        folder: checkpoint as one safetensors file.
        source: transformers' model.
        traces: what it computes for each prompt.
        runtime: the bound `ModelRuntime`, float32 on the CPU, weights loaded.
    """

    name: str
    folder: Path
    source: Any
    traces: list[Trace]
    runtime: ModelRuntime


class Run:
    """Requests in one driver that follow their traces; logits are compared after every step."""

    def __init__(self, case: Case, driver: Driver, tolerance: float = TOLERANCE) -> None:
        self.case, self.driver, self.tolerance = case, driver, tolerance
        self._traces: dict[DriverRequest, Trace] = {}

    def start(self, index: int, prefix: DriverRequest | None = None, prefix_len: int = 0) -> DriverRequest:
        """Starts prompt `index`."""
        found = self.case.traces[index]
        request = self.driver.start(found.prompt, prefix, prefix_len)
        self._traces[request] = found
        return request

    def step(self, *work: tuple[DriverRequest, int]) -> None:
        """Computes so many tokens of each request. One whose tokens all have KV reads the trace's next token first."""
        for request, _ in work:
            if not request.num_pending:
                request.tokens.append(self._traces[request].tokens[len(request.tokens)])
        for (request, count), logits in zip(work, self.driver.step(work), strict=True):
            end = request.num_computed
            self._compare(logits, self._traces[request].logits[end - count : end], end - count)

    def prefill(self, request: DriverRequest, chunk: int = MAX_MODEL_LEN) -> None:
        """Computes what is pending, `chunk` tokens a step."""
        while request.num_pending:
            self.step((request, min(chunk, request.num_pending)))

    def decode(self, request: DriverRequest, count: int) -> None:
        """Reads the next `count` output tokens."""
        for _ in range(count):
            self.step((request, 1))

    def _compare(self, logits: torch.Tensor, expected: torch.Tensor, position: int) -> None:
        difference = (logits - expected).abs().amax(-1)
        wrong = ~(difference <= self.tolerance)  # also true of NaN
        assert not wrong.any(), (
            f"{self.case.name}: logits after position {position + int(wrong.nonzero()[0])} differ from transformers' by "
            f"{difference[wrong][0].item():.3g}, allowed {self.tolerance:g} ({int(wrong.sum())} of {len(wrong)} positions differ)"
        )


class FamilyConformance:
    """Standard checks of a model family.

    Attributes:
        plugins: module paths of the plugins that serve the family.
        exempt: name of a check to the reason why it cannot hold for this family.
    """

    plugins: ClassVar[tuple[str, ...]] = ()
    exempt: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def configs(self) -> dict[str, Any]:
        """Name to transformers configuration of a tiny model: a vocabulary of about 100 and two layers are enough."""
        raise NotImplementedError

    def rewrite_config(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        """Hook for a subclass: changes the config.json of configuration `name`, for instance to an older spelling."""
        return config

    # ----- machinery

    _cases: ClassVar[dict[str, Case]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_guard(cls)
        cls._cases = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Runs each check that takes `case` for each configuration, grouped by it."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", list(self.configs()), indirect=True, scope="class")

    @pytest.fixture
    def case(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
        """The configuration's checkpoint and references, made once for all checks of the class."""
        name = request.param
        if name not in self._cases:
            self._cases[name] = self.create_case(name, tmp_path_factory.mktemp(name))
        return self._cases[name]

    def create_case(self, name: str, folder: Path) -> Case:
        """Writes the checkpoint of configuration `name` to `folder`, and binds the family to it."""
        source = create_model(self.configs()[name])
        traces = [trace(source, prompt) for prompt in create_prompts(source.config.vocab_size)]
        save_model(source, folder, lambda config: self.rewrite_config(name, config))
        return Case(name, folder, source, traces, load_model(folder, self.plugins, max_model_len=MAX_MODEL_LEN))

    @pytest.fixture(autouse=True)
    def _skip_exempt(self, request: pytest.FixtureRequest) -> None:
        name = getattr(request.node, "originalname", request.node.name)
        if name in self.exempt:
            pytest.skip(self.exempt[name])

    # ----- the guard

    def test_no_check_is_missing(self) -> None:
        """Every standard check is inherited as it is, or declared exempt."""
        check_guard(type(self))

    # ----- weights

    def test_weights_fit(self, case: Case) -> None:
        """The plan takes every tensor of the checkpoint and fills every row of every parameter once."""
        plan = case.runtime.weight_plan
        stored = {strip(name, plan.prefixes): tensor for name, tensor in load_file(case.folder / "model.safetensors").items()}
        planned = {placement.source for placement in plan.placements if not placement.optional}
        assert planned <= set(stored), f"not in the checkpoint: {sorted(planned - set(stored))}"
        left = {name for name in stored if name not in planned and not any(re.fullmatch(pattern, name) for pattern in plan.ignored)}
        assert not left, f"not in the plan: {sorted(left)}"
        parameters = {
            f"{prefix}.{name}": parameter
            for prefix, module in case.runtime.modules.items()
            for name, parameter in module.named_parameters()
        }
        for name, parameter in parameters.items():
            assert not parameter.requires_grad, f"{name} keeps gradients"
            if name not in plan.ties:
                filled = sorted(
                    i for p in plan.placements if p.param == name for i in range(p.offset, p.offset + (p.rows or len(parameter)))
                )
                assert filled == list(range(len(parameter))), f"rows of {name} are filled {len(filled)} times, it has {len(parameter)}"

    def test_wrong_checkpoints_are_refused(self, case: Case, tmp_path: Path) -> None:
        """A tensor that is missing, one too many, or of another shape is an error that names it."""
        tensors = load_file(case.folder / "model.safetensors")
        name = max(tensors, key=lambda name: (tensors[name].ndim, name))
        shorter = tensors[name][:-1].contiguous()
        wrong = {"missing": {k: v for k, v in tensors.items() if k != name}, "extra": tensors | {"stray.weight": tensors[name].clone()}}
        for kind, changed in (wrong | {"shape": tensors | {name: shorter}}).items():
            folder = tmp_path / kind
            folder.mkdir()
            (folder / "config.json").write_text((case.folder / "config.json").read_text())
            save_file(changed, folder / "model.safetensors")
            with pytest.raises(CheckpointError):
                load_model(folder, self.plugins, max_model_len=MAX_MODEL_LEN)

    def test_sharded_checkpoint(self, case: Case, tmp_path: Path) -> None:
        """Several files with an index give the same parameters as one file."""
        size = (case.folder / "model.safetensors").stat().st_size
        save_model(case.source, tmp_path, lambda config: self.rewrite_config(case.name, config), max_shard_size=size // 3)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1, "the tiny model is too small to be cut"
        sharded = load_model(tmp_path, self.plugins, max_model_len=MAX_MODEL_LEN)
        for prefix, module in case.runtime.modules.items():
            other = sharded.modules[prefix].state_dict()
            for name, parameter in module.state_dict().items():
                assert torch.equal(parameter, other[name]), f"{prefix}.{name}"

    # ----- logits, float32 on the CPU

    def test_prefill_logits(self, case: Case) -> None:
        """Logits after every prompt token equal transformers'."""
        for index in range(len(case.traces)):
            run = Run(case, Driver(case.runtime))
            run.prefill(run.start(index))

    def test_decode_logits(self, case: Case) -> None:
        """Logits after every output token equal transformers'."""
        for index in range(len(case.traces)):
            run = Run(case, Driver(case.runtime))
            request = run.start(index)
            run.prefill(request)
            run.decode(request, NUM_OUTPUT - 1)

    def test_greedy_tokens(self, case: Case) -> None:
        """Taking the likeliest token, on its own, gives transformers' output."""
        for expected in case.traces:
            driver = Driver(case.runtime)
            request = driver.start(expected.prompt)
            for _ in range(NUM_OUTPUT):
                (logits,) = driver.step([(request, request.num_pending)])
                request.tokens.append(int(logits[-1].argmax()))
            assert request.tokens == expected.tokens, case.name

    def test_chunked_prefill(self, case: Case) -> None:
        """However the prompt is cut, the logits are the same, and so are those of the output that follows."""
        for index in range(len(case.traces)):
            for chunk in (1, 7, 16):
                run = Run(case, Driver(case.runtime))
                request = run.start(index)
                run.prefill(request, chunk)
                run.decode(request, 2)

    def test_prefix_cache(self, case: Case) -> None:
        """A request that takes the KV of its first tokens from another's cache computes the same."""
        limit = case.runtime.kv_layout.max_shared_len
        sharer = case.traces[3]
        assert limit is None or limit >= len(sharer.prompt), f"{case.name}: choose an original length of {len(sharer.prompt)} or more"
        run = Run(case, Driver(case.runtime))
        first = run.start(2)
        run.prefill(first)
        second = run.start(3, prefix=first, prefix_len=PREFIX_LEN)
        run.step((second, len(sharer.prompt) - PREFIX_LEN))
        for _ in range(NUM_OUTPUT - 1):
            run.step((first, 1), (second, 1))
        run.driver.finish(first)
        assert second.num_computed == len(sharer.tokens) - 1

    def test_prefix_of_the_same_step(self, case: Case) -> None:
        """A request may read KV that another one writes in the same step: layers write all of it before they attend."""
        limit = case.runtime.kv_layout.max_shared_len
        sharer = case.traces[3]
        assert limit is None or limit >= len(sharer.prompt), f"{case.name}: choose an original length of {len(sharer.prompt)} or more"
        run = Run(case, Driver(case.runtime))
        first = run.start(2)
        second = run.start(3, prefix=first, prefix_len=PREFIX_LEN)
        run.step((first, first.num_pending), (second, len(sharer.prompt) - PREFIX_LEN))
        run.step((second, 1), (first, 1))

    def test_mixed_batch(self, case: Case) -> None:
        """Decodes and prefill chunks in one step compute what each computes alone."""
        run = Run(case, Driver(case.runtime))
        short, long, middle, late = (run.start(index) for index in (1, 0, 2, 3))
        run.step((short, 5), (long, 11))
        run.step((long, 13), (short, 1), (middle, 9))
        run.step((middle, 18), (short, 1), (long, 1), (late, 1))
        run.step((long, 20), (late, 28), (short, 1), (middle, 1))
        run.step((short, 1), (long, 1), (middle, 1), (late, 1))
        run.driver.finish(middle)
        run.step((late, 1), (long, 1), (short, 1))

    def test_padding(self, case: Case) -> None:
        """Requests that only fill up a batch, as under CUDA graphs, change nothing for the others."""
        run = Run(case, Driver(case.runtime))
        requests = [run.start(index) for index in range(len(case.traces))]
        for request in requests:
            run.prefill(request)
            request.tokens.append(case.traces[requests.index(request)].output[0])
        driver = run.driver
        logits = driver.run(pad(driver, driver.prepare([(request, 1) for request in requests]), 3))
        for i, found in enumerate(case.traces):
            run._compare(logits[i : i + 1], found.logits[len(found.prompt)][None], len(found.prompt))

    def test_preemption(self, case: Case) -> None:
        """A request that lost its KV half-way is recomputed, prompt and output, and goes on undisturbed."""
        for index, chunk in ((0, 7), (3, 7), (3, MAX_MODEL_LEN)):
            run = Run(case, Driver(case.runtime))
            victim, other = run.start(index), run.start(2)
            run.prefill(victim)
            run.prefill(other)
            for _ in range(NUM_OUTPUT // 2):
                run.step((victim, 1), (other, 1))
            run.driver.preempt(victim)
            run.decode(other, 2)
            run.prefill(victim, chunk)
            run.decode(victim, NUM_OUTPUT - 1 - NUM_OUTPUT // 2)

    def test_slot_order(self, case: Case) -> None:
        """Where in the pool the KV lies, and in which row of the slot table, makes no difference."""
        for seed in (1, 2):
            run = Run(case, Driver(case.runtime, seed=seed))
            first, second = run.start(0), run.start(2)
            run.prefill(first, 16)
            run.prefill(second)
            for _ in range(3):
                run.step((second, 1), (first, 1))

    # ----- lower precision and the GPU

    def test_bfloat16(self, case: Case) -> None:
        """In bfloat16 the family is as close to float32 as transformers is in bfloat16."""
        self._check_bfloat16(case, "cpu")

    @pytest.mark.gpu
    def test_bfloat16_gpu(self, case: Case) -> None:
        """As `test_bfloat16`, with the kernels of the GPU."""
        self._check_bfloat16(case, "cuda")

    @pytest.mark.gpu
    def test_float16_gpu(self, case: Case) -> None:
        """As `test_bfloat16_gpu`: float16 has more digits, so the same bounds hold."""
        self._check_bfloat16(case, "cuda", "float16")

    @pytest.mark.gpu
    def test_cuda_graph(self, case: Case) -> None:
        """A decode step that was captured once, with padding, replays to the same logits as running it."""
        eager, replayed = (self._decode_on_gpu(case, graph) for graph in (False, True))
        torch.testing.assert_close(replayed, eager, atol=1e-3, rtol=0)

    def _check_bfloat16(self, case: Case, device: str, dtype: str = "bfloat16") -> None:
        runtime = load_model(case.folder, self.plugins, dtype, device, MAX_MODEL_LEN)
        source = create_model(self.configs()[case.name]).bfloat16()
        ours, theirs, exact = [], [], []
        for found in case.traces:
            driver = Driver(runtime)
            ours.extend(driver.step([(driver.start(found.prompt), len(found.prompt))]))
            theirs.append(trace(source, found.prompt).logits[: len(found.prompt)])
            exact.append(found.logits[: len(found.prompt)])
        mine, peer, truth = torch.cat(ours), torch.cat(theirs), torch.cat(exact)
        noise = (peer - truth).abs()
        error = (mine - truth).abs()
        assert error.mean() <= 1.25 * noise.mean(), (
            f"{case.name}: {dtype} logits are off by {error.mean():.3g}, transformers' by {noise.mean():.3g}"
        )
        best = truth.topk(2).values
        clear = best[:, 0] - best[:, 1] > 4 * noise.flatten().quantile(0.99)
        assert clear.float().mean() > 0.1, "the tiny model's logits are too close to each other to tell"
        assert torch.equal(mine.argmax(-1)[clear], truth.argmax(-1)[clear]), f"{case.name}: {dtype} changes tokens that noise cannot"

    def _decode_on_gpu(self, case: Case, graph: bool) -> torch.Tensor:
        """Logits of three decode steps of three requests and a padding row, `[3, 3, V]`."""
        driver = Driver(load_model(case.folder, self.plugins, "bfloat16", "cuda", MAX_MODEL_LEN))
        requests = [driver.start(found.prompt) for found in case.traces[:3]]
        driver.step([(request, request.num_pending) for request in requests])
        captured: tuple[torch.cuda.CUDAGraph, Step, torch.Tensor] | None = None
        results = []
        for i in range(3):
            for request, found in zip(requests, case.traces):
                request.tokens.append(found.output[i])
            step = replace(pad(driver, driver.prepare([(request, 1) for request in requests]), 1), max_seq_len=MAX_MODEL_LEN)
            if not graph:
                results.append(driver.run(step).float()[:3].clone())
                continue
            captured = captured or capture(driver, step)
            for name in ("token_ids", "positions", "context_lens", "slots", "cu_seqlens_q", "seq_lens", "rows", "logits_rows"):
                getattr(captured[1], name).copy_(getattr(step, name))
            captured[0].replay()
            results.append(captured[2].float()[:3].clone())
        return torch.stack(results)


def check_guard(cls: type) -> None:
    """Raises `TypeError` if `cls` lacks or overrides a standard check, or exempts one that is none or without a reason."""
    standard = {name for name in vars(FamilyConformance) if name.startswith("test_")}
    exempt: Mapping[str, str] = cls.exempt  # type: ignore[attr-defined]
    if changed := sorted(name for name in standard if getattr(cls, name, None) is not getattr(FamilyConformance, name)):
        raise TypeError(f"{cls.__name__} overrides {', '.join(changed)}: name a check in `exempt` with the reason instead")
    if wrong := sorted(name for name, reason in exempt.items() if name not in standard or not reason.strip()):
        raise TypeError(f"{cls.__name__} exempts {', '.join(wrong)}: not a standard check, or without a reason")


def strip(name: str, prefixes: tuple[str, ...]) -> str:
    """`name` without the first of `prefixes` that it begins with."""
    return next((name[len(prefix) :] for prefix in prefixes if name.startswith(prefix)), name)


def pad(driver: Driver, step: Step, count: int) -> Step:
    """A step of decodes with `count` more that belong to no request: one token in the padding slot and row."""

    def extend(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return torch.cat((tensor, tensor.new_full((count,), value)))

    more = torch.arange(1, count + 1, dtype=torch.int32, device=driver.device)
    return replace(
        step,
        token_ids=extend(step.token_ids, 0),
        positions=extend(step.positions, 0),
        context_lens=extend(step.context_lens, 1),
        slots=extend(step.slots, driver.num_slots - 1),
        cu_seqlens_q=torch.cat((step.cu_seqlens_q, step.cu_seqlens_q[-1] + more)),
        seq_lens=extend(step.seq_lens, 1),
        rows=extend(step.rows, driver.slot_table.shape[0] - 1),
        logits_rows=torch.arange(step.num_tokens + count, device=driver.device),
        num_decodes=step.num_decodes + count,
        shared={},
    )


def capture(driver: Driver, step: Step) -> tuple[torch.cuda.CUDAGraph, Step, torch.Tensor]:
    """The forward pass of `step` as a CUDA graph, the step whose tensors it reads, and its logits."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        driver.run(replace(step, shared={}))
    torch.cuda.current_stream().wait_stream(stream)
    static = replace(step, shared={})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = driver.run(static)
    return graph, static, logits
