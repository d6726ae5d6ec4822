"""Light beside transformers' `generate` on the CPU, in one process: same weights, dtype, threads, greedy tokens.

    python core/benchmarks/cpu.py --models demo 1b --streams 1 16 --threads 2 --rounds 5

Both sides load one folder: the model that a plugin ships as "demo", or random weights in the shape of Llama-3.2-1B,
saved once. Rounds alternate (Light, transformers, Light, …), each with fresh random prompts, so that neither noise of
the machine nor Light's prefix cache favours a side. Several streams have the lengths of a workload (`mixed`), scaled down.
transformers runs them in order of arrival, in static batches of as many, padded on the left, until the longest of a batch
is done; and one after the other. Only tokens that were asked for count.

Prints a JSON object: medians of tokens a second, the ratio of each pair of rounds as median, least and most, and which
share of an output is the same on both sides before the first token that differs (1 in float32; in bfloat16 near-ties of
logits fall either way, and random weights have many).
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from light_core.bench.workloads import WORKLOADS, Lengths, Workload, create_requests
from light_core.llm import LLM
from light_core.sampling_params import SamplingParams

SHAPE_1B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
ONE_STREAM = Lengths(72, 72)
"""Prompt and output of a single stream, in tokens."""
REQUESTS_A_STREAM = 4


@dataclass(frozen=True, slots=True)
class Request:
    """Token ids of a prompt, and how many tokens are wanted after it."""

    prompt: list[int]
    output_len: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds that a round took, and each request's tokens."""

    seconds: float
    token_ids: list[list[int]]


def create_folder(model: str, dtype: str, parent: Path) -> Path:
    """The folder that both sides load."""
    if model == "demo":
        from light_core.plugins import load_plugins, resolve_bundled

        bundled = resolve_bundled("demo", load_plugins(None))
        assert bundled is not None, "no installed plugin ships a demo model"
        return Path(bundled[1])
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = parent / f"{model}-{dtype}"
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        network = LlamaForCausalLM(LlamaConfig(**SHAPE_1B, dtype=dtype)).to(getattr(torch, dtype))
        network.save_pretrained(folder, max_shard_size="100GB")
    return folder


def choose_workload(streams: int, args: argparse.Namespace) -> Workload:
    """What so many streams are given."""
    if streams == 1:
        return Workload("one stream", args.requests or 1, ONE_STREAM, ONE_STREAM)
    return replace(WORKLOADS[args.workload], num_prompts=args.requests or REQUESTS_A_STREAM * streams, length_scale=args.length_scale)


def run_light(llm: LLM, requests: Sequence[Request]) -> Outcome:
    """All requests handed over at once."""
    params = [SamplingParams(temperature=0.0, max_tokens=one.output_len, ignore_eos=True, detokenize=False) for one in requests]
    began = time.perf_counter()
    results = llm.generate([{"prompt_token_ids": one.prompt} for one in requests], params, use_tqdm=False)
    return Outcome(time.perf_counter() - began, [result.outputs[0].token_ids for result in results])


def run_transformers(network: Any, requests: Sequence[Request], batch: int) -> Outcome:
    """Static batches of `batch` requests, each until its longest is done."""
    tokens = []
    began = time.perf_counter()
    for begin in range(0, len(requests), batch):
        part = requests[begin : begin + batch]
        longest = max(len(one.prompt) for one in part)
        ids, mask = torch.zeros(len(part), longest, dtype=torch.long), torch.zeros(len(part), longest, dtype=torch.long)
        for row, one in enumerate(part):
            ids[row, longest - len(one.prompt) :] = torch.tensor(one.prompt)
            mask[row, longest - len(one.prompt) :] = 1
        most = max(one.output_len for one in part)
        out = network.generate(ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most)
        tokens += [row[longest : longest + one.output_len].tolist() for row, one in zip(out, part)]
    return Outcome(time.perf_counter() - began, tokens)


def load_transformers(folder: Path, dtype: str) -> Any:
    """The model for greedy generation that ends by length alone."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    network.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None, eos_token_id=None, pad_token_id=0)
    return network


def compare(args: argparse.Namespace, folder: Path, dtype: str) -> list[dict[str, Any]]:
    """One record for each number of streams."""
    network = load_transformers(folder, dtype)
    records = []
    for streams in args.streams:
        workload = choose_workload(streams, args)
        # One for each number of streams, as that bounds how many requests run at a time.
        llm = LLM(str(folder), dtype=dtype, device="cpu", skip_tokenizer_init=True, max_model_len=workload.max_len, max_num_seqs=streams)
        sides: dict[str, Callable[[Sequence[Request]], Outcome]] = {"light": lambda requests, llm=llm: run_light(llm, requests)}  # type: ignore[misc]
        sides["transformers"] = lambda requests, batch=streams: run_transformers(network, requests, batch)  # type: ignore[misc]
        if streams > 1:
            sides["transformers_one_by_one"] = lambda requests: run_transformers(network, requests, 1)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        same, wanted = 0.0, []
        for index in range(-1, args.rounds):  # the first round is not counted
            requests = [Request(*one) for one in create_requests(workload, llm.engine.vocab_size, seed=index + 1)]
            num_tokens = sum(one.output_len for one in requests)
            outcomes = {}
            for name, run in sides.items():
                if name == "transformers_one_by_one" and not 0 <= index < args.one_by_one_rounds:
                    continue
                outcomes[name] = outcome = run(requests)
                if index >= 0:
                    rates[name].append(num_tokens / outcome.seconds)
            if index >= 0:
                same += sum(map(_share_of_same, outcomes["light"].token_ids, outcomes["transformers"].token_ids))
                wanted.append(num_tokens)
        ratios = [ours / theirs for ours, theirs in zip(rates["light"], rates["transformers"])]
        record = {"streams": streams, "requests": workload.num_prompts, "workload": workload.name, "wanted_tokens": wanted}
        record["tokens_per_s"] = {name: round(statistics.median(values), 2) for name, values in rates.items() if values}
        record["ratio"] = {name: round(one, 3) for name, one in _spread(ratios).items()}
        record["same_tokens"] = round(same / (args.rounds * workload.num_prompts), 3)
        records.append(record)
        print(json.dumps(record), flush=True)
        llm.shutdown()
    return records


def _share_of_same(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """How far two outputs are the same, from the first token on."""
    differing = (index for index, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
    return next(differing, len(ours)) / len(ours)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", "1b"], choices=["demo", "1b"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--requests", type=int, help="in all (default: 1 for one stream, 4 for each of several)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one-by-one-rounds", type=int, default=1, help="of transformers one request after the other")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="mixed", help="lengths of several streams (default: mixed)")
    parser.add_argument("--length-scale", type=float, default=0.25, help="all its lengths are multiplied by this (default: 0.25)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--folder", type=Path, help="where random weights are kept for the next time (default: nowhere)")
    parser.add_argument("--json", type=Path, help="also write the result there")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    from light_core.engine.model_files import ModelFiles, resolve_dtype

    dtype = resolve_dtype(ModelFiles(Path(), None, {}), args.dtype, "cpu")
    result: dict[str, Any] = {"torch": torch.__version__, "threads": args.threads, "dtype": dtype, "rounds": args.rounds, "models": {}}
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        for model in args.models:
            result["models"][model] = compare(args, create_folder(model, dtype, args.folder or Path(temporary)), dtype)
    text = json.dumps(result, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
