"""Pictures on one GPU: how fast they are encoded, and how long a question about one waits for its first token.

    python plugins/qwen_vl/benchmarks/pictures.py encoder [NAME …]    the encoders alone, beside the roofline; --top N kernels
    python plugins/qwen_vl/benchmarks/pictures.py folder FOLDER       a model without weights of Qwen2-VL-7B's shape
    python plugins/qwen_vl/benchmarks/pictures.py ask URL             asks a server of the OpenAI API, Light's or another

`encoder` prints a case's time with every kernel launched and by its CUDA graph, after it has compared the two; a wrong one
prints no number and the program ends with status 1. Times hold resampling and cutting; "together" is all pictures in one pass,
where the encoder itself takes large ones one by one. Its floor is that of the products and of attention at the matrix rate.
`ask` needs nothing of Light and prints one JSON line for each of its cases:

    one     a question about a picture that no cache knows, one at a time: seconds from sending to the first token
    again   a second question about the same picture
    many    several such pictures at a time, one token each: pictures a second
    alone   several answers to words alone, at the same time: seconds between one piece and the next of an answer
    beside  the same, while questions about pictures come, one after the other
"""

import argparse
import base64
import io
import json
import math
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count as counting
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "dtype": "bfloat16",
}
FIRST = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "seq_length": 2048,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
}
EYES = {"depth": 32, "in_channels": 3, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN2 = {"embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "hidden_act": "quick_gelu"}
QWEN2_5 = {"hidden_size": 1280, "out_hidden_size": 3584, "intermediate_size": 3420, "window_size": 112, "hidden_act": "silu"}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2-vl": {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **TEXT,
        "vision_config": EYES | QWEN2 | {"model_type": "qwen2_vl"},
    },
    "qwen2.5-vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **TEXT,
        "vision_config": EYES | QWEN2_5 | {"fullatt_block_indexes": [7, 15, 23, 31], "model_type": "qwen2_5_vl"},
    },
    "qwen-vl": FIRST,
}
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|object_{part}|>" for part in ("ref_start", "ref_end")),
    *(f"<|{kind}_{part}|>" for kind in ("box", "quad") for part in ("start", "end")),
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = 151643
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 4096
"""Of the folder's pictures: engines reserve memory for the largest."""
SIDE = 1000
WARM = 8
"""Pictures one at a time before any counts: shapes that come back are captured by then."""
SIZES = ((224, 224, 1), (448, 448, 1), (1000, 1000, 1), (448, 448, 4), (1000, 1000, 3), (1000, 1000, 6), (2000, 1500, 1))
"""Width, height, and pictures at a time."""
SQUARES = ((448, 448, 1), (448, 448, 4), (448, 448, 16))
"""Of Qwen-VL, which knows one size."""
MATRIX_RATE = 700e12
"""Operations a second of an H200 in bfloat16, as measured with large products."""
TOLERANCE = 0.05
CALLS = 10
NUM_WORDS = 256
"""Tokens of an answer to words alone."""


# ------------------------------------------------------------------------------------------- encoders


def create_encoder(name: str, device: str = "cuda") -> Any:
    """The encoder of configuration `name` with random weights, in bfloat16, above a text model of one layer."""
    from light_core.engine.model_files import read_config
    from light_core.engine.weights import fill_dummy
    from light_core.plugins import bind, load_plugins, resolve_family
    from light_core.types import Limits

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIGS[name] | {"num_hidden_layers": 1}))
        loaded, files = load_plugins("light_sdk.hooks,light_qwen.hooks,light_qwen_vl.hooks"), read_config(Path(folder), {})
        limits = Limits(4096, 8, 4096)
        family = resolve_family(files.architectures, loaded)
        runtime = bind(loaded, family=family, config=files.config, dtype="bfloat16", device=device, limits=limits, folder=folder)
    modules = {prefix: module for prefix, module in runtime.modules.items() if prefix.startswith("media.")}
    fill_dummy(modules, runtime.weight_plan, 0)
    return runtime.media_encoders[0]


def picture(width: int, height: int, seed: int) -> bytes:
    """A binary PPM of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()


def operations(name: str, items: list[Any]) -> float:
    """Of the products and of attention, counted from the definition; what is padded and moved costs nothing."""
    if name == "qwen-vl":
        patches, width, inner, out, queries = 1024, 1664, 8192, 4096, 256
        layer = 2 * patches * (4 * width**2 + 2 * width * inner) + 4 * patches**2 * width
        resampler = 2 * (patches * out * (width + 2 * out) + queries * out * 3 * out) + 4 * queries * patches * out
        return len(items) * (48 * layer + resampler + 2 * patches * 588 * width)
    width, inner, total = 1280, (5120 if name == "qwen2-vl" else 3420), 0.0
    for item in items:
        patches = len(item["places"])
        products = 2 * patches * (4 * width**2 + (2 if name == "qwen2-vl" else 3) * width * inner)
        full, windowed = (32, 0) if name == "qwen2-vl" else (4, 28)
        attention = 4 * patches * width * (full * patches + windowed * 64)
        merger = 2 * patches // 4 * ((4 * width) ** 2 + 4 * width * 3584)
        total += 32 * products + attention + merger + 2 * patches * 588 * width
    return total


def measure(module: Any, items: list[Any]) -> float:
    """Median seconds of encoding `items`, by events."""
    import torch

    module(items)
    times = []
    for _ in range(CALLS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        module(items)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def print_kernels(run: Callable[[], object], top: int) -> None:
    """The `top` kernels of `run` by time, each with how often it ran; what CUDA graphs replay is among them."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = sorted(profiler.key_averages(), key=lambda one: -one.self_device_time_total)
    print(f"  {sum(one.self_device_time_total for one in kernels) / 1e3:8.2f} ms in {sum(one.count for one in kernels)} kernels")
    for one in kernels[:top]:
        print(f"  {one.self_device_time_total / 1e3:8.2f} ms {one.count:5} x {one.key[:100]}")


def measure_encoders(names: list[str], top: int) -> int:
    import torch
    from torch.nn.attention import sdpa_kernel

    from light_sdk.graphs import PLANNED, SEEN, UNPLANNED

    wrong = 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; floor at {MATRIX_RATE / 1e12:.0f} TFLOP/s")
    print("encoder      pictures        first ms  planned ms  together ms  graph ms  pictures/s  TFLOP/s  of floor")
    for name in names:
        encoder = create_encoder(name)
        module = encoder.module
        for width, height, count in SIZES if name != "qwen-vl" else SQUARES:
            items = [
                {key: value.cuda() for key, value in encoder.preprocess(picture(width, height, seed)).items()} for seed in range(count)
            ]
            with torch.inference_mode():
                graphs, module.graphs = module.graphs, lambda shape, inputs, module=module: module.encode(shape, *inputs)
                with sdpa_kernel(UNPLANNED, set_priority=True):
                    expected, first = module(items), measure(module, items)
                with sdpa_kernel(PLANNED, set_priority=True):
                    planned = measure(module, items)
                    together = measure(module.together, items) if count > 1 and hasattr(module, "together") else math.nan
                module.graphs = graphs
                for _ in range(SEEN + 2):  # the last two by the graph
                    found = module(items)
                seconds = measure(module, items)
            error = ((found - expected).float().abs().max() / expected.float().abs().max()).item()
            if not error <= TOLERANCE:
                wrong += 1
                print(f"{name:12} {count} x {width}x{height}: a graph's embeddings are off by {error:.3g} of the largest")
                continue
            work = operations(name, items)
            print(
                f"{name:12} {f'{count} x {width}x{height}':14} {first * 1e3:9.2f} {planned * 1e3:11.2f} {together * 1e3:12.2f} "
                f"{seconds * 1e3:9.2f} {count / seconds:11.1f} {work / seconds / 1e12:8.0f} {work / MATRIX_RATE / seconds:9.2f}"
            )
            if top:
                with torch.inference_mode():
                    print_kernels(lambda module=module, items=items: module(items), top)
        del encoder, module
        torch.cuda.empty_cache()
    return wrong


# ------------------------------------------------------------------------------------------- servers


def write_folder(folder: Path) -> None:
    """config.json, the processor's files and a tokenizer of bytes: to be served with dummy weights."""
    from tokenizers import pre_tokenizers

    from light_qwen_vl.chat import CHATML
    from light_qwen_vl.images import MEAN, STD

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "image_mean": MEAN, "image_std": STD}
    bounds = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}}
    processor = sizes | bounds | {"processor_class": "Qwen2VLProcessor"}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    added = {token: WORDS + index for index, token in enumerate(SPECIAL)}
    vocabulary = {text: index for index, text in enumerate([*letters, *(f"w{index}" for index in range(WORDS - len(letters)))])}
    tokenizer = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": TEXT["max_position_embeddings"],
        "added_tokens_decoder": {
            str(index): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
            for token, index in added.items()
        },
        "additional_special_tokens": list(SPECIAL[1:]),
        "chat_template": CHATML,
    }
    files = {
        "config.json": CONFIGS["qwen2-vl"],
        "preprocessor_config.json": processor | {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": processor | {"video_processor_type": "Qwen2VLVideoProcessor"},
        "tokenizer_config.json": tokenizer,
        "vocab.json": vocabulary,
    }
    for name, entries in files.items():
        (folder / name).write_text(json.dumps(entries))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "chat_template.jinja").write_text(CHATML)
    _write_backend(folder / "tokenizer.json", vocabulary)


def _write_backend(path: Path, vocabulary: dict[str, int]) -> None:
    """The tokenizer as one file: bytes, with Qwen2's way of splitting text, and no merges."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.save(str(path))


def jpeg(seed: int, side: int = SIDE) -> str:
    """A data URL of a picture of `side` pixels: slopes and noise, as large a file as a photograph's."""
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 24, (side, side, 3), dtype=np.uint8)
    across, down = np.linspace(0, 200, side, dtype=np.float32), np.linspace(0, 30, side, dtype=np.float32)
    slopes = across[None, :, None] * np.array([1.0, 0.6, 0.3], np.float32) + down[:, None, None]
    buffer = io.BytesIO()
    Image.fromarray(slopes.astype(np.uint8) + noise).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


class Server:
    """A server of the OpenAI API."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=60) as answer:
            self.model = json.load(answer)["data"][0]["id"]

    def ask(self, source: str, question: str = "What is in this picture?", max_tokens: int = 4) -> float:
        """Seconds from sending a question about a picture until the first piece of the answer, which is read to its end.

        Raises:
            RuntimeError: the server refuses, or answers without a piece.
        """
        parts = [{"type": "image_url", "image_url": {"url": source}}, {"type": "text", "text": question}]
        begin = time.perf_counter()
        return self.pieces(parts, max_tokens)[0] - begin

    def pieces(self, content: str | list[dict[str, Any]], max_tokens: int) -> list[float]:
        """When each piece of the answer to a message came; at least one.

        Raises:
            RuntimeError: the server refuses, or answers without a piece.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0, "stream": True}
        data = json.dumps(body | {"max_tokens": max_tokens, "ignore_eos": True}).encode()
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", data, {"Content-Type": "application/json"})
        times = []
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                for line in answer:
                    if line.startswith(b"data: {") and json.loads(line[6:]).get("choices"):
                        times.append(time.perf_counter())
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{error.code}: {error.read()[:300].decode(errors='replace')}") from None
        if not times:
            raise RuntimeError("the server answered without a token")
        return times


def measure_server(
    url: str, engine: str, num_one: int, num_many: int, at_a_time: int, side: int, num_streams: int
) -> Iterator[dict[str, Any]]:
    """The cases of `ask`, one after the other; before the first, as many pictures as make everything warm."""
    server, seeds = Server(url), counting(1)
    threads = ThreadPoolExecutor(at_a_time)

    def pictures(number: int) -> list[str]:
        return [jpeg(next(seeds), side) for _ in range(number)]

    def all_of(sources: list[str], max_tokens: int) -> float:
        begin = time.perf_counter()
        list(threads.map(lambda source: server.ask(source, max_tokens=max_tokens), sources))
        return time.perf_counter() - begin

    with threads:
        all_of(pictures(at_a_time), 4)
        for source in pictures(WARM):
            server.ask(source)
        one, again = [], []
        for source in pictures(num_one):
            one.append(server.ask(source))
            again.append(server.ask(source, "Which colours does it have, and where?"))
        for case, times in (("one", one), ("again", again)):
            yield {"engine": engine, "case": case, "pictures": num_one, "side": side, **quantiles(times, "ttft")}
        sources = pictures(num_many)
        elapsed = all_of(sources, 1)
        shape = {"pictures": num_many, "side": side, "at_a_time": at_a_time}
        yield {"engine": engine, "case": "many", **shape, "pictures_per_s": round(num_many / elapsed, 2), "s": round(elapsed, 3)}
        for case in ("alone", "beside"):
            sources = iter(pictures(num_many) if case == "beside" else ())
            gaps, shown = answer_words(server, num_streams, sources)
            shape = {"streams": num_streams, "tokens": NUM_WORDS, "pictures": shown, "side": side}
            yield {"engine": engine, "case": case, **shape, **quantiles(gaps, "itl"), "itl_ms_max": round(max(gaps) * 1e3, 2)}


def answer_words(server: Server, num_streams: int, sources: Iterator[str]) -> tuple[list[float], int]:
    """Seconds between the pieces of `num_streams` answers of `NUM_WORDS` tokens at the same time, and how many of `sources` were
    asked about meanwhile, one after the other."""

    def gaps(number: int) -> list[float]:
        times = server.pieces(f"Count to a thousand in language number {number}.", NUM_WORDS)
        return [after - before for before, after in pairwise(times)]

    shown = 0
    with ThreadPoolExecutor(num_streams) as threads:
        answers = [threads.submit(gaps, number) for number in range(num_streams)]
        for source in sources:
            if all(answer.done() for answer in answers):
                break
            server.ask(source)
            shown += 1
        return [gap for answer in answers for gap in answer.result()], shown


def quantiles(times: list[float], name: str) -> dict[str, float]:
    """p50, p99 and mean, in milliseconds."""
    p50, p99 = np.percentile(times, [50, 99])
    return {f"{name}_ms_{key}": round(float(value) * 1e3, 2) for key, value in (("p50", p50), ("p99", p99), ("mean", np.mean(times)))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    encoder = commands.add_parser("encoder")
    encoder.add_argument("names", nargs="*", help=f"of {', '.join(CONFIGS)}; all if none is given")
    encoder.add_argument("--top", type=int, default=0, help="kernels of each case that are printed, by time")
    commands.add_parser("folder").add_argument("folder", type=Path)
    asking = commands.add_parser("ask")
    asking.add_argument("url")
    asking.add_argument("--engine", default="", help="name in the results")
    asking.add_argument("--one", type=int, default=48, help="pictures one at a time")
    asking.add_argument("--many", type=int, default=128, help="pictures several at a time")
    asking.add_argument("--at-a-time", type=int, default=32)
    asking.add_argument("--side", type=int, default=SIDE, help="of a picture, in pixels")
    asking.add_argument("--streams", type=int, default=16, help="answers to words alone at the same time")
    arguments = parser.parse_args()
    if arguments.command == "encoder":
        return measure_encoders(arguments.names or list(CONFIGS), arguments.top)
    if arguments.command == "folder":
        write_folder(arguments.folder)
        return 0
    counts = arguments.one, arguments.many, arguments.at_a_time, arguments.side, arguments.streams
    for result in measure_server(arguments.url, arguments.engine, *counts):
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
