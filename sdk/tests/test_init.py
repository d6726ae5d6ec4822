"""The SDK's public surface: every name is there, and importing it costs no torch."""

import subprocess
import sys

import light_sdk
import light_sdk.layers
import light_sdk.testing
import light_sdk.weights


def test_every_public_name_exists() -> None:
    for module in (light_sdk, light_sdk.layers, light_sdk.testing, light_sdk.weights):
        assert len(set(module.__all__)) == len(module.__all__)
        for name in module.__all__:
            assert getattr(module, name) is not None, f"{module.__name__}.{name}"
    assert not hasattr(light_sdk.testing, "Nothing")


def test_importing_the_contract_imports_no_torch() -> None:
    code = "import sys, light_sdk, light_sdk.weights, light_sdk.testing; print({'torch', 'transformers', 'pytest'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
