"""Qwen-VL of 2023 against a plain model in float64, written from its report (arXiv 2308.12966), the text model's
(arXiv 2309.16609) and their configurations.

transformers has no such model. The one here has nothing in common with Light: a convolution, whole matrices of scores,
torch's own attention with projections in the resampler, rotation by complex numbers.
"""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from light_qwen_vl.first_generation import FirstShape, resize_positions
from light_sdk import MediaTokens, ModelError
from light_sdk.testing import FamilyConformance
from light_sdk.testing.bounds import LOGITS
from light_sdk.testing.loading import load_model
from light_sdk.testing.reference import PREFIX_LEN, Trace, save_model, trace

START = 98
"""Of a picture; 99 ends it, and 100 is its placeholder."""
SIZE, NUM_QUERIES = 56, 4
TEXT = {
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "vocab_size": 101,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "kv_channels": 32,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "seq_length": 64,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "tie_word_embeddings": False,
}
VISUAL = {
    "width": 48,
    "mlp_ratio": 1.7,
    "heads": 3,
    "layers": 2,
    "image_size": SIZE,
    "patch_size": 14,
    "output_dim": 128,
    "image_start_id": START,
    "n_queries": NUM_QUERIES,
}
LENS = (45, 5, 27, 29)
CONTENTS: tuple[tuple[int | str, ...], ...] = ((3, "wide", 9, "tall"), (), (2, "tall"), (2, "tall"))


def draw(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with slopes, shapes and edges."""
    red, green = Image.linear_gradient("L").resize((width, height)), Image.radial_gradient("L").resize((width, height))
    picture = Image.merge("RGB", (red, green, red.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
    ImageDraw.Draw(picture).ellipse((width // 5, height // 6, width // 2, height // 2), fill=(250, 20 + seed, 60), outline=(0, 0, 0))
    return picture


def ppm(picture: Image.Image) -> bytes:
    """As core hands pictures over."""
    buffer = io.BytesIO()
    picture.save(buffer, "PPM")
    return buffer.getvalue()


PICTURES = {"wide": draw(150, 80), "tall": draw(60, 140, seed=3)}


class QwenVLConfig(PretrainedConfig):
    model_type = "qwen"


def qwen_vl(visual: dict[str, Any] | None = None, **changes: Any) -> QwenVLConfig:
    return QwenVLConfig(**(TEXT | changes), visual=VISUAL | (visual or {}))


def module(**parts: nn.Module) -> nn.Module:
    """A module that only holds others."""
    holder = nn.Module()
    for name, part in parts.items():
        holder.add_module(name, part)
    return holder


def spread(positions: torch.Tensor, side: int) -> torch.Tensor:
    """A table of positions for s by s places, for `side` by `side`."""
    trained = math.isqrt(len(positions))
    plane = positions.T.reshape(1, -1, trained, trained)
    return F.interpolate(plane, (side, side), mode="bicubic").flatten(2)[0].T


class Eyes(nn.Module):
    """The transformer and the resampler."""

    def __init__(
        self,
        width: int,
        mlp_ratio: float,
        heads: int,
        layers: int,
        patch_size: int,
        output_dim: int,
        n_queries: int,
        trained: int,
        **_: Any,
    ) -> None:
        super().__init__()
        self.heads = heads
        inner = int(width * mlp_ratio)
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(trained, width))
        self.ln_pre = nn.LayerNorm(width, eps=1e-6)
        blocks = [
            module(
                ln_1=nn.LayerNorm(width, eps=1e-6),
                ln_2=nn.LayerNorm(width, eps=1e-6),
                attn=module(in_proj=nn.Linear(width, 3 * width), out_proj=nn.Linear(width, width)),
                mlp=module(c_fc=nn.Linear(width, inner), c_proj=nn.Linear(inner, width)),
            )
            for _ in range(layers)
        ]
        self.transformer = module(resblocks=nn.ModuleList(blocks))
        self.attn_pool = module(
            attn=nn.MultiheadAttention(output_dim, output_dim // 128, batch_first=True),
            ln_q=nn.LayerNorm(output_dim, eps=1e-6),
            ln_kv=nn.LayerNorm(output_dim, eps=1e-6),
        )
        if width != output_dim:
            self.attn_pool.kv_proj = nn.Linear(width, output_dim, bias=False)
        self.attn_pool.query = nn.Parameter(torch.empty(n_queries, output_dim))
        self.attn_pool.pos_embed = nn.Parameter(torch.empty(n_queries, output_dim))
        self.ln_post = nn.LayerNorm(output_dim, eps=1e-6)
        self.proj = nn.Parameter(torch.empty(output_dim, output_dim))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv1(pixels)
        side = x.shape[-1]
        x = self.ln_pre(x.flatten(2).transpose(1, 2) + spread(self.positional_embedding, side))
        for block in self.transformer.resblocks:
            # Each head has its q, k and v side by side.
            q, k, v = block.attn.in_proj(block.ln_1(x)).unflatten(-1, (self.heads, 3, -1)).unbind(3)
            weights = (torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
            x = x + block.attn.out_proj(torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        pool = self.attn_pool
        x = pool.ln_kv(pool.kv_proj(x) if hasattr(pool, "kv_proj") else x)
        query = pool.ln_q(pool.query) + pool.pos_embed
        out, _ = pool.attn(query.expand(len(x), -1, -1), x + spread(pool.pos_embed, side), x)
        return self.ln_post(out) @ self.proj


class Reference(PreTrainedModel):
    """Names as in the checkpoints of 2023. Prompts are shorter than the training length, so that nothing is stretched."""

    config_class = QwenVLConfig

    def __init__(self, config: Any, trained: int = NUM_QUERIES) -> None:
        super().__init__(config)
        size, inner = config.hidden_size, config.intermediate_size // 2
        blocks = [
            module(
                ln_1=nn.RMSNorm(size, 1e-6),
                ln_2=nn.RMSNorm(size, 1e-6),
                attn=module(c_attn=nn.Linear(size, 3 * size), c_proj=nn.Linear(size, size, False)),
                mlp=module(w1=nn.Linear(size, inner, False), w2=nn.Linear(size, inner, False), c_proj=nn.Linear(inner, size, False)),
            )
            for _ in range(config.num_hidden_layers)
        ]
        parts = {"wte": nn.Embedding(config.vocab_size, size), "h": nn.ModuleList(blocks), "ln_f": nn.RMSNorm(size, 1e-6)}
        self.transformer = module(**parts, visual=Eyes(**config.visual, trained=trained))
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # drawn below

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = True, pixels: Any = None) -> Any:
        """One sequence; `pixels` of its pictures, in order."""
        config, ids = self.config, input_ids[0]
        past = past_key_values or [None] * len(self.transformer.h)
        begin = 0 if past[0] is None else past[0][0].shape[0]
        positions, x, present = torch.arange(begin, begin + len(ids)), self.transformer.wte(ids), []
        if pixels is not None:
            begins = (ids == config.visual["image_start_id"]).nonzero().flatten().tolist()
            for first, picture in zip(begins, self.transformer.visual(pixels), strict=True):
                x = torch.cat((x[: first + 1], picture, x[first + 1 + len(picture) :]))
        for block, before in zip(self.transformer.h, past):
            q, k, v = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, config.num_attention_heads, config.kv_channels)).unbind(1)
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            if before is not None:
                k, v = torch.cat((before[0], k)), torch.cat((before[1], v))
            present.append((k, v))
            scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(config.kv_channels)
            scores.masked_fill_(positions[:, None] < torch.arange(len(k)), -math.inf)
            x = x + block.attn.c_proj(torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1))
            y = block.ln_2(x)
            x = x + block.mlp.c_proj(block.mlp.w1(y) * F.silu(block.mlp.w2(y)))
        return SimpleNamespace(logits=self.lm_head(self.transformer.ln_f(x))[None], past_key_values=present)

    def rotate(self, x_THD: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = self.config.kv_channels // 2
        angles = positions.double()[:, None] / self.config.rotary_emb_base ** (torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(x_THD[..., :half].double(), x_THD[..., half:].double()) * torch.exp(1j * angles)[:, None]
        return torch.cat((turned.real, turned.imag), dim=-1).to(x_THD.dtype)


def normalised(picture: Image.Image, size: int = SIZE) -> torch.Tensor:
    """float64 `[3, size, size]`: squeezed, from 0 to 1, then by CLIP's mean and deviation."""
    values = torch.from_numpy(np.array(picture.resize((size, size), Image.Resampling.BICUBIC))).double().permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return (values - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1)


def create_reference(config: QwenVLConfig, trained: int = NUM_QUERIES) -> Reference:
    """Weights that float32 holds exactly, computed with in float64."""
    model, generator = Reference(config, trained).float().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.15, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.0)
    return model.double()


class TestConformance(FamilyConformance):
    plugins = ("light_qwen.hooks", "light_qwen_vl.hooks")

    def configs(self) -> dict[str, Any]:
        return {"qwen-vl": qwen_vl(), "same-width": qwen_vl({"width": 128, "heads": 4, "mlp_ratio": 1.0, "layers": 1})}

    def create_source(self, name: str) -> Any:
        return create_reference(self.configs()[name])

    def create_traces(self, name: str, source: Any) -> list[Trace]:
        traces = []
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(START, (4, max(LENS)), generator=generator).tolist()
        words[3][:PREFIX_LEN] = words[2][:PREFIX_LEN]
        for text, contents, length in zip(words, CONTENTS, LENS, strict=True):
            prompt: list[int] = []
            for item in contents:
                picture = [START, *[START + 2] * NUM_QUERIES, START + 1]
                prompt += picture if isinstance(item, str) else text[len(prompt) : len(prompt) + item]
            pictures = [normalised(PICTURES[item]) for item in contents if isinstance(item, str)]
            media = {"pixels": torch.stack(pictures).to(source.dtype)} if pictures else {}
            traces.append(trace(source, prompt + text[len(prompt) : length], **media))
        return traces

    def create_media(self, name: str, runtime: Any, index: int) -> Mapping[str, MediaTokens]:
        pictures = [PICTURES[item] for item in CONTENTS[index] if isinstance(item, str)]
        if not pictures:
            return {}
        (encoder,) = runtime.media_encoders
        device, items = runtime.model.device, [encoder.preprocess(ppm(picture)) for picture in pictures]
        assert [encoder.num_tokens(item) for item in items] == [NUM_QUERIES] * len(items)
        rows, position = [], 0
        for item in CONTENTS[index]:
            rows += range(position + 1, position + 1 + NUM_QUERIES) if isinstance(item, str) else ()
            position += NUM_QUERIES + 2 if isinstance(item, str) else item
        with torch.inference_mode():
            embeddings = encoder.module([{key: value.to(device) for key, value in item.items()} for item in items])
        return {"image": MediaTokens(embeddings, torch.tensor(rows, device=device))}

    def rewrite_config(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        """The entries that Qwen's own repositories have."""
        return {key: value for key, value in config.items() if key in TEXT} | {
            "architectures": TEXT["architectures"],
            "visual": config["visual"],
        }


@pytest.mark.parametrize(
    ("visual", "trained"),
    [({}, NUM_QUERIES), ({"width": 128, "heads": 4, "mlp_ratio": 1.0}, 16), ({"image_size": 448, "n_queries": 256, "layers": 1}, 256)],
    ids=["tiny", "same-width", "published-squares"],
)
def test_embeddings_of_pictures_of_many_shapes(visual: dict[str, Any], trained: int, tmp_path: Path) -> None:
    """Transformer and resampler alone, in one batch; the last as published, but for widths: 448 pixels a side become 32 x 32
    patches, whose positions were trained for 16 x 16, and 256 tokens."""
    suite, config = TestConformance(), qwen_vl(visual)
    source = create_reference(config, trained)
    save_model(source, tmp_path, lambda config: suite.rewrite_config("", config))
    (encoder,) = load_model(tmp_path, suite.plugins).media_encoders
    pictures = [draw(*size, seed=index) for index, size in enumerate(((300, 200), (30, 400), (448, 448), (61, 57)))]
    items = [encoder.preprocess(ppm(picture)) for picture in pictures]
    with torch.inference_mode():
        expected = source.transformer.visual(torch.stack([normalised(picture, config.visual["image_size"]) for picture in pictures]))
        found = encoder.module(items).split([encoder.num_tokens(item) for item in items])
    assert expected.shape == (len(pictures), config.visual["n_queries"], TEXT["hidden_size"])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=LOGITS.limit, rtol=0)


def test_positions_keep_their_places_when_there_are_more_of_them() -> None:
    table = torch.arange(9.0).view(9, 1).expand(-1, 2)
    assert torch.equal(resize_positions(table, 3), table)
    larger = resize_positions(table.bfloat16(), 6)
    assert larger.dtype == torch.bfloat16
    torch.testing.assert_close(larger.double(), spread(table.double(), 6), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 50}, "do not fit"),
        ({"output_dim": 64}, "do not fit"),
        ({"image_size": 50}, "do not fit"),
        ({"n_queries": 5}, "do not fit"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    config = qwen_vl(change)
    with pytest.raises(ModelError, match=message):
        FirstShape.of(SimpleNamespace(checkpoint_config=config, config=config))  # type: ignore[arg-type]


def test_the_published_shape_is_read() -> None:
    published = {"heads": 16, "image_size": 448, "image_start_id": 151857, "layers": 48, "mlp_ratio": 4.9231, "output_dim": 4096}
    config = QwenVLConfig(visual=published | {"patch_size": 14, "width": 1664}, hidden_size=4096)
    shape = FirstShape.of(SimpleNamespace(checkpoint_config=config, config=config))  # type: ignore[arg-type]
    assert (shape.intermediate_size, shape.num_queries, shape.query_heads, shape.side) == (8192, 256, 32, 32)
    del config.visual["heads"]
    with pytest.raises(ModelError, match=r"visual in config\.json has no heads"):
        FirstShape.of(SimpleNamespace(checkpoint_config=config, config=config))  # type: ignore[arg-type]
