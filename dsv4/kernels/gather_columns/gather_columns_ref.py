"""Twin of gather_columns: what the ranks give by other means."""

from typing import Any

from torch import Tensor


def gather_columns_ref(x: Tensor, peers: Any) -> Tensor:
    whole: Tensor = peers.total(x)
    return whole
