"""What `sdk/benchmarks` take for right: rows of attention are held against their own size, whatever that of others is."""

import math

import pytest
import torch

from light_sdk.ops.mla_attention.tuning import DecodeConfig, PrefillConfig


@pytest.fixture
def benchmarks(import_benchmark, monkeypatch):
    """The modules `ops` and `mla`, on the CPU, with latents of a small model."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process; the interpreter tests run where there is no GPU")
    ops, mla = import_benchmark("ops"), import_benchmark("mla")
    for module in (ops, mla):
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "DTYPE", torch.float16)
    for name, value in (("RANK", 32), ("KEY_DIM", 16), ("ROTARY", 16), ("VALUE_DIM", 16)):
        monkeypatch.setattr(mla, name, value)
    torch.manual_seed(0)
    return ops, mla


def prompt(num_tokens: int) -> torch.Tensor:
    """What attention gives for a prompt of independent keys: averages over 1, 2, … of them, in float32."""
    return torch.randn(num_tokens, 4, 32) / torch.arange(1.0, num_tokens + 1)[:, None, None].sqrt()


def test_rounding_of_a_large_row_is_no_error(benchmarks) -> None:
    ops, _ = benchmarks
    expected = prompt(2000)
    found = expected.bfloat16()
    assert (found - expected).abs().max() > ops.ROW_TOLERANCE * expected.square().mean().sqrt(), "by the size of all rows it would be"
    case = ops.RowCase("any", "any", lambda: None, (found,), lambda: (expected,), 0.0)
    assert ops.row_error(found, expected) < 0.02 and case.error() is None


@pytest.mark.parametrize("row", [0, 7, 1999])
@pytest.mark.parametrize("wrong", ["of another token", "doubled", "one value", "missing", "not a number"])
def test_one_wrong_row_is_found(row, wrong, benchmarks) -> None:
    ops, _ = benchmarks
    expected = prompt(2000)
    found = expected.bfloat16()
    if wrong == "one value":
        found[row, 2, 5] += 0.3 * expected[row].square().mean().sqrt()
    else:
        found[row] = {"of another token": found[row - 1], "doubled": 2 * found[row], "missing": 0.0, "not a number": math.nan}[wrong]
    assert not ops.row_error(found, expected) <= ops.ROW_TOLERANCE
    for results in ((found,), ()):  # written in place, or returned
        case = ops.RowCase("any", "any", lambda: found, results, lambda: (expected,), 0.0)
        assert "of a row's size" in case.error()


def test_a_row_of_zeros(benchmarks) -> None:
    ops, _ = benchmarks
    expected = torch.ones(3, 4)
    expected[1] = 0.0
    assert ops.row_error(expected.clone(), expected) == 0.0 and ops.row_error(expected + 1e-3, expected) > 1.0


def test_prefill_trials(benchmarks) -> None:
    """A prompt of its own and one with a cached prefix are right; then a row is not, or has not been written."""
    _, mla = benchmarks
    names = []
    for trial in mla.prefill_trials(2, ((1, 40, 40), (1, 40, 8))):
        names.append(trial.name)
        assert trial.is_right is not None and not trial.is_right(), "nothing has been written"
        trial.run(PrefillConfig(16, 16, 4, 1))
        assert trial.is_right()
        out = trial.run.__defaults__[0].out
        row = out[-1].clone()
        out[-1] = out[-2]
        assert not trial.is_right()
        out[-1] = row
        assert trial.is_right()
        trial.begin_step()
        assert not trial.is_right(), "results of the candidate before are gone"
    assert names == ["1 x 40 of 40", "1 x 8 of 40"]


def test_decode_trials(benchmarks) -> None:
    _, mla = benchmarks
    (trial,) = mla.decode_trials(16, ((2, 40),))
    assert not trial.is_right()
    trial.run(DecodeConfig(16, 16, 4, 1, 1, 1))
    absorbed = trial.run.__self__
    assert trial.is_right() and absorbed.error() < 0.02
    absorbed.sums[1] = absorbed.sums[0]
    assert not trial.is_right()
    trial.begin_step()
    assert absorbed.sums.isnan().all() and not absorbed.inputs.step.shared


def test_the_best_candidate_is_right_at_every_size(benchmarks, monkeypatch, capsys) -> None:
    """The quicker one, wrong in the last row of a prompt, is not chosen."""
    _, mla = benchmarks
    good, bad = PrefillConfig(16, 16, 4, 1), PrefillConfig(32, 16, 4, 1)
    trials = list(mla.prefill_trials(2, ((1, 40, 40),)))
    out, compute, tried = trials[0].run.__defaults__[0].out, trials[0].run, []

    def run(config: PrefillConfig) -> None:
        tried.append(config)
        compute(config)
        if config is bad:
            out[-1] *= 1.5

    monkeypatch.setattr(trials[0], "run", run)
    monkeypatch.setattr(mla, "measure", lambda *_, replays: 2.0 if tried[-1] is good else 1.0)
    assert mla.try_candidates("any", (bad, good), iter(trials)) is good
    assert capsys.readouterr().out.count("wrong or not possible") == 1
    monkeypatch.setattr(trials[0], "run", lambda config: run(bad))
    assert mla.try_candidates("any", (bad, good), iter(trials)) is None


def test_attention_of_encoders_is_compared_where_there_is_a_kernel(import_benchmark) -> None:
    vision = import_benchmark("vision")
    names = {size: [name for name, _ in vision.attention_kernels(size, 100)] for size in (64, 72, 80, 96)}
    assert names[64] == names[72] == ["cudnn", "flash"] and names[80] == names[96] == ["cudnn", "flash", "attend_runs"]
