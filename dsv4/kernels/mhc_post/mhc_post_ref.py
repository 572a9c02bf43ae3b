"""Twin of mhc_post."""

from torch import Tensor


def mhc_post_ref(y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = (h.unsqueeze(-2) * comb.unsqueeze(-1)).sum(-3)
    return mixed.add_(y.unsqueeze(-2) * post.unsqueeze(-1)).to(h.dtype)
