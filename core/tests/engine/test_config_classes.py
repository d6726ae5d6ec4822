"""What reading a configuration imports, and that nothing is missing afterwards."""

import os
import subprocess
import sys
from pathlib import Path

IMPORTS = """
import sys
from light_core.engine.model_files import create_config

config = create_config({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}, "here")
assert config.hidden_size == 64 and config.model_type == "llama"
heavy = ("torch._dynamo", "torch.distributed.tensor", "torchvision", "sklearn")
heavy += tuple(f"transformers.{name}" for name in ("activations", "generation.utils", "image_utils", "video_utils"))
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

from transformers.image_utils import PILImageResampling
from transformers.utils import auto_docstring, type_validators

assert type_validators.PILImageResampling is PILImageResampling
assert auto_docstring.__module__ == "transformers.utils.auto_docstring"
"""


def test_configurations_bring_no_compiler_and_are_validated_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_torchvision_that_does_not_fit_torch_keeps_no_configuration_from_being_read(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "torchvision-9.0.dist-info").mkdir()
    (tmp_path / "torchvision-9.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 9.0\n")
    (tmp_path / "torchvision-9.0.dist-info" / "top_level.txt").write_text("torchvision\n")
    code = "from light_core.engine.model_files import create_config; create_config({'model_type': 'llama'}, 'here')"
    code += "; from transformers.utils.import_utils import is_torchvision_available; assert is_torchvision_available()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
