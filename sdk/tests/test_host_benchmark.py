"""`sdk/benchmarks/host.py` measures launches of kernels that are compiled for a GPU that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "host.py"


def test_each_step_has_a_time_for_each_op_that_is_asked_for(tmp_path) -> None:
    """In a process of its own, as Triton's interpreter has no compiler and an absent GPU stays."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "triton")
    command = [sys.executable, str(SCRIPT), "--only", "rms_norm,act_and_mul", "--output-json", str(tmp_path / "host.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "host.json").read_text())
    assert len(results) == 2
    for times in results.values():
        assert times.keys() == {"rms_norm", "act_and_mul"}
        assert all(time_us > 0.0 for time_us in times.values())
