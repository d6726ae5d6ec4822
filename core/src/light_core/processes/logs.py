"""One look for the log lines of every process: time, level, process, message; and quiet from libraries.

Called once by each process of `light serve`, before it does anything else.
"""

import logging

__all__ = ["LIBRARY_ENVIRONMENT", "configure_logging"]

LIBRARIES = ("asyncio", "filelock", "httpx", "huggingface_hub", "py.warnings", "torch", "transformers", "triton", "urllib3", "uvicorn")
"""What they say of their daily work is not of interest here; their warnings are."""
LIBRARY_ENVIRONMENT = {"TRANSFORMERS_VERBOSITY": "error"}
"""For child processes. transformers has a handler of its own, which would write lines of another look, mostly advice
about models that it does not run here."""


def configure_logging(process: str, level: int = logging.INFO) -> None:
    """Sets Python's logging up for this process.

    Args:
        process: its role, as the lines shall name it.
        level: of what is written.
    """
    line = f"%(asctime)s %(levelname)-7s {process:<11} %(message)s"
    logging.basicConfig(level=level, format=line, datefmt="%H:%M:%S")
    logging.captureWarnings(True)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
