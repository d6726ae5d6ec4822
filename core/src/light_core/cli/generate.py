"""`light generate`: complete prompts with a model in this process."""

from pathlib import Path
from typing import Any

import click

from light_core.cli.settings import create_llm, engine_config

__all__ = ["generate"]


def generate(
    model: str,
    prompts: tuple[str, ...],
    max_tokens: int,
    temperature: float,
    top_p: float,
    sampling_seed: int | None,
    images: tuple[str, ...],
    **values: Any,
) -> None:
    """Prints each prompt with what the model made of it."""
    from light_core import SamplingParams

    config = engine_config(model, values)
    llm = create_llm(config)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=sampling_seed)
    data = {"multi_modal_data": {"image": [Path(image).read_bytes() for image in images]}} if images else {}
    for output in llm.generate([{"prompt": prompt, **data} for prompt in prompts], params, use_tqdm=len(prompts) > 1):
        click.echo(click.style(output.prompt or "", bold=True) + output.outputs[0].text)
        click.echo()
    llm.shutdown()
