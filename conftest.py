"""What all tests share: random numbers that are the same in every run. And what a test may assume of time: nothing.

The machine may be slow, loaded, stopped for seconds or unusually fast, and tests run in any order on several workers.

- A sleep proves nothing. Wait for an event, or ask again and again until what must come is there. Such waits have a limit
  of a minute or more, which only ends a test that would hang, and no assertion depends on how long they take.
- No upper bound on a duration, no rate, no "quicker than". Say what follows from it: the order of two events, how many are
  in flight at once, how many lines or calls it takes. Lower bounds hold where one clock measures all of a sleep.
- What computes with time gets a clock that the test moves (`monkeypatch.setattr(module, "time", clock)`).
- A deadline that must pass is short; one that must not pass is minutes long. A test that needs both has two servers.
- Two things that come one after the other may come in one read; one that is sent may come in two.
- What has to be still going on when a test acts goes on until the test ends it, not for a number of steps.
- Work is bounded by processor time (`time.thread_time`) with room for a machine ten times slower, or better by counting.
- Ports: 0 where the server tells which it got, or one that is held bound. A port where nobody listens is a bound socket.
- Files in `tmp_path` alone. Random numbers from a generator with a seed, examples of hypothesis too.
"""

import os
import random
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of several workers that wait for each other in turns: ten times as slow. Before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Servers of tests are on this machine, whatever proxy leads out of it.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

APART = ("test_simulation.py", "test_compile_ahead.py", "sampling/test_kernel.py", "test_serve_families.py")
"""Files of few and long tests that share nothing: each test goes to whichever worker is free."""

settings.register_profile(
    "light",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("light")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Lets every test draw the same numbers, whichever ran before it in its process."""
    random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.manual_seed(0)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, by which a server or a model that a file's tests share is started once, but for files of `APART`."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if file.endswith(APART) else file

    return Scheduler(config, log)
