"""Twin of mhc_post."""

import torch
from torch import Tensor


def mhc_post_ref(y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = torch.bmm(comb.transpose(-1, -2), h.float())
    return mixed.addcmul_(post.unsqueeze(-1), y.float().unsqueeze(-2)).to(h.dtype)
