"""The data of the contract: what hooks are given and what they answer with.

Everything here is plain data or a protocol; nothing decides, loads or launches. Plugins see these names through
`light_sdk`; core's own modules import them from here.

Shape legend, used in every docstring and in model code as a suffix:

    T  tokens of a step (decodes first, then prefill chunks)      H  query heads       K  key/value heads
    B  requests of a step                                         D  head dim          E  hidden size
    R  rows whose logits are wanted                               V  vocabulary        S  slots of the KV pool
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from light_core.ops import OpTable

__all__ = [
    "ChatSpec",
    "Family",
    "FamilyRegistry",
    "Hidden",
    "KVGroup",
    "KVLayout",
    "KVPlane",
    "KVView",
    "Layer",
    "Limits",
    "MediaEncoder",
    "MediaSpan",
    "MediaTokens",
    "ModelContext",
    "Placement",
    "PostLayer",
    "PreLayer",
    "Shard",
    "Step",
    "WeightPlan",
]


# --------------------------------------------------------------------------------------------- families


@dataclass(frozen=True, slots=True)
class Family:
    """One model family, as data: enough to choose it and to say why something is not possible with it.

    Attributes:
        name: unique among installed plugins, e.g. "llama".
        architectures: the `architectures` entries of config.json that it serves.
        attention: "mha", "gqa", "mla" or "none".
        kv_dtypes: dtypes the KV planes may have; "auto" is the model's dtype.
        quantization: weight formats it can load beside plain ones, e.g. ("fp8",).
        max_tensor_parallel: ranks it can be cut over.
        media: kinds of input beside text, e.g. ("image",).
        heads: "generate" for logits, "score" for a reward.
        bundled: models shipped inside the plugin: name to "package/relative/folder", e.g. {"demo": "light_llama/demo"}.
        text_config: for checkpoints whose text model is of another family: the entry of config.json that configures it,
            e.g. "text_config", or "" where its entries stand beside the checkpoint's own. None for a text model.
        text_model_type: with `text_config`, transformers' `model_type` of the text model; None reads it from the entry.
    """

    name: str
    architectures: tuple[str, ...]
    attention: str = "gqa"
    kv_dtypes: tuple[str, ...] = ("auto",)
    quantization: tuple[str, ...] = ()
    max_tensor_parallel: int = 1
    media: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("generate",)
    bundled: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    text_config: str | None = None
    text_model_type: str | None = None


class FamilyRegistry(Protocol):
    """Where `light_register_families` announces families."""

    def add(self, family: Family) -> None:
        """Announces `family`. A second family of the same name or architecture is an error when loading ends."""


# --------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True, slots=True)
class Shard:
    """This worker's place in its tensor-parallel group."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds that a model may size its buffers by.

    Attributes:
        max_model_len: tokens of one request, prompt and output.
        max_num_seqs: requests of one step.
        max_num_batched_tokens: tokens of one step.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class ModelContext:
    """The model that hooks are asked about. One for a model and worker; frozen.

    Attributes:
        family: the family that was chosen; of a multimodal checkpoint, the text model's. A plugin answers the hooks that
            build the model only when `family.name` is its own.
        config: transformers' configuration object of the model, with `hf_overrides` applied; of a multimodal checkpoint,
            the text model's.
        dtype: "float32", "bfloat16" or "float16": of parameters and activations.
        device: torch device string, "cpu" or "cuda:0"; "meta" while only shapes are asked for.
        ops: the op table of this model; `ops.select(...)` while layers are built, frozen afterwards.
        limits: bounds to size buffers by.
        shard: this worker's tensor-parallel place.
        quantization: weight format, or None.
        folder: the local folder of config, tokenizer and weights.
        checkpoint_family: the family that the checkpoint's architecture names: `family` itself, but for a multimodal
            checkpoint. A vision plugin goes by its name to answer `light_media_encoders` and to wrap other hooks.
        checkpoint_config: the whole of the checkpoint's configuration: `config` itself, but for a multimodal one.
        enforce_eager: that no CUDA graph is to be captured. Core captures decodes; a plugin that captures anything by itself,
            such as its encoders, goes by this.
    """

    family: Family
    config: Any
    dtype: str
    device: str
    ops: "OpTable"
    limits: Limits
    shard: Shard = Shard()
    quantization: str | None = None
    folder: str = ""
    checkpoint_family: Family | None = None
    checkpoint_config: Any = None
    enforce_eager: bool = False

    @property
    def torch_dtype(self) -> "torch.dtype":
        """`dtype` as torch has it."""
        import torch

        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


# --------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one checkpoint tensor goes: a parameter, or a run of rows of one.

    The tensor is read once, its `shard_dim` cut to this worker's part, `transform` applied, and the result copied to
    `param[offset : offset + len]`. Several placements with the same `param` and growing offsets fill a merged
    parameter (q, k and v; gate and up).

    Attributes:
        source: name in the checkpoint.
        param: name of the parameter: "pre.…", "layers.{i}.…", "post.…" or "media.{name}.…".
        offset: first row (dimension 0) of `param` that it fills.
        rows: how many rows it fills; None fills the whole of `param`.
        transform: tensor to tensor, on the CPU or the device, in the checkpoint's dtype; for transposed or interleaved
            layouts. It must not keep its arguments.
        shard_dim: dimension that tensor parallelism cuts, or None for a replicated tensor.
        optional: the checkpoint may lack it; the parameter then keeps the value that its module gave it.
        extras: further checkpoint tensors that `transform` takes after the first, whole, such as the scales of a
            quantised weight. They count as consumed.
    """

    source: str
    param: str
    offset: int = 0
    rows: int | None = None
    transform: "Callable[..., torch.Tensor] | None" = None
    shard_dim: int | None = None
    optional: bool = False
    extras: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """How a checkpoint becomes parameters. Loading checks it both ways: every tensor consumed, every parameter set.

    Attributes:
        placements: one or more for each checkpoint tensor.
        ties: parameter to the parameter that it shares memory with, e.g. {"post.head.weight": "pre.embedding.weight"}.
        ignored: regular expressions (full match) of checkpoint tensors that are dropped on purpose, such as saved
            rotary frequencies.
        prefixes: prefixes that a checkpoint may or may not put before every name, e.g. ("transformer.",); the first that
            fits is stripped before names are compared.
        folders: local folders of further checkpoints that the placements take tensors from, such as a vision tower that
            is published by itself; every tensor of theirs is to be consumed as well.
    """

    placements: tuple[Placement, ...]
    ties: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    ignored: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()


# --------------------------------------------------------------------------------------------- KV


@dataclass(frozen=True, slots=True)
class KVPlane:
    """One tensor that a layer keeps for each token: `[S, *shape]` of `dtype`.

    Attributes:
        name: as the layer's view calls it, e.g. "k", "v", "latent", "k_scale".
        shape: of one token, e.g. (num_kv_heads, head_dim).
        dtype: torch's name, e.g. "bfloat16", "int8", "float8_e4m3fn", "uint8" (two int4 values a byte).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that keep the same planes.

    Attributes:
        layers: their ids.
        planes: what one token keeps in each of them; () for layers without KV.
        window: how far back these layers look, in tokens, or None for all the way. Core may drop what lies further
            back than every group's window.
    """

    layers: tuple[int, ...]
    planes: tuple[KVPlane, ...]
    window: int | None = None


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What one token keeps, layer by layer. Core owns the memory: `S` slots, the same slot id in every layer.

    Attributes:
        groups: every layer in exactly one of them.
        max_shared_len: None where a token's KV depends on the tokens before it alone. Otherwise, KV beyond this many
            tokens depends on the request's length too (rotary scalings of the kind of dynamic NTK): requests with a
            longer prompt, and later positions of any request, stay out of the prefix cache.
    """

    groups: tuple[KVGroup, ...]
    max_shared_len: int | None = None


KVView = Mapping[str, "torch.Tensor"]
"""One layer's planes by name, each `[S, *shape]`. A layer writes the step's tokens at `step.slots` and reads the past
of request b at `step.slot_table[step.rows[b], :step.seq_lens[b]]`."""


# --------------------------------------------------------------------------------------------- the step


@dataclass(frozen=True, slots=True, eq=False)
class MediaTokens:
    """What one media encoder made of tokens of a step; the pre layer puts it in the place of their embeddings.

    Attributes:
        embeddings: [M, E], in the model's dtype.
        rows: int64 [M], which of the step's T tokens they belong to, ascending.
    """

    embeddings: "torch.Tensor"
    rows: "torch.Tensor"


@dataclass(slots=True, eq=False)
class Step:
    """One forward pass of one mixed batch, as the model sees it. Tensors live on the model's device.

    Requests 0 … num_decodes-1 have one token each; the others are prefill chunks. A token's KV is written before any
    attention of the same layer reads it, so a request may read slots that another request of the same step writes.

    Attributes:
        token_ids: int32 [T].
        positions: int32 [T], position of each token in its request.
        context_lens: int32 [T], length of the request when the token was first computed: the prompt's length for
            prompt tokens, position + 1 for generated ones. Rotary scalings that depend on length go by it, so that
            chunking, caching and recomputation do not change a token's KV.
        slots: int64 [T], slot that takes each token's KV; slot S-1 is never read (padding of CUDA graphs).
        cu_seqlens_q: int32 [B+1], where each request's tokens begin.
        seq_lens: int32 [B], tokens of the request in KV after this step.
        rows: int32 [B], row of each request in `slot_table`.
        slot_table: int32 [max_num_seqs+1, max_model_len], slot of each position of each row.
        logits_rows: int64 [R], indices into T of the tokens whose logits are wanted.
        num_decodes: requests with one token, at the front.
        max_query_len: upper bound of the tokens a request has in this step.
        max_seq_len: upper bound of `seq_lens`; under a CUDA graph the model's limit.
        prefill_lens: (tokens in this step, tokens in KV after it) of each prefill chunk, on the host, for kernels that
            choose by length; () where the caller does not say.
        prompt_lens: int32 [B], length of each request's prompt, for what the prompt settles and generation keeps; None
            where the caller does not say, which core never does.
        shared_prefixes: int32 [3, num_decodes], decodes in groups that begin with the same slots, for kernels that read
            those once; None where the caller does not say or nothing is shared. At each place: a decode (its index in
            B, each once, the members of a group side by side); how many tokens its group has in common, less than
            `seq_lens` of any member, 0 for a decode that shares nothing; which member of the group it is, from 0.
            The last dimension is dense.
        media: what media encoders produced for tokens of this step, by encoder name; None without media. `token_ids` of
            these tokens are 0.
        media_positions: int32 [3, T], positions of three axes, where an encoder has `positions`; None elsewhere.
        shared: what the layers of a family compute once a step and all use, e.g. rotary cosines and sines; empty when
            the step begins.
        wanted: the tokens `logits_rows` as a step of their own, each of them a decode; given to the last layer alone, where
            it `narrows` (see `Layer`) and others are not wanted. Its `shared` is empty when that layer begins.
    """

    token_ids: "torch.Tensor"
    positions: "torch.Tensor"
    context_lens: "torch.Tensor"
    slots: "torch.Tensor"
    cu_seqlens_q: "torch.Tensor"
    seq_lens: "torch.Tensor"
    rows: "torch.Tensor"
    slot_table: "torch.Tensor"
    logits_rows: "torch.Tensor"
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    prefill_lens: tuple[tuple[int, int], ...] = ()
    prompt_lens: "torch.Tensor | None" = None
    shared_prefixes: "torch.Tensor | None" = None
    media: "Mapping[str, MediaTokens] | None" = None
    media_positions: "torch.Tensor | None" = None
    shared: dict[str, Any] = field(default_factory=dict)
    wanted: "Step | None" = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.token_ids.shape[0])

    @property
    def num_seqs(self) -> int:
        """B."""
        return int(self.seq_lens.shape[0])


class Hidden(NamedTuple):
    """Hidden states between layers: the value is `x`, plus `residual` where there is one.

    A layer whose norm follows the residual addition leaves the addition to the next layer, which fuses both; one that
    does not simply returns the sum and None. `x` and `residual` are `[T, E]`; a layer may overwrite both.
    """

    x: "torch.Tensor"
    residual: "torch.Tensor | None" = None

    def value(self) -> "torch.Tensor":
        """`x + residual`, `[T, E]`."""
        return self.x if self.residual is None else self.x + self.residual


class PreLayer(Protocol):
    """Token ids to hidden states. A `torch.nn.Module`; its parameters are named "pre.…"."""

    def __call__(self, step: Step) -> Hidden:
        """Runs in every step and inside CUDA graphs: no synchronisation, no host value that changes."""


class Layer(Protocol):
    """One transformer layer. A `torch.nn.Module`; its parameters are named "layers.{i}.…".

    One that has a true attribute `narrows` goes by `step.wanted`, where that is not None: it writes the KV of all tokens,
    and gives the hidden states of the wanted ones alone, `[R, E]`. They attend as `step.wanted` says.

    A layer that reads nothing of the step but what belongs to tokens (`slots`, `shared`, …), and gives the step itself to ops alone,
    is replayed in steps with prompts too. Core finds out by itself (docs/decisions/0016).

    A module inside of it that sends each token through a few of many experts, all of one size, has them in a module
    `experts`, and as integers `num_experts` and `top_k`, how many there are and how many a token meets. Only what
    counts the bytes and operations of a step goes by these: `light bench step`, and the pace of steps.
    """

    def __call__(self, hidden: Hidden, step: Step, kv: KVView) -> Hidden:
        """As `PreLayer`; writes this step's tokens to `kv`."""


class PostLayer(Protocol):
    """Hidden states to logits, or to scores. A `torch.nn.Module`; its parameters are named "post.…"."""

    def __call__(self, hidden: Hidden, step: Step) -> "torch.Tensor":
        """`[R, V]` logits (or `[R, 1]` scores) of the tokens `step.logits_rows`, in any float dtype."""


# --------------------------------------------------------------------------------------------- media and chat


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """Where one item stands in a prompt.

    Attributes:
        start: position of its first token.
        num_tokens: how many it takes.
        encoder: name of its encoder.
        grid: what `MediaEncoder.grid` said of it; () without.
    """

    start: int
    num_tokens: int
    encoder: str
    grid: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class MediaEncoder:
    """An encoder of images (later audio): what the media process, the engine and the pre layer need of it.

    The hook is asked twice: in the engine, and with device "meta" in the media process, which preprocesses.

    Attributes:
        name: unique within the model, e.g. "image"; its parameters are named "media.{name}.…".
        kind: "image" or "audio".
        preprocess: bytes of one item to named tensors on the CPU, from several threads at a time. An image comes as a
            binary PPM (P6): core has decoded it, turned it upright, and made it 8-bit RGB. It never opens a path or an
            address. Equal bytes give equal tensors.
        num_tokens: the preprocessed tensors to the number of tokens that the item takes in the prompt, 1 or more.
        module: `torch.nn.Module` from a list of items, each its preprocessed tensors on the model's device (in the dtypes
            that `preprocess` gave), to embeddings `[sum of num_tokens, E]` in their order and in the model's dtype. Runs
            outside of CUDA graphs; an item's embeddings do not depend on those beside it.
        placeholder: the text that stands for one item in a prompt, e.g. "<image>". Core puts the item's tokens in its
            place; where the tokenizer has it as a token, that token is looked for, else the text.
        token_id: the placeholder's token id, for prompts of token ids; None if the vocabulary has none.
        marker: what stands for an item where a chat template takes text alone; has the placeholder once. "" takes the
            placeholder itself.
        grid: the preprocessed tensors to what `positions` must know of the item, e.g. (frames, rows, columns).
        positions: length of a prompt and its items (of every encoder) to int32 `[3, length]` positions (CPU), and what is
            to be added to the positions of later tokens; a token's positions depend on what comes before it and its own
            item alone. None where positions have one axis. One encoder of a model at most has it.
    """

    name: str
    kind: str
    preprocess: "Callable[[bytes], Mapping[str, torch.Tensor]]"
    num_tokens: "Callable[[Mapping[str, torch.Tensor]], int]"
    module: Any
    placeholder: str = ""
    token_id: int | None = None
    marker: str = ""
    grid: "Callable[[Mapping[str, torch.Tensor]], tuple[int, ...]] | None" = None
    positions: "Callable[[int, Sequence[MediaSpan]], tuple[torch.Tensor, int]] | None" = None


@dataclass(frozen=True, slots=True)
class ChatSpec:
    """How conversations become prompts, and replies become messages, where the tokenizer does not say.

    Attributes:
        template: Jinja chat template used when the tokenizer has none.
        stop: strings that end a reply, beside the model's end-of-sequence tokens.
        tool_parser: name to a factory of incremental tool-call parsers; empty without tools.
        reasoning_parser: as `tool_parser`, for reasoning text.
        end_token_ids: ids that end every output, chat or not, where no file of the checkpoint names them.
    """

    template: str | None = None
    stop: Sequence[str] = ()
    tool_parser: Mapping[str, Callable[[], Any]] = field(default_factory=lambda: MappingProxyType({}))
    reasoning_parser: Mapping[str, Callable[[], Any]] = field(default_factory=lambda: MappingProxyType({}))
    end_token_ids: Sequence[int] = ()
