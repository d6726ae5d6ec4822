"""Commands and their options. What they do is in the modules beside this one."""

import importlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from light_core import __version__
from light_core.cli.options import SectionedCommand, dataclass_options, read_config_file
from light_core.cli.settings import ENGINE_CHOICES, ENGINE_HELP, SECTIONS, server_options
from light_core.config import EngineConfig
from light_core.errors import LightError

__all__ = ["main"]

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def main(argv: list[str] | None = None) -> NoReturn:
    """Runs the command line; a `LightError` becomes three lines and its exit code."""
    try:
        code = command.main(argv, prog_name="light", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except LightError as error:
        click.echo(error.block(), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="light")
def command() -> None:
    """Light serves large language models; each model family is a plugin."""


def _later(target: str) -> Callable[..., Any]:
    """A command body that is imported when it runs: "module:function"."""

    def body(**values: Any) -> Any:
        module, _, name = target.partition(":")
        return getattr(importlib.import_module(module), name)(**values)

    return body


def _add(group: click.Group, name: str, target: str, text: str, *params: click.Parameter) -> None:
    group.add_command(click.Command(name, callback=_later(target), params=list(params), help=text, context_settings=CONTEXT))


def _add_sectioned(name: str, target: str, text: str, *params: click.Parameter) -> None:
    """As `_add` on the top level, for a command with the options of an engine."""
    made = SectionedCommand(name, callback=_later(target), params=list(params), help=text, context_settings=CONTEXT, sections=SECTIONS)
    command.add_command(made)


def _model_argument(required: bool = True) -> click.Argument:
    return click.Argument(["model"], required=required, metavar="MODEL")


def _engine_options() -> list[click.Option]:
    return dataclass_options(EngineConfig, ENGINE_HELP, ENGINE_CHOICES)


def _image_option(text: str) -> click.Option:
    return click.Option(["--image", "images"], multiple=True, type=click.Path(exists=True, dir_okay=False), metavar="FILE", help=text)


def _config_file() -> click.Option:
    return click.Option(
        ["--config"],
        is_eager=True,
        expose_value=False,
        callback=read_config_file,
        metavar="FILE.yaml",
        help="YAML file of settings, named as the options are.",
    )


_add_sectioned(
    "serve",
    "light_core.cli.serve:serve",
    """Serve MODEL over HTTP: OpenAI's API and LightLLM's own.

    MODEL is a local folder, a hub id like org/name, or "demo".
    """,
    _model_argument(),
    *_engine_options(),
    *server_options(),
    _config_file(),
)
_add_sectioned(
    "doctor",
    "light_core.cli.doctor:doctor",
    "Say whether MODEL would start here, without loading its weights: plugin, memory, kernels, port.",
    _model_argument(),
    *_engine_options(),
    *server_options(),
    _config_file(),
)
_add(
    command,
    "convert",
    "light_core.cli.convert:convert",
    """Write NEW_FOLDER with the weights of MODEL as safetensors, if they are pickles: pytorch_model*.bin and the like.

    MODEL is a local folder or a hub id like org/name. Tensors keep their names and dtypes; configuration, tokenizer and
    templates come along. No code of a pickle is run.
    """,
    _model_argument(),
    click.Argument(["new_folder"], required=True, metavar="NEW_FOLDER"),
    click.Option(["--revision"], help="Branch, tag or commit of a hub id."),
)
_add(
    command,
    "generate",
    "light_core.cli.generate:generate",
    "Complete PROMPTs with MODEL in this process.",
    _model_argument(),
    click.Argument(["prompts"], nargs=-1, required=True),
    click.Option(["--max-tokens"], type=click.IntRange(1), default=128, show_default=True, help="Output tokens at most."),
    click.Option(["--temperature"], type=float, default=0.8, show_default=True, help="0 is greedy."),
    click.Option(["--top-p"], type=float, default=1.0, show_default=True, help="Smallest set of tokens that reaches this probability."),
    click.Option(["--sampling-seed"], type=int, help="Makes the output repeatable."),
    _image_option("Picture for every prompt, at the model's placeholder in it; may be repeated."),
    *_engine_options(),
)
_add(
    command,
    "chat",
    "light_core.cli.chat:chat",
    "Talk to a running server from this terminal.",
    click.Option(["--url"], default="http://127.0.0.1:8000", show_default=True, envvar="LIGHT_URL", help="Where it listens."),
    click.Option(["--api-key"], envvar="LIGHT_API_KEY", help="If the server asks for one."),
    click.Option(["--model"], help="Name of the model; the server's first one otherwise."),
    click.Option(["--system"], help="A system message to begin with."),
    click.Option(["--temperature"], type=float, help="0 is greedy; the model's own default otherwise."),
    click.Option(["--max-tokens"], type=click.IntRange(1), help="Tokens of a reply at most."),
    _image_option("Picture that goes with the first message; may be repeated."),
)


@command.group(context_settings=CONTEXT)
def plugin() -> None:
    """Installed model plugins."""


_add(plugin, "list", "light_core.cli.plugins:list_plugins", "All installed plugins, what they serve, and why one is broken.")
_add(
    plugin,
    "info",
    "light_core.cli.plugins:plugin_info",
    "One plugin: distribution, families, kernels, hooks.",
    click.Argument(["name"]),
)
_add(
    plugin,
    "new",
    "light_core.cli.plugins:new_plugin",
    "Write the package of a new family, ready to edit.",
    click.Argument(["name"]),
    click.Option(["--folder"], default=".", show_default=True, help="Where the package folder is made."),
    click.Option(["--like"], default="llama", show_default=True, help="The family to begin from."),
)


@command.group(context_settings=CONTEXT)
def bench() -> None:
    """Measure throughput and latency."""


def _workload_options(num_prompts: str) -> list[click.Option]:
    return [
        click.Option(
            ["--workload"],
            metavar="NAME[,NAME]",
            help='decode-1, decode-64, decode-256, prefill, mixed, shared-prefix, long, or "all"; fixed lengths otherwise.',
        ),
        click.Option(["--num-prompts"], type=click.IntRange(1, 100_000), help=num_prompts),
        click.Option(["--input-len"], type=click.IntRange(1), help="Prompt tokens each, without a workload; 256 otherwise."),
        click.Option(["--output-len"], type=click.IntRange(1), help="Output tokens each, without a workload; 128 otherwise."),
        click.Option(
            ["--length-scale"],
            type=click.FloatRange(0, min_open=True),
            default=1.0,
            show_default=True,
            help="Multiplies all lengths of a workload, to fit a small model.",
        ),
    ]


def _result_options() -> list[click.Option]:
    return [
        click.Option(["--output-json", "--json", "output_json"], metavar="FILE", help="Write the results to this file too."),
        click.Option(["--plot"], metavar="FILE.png", help="Draw them; needs light-core[bench]."),
    ]


_add(
    bench,
    "offline",
    "light_core.cli.bench:offline",
    "Throughput of MODEL in this process: all requests of a workload at once, in rounds with fresh prompts.",
    _model_argument(),
    *_workload_options("Requests; 64 otherwise, or all of the workload."),
    click.Option(["--rounds"], type=click.IntRange(1), default=1, show_default=True, help="Rounds that are measured; their median counts."),
    click.Option(["--warmup-rounds"], type=click.IntRange(0), default=1, show_default=True, help="Rounds before them."),
    *_result_options(),
    *_engine_options(),
)
_add(
    bench,
    "serve",
    "light_core.cli.bench:serve",
    "Load a running server, Light's or another of the OpenAI API, and report throughput, TTFT, TPOT, ITL.",
    click.Option(
        ["--url", "--base-url", "url"], default="http://127.0.0.1:8000", show_default=True, envvar="LIGHT_URL", help="Where it listens."
    ),
    click.Option(["--endpoint"], default="/v1/completions", show_default=True, help="Route that takes prompts of token ids."),
    click.Option(["--api-key"], envvar="LIGHT_API_KEY", help="If the server asks for one."),
    click.Option(["--model"], help="Name of the model; the server's first one otherwise."),
    *_workload_options("Requests of each run; 200 otherwise, or all of the workload."),
    click.Option(["--request-rate"], metavar="RATE[,RATE]", help="Requests a second, one run for each; all at once otherwise."),
    click.Option(
        ["--burstiness"],
        type=float,
        default=1.0,
        show_default=True,
        help="Of arrivals: 1 is a Poisson process, less comes in bursts, more is even.",
    ),
    click.Option(
        ["--max-concurrency"], metavar="N[,N]", help="Requests at a time, one run for each; 64 otherwise, without bound under a rate."
    ),
    click.Option(["--goodput"], metavar="NAME:MS[,…]", help="Count requests within bounds of ttft, tpot, e2el: ttft:200,tpot:50."),
    click.Option(["--metric-percentiles"], default="99", show_default=True, metavar="P[,P]", help="Percentiles of each time."),
    click.Option(
        ["--clients"], type=click.IntRange(1, 64), help="Processes that send; one for 64 requests at a time otherwise, 4 at most."
    ),
    click.Option(["--timeout"], type=click.FloatRange(0, min_open=True), default=600.0, show_default=True, help="Seconds of one request."),
    click.Option(["--vocab-size"], type=click.IntRange(2), help="Token ids are below it; as the server says, or 30000, otherwise."),
    click.Option(["--seed"], type=int, default=0, show_default=True, help="Of prompts and arrivals."),
    click.Option(["--save-detailed"], is_flag=True, help="Keep the times of each request in the JSON."),
    *_result_options(),
)
_add(
    bench,
    "step",
    "light_core.cli.bench:step",
    """Print the budget of a decode step and of a prefill step of MODEL: floor, kernels, gaps, host.

    The lines of each account add up to the step. --load-format dummy measures a model without its weights.
    """,
    _model_argument(),
    click.Option(["--batch"], default="1,64,256", show_default=True, metavar="N[,N]", help='Requests of decode steps; "" for none.'),
    click.Option(["--context"], type=click.IntRange(1), default=640, show_default=True, help="Tokens in KV of each of them."),
    click.Option(["--prefill"], default="8192", show_default=True, metavar="N[,N]", help='Tokens of prefill steps; "" for none.'),
    click.Option(
        ["--steps"],
        type=click.IntRange(2),
        default=32,
        show_default=True,
        help="Decode steps that are measured; an eighth of prefill steps.",
    ),
    click.Option(["--top"], type=click.IntRange(0), default=0, show_default=True, help="List so many of the longest kernels."),
    *_result_options(),
    *_engine_options(),
)
_add(command, "collect-env", "light_core.cli.collect_env:collect_env", "Versions and machine, for a bug report.")
