"""When the next step is planned: late, and never so late that the device would be idle."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from light_core.engine.timing import LEAST_KNOWN, MARGIN_S, StepTimes


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Device:
    """A device and a host that is one step ahead, by a clock of their own."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.times = StepTimes(self.clock)
        self.ends: list[float] = []
        self.idle_s = 0.0

    def step(self, plan: Any, takes_s: float, host_s: float, is_alone: bool = True) -> None:
        """Plans and launches a step, then waits for the one before it."""
        began = self.times.now()
        self.clock.now += host_s
        free = self.ends[-1] if self.ends else self.clock.now
        self.idle_s += max(self.clock.now - free, 0.0)
        self.ends.append(max(self.clock.now, free) + takes_s)
        self.times.launched(plan, began, is_alone)
        if len(self.ends) > 1:
            self.wait(self.ends[-2])

    def wait(self, end: float) -> None:
        waited = max(end - self.clock.now, 0.0)
        self.clock.now += waited
        self.times.finished(waited)


def plan(num_tokens: int, num_decodes: int | None = None) -> Any:
    return SimpleNamespace(num_tokens=num_tokens, num_decodes=num_tokens if num_decodes is None else num_decodes)


def warm(device: Device, takes_s: float = 0.020, host_s: float = 0.002, num_steps: int = LEAST_KNOWN + 2) -> None:
    for _ in range(num_steps):
        device.step(plan(40), takes_s, host_s)


def test_nothing_waits_before_steps_are_known() -> None:
    device = Device()
    assert device.times.left(False) == 0
    for _ in range(LEAST_KNOWN):
        device.step(plan(40), 0.020, 0.002)
        assert device.times.left(False) == 0


def test_planning_waits_until_shortly_before_the_device_is_done() -> None:
    device = Device()
    warm(device)
    assert device.times.left(False) == pytest.approx(0.020 - 0.002 - MARGIN_S)
    device.clock.now += 0.005
    assert device.times.left(False) == pytest.approx(0.015 - 0.002 - MARGIN_S)
    device.clock.now += 0.015
    assert device.times.left(False) == 0


def test_prompts_are_planned_earlier_as_they_take_longer_to_launch() -> None:
    device = Device()
    warm(device)
    assert device.times.left(True) == 0, "nobody knows yet how long that takes"
    for _ in range(LEAST_KNOWN):
        device.step(plan(1024, 40), 0.025, 0.008)
    warm(device)
    assert device.times.left(True) == pytest.approx(0.020 - 0.008 - MARGIN_S)
    assert device.times.left(False) == pytest.approx(0.020 - 0.002 - MARGIN_S)


def test_kinds_of_steps_are_told_apart() -> None:
    device = Device()
    warm(device)
    device.step(plan(80), 0.030, 0.002)
    assert device.times.left(False) == 0, "80 decodes have not run before"
    device.step(plan(41), 0.020, 0.002)
    assert device.times.left(False) == pytest.approx(0.020 - 0.002 - MARGIN_S), "41 are about as many as 40"


def test_a_late_host_does_not_make_steps_longer() -> None:
    device = Device()
    warm(device)
    for _ in range(20):
        device.clock.now += 0.050  # the device has been done for long, and has not begun anew
        device.step(plan(40), 0.020, 0.002)
    warm(device, num_steps=2)
    assert device.times.left(False) <= 0.020 - 0.002 - MARGIN_S + 1e-9


def test_what_is_not_waited_for_is_no_measure() -> None:
    device = Device()
    warm(device)
    device.step(plan(40), 0.020, 0.002, is_alone=False)
    assert device.times.left(False) == 0, "the device does something else as well"
    warm(device)
    device.times.finished(None)
    assert device.times.left(False) == 0
    device.times.launched(plan(40), device.times.now())
    assert device.times.left(False) == 0, "nobody knows when that one begins"


def test_after_a_failure_nothing_is_under_way() -> None:
    device = Device()
    warm(device)
    device.times.forget()
    assert device.times.left(False) == 0
    device.ends.clear()
    device.step(plan(40), 0.020, 0.002)
    device.step(plan(40), 0.020, 0.002)
    assert device.times.left(False) == pytest.approx(0.020 - 0.002 - MARGIN_S)


@pytest.mark.parametrize("grows", [0.0, 2e-5, -2e-5])
def test_the_device_is_never_idle(grows: float) -> None:
    """Steps of two kinds that take longer or shorter by and by, a host that is interrupted for up to the margin."""
    random = np.random.default_rng(1)
    device, base, waited = Device(), 0.020, 0.0
    device.step(plan(40), base, 0.002)
    device.idle_s = 0.0
    for index in range(600):
        has_prompt = bool(random.random() < 0.3)
        left = device.times.left(has_prompt)
        device.clock.now += left
        waited += left
        takes = base + grows * index + (0.010 if has_prompt else 0.0)
        host = (0.006 if has_prompt else 0.002) + random.random() * 0.8 * MARGIN_S
        device.step(plan(1024, 40) if has_prompt else plan(40), takes, host)
    assert waited > 600 * 0.005, "or there was nothing to show"
    assert device.idle_s < 0.001 * (device.clock.now - 100.0)
