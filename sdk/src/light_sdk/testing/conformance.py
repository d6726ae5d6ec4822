"""The checks that every model family passes: inherit `FamilyConformance` in a plugin's tests.

    class TestConformance(FamilyConformance):
        plugins = ("light_mine.hooks",)

        def configs(self):
            return {"base": MineConfig(vocab_size=101, hidden_size=64, …), "tied": …}

Each check runs for each configuration, against transformers' model of the same random weights. Sequences are up to 55
tokens long: give configurations with an original length of 32, or a window of 8, and they cross it. A check that
cannot hold for a family is named in `exempt` with the reason, and is reported as skipped; removing or overriding one
in any other way is an error. A family that transformers lacks overrides `create_source`; one that takes media overrides
`create_traces` and `create_media`, and has its pictures in every check.

What each check allows stands in `bounds.py`, and `results.py` writes down what it measured.
"""

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from light_core.errors import CheckpointError
from light_core.plugins import ModelRuntime
from light_core.types import MediaSpan, MediaTokens, Step
from light_sdk.testing.bounds import EXACT, GRAPH, LOGITS, NOISE, NOISE_FLOAT16, NOISE_GPU, Bound, allows
from light_sdk.testing.driver import Driver, DriverRequest
from light_sdk.testing.loading import load_model
from light_sdk.testing.opening import openings_of_package
from light_sdk.testing.reference import MAX_MODEL_LEN, NUM_OUTPUT, PREFIX_LEN, Trace, create_model, create_prompts, save_model, trace

__all__ = ["Case", "FamilyConformance"]

STEP_TENSORS = (
    "token_ids",
    "positions",
    "context_lens",
    "slots",
    "cu_seqlens_q",
    "seq_lens",
    "rows",
    "logits_rows",
    "prompt_lens",
    "media_positions",
)
"""What changes from one replay of a captured step to the next."""


@dataclass(frozen=True, eq=False)
class Case:
    """One configuration: its checkpoint, its references, and the family bound to it.

    Attributes:
        name: of the configuration.
        folder: checkpoint as one safetensors file.
        source: transformers' model.
        traces: what it computes for each prompt.
        media: the embeddings in the prompt of trace `index`, made by the encoders of a runtime of this checkpoint.
        spans: where the items stand in the prompt of trace `index`.
        runtime: the bound `ModelRuntime`, float32 on the CPU, weights loaded.
        errors: what the check that runs has measured so far, in the measure of its bound.
    """

    name: str
    folder: Path
    source: Any
    traces: list[Trace]
    runtime: ModelRuntime
    media: Callable[[ModelRuntime, int], Mapping[str, MediaTokens]] = lambda runtime, index: {}
    spans: Callable[[ModelRuntime, int], Sequence[MediaSpan]] = lambda runtime, index: ()
    errors: list[float] = field(default_factory=list)

    def start(self, driver: Driver, index: int, prefix: DriverRequest | None = None, prefix_len: int = 0) -> DriverRequest:
        """Starts prompt `index` with its items in `driver`."""
        media, spans = self.media(driver.runtime, index), self.spans(driver.runtime, index)
        return driver.start(self.traces[index].prompt, prefix, prefix_len, media, spans)


class Run:
    """Requests in one driver that follow their traces; logits are compared after every step."""

    def __init__(self, case: Case, driver: Driver) -> None:
        self.case, self.driver = case, driver
        self._traces: dict[DriverRequest, Trace] = {}

    def start(self, index: int, prefix: DriverRequest | None = None, prefix_len: int = 0) -> DriverRequest:
        """Starts prompt `index`."""
        request = self.case.start(self.driver, index, prefix, prefix_len)
        self._traces[request] = self.case.traces[index]
        return request

    def step(self, *work: tuple[DriverRequest, int]) -> None:
        """Computes so many tokens of each request. One whose tokens all have KV reads the trace's next token first."""
        self._read_next(work)
        for (request, count), logits in zip(work, self.driver.step(work), strict=True):
            end = request.num_computed
            self._compare(logits, self._traces[request].logits[end - count : end], end - count)

    def last(self, *work: tuple[DriverRequest, int]) -> None:
        """As `step`, decodes in front, where only the logits after each request's last token are asked for."""
        self._read_next(work)
        for (request, _), logits in zip(work, self.driver.last(work), strict=True):
            end = request.num_computed
            self._compare(logits[None], self._traces[request].logits[end - 1 : end], end - 1)

    def _read_next(self, work: Sequence[tuple[DriverRequest, int]]) -> None:
        """Gives each request whose tokens all have KV the trace's next one."""
        for request, _ in work:
            if not request.num_pending:
                request.tokens.append(self._traces[request].tokens[len(request.tokens)])

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
        self.case.errors.append(difference.max().item())
        wrong = ~(difference <= LOGITS.limit)  # also true of NaN
        assert not wrong.any(), (
            f"{self.case.name}: logits after position {position + int(wrong.nonzero()[0])} differ from the reference's by "
            f"{difference[wrong][0].item():.3g}, allowed {LOGITS.limit:g} ({int(wrong.sum())} of {len(wrong)} positions differ)"
        )


class FamilyConformance:
    """Standard checks of a model family.

    Attributes:
        plugins: module paths of the plugins that serve the family; the last is the one that is tested.
        exempt: name of a check to the reason why it cannot hold for this family.
    """

    plugins: ClassVar[tuple[str, ...]] = ()
    exempt: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def configs(self) -> dict[str, Any]:
        """Name to transformers configuration of a tiny model: a vocabulary of about 100 and two layers are enough."""
        raise NotImplementedError

    def create_source(self, name: str) -> Any:
        """Hook for a subclass: the reference model of configuration `name`, where transformers has none.

        It is called as `trace` calls it, has `config.vocab_size`, and `save_pretrained` writes its checkpoint.
        """
        return create_model(self.configs()[name])

    def create_traces(self, name: str, source: Any) -> list[Trace]:
        """Hook for a subclass with media: what `source` computes for each of four prompts.

        They are as long as those of `create_prompts`, and the last two begin with the same `PREFIX_LEN` tokens.
        """
        return [trace(source, prompt) for prompt in create_prompts(source.config.vocab_size)]

    def create_media(self, name: str, runtime: ModelRuntime, index: int) -> Mapping[str, MediaTokens]:
        """Hook for a subclass with media: what the encoders of `runtime` make of the items in the prompt of trace `index`;
        `rows` are positions in it."""
        return {}

    def create_spans(self, name: str, runtime: ModelRuntime, index: int) -> Sequence[MediaSpan]:
        """Hook for a subclass whose encoder has `positions`: where the items stand in the prompt of trace `index`."""
        return ()

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
        source = self.create_source(name)
        traces = self.create_traces(name, source)
        save_model(source, folder, lambda config: self.rewrite_config(name, config))
        runtime = load_model(folder, self.plugins, max_model_len=MAX_MODEL_LEN)
        return Case(name, folder, source, traces, runtime, partial(self.create_media, name), partial(self.create_spans, name))

    @pytest.fixture(autouse=True)
    def _skip_exempt(self, request: pytest.FixtureRequest) -> None:
        name = getattr(request.node, "originalname", request.node.name)
        if name in self.exempt:
            pytest.skip(self.exempt[name])

    # ----- the guard

    def test_no_check_is_missing(self) -> None:
        """Every standard check is inherited as it is, or declared exempt."""
        check_guard(type(self))

    # ----- what it may do

    def test_media_is_never_opened(self) -> None:
        """No code of the plugin gets media by itself, from a path or an address: it is given bytes."""
        for name in self.plugins:
            found = importlib.util.find_spec(name)
            assert found is not None and found.origin is not None, name
            assert openings_of_package(Path(found.origin).parent) == {}, f"{name}: a plugin is given bytes, and opens nothing"

    # ----- weights

    @allows(EXACT)
    def test_weights_fit(self, case: Case) -> None:
        """The plan takes every tensor of the checkpoint and fills every row of every parameter once."""
        plan = case.runtime.weight_plan
        stored = {strip(name, plan.prefixes): tensor for name, tensor in load_file(case.folder / "model.safetensors").items()}
        planned = {name for placement in plan.placements if not placement.optional for name in (placement.source, *placement.extras)}
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

    @allows(EXACT)
    def test_wrong_checkpoints_are_refused(self, case: Case, tmp_path: Path) -> None:
        """A tensor that is missing, one too many, or of another shape is an error that names it."""
        tensors = load_file(case.folder / "model.safetensors")
        name, stray = max(tensors, key=lambda name: (tensors[name].ndim, name)), "stray.weight"
        wrong = {
            "missing": (name, {k: v for k, v in tensors.items() if k != name}),
            "extra": (stray, tensors | {stray: tensors[name].clone()}),
            "shape": (name, tensors | {name: tensors[name][:-1].contiguous()}),
        }
        for kind, (culprit, changed) in wrong.items():
            folder = tmp_path / kind
            folder.mkdir()
            (folder / "config.json").write_text((case.folder / "config.json").read_text())
            save_file(changed, folder / "model.safetensors")
            with pytest.raises(CheckpointError) as caught:
                load_model(folder, self.plugins, max_model_len=MAX_MODEL_LEN)
            named = strip(culprit, case.runtime.weight_plan.prefixes)
            assert named in str(caught.value), f"{kind}: {culprit!r} is not named by {caught.value}"

    @allows(EXACT)
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

    @allows(LOGITS)
    def test_prefill_logits(self, case: Case) -> None:
        """Logits after every prompt token equal the reference's."""
        for index in range(len(case.traces)):
            run = Run(case, Driver(case.runtime))
            run.prefill(run.start(index))

    @allows(LOGITS)
    def test_decode_logits(self, case: Case) -> None:
        """Logits after every output token equal the reference's."""
        for index in range(len(case.traces)):
            run = Run(case, Driver(case.runtime))
            request = run.start(index)
            run.prefill(request)
            run.decode(request, NUM_OUTPUT - 1)

    @allows(EXACT)
    def test_greedy_tokens(self, case: Case) -> None:
        """Taking the likeliest token, on its own, gives the reference's output."""
        for index, expected in enumerate(case.traces):
            driver = Driver(case.runtime)
            request = case.start(driver, index)
            for _ in range(NUM_OUTPUT):
                (logits,) = driver.step([(request, request.num_pending)])
                request.tokens.append(int(logits[-1].argmax()))
            assert request.tokens == expected.tokens, case.name

    @allows(LOGITS)
    def test_chunked_prefill(self, case: Case) -> None:
        """However the prompt is cut, the logits are the same, and so are those of the output that follows."""
        for index in range(len(case.traces)):
            for chunk in (1, 7, 16):
                run = Run(case, Driver(case.runtime))
                request = run.start(index)
                run.prefill(request, chunk)
                run.decode(request, 2)

    @allows(LOGITS)
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

    @allows(LOGITS)
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

    @allows(LOGITS)
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

    @allows(LOGITS)
    def test_wanted_rows(self, case: Case) -> None:
        """Where core asks for the last token of each request alone, which a last layer may make use of, the logits are the same,
        and so are those of steps that read the KV afterwards."""
        run = Run(case, Driver(case.runtime))
        short, long, middle, late = (run.start(index) for index in (1, 0, 2, 3))
        run.last((short, 5), (long, 11))
        run.last((short, 1), (long, 13), (middle, 9))
        run.last((short, 1), (long, 20), (late, 28), (middle, 18))
        run.step((short, 1), (long, 1), (middle, 1), (late, 1))
        run.last((middle, 1), (late, 1))

    @allows(LOGITS)
    def test_layers_by_tokens(self, case: Case) -> None:
        """All layers but the last read nothing of a step but what belongs to its tokens, and give the step itself to ops alone, so
        that core can replay steps with prompts."""
        runtime = load_model(case.folder, self.plugins, max_model_len=MAX_MODEL_LEN, kernels={"attention": "reference"})
        run = Run(case, Driver(runtime, by_tokens=True))
        short, long, late = (run.start(index) for index in (1, 0, 3))
        run.step((short, 5), (long, 11))
        run.step((short, 1), (long, 13), (late, 9))
        run.last((short, 1), (long, 20), (late, 19))

    @allows(LOGITS)
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

    @allows(LOGITS)
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

    @allows(LOGITS)
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

    @allows(NOISE)
    def test_bfloat16(self, case: Case) -> None:
        """In bfloat16 the family is as close to float32 as the reference is in bfloat16."""
        self._check_noise(case, NOISE)

    @pytest.mark.gpu
    @allows(NOISE_GPU)
    def test_bfloat16_gpu(self, case: Case) -> None:
        """As `test_bfloat16`, with the kernels of the GPU."""
        self._check_noise(case, NOISE_GPU)

    @pytest.mark.gpu
    @allows(NOISE_FLOAT16)
    def test_float16_gpu(self, case: Case) -> None:
        """As `test_bfloat16_gpu`, in float16."""
        self._check_noise(case, NOISE_FLOAT16)

    @pytest.mark.gpu
    @allows(GRAPH)
    def test_cuda_graph(self, case: Case) -> None:
        """A decode step that was captured once, with padding, replays to the same logits as running it."""
        eager, replayed = (self._decode_on_gpu(case, graph) for graph in (False, True))
        case.errors.append((replayed - eager).abs().max().item())
        torch.testing.assert_close(replayed, eager, atol=GRAPH.limit, rtol=0)

    def _check_noise(self, case: Case, bound: Bound) -> None:
        runtime = load_model(case.folder, self.plugins, bound.dtype, bound.device, MAX_MODEL_LEN)
        source = self.create_source(case.name).bfloat16()
        ours, theirs, exact = [], [], []
        for index, (found, rounded) in enumerate(zip(case.traces, self.create_traces(case.name, source), strict=True)):
            driver = Driver(runtime)
            ours.extend(driver.step([(case.start(driver, index), len(found.prompt))]))
            theirs.append(rounded.logits[: len(found.prompt)])
            exact.append(found.logits[: len(found.prompt)])
        mine, peer, truth = torch.cat(ours), torch.cat(theirs), torch.cat(exact)
        noise = (peer - truth).abs()
        error = (mine - truth).abs()
        case.errors.append((error.mean() / noise.mean()).item())
        assert error.mean() <= bound.limit * noise.mean(), (
            f"{case.name}: {bound.dtype} logits are off by {error.mean():.3g}, the reference's by {noise.mean():.3g}"
        )
        best = truth.topk(2).values
        clear = best[:, 0] - best[:, 1] > 4 * noise.flatten().quantile(0.99)
        assert clear.float().mean() > 0.1, "the tiny model's logits are too close to each other to tell"
        assert torch.equal(mine.argmax(-1)[clear], truth.argmax(-1)[clear]), f"{case.name}: {bound.dtype} changes tokens that noise cannot"

    def _decode_on_gpu(self, case: Case, graph: bool) -> torch.Tensor:
        """Logits of three decode steps of three requests and a padding row, `[3, 3, V]`."""
        driver = Driver(load_model(case.folder, self.plugins, GRAPH.dtype, GRAPH.device, MAX_MODEL_LEN))
        requests = [case.start(driver, index) for index in range(3)]
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
            for name in STEP_TENSORS:
                if (tensor := getattr(step, name)) is not None:
                    getattr(captured[1], name).copy_(tensor)
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
        prompt_lens=None if step.prompt_lens is None else extend(step.prompt_lens, 1),
        rows=extend(step.rows, driver.slot_table.shape[0] - 1),
        media_positions=None if step.media_positions is None else F.pad(step.media_positions, (0, count)),
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
