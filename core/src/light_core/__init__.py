"""Light's core: serves large language models and knows none.

`LLM` and `SamplingParams` are the offline API. The contract of plugins is in `types`, `ops`, `hookspecs`, `errors` and
`config`; what is not named here or there is private.
"""

from typing import TYPE_CHECKING, Any

from light_core.errors import LightError
from light_core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from light_core.llm import LLM, CompletionOutput, RequestOutput

__version__ = "1.0.0"
__all__ = ["LLM", "CompletionOutput", "LightError", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports the offline API when it is first asked for, so that `light --help` does not."""
    if name in ("LLM", "CompletionOutput", "RequestOutput"):
        from light_core import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
