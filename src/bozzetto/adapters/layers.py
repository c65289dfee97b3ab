"""How decoders of transformers are run: by themselves, with a cache of ours (`SlotCache`), or as ours, where layers are
of Llama's kind, with the weights of the unmodified model.

Weights lie in memory once. They are laid out layer by layer, and the model gives up its own copy of each; when the
model itself is called after that, it takes them back first.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ChameleonModel, Emu3TextModel, LlamaModel, Qwen2Model
from transformers.cache_utils import Cache
from transformers.models.chameleon.modeling_chameleon import ChameleonDecoderLayer
from transformers.models.emu3.modeling_emu3 import Emu3DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from bozzetto.runtime.engine import LayerParts, LinearMap
from bozzetto.targets.decoder import OwnDecoder, Shape

# Decoders that are read, and what all of their layers have to be.
_KINDS: Mapping[type[nn.Module], type[nn.Module]] = {
    ChameleonModel: ChameleonDecoderLayer,
    Emu3TextModel: Emu3DecoderLayer,
    LlamaModel: LlamaDecoderLayer,
    Qwen2Model: Qwen2DecoderLayer,
}
_MOVING = ("dynamic", "longrope")  # rotations that change while a sequence grows
_ATTENTION, _FEED = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_MOST_NUMBERS = 1024  # of a head, in our kernels
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook")
_made: WeakKeyDictionary[nn.Module, tuple[OwnDecoder, Tensor]] = WeakKeyDictionary()


class SlotCache(Cache):
    """Keys and values of all layers, [R, S, H, D] each, written where the pass says and read up to `reach` columns;
    each layer's on its own device. Rows are changed as those of a cache of ours (targets/decoder.py)."""

    def __init__(self, layers: int, rows: int, slots: int):
        super().__init__(layers=[])
        self.rows, self.slots = rows, slots
        self.parts: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.flat = torch.zeros(0, dtype=torch.int64)  # slots of the pass, in the flat tables [R S, H, D]
        self.reach = slots

    def __len__(self) -> int:
        return len(self.parts)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nobody needs it: positions and masks are given."""
        return 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [R, H, W, D] of a pass -> all that it may attend to, [R, H, reach, D]."""
        found = self.parts[layer_idx]
        if found is None:
            rows, heads, _, dim = key_states.shape
            blank = key_states.new_zeros(rows, self.slots, heads, dim)
            found = self.parts[layer_idx] = (blank, blank.new_zeros(*blank.shape[:3], value_states.shape[-1]))
        for table, new in zip(found, (key_states, value_states), strict=True):
            table.flatten(0, 1).index_copy_(0, self.flat.to(table.device), new.transpose(1, 2).flatten(0, 1))
        keys, values = (table[:, : self.reach].transpose(1, 2) for table in found)
        return keys, values

    def tables(self) -> list[Tensor]:
        """Every table that there is, [R, S, H, D]."""
        return [part for pair in self.parts if pair is not None for part in pair]

    def compact(self, path: Tensor, start: Tensor) -> None:
        """Gathers and scatters of whole rows. path int64 [R, P]."""
        path = path[:, 1:]  # the root does not move
        first = (torch.arange(self.rows, device=path.device) * self.slots + start)[:, None].expand_as(path)
        to = (first + torch.arange(1, path.shape[1] + 1, device=path.device)).flatten()
        here = (first + path).flatten()
        for table in self.tables():
            flat, device = table.flatten(0, 1), table.device
            flat.index_copy_(0, to.to(device), flat.index_select(0, here.to(device)))

    def keep(self, rows: Tensor) -> None:
        """rows int64 [R']."""
        self.rows = len(rows)
        self._change(lambda table: table[rows.to(table.device)])

    def take(self, other: SlotCache, rows: Tensor) -> None:
        """Give rows int64 [n] what another cache holds, of any number of slots."""
        if not self.tables():  # nothing has run here yet
            self.parts = list(other.parts)
            self._change(lambda table: table.new_zeros(self.rows, self.slots, *table.shape[2:]))
        if (more := other.slots - self.slots) > 0:
            self.slots += more
            self._change(lambda table: F.pad(table, (0, 0, 0, 0, 0, more)))
        for ours, theirs in zip(self.tables(), other.tables(), strict=False):
            ours[rows.to(ours.device), : theirs.shape[1]] = theirs

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.parts = [None if pair is None else (change(pair[0]), change(pair[1])) for pair in self.parts]


def cache_argument(forward: Callable[..., Any]) -> str:
    """What a decoder's forward calls its cache: `cache` since transformers 5.24, `past_key_values` before (which 5.24
    still takes, with a FutureWarning, and 5.40 shall not)."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def why_not(body: Any) -> str:
    """Why our kernels cannot run a decoder of transformers; "": they can."""
    if body in _made:
        return ""
    kind, config, stack = type(body), body.config, body.layers
    if kind not in _KINDS or any(type(layer) is not _KINDS[kind] for layer in stack):
        return f"layers of {kind.__name__} are not known here"
    first, weights = stack[0].self_attn, [*stack.parameters(), body.norm.weight]
    rope, wide = config.rope_parameters["rope_type"], first.head_dim
    fixed = rope not in _MOVING and 2 * len(body.rotary_emb.inv_freq) == wide
    reasons = (
        (any(vars(part).get(name) for part in body.modules() for name in _HOOKS), "it has hooks"),
        (any(type(part) is not nn.Linear for layer in stack for part in _linear(layer)), "linear layers of its own"),
        (len({(weight.device, weight.dtype) for weight in weights}) > 1, "weights of several types or devices"),
        (config.hidden_act not in ("silu", "swish"), f"its activation is {config.hidden_act}"),
        (config.to_dict().get("mlp_bias"), "its feed-forward layers have biases"),
        (any(getattr(layer.self_attn, "sliding_window", None) for layer in stack), "its attention has a window"),
        (not fixed, f"its positions are not turned as we turn them ({rope})"),
        (wide > _MOST_NUMBERS, f"its heads have {wide} numbers"),
    )
    return next((why for found, why in reasons if found), "")


def own_decoder(body: Any) -> tuple[OwnDecoder, Tensor]:
    """A decoder without a reason in `why_not` as ours, and its rotations float32 [positions, hd/2, 2]; the same for all
    that ask for this one."""
    if body not in _made:
        first, weight = body.layers[0].self_attn, body.norm.weight
        heads, kv_heads = (len(part.weight) // first.head_dim for part in (first.q_proj, first.k_proj))
        shape = Shape(len(weight), heads, kv_heads, first.head_dim, body.norm.variance_epsilon)
        decoder = OwnDecoder(_taken(body), shape, weight.dtype, weight.detach())
        _made[body] = decoder, _turns(body, first.head_dim)

        def called(module: Any, _: Any) -> None:
            hook.remove()
            _give_back(module, decoder)

        hook = body.register_forward_pre_hook(called)
    return _made[body]


def by_kernels(head: Any, dtype: torch.dtype) -> Any:
    """A module with its linear maps in our layout; the rest of it is as it is."""
    other = copy.copy(head)
    parts = head._modules.items()
    other._modules = {n: LinearMap.of(m, dtype) if type(m) is nn.Linear else m for n, m in parts}
    return other


def _linear(layer: Any) -> list[Any]:
    return [getattr(layer.self_attn, n) for n in _ATTENTION] + [getattr(layer.mlp, n) for n in _FEED]


def _turns(body: Any, head_dim: int) -> Tensor:
    """As the model rounds them."""
    like = torch.zeros(1, dtype=body.norm.weight.dtype)
    parts = body.rotary_emb(like, torch.arange(body.config.max_position_embeddings)[None])
    return torch.stack([part[0, :, : head_dim // 2].float() for part in parts], -1)


def _taken(body: Any) -> Iterator[LayerParts]:
    """The layers one after another; a layer is empty when the next is asked for."""
    for layer in body.layers:
        yield _parts(layer)
        for part in _linear(layer):
            part.weight.data = part.weight.new_empty(0)


def _parts(layer: Any) -> LayerParts:
    q, k, v, o, gate, up, down = _linear(layer)
    a, norms, bias = layer.self_attn, None, None
    if type(layer) is ChameleonDecoderLayer:
        norms = torch.cat([a.q_norm.weight, a.k_norm.weight]), torch.cat([a.q_norm.bias, a.k_norm.bias])
    if q.bias is not None:
        bias = torch.cat([q.bias, k.bias, v.bias])
    rows, gated = torch.cat([q.weight, k.weight, v.weight]), torch.cat([gate.weight, up.weight])
    gains = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    return LayerParts(rows, o.weight, gated, down.weight, *gains, bias, norms, halves=True, out_bias=o.bias)


@torch.no_grad()
def _give_back(body: Any, decoder: OwnDecoder) -> None:
    """The weights as they were, for the model itself; ours stay."""
    maps = iter(decoder.network.maps)
    for layer in body.layers:
        q, k, v, o, gate, up, down = _linear(layer)
        for group in ((q, k, v), (o,), (gate, up), (down,)):
            rows = next(maps).rows().split([part.out_features for part in group])
            for part, weight in zip(group, rows, strict=True):
                part.weight.data = weight.clone()
