"""token_logprobs against float64."""

import pytest
import torch

from dsv4.kernels.token_logprobs.token_logprobs import token_logprobs


@pytest.mark.parametrize("top", [0, 1, 5, 30])
def test_token_logprobs_match_float64(top: int) -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(2)) * 4
    logits[1, 3] = logits[1, 4]
    tokens = torch.tensor([0, 3, 4, 29])
    logprob, rank, values, ids = token_logprobs(logits, tokens, top)
    truth = logits.double().log_softmax(-1)
    for i, token in enumerate(tokens.tolist()):
        row = truth[i].tolist()
        assert logprob[i].item() == pytest.approx(row[token], abs=1e-5)
        assert rank[i].item() == 1 + sum(x > row[token] for x in row)
        assert values[i].tolist() == pytest.approx(sorted(row, reverse=True)[:top], abs=1e-5)
        assert [row[t] for t in ids[i].tolist()] == pytest.approx(values[i].tolist(), abs=1e-5)


def test_the_greedy_token_has_exactly_the_best_logprob() -> None:
    logits = torch.randn(200, 1000)
    logprob, rank, values, _ = token_logprobs(logits, logits.argmax(-1), 1)
    assert torch.equal(logprob, values[:, 0]) and rank.eq(1).all()
