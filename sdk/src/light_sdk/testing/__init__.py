"""What plugins are tested with.

    conformance.py  FamilyConformance: inherit it, name tiny configurations, get every standard check
    bounds.py       what each of its checks allows
    results.py      a pytest plugin that writes down what they measured: `--model-results FILE`
    reference.py    tiny random models of transformers and what they compute, the independent reference
    routing.py      settle_routing: random models whose choices of experts do not hang on rounding
    driver.py       Driver: a bound model, step by step, without the engine
    loading.py      load_model: a folder through the real plugin loader
    compiling.py    do a model's kernels compile for a GPU that is not there, and what do they take of it
    absent_gpu.py   that GPU
    descriptors.py  do products by `wgmma` read the shared memory that they were given
    guarded.py      interpreted kernels with nothing behind their tensors
    opening.py      finds plugin code that would open paths or addresses of media by itself
    echo.py         a family without weights whose output a test can predict: `--model-plugin light_sdk.testing.echo`

`FamilyConformance` and `Driver` may be imported from here. They are looked up on first use: servers run the echo family,
and have no pytest.
"""

import importlib
from typing import Any

__all__ = ["Driver", "FamilyConformance"]

_HOMES = {"Driver": "driver", "FamilyConformance": "conformance"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
