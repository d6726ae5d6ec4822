"""What is sampled, against definitions in float64 with sorting (transformers' logits processors, and our own for ties)."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from light_core.engine.requests import EngineRequest
from light_core.engine.sampling import Sampler
from light_core.engine.sampling import params as p
from light_core.sampling_params import SamplingParams

Make = Callable[[int, int], Sampler]
ENDS = (2, 11)


def request(params: SamplingParams, seed: int = 0, prompt: Sequence[int] = (1, 2, 3), ends: Sequence[int] = ENDS) -> EngineRequest:
    return EngineRequest(seed, np.asarray(prompt, np.int32), params, frozenset(ends), seed)


def step(
    sampler: Sampler, logits: torch.Tensor, rows: Sequence[int], counts: Sequence[int] | None = None, uniforms: object = None
) -> list[int]:
    """Samples one step and returns its tokens; `uniforms` replaces the random numbers."""
    prepared = sampler.prepare(np.asarray(rows, np.int32), np.asarray(counts or [0] * len(rows), np.int32))
    if uniforms is not None:
        ordered = np.asarray(uniforms, np.float32)[prepared.columns[p.POSITION]]
        prepared.columns[p.UNIFORM] = ordered.view(np.int32)
    result = sampler.sample(logits.to(sampler.device), prepared).to_host().result()
    assert not result.status.any()
    return result.token_ids.tolist()


def processed(logits: npt.NDArray[np.float64], params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    """The logits after bias, bans and penalties: float64 [1, V]."""
    from transformers import RepetitionPenaltyLogitsProcessor

    x = logits.copy()
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    if params.allowed_token_ids is not None:
        x[np.setdiff1d(np.arange(len(x)), params.allowed_token_ids)] = -np.inf
    x[params.banned_token_ids or []] = -np.inf
    if len(output) < params.min_tokens:
        x[list(ENDS)] = -np.inf
    scores = torch.from_numpy(x)[None]
    if params.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(torch.tensor([[*prompt, *output]]), scores)
    for token in output:
        scores[0, token] -= params.frequency_penalty
    for token in set(output):
        scores[0, token] -= params.presence_penalty
    return scores


def distribution(
    logits: torch.Tensor, params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = ()
) -> npt.NDArray[np.float64]:
    """Probabilities of the next token, by transformers' warpers in float64."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = processed(logits.double().numpy(), params, prompt, output)
    warpers = [TemperatureLogitsWarper(params.temperature)]
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p > 0 else []
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k > 0 else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    for warper in warpers:
        scores = warper(torch.empty((1, 0), dtype=torch.long), scores)
    return scores.softmax(-1)[0].numpy()


CASES = {
    "temperature": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.05},
    "top_k": {"top_k": 40},
    "top_k_1": {"top_k": 1},
    "top_k_most": {"top_k": 4900, "temperature": 4.0},
    "top_p": {"top_p": 0.9},
    "top_p_little": {"top_p": 0.01},
    "top_p_most": {"top_p": 0.97, "temperature": 8.0},
    "min_p": {"min_p": 0.02},
    "min_p_and_top_p": {"min_p": 0.01, "top_p": 0.6, "temperature": 1.5},
    "min_p_before_top_k": {"min_p": 0.3, "top_k": 50},
    "top_k_and_top_p": {"top_k": 64, "top_p": 0.8},
    "top_k_and_top_p_most": {"top_k": 4500, "top_p": 0.9, "temperature": 30.0},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": -0.4},
    "bias_and_bans": {"logit_bias": {7: 6.0, 30: -5.0}, "banned_token_ids": [9, 40]},
    "allowed": {"allowed_token_ids": [3, 31, 32, 64, 5000], "temperature": 3.0},
    "min_tokens": {"min_tokens": 5, "logit_bias": {2: 20.0, 8: 4.0}},
    "everything": {
        "temperature": 1.3, "min_p": 0.002, "top_k": 50, "top_p": 0.93, "repetition_penalty": 1.2, "frequency_penalty": 0.3,
        "presence_penalty": 0.2, "min_tokens": 5, "logit_bias": {12: 3.5, 7: 1.0}, "banned_token_ids": [9],
        "allowed_token_ids": list(range(1200)),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inverse_of_the_cumulative_distribution(make_sampler: Make, backend: str, name: str, dtype: torch.dtype) -> None:
    """The middle of each token's share of [0, 1) gives that token: the kept set, the probabilities and the order."""
    vocab, most = 5003, 24
    if backend == "interpreter":
        # More than 2048 kept tokens take another way through the kernel; elsewhere a small vocabulary saves time.
        vocab, most = (5003 if "most" in name or "allowed" in name else 1307), 3
    params = SamplingParams(max_tokens=None, **CASES[name])
    generator = torch.Generator().manual_seed(len(name))
    # Distinct logits in both dtypes: HF breaks ties where ours stay together.
    logits = 2.5 * torch.randn(vocab, generator=generator)
    if dtype == torch.bfloat16:
        values = torch.arange(-2047, 2048, dtype=torch.float32) / 128
        grid = values.bfloat16().unique()
        logits = torch.full((vocab,), -torch.inf)
        logits[torch.randperm(vocab, generator=generator)[: len(grid)]] = grid.float()
    prompt, output = [1, 2, 3, 3, 30, int(logits.argmax())], [4, 4, 30]
    probabilities = distribution(logits, params, prompt, output)
    ends = probabilities.cumsum()
    tokens = np.flatnonzero(probabilities > 2e-5)
    assert len(tokens) > 0
    tokens = np.unique(np.concatenate([tokens[:: max(1, len(tokens) // most)], tokens[-1:], [probabilities.argmax()]]))
    sampler = make_sampler(len(tokens), vocab)
    for row in range(len(tokens)):
        sampler.admit(row, request(params, row, prompt), output)
    middles = ends[tokens] - probabilities[tokens] / 2
    rows = range(len(tokens))
    got = step(sampler, logits.to(dtype).expand(len(tokens), -1).contiguous(), rows, [len(output)] * len(tokens), middles)
    assert got == tokens.tolist()


@pytest.mark.parametrize(("params", "kept"), [
    ({"top_k": 3}, [0, 1, 2, 5, 6]),
    ({"top_k": 2, "top_p": 0.45}, [2]),
    ({"top_p": 0.56}, [0, 1, 2, 5, 6]),
    ({"top_p": 0.45}, [2]),
    ({"min_p": 0.24}, [0, 1, 2, 5, 6]),
    ({"top_k": 6}, [0, 1, 2, 3, 4, 5, 6, 7]),
])  # fmt: skip
def test_ties_with_the_last_kept_token_are_kept(make_sampler: Make, params: dict[str, float], kept: list[int]) -> None:
    """Weights 1, 1, 4, …, up to rounding; their sum is 8.75."""
    num = 40
    logits = torch.tensor([1, 1, 4, 0.25, 0.25, 1, 1, 0.25], dtype=torch.float64).log()
    logits = torch.cat([logits, torch.full((60,), -torch.inf)]).bfloat16()
    sampler = make_sampler(num, 68)
    for row in range(num):
        sampler.admit(row, request(SamplingParams(**params), row))
    drawn = step(sampler, logits.expand(num, -1).contiguous(), range(num), uniforms=np.arange(num) / num)
    assert sorted(set(drawn)) == kept


def test_equal_logits_are_all_kept(make_sampler: Make) -> None:
    """More of them than a program holds at once, in every filter."""
    vocab, num = 4099, 4
    sampler = make_sampler(num, vocab)
    for row, params in enumerate([{"top_k": 5}, {"top_p": 0.1}, {"min_p": 1.0}, {"top_k": 3000, "top_p": 0.5}]):
        sampler.admit(row, request(SamplingParams(**params), row))
    uniforms = [0.9999, 0.5, 0.0, 0.25]
    assert step(sampler, torch.full((num, vocab), 3.25), range(num), uniforms=uniforms) == [int(vocab * np.float32(u)) for u in uniforms]


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 20011), (5, 33), (257, 1030)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_of_the_largest(make_sampler: Make, backend: str, rows: int, vocab: int, dtype: torch.dtype) -> None:
    rows = min(rows, 20) if backend == "interpreter" else rows
    generator = torch.Generator().manual_seed(rows + vocab)
    logits = torch.randint(-5, 6, (rows, vocab), generator=generator).to(dtype)
    sampler = make_sampler(rows, vocab)
    for row in range(rows):
        sampler.admit(row, request(SamplingParams(temperature=0.0), row))
    expected = np.argmax(logits.float().numpy(), axis=1).tolist()
    assert step(sampler, logits, range(rows)) == expected
    assert sampler.last_tokens.tolist()[:rows] == expected


def test_many_rows_of_all_kinds(make_sampler: Make, backend: str) -> None:
    """Rows of different features in one step, in an order of the scheduler's: each as if it were alone."""
    num, vocab = (22 if backend == "interpreter" else 257), 1031
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn((num, vocab), generator=generator)
    cases = [{"temperature": 0.0}, *({key: value for key, value in case.items() if key != "allowed_token_ids"} for case in CASES.values())]
    order = np.random.default_rng(0).permutation(num)
    sampler = make_sampler(num, vocab)
    for row in range(num):
        sampler.admit(row, request(SamplingParams(max_tokens=None, **cases[row % len(cases)]), row))
    together = step(sampler, logits[order], order.tolist(), [1] * num)
    for index in range(0, num, 7):
        row = int(order[index])
        alone = make_sampler(3, vocab)
        alone.admit(1, request(SamplingParams(max_tokens=None, **cases[row % len(cases)]), row))
        assert step(alone, logits[row : row + 1], [1], [1]) == [together[index]]


def test_frequencies_over_seeds(make_sampler: Make, backend: str) -> None:
    """Chi-square over many seeds and positions: the random numbers are independent of both."""
    rows, steps, vocab = (15, 10, 30) if backend == "interpreter" else (250, 40, 30)
    logits = torch.linspace(-1.5, 1.5, vocab)[torch.randperm(vocab, generator=torch.Generator().manual_seed(0))]
    params = SamplingParams(temperature=0.8, top_p=0.95)
    probabilities = distribution(logits, params)
    sampler = make_sampler(rows, vocab)
    for row in range(rows):
        sampler.admit(row, request(params, row))
    counts = np.zeros(vocab)
    for position in range(steps):
        np.add.at(counts, step(sampler, logits.expand(rows, -1).contiguous(), range(rows), [position] * rows), 1)
    kept = probabilities > 0
    assert counts[~kept].sum() == 0
    expected = probabilities[kept] * rows * steps
    statistic = float(((counts[kept] - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    # Wilson and Hilferty's approximation of the quantile at 4 standard deviations.
    limit = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def test_a_seed_gives_the_same_tokens_anywhere(make_sampler: Make) -> None:
    vocab, steps = 300, 12
    generator = torch.Generator().manual_seed(5)
    all_logits = 2 * torch.randn((steps, vocab), generator=generator)
    params = SamplingParams(top_p=0.95, frequency_penalty=0.2)
    alone = make_sampler(4, vocab)
    alone.admit(3, request(params, 77))
    first = [step(alone, all_logits[n : n + 1], [3], [n])[0] for n in range(steps)]
    crowd = make_sampler(8, vocab)
    for row in range(6):
        crowd.admit(row, request(params if row == 2 else SamplingParams(temperature=1.7, top_k=9), 77 if row == 2 else row))
    second = []
    for n in range(steps):
        rows = [5, 2, 0, 1] if n % 2 else [2, 4]
        logits = torch.randn((len(rows), vocab), generator=generator)
        logits[rows.index(2)] = all_logits[n]
        second.append(step(crowd, logits, rows, [n] * len(rows))[rows.index(2)])
    assert first == second
    assert len(set(first)) > 3
    other = make_sampler(1, vocab)
    other.admit(0, request(params, 78))
    assert [step(other, all_logits[n : n + 1], [0], [n])[0] for n in range(steps)] != first


def test_penalties_follow_steps_that_the_host_has_not_read(make_sampler: Make) -> None:
    """Steps are enqueued before any result is read; the tokens equal those of a host that knows them all."""
    vocab, steps, rows = 60, 15, 5
    generator = torch.Generator().manual_seed(9)
    all_logits = torch.randn((steps, rows, vocab), generator=generator)
    params = [
        SamplingParams(temperature=0.0, frequency_penalty=0.5),
        SamplingParams(temperature=0.0, presence_penalty=1.5),
        SamplingParams(temperature=0.0, repetition_penalty=1.8),
        SamplingParams(temperature=0.0, repetition_penalty=0.7, frequency_penalty=-0.1, presence_penalty=0.3, min_tokens=6),
        SamplingParams(temperature=0.0),
    ]
    prompt = [5, 6, 6, 59, 1000]  # the last is no token of the vocabulary, as media tokens are
    sampler = make_sampler(rows, vocab)
    for row in range(rows):
        sampler.admit(row, request(params[row], row, prompt))
    pending, orders = [], []
    for n in range(steps):
        order = np.random.default_rng(n).permutation(rows).astype(np.int32)
        prepared = sampler.prepare(order, np.full(rows, n, np.int32))
        pending.append(sampler.sample(all_logits[n, order].to(sampler.device), prepared).to_host())
        orders.append(order)
    history: list[list[int]] = [[] for _ in range(rows)]
    for n in range(steps):
        tokens = pending[n].result().token_ids
        for place, row in enumerate(orders[n]):
            expected = processed(all_logits[n, row].double().numpy(), params[row], prompt[:4], history[row])
            assert tokens[place] == int(expected.argmax()), (n, row)
        for place, row in enumerate(orders[n]):
            history[row].append(int(tokens[place]))
    assert sampler.last_tokens.tolist()[:rows] == [tokens[-1] for tokens in history]


def test_a_preempted_request_goes_on_with_its_counts(make_sampler: Make) -> None:
    vocab = 40
    params = SamplingParams(temperature=0.0, frequency_penalty=0.6, repetition_penalty=1.2)
    logits = torch.randn((12, vocab), generator=torch.Generator().manual_seed(2)) * 0.5
    through, resumed = make_sampler(2, vocab), make_sampler(3, vocab)
    through.admit(0, request(params))
    expected = [step(through, logits[n : n + 1], [0], [n])[0] for n in range(12)]
    resumed.admit(1, request(params))
    tokens = [step(resumed, logits[n : n + 1], [1], [n])[0] for n in range(5)]
    resumed.release(1)
    resumed.admit(1, request(SamplingParams(temperature=0.0, frequency_penalty=2.0), 9, [3]), [7, 7, 7])
    resumed.admit(2, request(params), tokens)
    tokens += [step(resumed, logits[n : n + 1], [2], [n])[0] for n in range(5, 12)]
    assert tokens == expected


def test_min_tokens_bans_end_tokens_until_then(make_sampler: Make) -> None:
    logits = torch.zeros((1, 20))
    logits[0, 2], logits[0, 11], logits[0, 5] = 9.0, 8.0, 1.0
    sampler = make_sampler(1, 20)
    sampler.admit(0, request(SamplingParams(temperature=0.0, min_tokens=2)))
    assert [step(sampler, logits, [0], [n])[0] for n in range(4)] == [5, 5, 2, 2]


def test_the_padding_row_and_free_rows_change_nothing(make_sampler: Make) -> None:
    vocab = 50
    logits = torch.randn((4, vocab), generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=0.0, frequency_penalty=0.4)
    sampler, alone = make_sampler(3, vocab), make_sampler(3, vocab)
    sampler.admit(0, request(params))
    sampler.admit(1, request(params, 1))
    alone.admit(1, request(params, 1))
    sampler.release(0)
    for n in range(6):
        padded = step(sampler, torch.cat([logits[:1], logits[:1], logits[1:3]]), [0, 1, 3, 3], [n, n, 0, 0])
        assert [padded[1]] == step(alone, logits[:1], [1], [n])


def test_logits_are_left_as_they_were(make_sampler: Make) -> None:
    vocab = 300
    logits = torch.randn((2, vocab))
    sampler = make_sampler(2, vocab)
    for row in range(2):
        sampler.admit(row, request(SamplingParams(max_tokens=None, **{**CASES["everything"], "allowed_token_ids": [1, 5, 9]}), row))
    copy = logits.clone().to(sampler.device)
    step(sampler, copy, [0, 1])
    assert torch.equal(copy.cpu(), logits)
