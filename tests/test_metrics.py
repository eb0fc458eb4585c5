"""Fréchet distance and inception score: closed forms, scipy's matrix square root, and what few samples do."""

import math

import numpy as np
import pytest
from scipy.linalg import sqrtm

from nelbo import metrics
from nelbo.metrics import Moments, Scores, frechet_distance, inception_score


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def spd(d: int, seed: int, rank: int | None = None) -> np.ndarray:
    """A random covariance (d, d), of that rank."""
    a = rng(seed).standard_normal((d, d if rank is None else rank))
    return a @ a.T / d


def exact(mean: np.ndarray, covariance: np.ndarray, count: int = 10**6) -> Moments:
    """The sums of a set that has exactly these moments."""
    mean = np.asarray(mean, dtype=float)
    return Moments(count, mean, np.zeros(len(mean)), np.asarray(covariance) * (count - 1))


# Sums ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_are_numpy_s_mean_and_covariance(offset: float) -> None:
    features = rng(0).standard_normal((50, 6)) @ spd(6, 1) + offset
    found = Moments.of(features)
    assert np.allclose(found.mean, features.mean(0), rtol=1e-14)
    assert np.allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [7, 43], [20, 1, 29]])
def test_sums_do_not_depend_on_how_a_set_is_cut(sizes: list[int]) -> None:
    features = rng(0).standard_normal((50, 6)) @ spd(6, 1) + 3e3
    parts = np.split(features, np.cumsum(sizes)[:-1])
    merged = metrics.merge(Moments.of(part) for part in parts)
    assert merged.count == 50
    assert np.allclose(merged.mean, features.mean(0), rtol=1e-14)
    assert np.allclose(merged.covariance, np.cov(features, rowvar=False), rtol=1e-10, atol=1e-12)


def test_the_vector_that_sums_are_about_changes_nothing() -> None:
    features = rng(0).standard_normal((30, 4))
    a, b = Moments.of(features, np.zeros(4)), Moments.of(features, np.array([1.0, -2.0, 3.0, 0.5]))
    assert np.allclose(a.covariance, b.covariance, rtol=1e-13)
    assert np.allclose(b.about(np.zeros(4)).second, a.second, rtol=1e-13)
    assert np.allclose(b.about(np.zeros(4)).first, a.first, rtol=1e-13, atol=1e-13)
    assert np.allclose((a + b).covariance, np.cov(np.tile(features, (2, 1)), rowvar=False), rtol=1e-13)


def test_sums_in_the_square_of_large_numbers_do_not_cancel() -> None:
    features = (1e8 + rng(0).standard_normal((100, 3))).astype(np.float64)
    assert np.allclose(Moments.of(features).covariance, np.cov(features, rowvar=False), rtol=1e-9)


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.zeros((3, 0)), np.zeros(3), np.array([[1.0, np.nan]])])
def test_features_that_have_no_moments_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="features must be"):
        Moments.of(bad)


def test_one_vector_has_no_covariance_and_other_sizes_do_not_merge() -> None:
    with pytest.raises(ValueError, match="needs at least 2 feature vectors, got 1"):
        _ = Moments.of(np.ones((1, 3))).covariance
    with pytest.raises(ValueError, match="sets of 3 and 4 features do not merge"):
        Moments.of(np.ones((2, 3))) + Moments.of(np.ones((2, 4)))


# The distance --------------------------------------------------------------------------------------------------------


def by_scipy(mean_1: np.ndarray, s_1: np.ndarray, mean_2: np.ndarray, s_2: np.ndarray) -> float:
    """As the field's scripts compute it."""
    root = sqrtm(s_1 @ s_2)
    return float(((mean_1 - mean_2) ** 2).sum() + np.trace(s_1) + np.trace(s_2) - 2 * np.trace(root).real)


def test_one_dimension_is_the_distance_of_means_and_deviations() -> None:
    found = frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([-2.0]), np.array([[9.0]]))
    assert found == pytest.approx(3.0**2 + (2 - 3) ** 2, rel=1e-14)


def test_covariances_that_commute_have_a_closed_form() -> None:
    q = np.linalg.qr(rng(0).standard_normal((5, 5)))[0]
    a, b = rng(1).uniform(0.1, 4, (2, 5))
    m_1, m_2 = rng(2).standard_normal((2, 5))
    found = frechet_distance(m_1, q * a @ q.T, m_2, q * b @ q.T)
    assert found == pytest.approx(((m_1 - m_2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-13)


@pytest.mark.parametrize("d", [1, 2, 5, 40])
def test_covariances_that_do_not_commute_agree_with_scipy(d: int) -> None:
    s_1, s_2 = spd(d, 1, 2 * d), 3 * spd(d, 2, 2 * d)
    m_1, m_2 = rng(3).standard_normal((2, d))
    found = frechet_distance(m_1, s_1, m_2, s_2)
    assert found == pytest.approx(by_scipy(m_1, s_1, m_2, s_2), rel=1e-9)
    assert found == pytest.approx(frechet_distance(m_2, s_2, m_1, s_1), rel=1e-13)


def test_the_distance_to_oneself_is_zero_and_never_negative() -> None:
    for seed in range(20):
        s, m = spd(30, seed, rank=5 + seed), rng(seed).standard_normal(30)
        assert 0 <= frechet_distance(m, s, m, s) < 1e-12


def test_singular_covariances_on_orthogonal_spaces_share_nothing() -> None:
    q = np.linalg.qr(rng(0).standard_normal((8, 8)))[0]
    a, b = q[:, :3] @ spd(3, 1) @ q[:, :3].T, q[:, 3:] @ spd(5, 2) @ q[:, 3:].T
    assert frechet_distance(np.zeros(8), a, np.zeros(8), b) == pytest.approx(np.trace(a) + np.trace(b), rel=1e-12)


def test_singular_covariances_reduce_to_the_space_where_they_live() -> None:
    """Both on one 3-dimensional plane of 200: the distance there, which the plane's coordinates give."""
    q = np.linalg.qr(rng(0).standard_normal((200, 3)))[0]
    a, b = spd(3, 1, 6), 2 * spd(3, 2, 6)
    m = rng(3).standard_normal(3)
    found = frechet_distance(q @ m, q @ a @ q.T, np.zeros(200), q @ b @ q.T)
    assert found == pytest.approx(by_scipy(m, a, np.zeros(3), b), rel=1e-10)


def test_one_singular_covariance_against_a_full_one() -> None:
    """u u^T against S: tr (u^T S u)^1/2 in closed form."""
    u, s = rng(0).standard_normal(20), spd(20, 1, 40)
    found = frechet_distance(np.zeros(20), np.outer(u, u), np.zeros(20), s)
    assert found == pytest.approx(u @ u + np.trace(s) - 2 * math.sqrt(u @ s @ u), rel=1e-12)


def test_fewer_vectors_than_features_have_a_finite_distance() -> None:
    """n = 10 of d = 300: by the 10x10 matrix of inner products, whose singular values are the same."""
    x, y = rng(0).standard_normal((2, 10, 300))
    a, b = (v - v.mean(0) for v in (x, y))
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum() / 9
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + ((a**2).sum() + (b**2).sum()) / 9 - 2 * shared
    assert Moments.of(x).root.shape == (300, 9)
    assert metrics.frechet(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-12)


def test_no_variance_at_all_leaves_the_means() -> None:
    zero = np.zeros((3, 3))
    assert frechet_distance(np.array([1.0, 2, 3]), zero, np.zeros(3), zero) == 14
    assert frechet_distance(np.zeros(3), zero, np.zeros(3), np.eye(3)) == pytest.approx(3, rel=1e-15)


def test_a_root_is_one_and_knows_the_rank() -> None:
    for rank in (1, 4, 12):
        s = spd(12, rank, rank)
        a = metrics.root(s)
        assert a.shape == (12, rank)
        assert np.allclose(a @ a.T, s, rtol=0, atol=1e-14)


# Few samples ---------------------------------------------------------------------------------------------------------

D = 12
SPECTRUM = 1 / np.arange(1, D + 1)
SCALES = {
    "a perfect model": np.ones(D),
    "twice the variance": np.full(D, 2.0),
    "another spectrum": np.arange(1, D + 1.0),
}


def b_of(s_1: np.ndarray, s_2: np.ndarray) -> float:
    """The b of equation (5)."""
    sigma = np.linalg.svd(metrics.root(s_1).T @ metrics.root(s_2), compute_uv=False)
    pairs = sigma[:, None] * sigma / (sigma[:, None] + sigma)
    return float(np.trace(s_1) + pairs.sum() / 2 + sigma.sum() / 4)


def test_b_of_equal_distributions_of_covariance_one() -> None:
    assert b_of(np.eye(D), np.eye(D)) == pytest.approx(D + D**2 / 4 + D / 4)


@pytest.mark.parametrize("name", SCALES)
def test_the_bias_of_n_samples_is_b_over_n(name: str) -> None:
    """400 samples, 300 times: within 4 standard errors and the next order, 3 %; the jackknife finds it too."""
    s_1, s_2, n = np.diag(SPECTRUM * SCALES[name]), np.diag(SPECTRUM), 400
    reference, generator = exact(np.zeros(D), s_2), rng(5)
    truth = frechet_distance(np.zeros(D), s_1, np.zeros(D), s_2)
    found = []
    for _ in range(300):
        x = generator.standard_normal((n, D)) * np.sqrt(np.diag(s_1))
        found.append(metrics.jackknife([Moments.of(x[part]) for part in metrics.consecutive(n, 10)], reference))
    values, bias = np.array([f.value for f in found]), np.array([f.bias for f in found])
    expected, error = b_of(s_1, s_2) / n, values.std() / math.sqrt(len(found))
    assert values.mean() - truth == pytest.approx(expected, abs=4 * error + 0.03 * expected)
    assert bias.mean() == pytest.approx(expected, abs=4 * bias.std() / math.sqrt(len(found)) + 0.03 * expected)
    assert np.mean([f.limit for f in found]) == pytest.approx(truth, abs=4 * error + 0.03 * expected)


def test_the_jackknife_s_error_is_the_spread_of_the_figure() -> None:
    """Where F has a slope; within 10 %, the error of 400 repetitions with 9 degrees of freedom each."""
    reference, generator, n = exact(np.zeros(D), np.diag(SPECTRUM)), rng(6), 400
    found = []
    for _ in range(400):
        x = generator.standard_normal((n, D)) * np.sqrt(2 * SPECTRUM) + 1
        found.append(metrics.jackknife([Moments.of(x[part]) for part in metrics.consecutive(n, 10)], reference))
    spread = np.std([f.value for f in found])
    assert math.sqrt(np.mean([f.standard_error**2 for f in found])) == pytest.approx(spread, rel=0.1)


def test_the_jackknife_of_a_mean_s_square_is_exact() -> None:
    """In one dimension without spread in the reference, F = m^2 + s^2, whose bias is that of m^2: var/n exactly."""
    x = rng(0).standard_normal((60, 1)) + 0.3
    parts = [Moments.of(x[part]) for part in metrics.consecutive(60, 60)]
    found = metrics.jackknife(parts, exact(np.zeros(1), np.zeros((1, 1))))
    assert found.value == pytest.approx(x.mean() ** 2 + x.var(ddof=1), rel=1e-12)
    assert found.bias == pytest.approx(x.var(ddof=1) / 60, rel=1e-9)


@pytest.mark.parametrize(("count", "known"), [(2 * D - 1, False), (2 * D + 2, False), (2 * D + 3, True), (60, True)])
def test_a_bias_is_given_from_two_samples_a_feature(count: int, known: bool) -> None:
    """27 samples in 10 parts: 24 = 2 D are left without the largest."""
    x = rng(0).standard_normal((count, D))
    parts = [Moments.of(x[part]) for part in metrics.consecutive(count, 10)]
    found = metrics.jackknife(parts, exact(np.zeros(D), np.eye(D)))
    assert math.isfinite(found.bias) is math.isfinite(found.standard_error) is known
    assert found.value == metrics.frechet(metrics.merge(parts), exact(np.zeros(D), np.eye(D)))
    assert math.isnan(metrics.jackknife([metrics.merge(parts)], exact(np.zeros(D), np.eye(D))).bias)


@pytest.mark.parametrize("n", [2, 5, D, D + 1, 100])
def test_the_floor_is_what_n_draws_of_the_reference_score(n: int) -> None:
    """Below and above the number of features; 300 repetitions of each, within 4 standard errors."""
    s = spd(D, 1, 2 * D)
    root, reference, generator = metrics.root(s), exact(np.ones(D), s), rng(n)
    drawn = [metrics.frechet(Moments.of(generator.standard_normal((n, D)) @ root.T + 1), reference) for _ in range(300)]
    floors = [metrics.floor(n, reference, seed) for seed in range(300)]
    error = math.hypot(np.std(drawn), np.std(floors)) / math.sqrt(300)
    assert np.mean(floors) == pytest.approx(np.mean(drawn), abs=4 * error)
    assert np.std(floors) == pytest.approx(np.std(drawn), rel=0.2)
    assert metrics.floor(n, reference, 3) == floors[3]


def test_the_floor_of_a_singular_reference_is_that_of_its_space() -> None:
    q = np.linalg.qr(rng(0).standard_normal((30, 3)))[0]
    plane, whole = exact(np.zeros(3), np.eye(3)), exact(np.zeros(30), q @ q.T)
    found = [np.mean([metrics.floor(50, r, seed) for seed in range(200)]) for r in (plane, whole)]
    assert found[0] == pytest.approx((3 + 9 / 4 + 3 / 4) / 50, rel=0.1)
    assert found[1] == pytest.approx(found[0], rel=0.1)


# The inception score -------------------------------------------------------------------------------------------------


def test_certain_and_even_probabilities_score_the_number_of_classes() -> None:
    assert inception_score(np.eye(7)[np.arange(70) % 7]) == pytest.approx((7, 0), abs=1e-12)


def test_the_same_probabilities_for_all_score_one() -> None:
    assert inception_score(np.tile([0.2, 0.5, 0.3], (40, 1))) == pytest.approx((1, 0), abs=1e-12)


def test_a_score_is_the_exponent_of_the_mean_divergence() -> None:
    """Term by term over 3 parts of 25, which end at 8, 16 and 25."""
    p = rng(0).dirichlet(np.full(6, 0.3), 25)
    scores = []
    for part in (p[:8], p[8:16], p[16:]):
        marginal = part.mean(0)
        scores.append(
            math.exp(np.mean([sum(q * math.log(q / m) for q, m in zip(row, marginal, strict=True)) for row in part]))
        )
    assert inception_score(p, 3) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_parts_of_unlike_classes_lower_the_score() -> None:
    """Ten parts of one class each score 1, although the whole scores 10: why images are shuffled."""
    sorted_by_class = np.eye(10)[np.repeat(np.arange(10), 5)]
    assert inception_score(sorted_by_class)[0] == pytest.approx(1, abs=1e-12)
    assert inception_score(sorted_by_class, 1)[0] == pytest.approx(10, rel=1e-12)


@pytest.mark.parametrize("sizes", [[1] * 30, [11, 19]])
def test_a_score_does_not_depend_on_how_its_sums_were_taken(sizes: list[int]) -> None:
    p = rng(0).dirichlet(np.full(6, 0.3), 30)
    parts = [Scores.of(part) for part in np.split(p, np.cumsum(sizes)[:-1])]
    assert sum(parts[1:], parts[0]).score == pytest.approx(Scores.of(p).score, rel=1e-13)


def test_the_score_of_few_is_too_low_by_miller_and_madow() -> None:
    """Certain images of K = 20 even classes: E log IS = log K - (K - 1)/(2 n), here n = 400, within 4 errors."""
    generator, k, n = rng(0), 20, 400
    logs = [math.log(Scores.of(np.eye(k)[generator.integers(k, size=n)]).score) for _ in range(500)]
    error = np.std(logs) / math.sqrt(500)
    assert np.mean(logs) == pytest.approx(math.log(k) - (k - 1) / (2 * n), abs=4 * error + 1e-4)


@pytest.mark.parametrize("bad", [np.array([[0.5, 0.6]]), np.array([[1.5, -0.5]]), np.zeros((0, 2)), np.ones(1)])
def test_what_is_no_probability_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="probabilities must be"):
        Scores.of(bad)


def test_parts_are_those_of_the_field() -> None:
    assert metrics.consecutive(7, 3) == [slice(0, 2), slice(2, 4), slice(4, 7)]
    for wrong in (0, 8):
        with pytest.raises(ValueError, match="7 images make 1 to 7 parts"):
            metrics.consecutive(7, wrong)
