"""What reading a configuration imports, and that nothing is missing afterwards."""

import subprocess
import sys

IMPORTS = """
import sys
from light_core.engine.model_files import create_config

config = create_config({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}, "here")
assert config.hidden_size == 64 and config.model_type == "llama"
heavy = ("torch._dynamo", "torch.distributed.tensor", "transformers.activations", "transformers.generation.utils")
assert not [name for name in heavy if name in sys.modules], [name for name in heavy if name in sys.modules]
try:
    create_config({"model_type": "llama", "hidden_size": "wide"}, "there")
except Exception as error:
    assert "there is not a valid llama configuration" in str(error), error
else:
    raise AssertionError("a wrong configuration was taken")

from transformers.utils.type_validators import ACT2FN

assert "silu" in ACT2FN and "no such function" not in ACT2FN
from transformers.activations import ACT2FN as table

assert sorted(ACT2FN) == sorted(table) and len(ACT2FN) == len(table) and type(ACT2FN["gelu"]) is type(table["gelu"])
"""


def test_configurations_bring_no_compiler_and_are_validated_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
