"""Keyed randomness: a number belongs to (seed, index, draw, stream) and to nothing else."""

import numpy as np
import pytest
import torch
from scipy import stats

from nelbo.draws import STREAMS, Draws, generator
from nelbo.times import stratified, uniform

KINDS = {
    "normal": lambda draws: draws.normal("eps", (3, 2)),
    "uniform": lambda draws: draws.uniform("eps", (3, 2)),
    "gumbel": lambda draws: draws.gumbel("eps", (3, 2)),
    "gamma": lambda draws: draws.gamma("eps", 1 / 15, (3, 2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_do_not_depend_on_the_batch_or_its_order(kind):
    draw = KINDS[kind]
    together = draw(Draws(5, [3, 9, 7, 1], [0, 2, 2, 1]))
    assert together.dtype == torch.float32 and together.shape == (4, 3, 2)
    for row, (index, number) in enumerate([(3, 0), (9, 2), (7, 2), (1, 1)]):
        assert torch.equal(draw(Draws(5, [index], number))[0], together[row])
    assert torch.equal(draw(Draws(5, [1, 7, 9, 3], [1, 2, 2, 0])), together.flip(0))


def test_many_numbers_are_those_of_each_examples_generator():
    """Rows of odd length leave half-used words behind."""
    index, number = [*range(4), 2**64 - 1, 2**63], [*range(4), 2**63, 2**64 - 1]
    draws = Draws(2**64 - 1, index, number)
    normal, uniform, keys = draws.normal("eps", (3, 7)), draws.uniform("time", (21,)), draws.keys("dropout", 21)
    for row, (i, d) in enumerate(zip(index, number, strict=True)):
        one, two, three = (generator(2**64 - 1, i, d, stream) for stream in ("eps", "time", "dropout"))
        assert np.array_equal(normal[row], one.standard_normal((3, 7), dtype=np.float32))
        assert np.array_equal(uniform[row], two.random(21, dtype=np.float32))
        assert np.array_equal(keys[row].numpy().view(np.uint64), three.bit_generator.random_raw(21))


def test_numbers_drawn_ahead_are_the_same_and_are_not_drawn_again(monkeypatch):
    before = Draws(3, [5, 6])
    for draw in KINDS.values():
        draw(before)
    draws = Draws(3, [8, 9], 4)
    draws.prepare(before.asked)
    expected = [draw(Draws(3, [8, 9], 4)) for draw in KINDS.values()]
    with monkeypatch.context() as patch:
        patch.setattr(Draws, "_make", None)
        found = [draw(draws) for draw in KINDS.values()]
    assert all(map(torch.equal, found, expected))
    assert torch.equal(KINDS["normal"](draws), expected[0])  # the second time they are drawn again
    assert torch.equal(draws.normal("eps_0", (2,)), Draws(3, [8, 9], 4).normal("eps_0", (2,)))  # nobody foresaw it


def test_the_same_call_returns_the_same_numbers():
    draws = Draws(0, range(4))
    assert torch.equal(draws.normal("eps", (5,)), draws.normal("eps", (5,)))


def test_a_longer_row_starts_with_the_shorter_one():
    """Numbers come from a counter, so what a stream gives first does not depend on how much is asked for."""
    draws = Draws(0, [4])
    assert torch.equal(draws.normal("eps", (100,))[:, :10], draws.normal("eps", (10,)))


def test_every_part_of_the_key_makes_a_difference():
    """Rows of all seeds, indices, draws and streams differ; the largest allowed seed and index are distinct too."""
    rows = [
        generator(seed, index, draw, stream).random(4)
        for seed in (0, 1, 2**64 - 1)
        for index in (0, 1, 2**64 - 1)
        for draw in (0, 1, 2**64 - 1)
        for stream in STREAMS
    ]
    assert len(rows) == 27 * 10
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_seed_and_index_are_not_interchangeable():
    assert not torch.equal(Draws(1, [2]).normal("eps", (4,)), Draws(2, [1]).normal("eps", (4,)))


def test_streams_do_not_overlap():
    """No number of a long stretch of one stream occurs in another or in the next draw."""
    stretches = [generator(3, 4, draw, stream).integers(0, 2**63, 20_000) for draw in (0, 1) for stream in STREAMS]
    together = np.concatenate(stretches)
    assert len(np.unique(together)) == len(together)


def test_numbers_of_neighbouring_keys_are_independent():
    """Correlations of 20 000 normals between neighbouring indices, draws, streams and seeds: five deviations."""
    first = Draws(0, range(20_000)).normal("eps", ())
    others = {
        "index": Draws(0, range(1, 20_001)).normal("eps", ()),
        "draw": Draws(0, range(20_000), 1).normal("eps", ()),
        "stream": Draws(0, range(20_000)).normal("eps_0", ()),
        "seed": Draws(1, range(20_000)).normal("eps", ()),
    }
    for name, other in others.items():
        assert abs(float((first * other).mean())) < 5 / 20_000**0.5, name


def test_distributions():
    """Kolmogorov-Smirnov against each distribution over indices, and moments of the Gamma used by the paper's k-hot."""
    draws = Draws(11, range(5000))
    assert stats.kstest(draws.normal("eps", (2,)).flatten(), "norm").pvalue > 1e-3
    u = draws.uniform("time", (2,))
    assert stats.kstest(u.flatten(), "uniform").pvalue > 1e-3
    assert 0 <= float(u.min()) and float(u.max()) < 1
    assert stats.kstest(draws.gumbel("latent", (2,)).flatten(), "gumbel_r").pvalue > 1e-3
    gamma = draws.gamma("latent", 0.5, (2,)).flatten()
    assert stats.kstest(gamma, stats.gamma(0.5).cdf).pvalue > 1e-3
    small = draws.gamma("latent", 1 / 15, (10,)).double().flatten()  # mean 1/15, variance 1/15
    assert abs(float(small.mean()) - 1 / 15) < 5 * (1 / 15 / 50_000) ** 0.5


def test_as_many_draws_as_indices():
    with pytest.raises(ValueError):
        Draws(0, [1, 2, 3], [0, 1]).normal("eps", ())


def test_a_draw_may_be_a_numpy_number():
    assert torch.equal(Draws(0, [1, 2], np.int64(3)).normal("eps", ()), Draws(0, [1, 2], 3).normal("eps", ()))


def test_stratified_times_lie_on_a_shifted_grid():
    """t_i = (u + i/n) mod 1: one in each of n strata, evenly apart; uniform times are the shifts themselves."""
    t = stratified(torch.tensor(0.3, dtype=torch.float64), torch.arange(8, dtype=torch.float64), 8)
    expected = torch.tensor([0.3, 0.425, 0.55, 0.675, 0.8, 0.925, 0.05, 0.175], dtype=torch.float64)
    assert torch.allclose(t, expected, atol=1e-15, rtol=0)
    u = torch.rand(5)
    assert torch.equal(uniform(u, torch.arange(5), 5), u)


def test_stratified_times_stay_below_one():
    """In float32 too, and for the largest shift: t = 1 would fall off the finite-T grid."""
    u = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    for n in (1, 3, 7, 128, 1000):
        t = stratified(u, torch.arange(n), n)
        assert float(t.min()) >= 0 and float(t.max()) < 1


def test_the_average_over_shifts_is_the_integral():
    """Stratified times are uniform one by one: the mean of t^2 over a fine grid of shifts is 1/3."""
    shifts = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = stratified(shifts[:, None], torch.arange(4, dtype=torch.float64), 4)
    assert torch.allclose((t**2).mean(0), torch.full((4,), 1 / 3, dtype=torch.float64), atol=1e-6)
