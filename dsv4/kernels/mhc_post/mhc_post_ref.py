"""Twin of mhc_post."""

from torch import Tensor


def mhc_post_ref(y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = (comb.unsqueeze(-1) * h.unsqueeze(-2)).sum(-3)
    return (post.unsqueeze(-1) * y.unsqueeze(-2) + mixed).to(h.dtype)
