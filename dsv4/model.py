"""DeepSeek-V4 on one page. Read this first; each name below is a file in layers/, each op a folder in kernels/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsv4.checkpoint.load import Policy, load_model_weights
from dsv4.config import LayerSpec, ModelConfig
from dsv4.errors import RequestError
from dsv4.kernels.embed.embed import embed
from dsv4.kvcache import KVCache, make_plan
from dsv4.kvcache.cache import LayerCache
from dsv4.layers.attention import Attention
from dsv4.layers.mhc import Site, StreamHead, Streams, whole
from dsv4.layers.moe import MoE
from dsv4.layers.persistent import Persistent
from dsv4.layers.scope import Scope
from dsv4.layers.settings import Settings, check_device
from dsv4.layers.step import Rotaries, Step
from dsv4.layers.vocabulary import Vocabulary
from dsv4.parallel.mesh import Mesh
from dsv4.parallel.shard import Share
from dsv4.quant.weights import Weight

Observe = Callable[[str, Tensor], None]


class Block:
    """One layer: attention and MoE, each inside its hyper-connection site."""

    def __init__(self, scope: Scope, config: ModelConfig, spec: LayerSpec, settings: Settings):
        self.attn_site, self.ffn_site = (Site(scope, name, config, settings.tp) for name in ("attn", "ffn"))
        self.attn = Attention(scope.at("attn"), config, spec, settings)
        self.ffn = MoE(scope.at("ffn"), config, spec, settings)

    def __call__(self, streams: Streams, cache: LayerCache, step: Step) -> tuple[Streams, Tensor]:
        """The streams inside the attention site -> inside the FFN site, and the FFN's output y [T, D], or of several
        ranks this one's part of it.
        """
        mid = self.ffn_site.seam(self.attn(streams.x, cache, step), streams)
        return mid, self.ffn(mid.x, step)


class Model:
    """Embedding, layers, head. `weights` is emptied as the layers are made. `path` is the checkpoint folder, None for a
    model made from a seed.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Weight | Tensor],
        settings: Settings,
        *,
        device: str = "cpu",
        path: Path | None = None,
    ):
        self.config, self.settings, self.device, self.path = config, settings, device, path
        root = Scope(weights)
        self.embed = root.tensor("embed.weight").to(settings.dtype)
        self.blocks = [Block(root.at(f"layers.{i}"), config, spec, settings) for i, spec in enumerate(config.layers)]
        self.stream_head = StreamHead(root, config, settings.tp)
        self.vocabulary = Vocabulary(root.weight("head"), settings)
        self.rotaries = Rotaries(config, device)

    def new_cache(self, max_seqs: int, max_tokens: int, *, packed: bool | None = None) -> KVCache:
        """A cache for at most `max_seqs` sequences of `max_tokens` tokens together.

        `packed`: what the settings round anyway is held in its bytes, a bit over half of BF16's, and reads back the
        same bit for bit. The default on a GPU in bfloat16; a CPU is faster without.
        """
        how = self.settings
        if packed is None:
            packed = self.device != "cpu" and how.dtype == torch.bfloat16
        return KVCache(
            self.config,
            max_seqs,
            max_tokens,
            dtype=how.dtype,
            device=self.device,
            pack_entries=packed and how.kv_quant,
            pack_index_keys=packed and how.index_quant,
        )

    @torch.inference_mode()
    def forward(
        self,
        batch: Sequence[tuple[int, Tensor]],
        cache: KVCache,
        *,
        all_logits: bool = False,
        observe: Observe | None = None,
    ) -> Tensor:
        """Append each (slot, ids [n] i64) to its sequence and return logits: [B, V] f32 of the last rows, or [T, V] of
        all.

        Prefill, a chunk of one, decode (n = 1) and mixtures are the same call; sequences may have different lengths.
        `observe(name, tensor)` sees the streams [T, M, D] after `layers.L.attn` and `layers.L.ffn`, and `logits`.
        """
        plan = make_plan(batch, cache)
        h = self.body(self.rotaries.step(plan), cache, observe)
        for segment in plan.segments:
            cache.advance(segment.slot, segment.length)
        if not all_logits and len(plan.tokens) != len(plan.segments):
            h = h[plan.last_rows]
        logits = self.head(h)
        if observe is not None:
            observe("logits", logits)
        return logits

    def body(self, step: Step, cache: KVCache, observe: Observe | None = None) -> Tensor:
        """The streams [T, M, D] after the last layer, of the step's tokens; appends them to the cache's buffers.

        Everything that depends on a length is in `step`, so on a plan of fixed shapes this is fixed work.
        """
        last, y = self.body_apart(step, cache, observe)
        h = last.leave(y, self.settings.tp)
        if observe is not None:
            observe(f"layers.{len(self.blocks) - 1}.ffn", whole(h, len(y), self.settings.tp))
        return h

    def body_apart(self, step: Step, cache: KVCache, observe: Observe | None = None) -> tuple[Streams, Tensor]:
        """As `body`, up to the last site, which `head_at_once` leaves: its streams, and the FFN's output y [T, D], or
        of several ranks this one's part of it.
        """
        h = embed(step.plan.tokens, self.embed, self.config.hc_mult)
        mid, y = self._block(0, self.blocks[0].attn_site.enter(h), step, cache, observe)
        for i in range(1, len(self.blocks)):
            streams = self.blocks[i].attn_site.seam(y, mid)  # out of the layer in front and into this one
            if observe is not None:
                observe(f"layers.{i - 1}.ffn", whole(streams.h, len(y), self.settings.tp))
            mid, y = self._block(i, streams, step, cache, observe)
        return mid, y

    def _block(
        self, i: int, streams: Streams, step: Step, cache: KVCache, observe: Observe | None
    ) -> tuple[Streams, Tensor]:
        mid, y = self.blocks[i](streams, cache.layers[i], step)
        if observe is not None:
            observe(f"layers.{i}.attn", whole(mid.h, len(y), self.settings.tp))
        return mid, y

    def at_once(self, step: Step, cache: KVCache) -> Persistent:
        """All layers of a decode step at fixed shapes as one op, for `body_at_once`. Unfit where that cannot be;
        `body` always can.
        """
        return Persistent(self.blocks, cache, step, self.config, self.settings)

    def body_at_once(self, step: Step, layers: Persistent) -> tuple[Streams, Tensor]:
        """As `body_apart`, bit for bit, in one op."""
        streams = layers.entered
        embed(step.plan.tokens, self.embed, self.config.hc_mult, out=streams.h)
        self.blocks[0].attn_site.enter(streams.h, out=streams)
        return layers()

    def head(self, h: Tensor, out: Tensor | None = None) -> Tensor:
        """h [T, M, D] -> logits [T, V] f32."""
        return self.vocabulary(self.stream_head(h), out)

    def head_at_once(self, last: Streams, y: Tensor, out: Tensor | None = None) -> Tensor:
        """What `body_apart` or `body_at_once` leaves -> logits [T, V] f32."""
        return self.vocabulary(self.stream_head.leave(y, last)[1], out)

    def logits(self, ids: Sequence[int] | Tensor, prefill: int | None = None, chunk: int | None = None) -> Tensor:
        """Teacher-forced logits [T, V] f32 of one sequence: the first `prefill` tokens (default all) in chunks of
        `chunk` (default one chunk), the rest one by one.
        """
        tokens = torch.as_tensor(ids, dtype=torch.int64, device="cpu")
        total = len(tokens)
        prefill = total if prefill is None else prefill
        chunk = max(prefill, 1) if chunk is None else chunk
        if tokens.dim() != 1 or not total or not 0 <= prefill <= total or chunk < 1:
            raise RequestError(
                f"logits wants ids [T >= 1], 0 <= prefill <= T and chunk >= 1; got shape {list(tokens.shape)}, "
                f"prefill {prefill}, chunk {chunk}"
            )
        cache = self.new_cache(1, total)
        slot = cache.acquire()
        parts = [*tokens[:prefill].split(chunk), *tokens[prefill:].split(1)]
        return torch.cat([self.forward([(slot, part)], cache, all_logits=True) for part in parts if len(part)])


def load(
    path: str | Path = "nano",
    *,
    device: str = "cpu",
    dtype: str = "bfloat16",
    act: str = "bf16",
    kv_quant: bool = True,
    index_quant: bool = True,
    weights: Policy = "native",
    layers: int | None = None,
    tp: Mesh | None = None,
) -> Model:
    """Load a checkpoint folder (or one .safetensors beside its config.json), `nano`, or seeded weights without a file:
    `random:tiny`, or `random:flash` and `random:pro` in the real sizes, of which `layers` keeps the first so many.

    dtype: `bfloat16` | `float32`, of everything between ops. act: `bf16` (W4A16), `fp8` (DeepSeek's script), `nvfp4`
    (W4A4). kv_quant, index_quant: the roundings the model was trained with. weights: `native` (as stored) | `nvfp4`
    (every large linear requantised at load). tp: the ranks to share the model with (dsv4/parallel), and how: this
    process loads its part onto the mesh's device, whatever `device` says, and takes part in every step. Raises
    ConfigError or CheckpointError, each listing everything found.
    """
    device, share = (device, Share()) if tp is None else (tp.device, tp.share)
    check_device(device)
    config, tensors, folder = load_model_weights(path, policy=weights, device=device, layers=layers, share=share)
    settings = Settings.parse(config, dtype, act, kv_quant, index_quant, tp)
    return Model(config, tensors, settings, device=device, path=folder)
