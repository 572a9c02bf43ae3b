"""sample against integers in plain Python, float64 brute force and the frequencies it must produce."""

import math

import pytest
import torch
from torch import Tensor

from dsv4.kernels.sample.sample import Forbidden, Penalties, sample
from dsv4.kernels.sample.sample_ref import splitmix, threshold_ref, uniform_ref

VOCABS = [1, 7, 4096, 129280]  # the last is V4's vocabulary
FLASH_VOCAB = 129280


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def draw(logits: Tensor, temperature: float = 1.0, seed: int = 0, counter: int = 0, **filters: float) -> list[int]:
    """Every row of `logits` with the same parameters and consecutive counters."""
    rows = logits.shape[0]
    dtypes = {"top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32}
    vectors = {name: torch.full((rows,), value, dtype=dtypes[name]) for name, value in filters.items()}
    counters = torch.arange(counter, counter + rows)
    return sample(logits, torch.full((rows,), temperature), torch.full((rows,), seed), counters, **vectors).tolist()


def test_splitmix_gives_the_published_sequence() -> None:
    """First outputs of SplitMix64 seeded with 1234567 (Vigna's reference implementation)."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = [(1234567 + (i + 1) * 0x9E3779B97F4A7C15) % 2**64 for i in range(5)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    assert [v % 2**64 for v in splitmix(signed).tolist()] == published


@pytest.mark.parametrize("seed,counter", [(0, 0), (2**62 + 12345, 7), (-1, 2**31)])
def test_noise_is_the_stated_integer_function(seed: int, counter: int) -> None:
    golden = 0x9E3779B97F4A7C15
    key = mix((mix((seed + golden) % 2**64) + (counter + 1) * golden) % 2**64)
    expected = [((mix((key + (t + 1) * golden) % 2**64) >> 32) + 0.5) * 2.0**-32 for t in range(50)]
    got = uniform_ref(torch.tensor([seed]), torch.tensor([counter]), 50)[0].tolist()
    assert got == pytest.approx(expected, rel=2e-7)


def test_noise_stays_inside_the_open_interval_and_is_uniform() -> None:
    u = uniform_ref(torch.arange(40), torch.zeros(40, dtype=torch.int64), FLASH_VOCAB)
    assert u.min() > 0 and u.max() < 1
    counts = torch.histc(u, bins=64, min=0, max=1).double()
    expected = u.numel() / 64
    # chi-square with 63 degrees of freedom: mean 63, deviation 11.2
    assert abs(((counts - expected) ** 2 / expected).sum() - 63) < 5 * 11.3


@pytest.mark.parametrize("vocab", VOCABS)
def test_greedy_takes_the_largest_logit_and_the_lower_id_of_a_tie(vocab: int) -> None:
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[2] = 1.5
    if vocab > 3:
        logits[3, [vocab - 1, vocab // 2]] = 99.0
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert draw(logits, temperature=0.0) == expected


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 0.5, -1.0, 1.25, 0.0])
    n, temperature = 40_000, 0.7
    counts = torch.bincount(torch.tensor(draw(logits.expand(n, -1), temperature, seed=11)), minlength=5).double()
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    expected = torch.tensor([n * w / sum(weights) for w in weights]).double()
    # chi-square with 4 degrees of freedom: 23.5 is exceeded once in 10^4 seeds
    assert ((counts - expected) ** 2 / expected).sum() < 23.5


def test_draws_of_different_seeds_and_counters_are_independent() -> None:
    logits = torch.zeros(20_000, 10)
    a = torch.tensor(draw(logits, seed=1))
    b = torch.tensor(draw(logits, seed=2))
    for x, y in [(a, b), (a[:-1], a[1:]), (b[:-1], b[1:])]:
        joint = torch.bincount(x * 10 + y, minlength=100).double()
        expected = len(x) / 100
        # chi-square with 99 degrees of freedom: mean 99, deviation 14.1
        assert abs(((joint - expected) ** 2 / expected).sum() - 99) < 5 * 14.1


def brute_keep(row: list[float], top_k: int, top_p: float) -> set[int]:
    order = sorted(range(len(row)), key=lambda t: -row[t])
    if top_k:
        order = [t for t in order if row[t] >= row[order[min(top_k, len(row)) - 1]]]
    total, mass, kept = math.fsum(math.exp(row[t]) for t in order), 0.0, set()
    for t in order:
        tied = any(row[t] == row[other] for other in kept)
        if top_p < 1 and mass >= top_p * total and not tied:
            break
        kept.add(t)
        mass += math.exp(row[t])
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 3, 40, 64])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_top_k_and_top_p_keep_what_brute_force_keeps(top_k: int, top_p: float) -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(top_k)) * 2
    logits[1] = logits[1].round()  # many ties
    logits[2, 5:] = -50.0
    scores = logits - logits.amax(-1, keepdim=True)
    keep = scores >= threshold_ref(scores, torch.full((6,), top_k), torch.full((6,), top_p), None)
    for row, kept in zip(scores.double().tolist(), keep, strict=True):
        assert set(kept.nonzero().flatten().tolist()) == brute_keep(row, top_k, top_p)


@pytest.mark.parametrize(("spread", "top_p"), [(0.1, 0.9), (0.1, 0.01), (4.0, 0.9), (4.0, 0.999)])
def test_top_p_over_a_large_vocabulary(spread: float, top_p: float) -> None:
    """Flat rows need more candidates than are looked at first; a peaked row beside them must not notice."""
    logits = torch.randn(2, 3000, generator=torch.Generator().manual_seed(7)) * torch.tensor([[spread], [4.0]])
    scores = logits - logits.amax(-1, keepdim=True)
    keep = scores >= threshold_ref(scores, None, torch.full((2,), top_p), None)
    for row, kept in zip(scores.double().tolist(), keep, strict=True):
        expected = brute_keep(row, 0, top_p)
        # float32 sums may move the border by a token or two of thousands
        assert len(set(kept.nonzero().flatten().tolist()) ^ expected) <= (2 if len(expected) > 500 else 0)


@pytest.mark.parametrize(
    "filters", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 4, "top_p": 0.8, "min_p": 0.1}]
)
def test_filtered_draws_reach_exactly_the_allowed_tokens(filters: dict[str, float]) -> None:
    logits = torch.tensor([1.0, 0.2, 0.9, -0.5, 0.7, -3.0])
    temperature = 0.8
    scaled = [x / temperature for x in logits.tolist()]
    allowed = brute_keep(scaled, int(filters.get("top_k", 0)), filters.get("top_p", 1.0))
    floor = max(scaled) + math.log(filters["min_p"]) if "min_p" in filters else -math.inf
    allowed = {t for t in allowed if scaled[t] >= floor}
    assert set(draw(logits.expand(3000, -1), temperature, seed=5, **filters)) == allowed


def test_a_filter_that_is_off_changes_nothing() -> None:
    logits = torch.randn(200, 300)
    plain = draw(logits, seed=3)
    assert draw(logits, seed=3, top_k=0, top_p=1.0, min_p=0.0) == plain
    assert draw(logits, seed=3, top_k=300) == plain


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = torch.randn(50, 100) * 1e4
    tokens = draw(logits, temperature, top_p=0.5)
    if temperature < 1:
        assert tokens == logits.argmax(-1).tolist()
    else:
        assert len(set(tokens)) > 25


def test_a_row_depends_on_that_row_alone() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 500, generator=g)
    temperature = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 0.9])
    seed, counter = torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([0, 3, 1, 4, 1, 5])
    top_k, top_p = torch.tensor([0, 0, 5, 0, 50, 2]), torch.tensor([1.0, 1.0, 0.9, 0.3, 1.0, 0.9])
    together = sample(logits, temperature, seed, counter, top_k=top_k, top_p=top_p)
    for i in range(6):
        one = slice(i, i + 1)
        alone = sample(logits[one], temperature[one], seed[one], counter[one], top_k=top_k[one], top_p=top_p[one])
        assert alone.item() == together[i].item()


def test_penalties_match_the_formula_token_by_token() -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 50, generator=g) * 3
    in_prompt = torch.rand(3, 50, generator=g) < 0.3
    counts = torch.randint(0, 4, (3, 50), generator=g, dtype=torch.int32)
    factors = [(1.3, 0.4, -0.2), (0.8, -1.0, 0.6), (1.0, 0.0, 0.0)]
    repetition, presence, frequency = (torch.tensor(column) for column in zip(*factors, strict=True))
    tokens = sample(
        logits,
        torch.zeros(3),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, dtype=torch.int64),
        penalties=Penalties(in_prompt, counts, repetition, presence, frequency),
    )
    for i, (r, p, f) in enumerate(factors):
        expected = []
        for t in range(50):
            x, count = logits[i, t].item(), counts[i, t].item()
            if count or in_prompt[i, t]:
                x = x / r if x > 0 else x * r
            expected.append(x - f * count - p * (count > 0))
        assert tokens[i].item() == expected.index(max(expected))


def test_bias_is_added_before_the_choice() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0], [0.0, 3.0, 1.0]])
    bias = torch.tensor([[0.0, 0.0, 0.0], [0.0, -torch.inf, 0.0], [9.0, 0.0, 0.0]])
    zeros = torch.zeros(3, dtype=torch.int64)
    assert sample(logits, torch.zeros(3), zeros, zeros, bias=bias).tolist() == [1, 2, 0]
    drawn = sample(
        logits[1:2].expand(500, -1), torch.ones(500), torch.arange(500), torch.zeros(500).long(), bias=bias[1:2]
    )
    assert set(drawn.tolist()) == {0, 2}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_gives_minus_one_and_spares_the_others(bad: float, temperature: float) -> None:
    logits = torch.randn(3, 20)
    expected = draw(logits, temperature)
    logits[1, 13] = bad
    assert draw(logits, temperature) == [expected[0], -1, expected[2]]


def test_no_rows_give_no_tokens() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert sample(torch.zeros(0, 9), torch.zeros(0), empty, empty).shape == (0,)


def test_forbidden_tokens_are_out_until_the_counter_gets_there() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(4, -1)
    zeros = torch.zeros(4, dtype=torch.int64)
    forbidden = Forbidden(torch.tensor([[1, -1], [1, 3], [3, 1], [-1, -1]]), torch.tensor([5, 5, 4, 9]))
    counter = torch.full((4,), 4)
    assert sample(logits, torch.zeros(4), zeros, counter, forbidden=forbidden).tolist() == [3, 2, 1, 1]
    assert sample(logits, torch.zeros(4), zeros, counter + 1, forbidden=forbidden).tolist() == [1, 1, 1, 1]
    drawn = {sample(logits, torch.full((4,), 9.0), zeros + i, zeros, forbidden=forbidden)[1].item() for i in range(99)}
    assert drawn == {0, 2}


def test_a_forbidden_token_stays_out_whatever_bias_and_penalties_say() -> None:
    logits, zeros = torch.tensor([[0.0, 3.0]]), torch.zeros(1, dtype=torch.int64)
    counts = torch.tensor([[9, 0]], dtype=torch.int32)
    penalties = Penalties(counts > 0, counts, torch.tensor([1.5]), torch.tensor([-2.0]), torch.tensor([-2.0]))
    forbidden = Forbidden(torch.tensor([[0]]), torch.tensor([1]))
    bias = torch.tensor([[99.0, 0.0]])
    assert sample(logits, torch.zeros(1), zeros, zeros, bias=bias, penalties=penalties).item() == 0
    assert sample(logits, torch.zeros(1), zeros, zeros, bias=bias, penalties=penalties, forbidden=forbidden).item() == 1


def test_a_row_that_is_not_biased_does_not_see_its_bias() -> None:
    logits, zeros = torch.tensor([[0.0, 3.0]]).expand(2, -1), torch.zeros(2, dtype=torch.int64)
    bias = torch.tensor([[9.0, 0.0], [torch.nan, torch.nan]])
    assert sample(logits, torch.zeros(2), zeros, zeros, bias=bias, biased=torch.tensor([True, False])).tolist() == [
        0,
        1,
    ]
