"""The driver hands media to steps as the engine does: for the tokens of a step alone, wherever a chunk cuts them."""

from pathlib import Path

import pytest
import torch

from light_core.types import MediaTokens
from light_sdk.testing import Driver
from light_sdk.testing.echo import write_model
from light_sdk.testing.loading import load_model


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    write_model(tmp_path)
    return Driver(load_model(tmp_path, ("light_sdk.testing.echo",)))


def test_rows_are_those_of_the_step(driver: Driver) -> None:
    first = MediaTokens(torch.arange(8.0).view(4, 2), torch.tensor([1, 2, 3, 6]))
    second = MediaTokens(-torch.arange(2.0).view(1, 2), torch.tensor([0]))
    one, two = driver.start(range(10, 18), media={"image": first}), driver.start(range(20, 23), media={"image": second})
    step = driver.prepare([(one, 3)])
    assert step.token_ids.tolist() == [10, 0, 0] and step.media is not None
    assert step.media["image"].rows.tolist() == [1, 2] and torch.equal(step.media["image"].embeddings, first.embeddings[:2])
    step = driver.prepare([(one, 4), (two, 3)])
    assert step.token_ids.tolist() == [0, 14, 15, 0, 0, 21, 22] and step.media is not None
    assert step.media["image"].rows.tolist() == [0, 3, 4]
    assert torch.equal(step.media["image"].embeddings, torch.cat([first.embeddings[2:], second.embeddings]))
    assert driver.prepare([(one, 1)]).media is None
