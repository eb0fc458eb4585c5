r"""Metrics of samples by the features of a network: the Fréchet distance and the inception score, as functions of sums.

From n feature vectors f (d,), with a any fixed vector near their mean (it only keeps the sums from cancelling),

    (1)  s = sum (f - a),  Q = sum (f - a)(f - a)^T;    m = a + s/n,    S = (Q - s s^T/n)/(n - 1)
    (2)  a' = a + e:       s' = s - n e,                Q' = Q - s e^T - e s^T + n e e^T

so that sets merge by adding their sums. The distance of two normal distributions (Heusel et al. 2017, equation 6):

    (3)  F = |m_1 - m_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1^1/2 S_2 S_1^1/2)^1/2
    (4)  tr (S_1^1/2 S_2 S_1^1/2)^1/2 = sum_i sigma_i,   the singular values of A_1^T A_2 where S = A A^T

(4) needs neither full rank nor a constant on the diagonal: A = V sqrt(lambda) has a column for every eigenvalue of S
that is not 0. A negative one is there by rounding, and positive ones no larger than it are taken for 0 as well.

F of n samples is too high. In second order, for normal features and a fixed second distribution,

    (5)  E F_n = F + b/n + O(1/n^2),    b = tr S_1 + 1/2 sum_ij sigma_i sigma_j/(sigma_i + sigma_j) + 1/4 sum_i sigma_i

because |m_1 - m_2|^2 gains tr S_1/n and the trace (4) is a concave function of S_1; b is about d^2/4 for two equal
distributions of covariance I. Chong and Forsyth (2020) find F by a line through F_n over 1/n; b depends on the model,
so equal n is no cure. Without normal features, from G parts of the samples and F_g of all but part g, the jackknife:

    (6)  b/n = (G - 1)(mean_g F_g - F_n),    error^2 = (G - 1)/G sum_g (F_g - mean F_g)^2

It needs n well above d: at n = 2 d it takes off about a tenth of the bias too much (2 % at 5 d), and it is not given
below. Its error is half as large again as it should be, or more, where F is nearly 0 and so without a slope. At any n,

    (7)  the floor: F of n draws of N(m_2, S_2) itself, about what n samples of a perfect model would score.

What n_2 images leave open of m_2 and S_2 adds a bias of the same form. It is no part of (6) or (7): the statistics are
what is measured against, and another set gives another figure.

The inception score (Salimans et al. 2016) of probabilities p_i (K,), in nats:

    (8)  IS = exp( mean_i KL(p_i || p_bar) ),    mean_i KL = 1/n sum_i sum_k p_ik log p_ik - sum_k p_bar_k log p_bar_k

The field cuts the samples into 10 consecutive parts and gives the mean and the standard deviation (divided by 10, not
9) of their scores. It is no standard error of a score, and IS of a part is too low: the entropy of p_bar is, by up to
(K - 1)/(2 n) nats.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add

import numpy as np

from nelbo.draws import generator

__all__ = [
    "Frechet",
    "Moments",
    "Scores",
    "consecutive",
    "floor",
    "frechet",
    "frechet_distance",
    "inception_score",
    "jackknife",
    "merge",
    "root",
    "score_parts",
]

ENOUGH = 2  # images for every feature, below which equation (6) is not given


@dataclass(frozen=True, eq=False)
class Moments:
    """The sums of equation (1) in float64; ``a + b`` is the sums of both sets."""

    count: int
    shift: np.ndarray  # a (d,)
    first: np.ndarray  # s (d,)
    second: np.ndarray  # Q (d, d)

    @classmethod
    def of(cls, features: np.ndarray, shift: np.ndarray | None = None) -> "Moments":
        """Of features (n, d), n at least 1; ``shift`` (d,) is a, by default their mean."""
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or not features.size:
            raise ValueError(f"features must be (n, d) with at least one row and column, got {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError("features must be finite")
        shift = features.mean(0) if shift is None else np.asarray(shift, dtype=np.float64)
        centred = features - shift
        return cls(len(features), shift, centred.sum(0), centred.T @ centred)

    @property
    def size(self) -> int:
        """d."""
        return len(self.shift)

    def about(self, shift: np.ndarray) -> "Moments":
        """The same set's sums about another a, equation (2)."""
        e = shift - self.shift
        crossed = np.outer(self.first, e)
        second = self.second - crossed - crossed.T + self.count * np.outer(e, e)
        return Moments(self.count, shift, self.first - self.count * e, second)

    def __add__(self, other: "Moments") -> "Moments":
        if other.size != self.size:
            raise ValueError(f"sets of {self.size} and {other.size} features do not merge")
        if not np.array_equal(self.shift, other.shift):
            other = other.about(self.shift)
        return Moments(self.count + other.count, self.shift, self.first + other.first, self.second + other.second)

    @property
    def mean(self) -> np.ndarray:
        """m (d,)."""
        return self.shift + self.first / self.count

    @property
    def covariance(self) -> np.ndarray:
        """S (d, d), divided by n - 1 as the field does; ValueError for one vector, which has none."""
        if self.count < 2:
            raise ValueError("a covariance needs at least 2 feature vectors, got 1")
        return (self.second - np.outer(self.first, self.first) / self.count) / (self.count - 1)

    @cached_property
    def root(self) -> np.ndarray:
        """A (d, r) with S = A A^T, of as many columns as S has rank."""
        return root(self.covariance)


def root(covariance: np.ndarray) -> np.ndarray:
    """A (d, r) with S = A A^T for a symmetric S (d, d) without negative eigenvalues, r its rank."""
    covariance = np.asarray(covariance, dtype=np.float64)
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > max(-values[0], np.finfo(np.float64).eps * values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])


def _distance(mean_1: np.ndarray, root_1: np.ndarray, mean_2: np.ndarray, root_2: np.ndarray) -> float:
    """Equation (3) by (4); never below 0, where only rounding could take it."""
    shared = np.linalg.svd(root_1.T @ root_2, compute_uv=False).sum() if root_1.size and root_2.size else 0.0
    return max(0.0, float(((mean_1 - mean_2) ** 2).sum() + (root_1**2).sum() + (root_2**2).sum() - 2 * shared))


def frechet_distance(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> float:
    """Equation (3) of N(mean_1, covariance_1) and N(mean_2, covariance_2), in squared units of the features."""
    mean_1, mean_2 = (np.asarray(mean, dtype=np.float64) for mean in (mean_1, mean_2))
    return _distance(mean_1, root(covariance_1), mean_2, root(covariance_2))


def frechet(a: Moments, b: Moments) -> float:
    """Equation (3) of the normal distributions with the moments of two sets, of at least 2 vectors each."""
    return _distance(a.mean, a.root, b.mean, b.root)


@dataclass(frozen=True)
class Frechet:
    """A Fréchet distance, and what (6) says of it: nan where it says nothing."""

    value: float
    bias: float = math.nan
    standard_error: float = math.nan

    @property
    def limit(self) -> float:
        """The distance at infinitely many samples, as far as (6) knows."""
        return self.value - self.bias


def jackknife(parts: Sequence[Moments], reference: Moments) -> Frechet:
    """Equation (3) of all parts together against the reference, with (6) where there are two parts or more and all but
    the largest hold ``ENOUGH`` images for every feature. It costs as many distances as parts."""
    whole, n = merge(parts), len(parts)
    value = frechet(whole, reference)
    if n < 2 or whole.count - max(part.count for part in parts) < ENOUGH * whole.size:
        return Frechet(value)
    without = np.array([frechet(merge([*parts[:g], *parts[g + 1 :]]), reference) for g in range(n)])
    error = math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    return Frechet(value, float((n - 1) * (without.mean() - value)), error)


def floor(count: int, reference: Moments, seed: int = 0) -> float:
    """Equation (7) by one draw of ``count`` vectors, whose mean and covariance are drawn as such (Bartlett's factor of
    a Wishart matrix): the cost does not depend on the count. ValueError below 2."""
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 feature vectors, got {count}")
    rng = generator(seed, 0, 0, "data")
    rank, m = reference.root.shape[1], count - 1
    factor = np.tril(rng.standard_normal((rank, min(rank, m))), -1)
    np.fill_diagonal(factor, np.sqrt(rng.chisquare(m - np.arange(min(rank, m)))))
    mean = reference.root @ rng.standard_normal(rank) / math.sqrt(count)
    return _distance(mean, reference.root @ factor / math.sqrt(m), np.zeros(reference.size), reference.root)


def merge(parts: Iterable[Moments]) -> Moments:
    """The sums of all parts."""
    return reduce(add, parts)


@dataclass(frozen=True, eq=False)
class Scores:
    """The sums of equation (8) in float64; ``a + b`` is the sums of both sets."""

    count: int
    total: np.ndarray  # sum_i p_i (K,)
    negentropy: float  # sum_i sum_k p_ik log p_ik

    @classmethod
    def of(cls, probabilities: np.ndarray) -> "Scores":
        """Of probabilities (n, K), n at least 1, whose rows sum to 1."""
        p = np.asarray(probabilities, dtype=np.float64)
        if p.ndim != 2 or not p.size:
            raise ValueError(f"probabilities must be (n, K) with at least one row and column, got {p.shape}")
        if not (p >= 0).all() or np.abs(p.sum(1) - 1).max() > 1e-4:
            raise ValueError("probabilities must be 0 or more and sum to 1 in every row")
        return cls(len(p), p.sum(0), float(_p_log_p(p).sum()))

    def __add__(self, other: "Scores") -> "Scores":
        return Scores(self.count + other.count, self.total + other.total, self.negentropy + other.negentropy)

    @property
    def score(self) -> float:
        """IS, between 1 and K."""
        return math.exp(self.negentropy / self.count - float(_p_log_p(self.total / self.count).sum()))


def _p_log_p(p: np.ndarray) -> np.ndarray:
    return p * np.log(p, out=np.zeros_like(p), where=p > 0)


def score_parts(parts: Sequence[Scores]) -> tuple[float, float]:
    """Mean and standard deviation of the parts' scores, as the field gives them."""
    scores = np.array([part.score for part in parts])
    return float(scores.mean()), float(scores.std())


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation of IS over consecutive parts of probabilities (n, K); n at least ``splits``."""
    return score_parts([Scores.of(probabilities[part]) for part in consecutive(len(probabilities), splits)])


def consecutive(count: int, parts: int) -> list[slice]:
    """0 .. count - 1 in consecutive parts, as equal as can be: part i ends before floor((i + 1) count/parts)."""
    if not 1 <= parts <= count:
        raise ValueError(f"{count} images make 1 to {count} parts, got {parts}")
    return [slice(i * count // parts, (i + 1) * count // parts) for i in range(parts)]
