"""The bytes of the KV cache: entries with E4M3 channels and a BF16 rotary tail, index keys in E2M1.

    entry      | Dh-R E4M3 bytes | R BF16 values (2R bytes) | (Dh-R)/64 E8M0 scales | zeros to a multiple of 8 |
    index key  | Ci/2 bytes of two E2M1 codes, even channel low | Ci/32 E8M0 scales |

584 and 68 bytes at the sizes of Flash and Pro. What comes out equals fp8.act_fake_quant and fp8.fp4_act_fake_quant of
what went in, bit for bit: both formats keep exactly what those round to. A group that holds NaN or Inf reads as NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.quant import fp8, mxfp4
from dsv4.quant.formats import e4m3_decode, e8m0_decode, groups_of

GROUP = 64  # channels of an entry per E8M0 scale
E8M0_NAN = 255


def entry_bytes(head_dim: int, rope_dims: int) -> int:
    """Stored bytes of one entry of Dh channels, the last R of them rotary."""
    plain = head_dim - rope_dims
    return -(-(plain + 2 * rope_dims + -(-plain // GROUP)) // 8) * 8


def pack_entry(x: Tensor, rope_dims: int) -> Tensor:
    """x [..., Dh] bf16|f32, normed and rotated but not yet rounded -> u8 [..., entry_bytes(Dh, R)]. Dh - R % 64 == 0.

    The rotary tail is kept as BF16, so only BF16 entries come back whole.
    """
    plain = x.shape[-1] - rope_dims
    groups_of(x[..., :plain], GROUP, "the un-rotated part of an entry")
    codes, scale = fp8.act_quant(x[..., :plain], GROUP)
    tail = x[..., plain:].to(torch.bfloat16).contiguous()
    parts = (codes, tail, _nan_for_none(scale.to(torch.float8_e8m0fnu).view(torch.uint8)))
    packed = torch.cat([part.view(torch.uint8) for part in parts], dim=-1)
    return F.pad(packed, (0, entry_bytes(x.shape[-1], rope_dims) - packed.shape[-1]))


def unpack_entry(packed: Tensor, head_dim: int, rope_dims: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Values [..., Dh] of packed u8 [..., X]; exact in bf16 and f32."""
    plain = head_dim - rope_dims
    scales = packed[..., plain + 2 * rope_dims :][..., : plain // GROUP]
    values = e4m3_decode(packed[..., :plain]).unflatten(-1, (-1, GROUP)) * e8m0_decode(scales).unsqueeze(-1)
    tail = packed[..., plain : plain + 2 * rope_dims].contiguous().view(torch.bfloat16)
    return torch.cat([values.flatten(-2).to(dtype), tail.to(dtype)], dim=-1)


def index_key_bytes(width: int) -> int:
    """Stored bytes of one index key of Ci channels."""
    return -(-width // 2) + -(-width // mxfp4.GROUP)


def pack_index_key(x: Tensor) -> Tensor:
    """x [..., Ci] bf16|f32, Hadamard applied -> u8 [..., index_key_bytes(Ci)]. Ci % 32 == 0."""
    codes, scale = mxfp4.quantize(x, check=False, name="index key")
    return torch.cat((codes, _nan_for_none(scale)), dim=-1)


def unpack_index_key(packed: Tensor, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Values [..., Ci] of packed u8 [..., index_key_bytes(Ci)]; exact in bf16 and f32."""
    return mxfp4.dequantize(packed[..., : width // 2], packed[..., width // 2 :], dtype)


def _nan_for_none(scale: Tensor) -> Tensor:
    """Both rules have a floor above byte 0, so it is the scale of a group with NaN: 255 makes that read as NaN."""
    return scale.masked_fill(scale == 0, E8M0_NAN)
