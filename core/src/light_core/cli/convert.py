"""`light convert MODEL NEW_FOLDER`: pickled weights as safetensors, which alone are served."""

import shlex

import click

__all__ = ["convert"]


def convert(model: str, new_folder: str, revision: str | None) -> None:
    """Writes `new_folder` and says what is in it."""
    from light_core.engine.convert import convert as convert_weights
    from light_core.engine.memory import GIB

    done = convert_weights(model, new_folder, revision, progress=lambda name: click.echo(f"converting {name}"))
    click.echo(f"wrote {new_folder}: {done.num_tensors} tensors in {done.num_files} file(s), {done.num_bytes / GIB:.2f} GiB")
    click.echo(f"serve it with: light serve {shlex.quote(new_folder)}")
