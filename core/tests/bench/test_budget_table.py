"""The table of a step's budget says what its floor leaves out, or counts too often."""

from dataclasses import replace

import pytest

from light_core.bench.budget_table import print_budget
from light_core.bench.step import HOST_PHASES, StepBudget
from light_core.engine.counting import Needs, StepCount, floor_ms

COUNT = StepCount(Needs(1e3), Needs(2e9, 3e9), Needs(), Needs(5e6, 6e6), Needs(7e6), is_attention_counted=False, are_experts_known=False)


def budget(count: StepCount) -> StepBudget:
    floor, host = floor_ms(count, 1e12, 1e15), dict.fromkeys(HOST_PHASES, 1.0)
    return StepBudget("decode", 2, 2, 30.0, 8, 4, 7.0, 7.0, 8.0, 7.0, 7.0, count, floor, {"linear": 6.0}, 1.0, host, [])


@pytest.mark.parametrize(
    "field, line, note",
    [
        ("is_attention_counted", "attention", "without products of queries and keys, whose heads no op tells"),
        ("are_experts_known", "layers", "with every expert for every token, as no module tells which parameters are theirs"),
    ],
)
def test_notes(field: str, line: str, note: str, capsys: pytest.CaptureFixture[str]) -> None:
    for known in (False, True):
        told = budget(replace(COUNT, **{field: known}))
        print_budget(told, 0)
        lines = [text for text in capsys.readouterr().out.splitlines() if note in text]
        assert [text.split()[0] for text in lines] == ([] if known else [line])
        assert told.as_dict()[field] is known
