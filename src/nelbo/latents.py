r"""Auxiliary latents c ~ q(c|x): posteriors, priors and what they cost.

    (1)  latent term of the bound   KL(q(c|x) || p(c)),   nats per image

k-hot, exact     q(c|x) = exp(<theta, c>)/Z over |c| = k, prior uniform over the C(n, k) subsets. By dynamic programming
                 over items, with P_i[j] the log weight of the j-subsets of the first i items and S_i[j] of the last:
    (2)  P_i[j] = logaddexp(P_{i-1}[j], P_{i-1}[j-1] + theta_i),      log Z = P_n[k]
    (3)  mu_i = exp(logsumexp_j(P_{i-1}[j] + S_{i+1}[k-1-j]) + theta_i - log Z)          (inclusion marginals)
    (4)  KL = <mu, theta> - log Z + log C(n, k)
                 Samples are exact; their gradient is that of the marginals (SIMPLE, Ahmed et al. 2023): biased.
k-hot, paper     MuLAN: noisy logits, top k, straight through the logits centred and divided by their norm; charged
    (5)  KL(softmax(theta) || uniform(n))
                 which is not the KL of the subset. Its valid price replaces (5) by log C(n, k): it bounds the KL of any
                 distribution over the k-subsets to the uniform one, because entropy is at least 0.
one-hot          Gumbel softmax, straight through, temperature max(0.5, exp(-1e-5 step)); (5) is exact for it.
Gaussian         N(mu, var), prior N(0, I):
    (6)  KL = 1/2 sum (mu^2 + var - log var - 1)
label            c is the class, known with the image: q is a point, prior uniform, KL = log(classes).

Several draws of c may be averaged before the logarithm, each with its weight:

    (7)  log p(x) >= E log 1/K sum_k p(x|c_k) p(c_k)/q(c_k|x)
                 For the paper's k-hot, whose q(c|x) is not known, q is replaced by 1: as q <= 1, this is still a bound.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nelbo.draws import Draws

__all__ = [
    "LATENTS",
    "Gaussian",
    "KHot",
    "Label",
    "Latent",
    "LatentDraw",
    "OneHot",
    "PaperKHot",
    "k_subset",
    "log_binomial",
    "sample_k_subset",
]


@dataclass(frozen=True)
class LatentDraw:
    """A draw of c for each image and what it costs.

    c: (B, size). kl: (B,) nats, the figure that the posterior's authors charge. valid_kl: (B,) nats, a figure that
    makes the bound a bound; the same tensor where kl is already one.
    """

    c: Tensor
    kl: Tensor
    valid_kl: Tensor


class Latent(nn.Module, ABC):
    """q(c|x) and p(c). ``heads`` is how many tensors the encoder must give; 0 means that there is no encoder."""

    heads = 1

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    @abstractmethod
    def noise(self, draws: Draws) -> Tensor:
        """The random numbers that ``posterior`` needs, (B, ...)."""

    @abstractmethod
    def posterior(self, parameters: tuple[Tensor, ...], noise: Tensor, step: int = 0) -> LatentDraw:
        """A draw of q(c|x) from the encoder's parameters, each (B, size), and recorded noise."""

    @abstractmethod
    def log_weight(self, parameters: tuple[Tensor, ...], c: Tensor) -> Tensor:
        """log p(c) - log q(c|x) of a draw c (B, size), (B,) nats: equation (7)."""

    @abstractmethod
    def prior(self, draws: Draws) -> Tensor:
        """A draw of p(c), (B, size)."""


IMPOSSIBLE = -1e30  # log weight of no subset at all; the gradient of logaddexp(-inf, -inf) is NaN


def log_binomial(n: int, k: int) -> float:
    """log C(n, k) in nats."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _tables(theta: Tensor, k: int) -> Tensor:
    """P_0 .. P_n of equation (2) for theta (B, n): (n + 1, B, k + 1)."""
    batch, n = theta.shape
    none = theta.new_full((batch, 1), IMPOSSIBLE)
    table = torch.cat([theta.new_zeros(batch, 1), none.expand(-1, k)], 1)
    tables = [table]
    for i in range(n):
        table = torch.logaddexp(table, torch.cat([none, table[:, :-1] + theta[:, i : i + 1]], 1))
        tables.append(table)
    return torch.stack(tables)


def k_subset(theta: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """log Z (B,), marginals (B, n) and the prefix tables (n + 1, B, k + 1) of the exact k-subset family."""
    batch, n = theta.shape
    both = _tables(torch.cat([theta, theta.flip(1)]), k)  # prefixes, and the suffixes read backwards
    prefix, suffix = both[:, :batch], both[:, batch:].flip(0)
    log_z = prefix[n, :, k]
    pairs = prefix[:n, :, :k] + suffix[1:, :, :k].flip(2)  # j of the items before, k - 1 - j of those after
    mu = torch.exp(torch.logsumexp(pairs, 2).T + theta - log_z[:, None])
    return log_z, mu, prefix


@torch.no_grad()
def sample_k_subset(theta: Tensor, prefix: Tensor, k: int, uniform: Tensor) -> Tensor:
    """Exact samples, (B, n) of zeros and k ones each: items from the last to the first, uniform (B, n).

    An item is taken with probability 1 when as many are left as are needed, and 0 when none is needed.
    """
    batch, n = theta.shape
    c = torch.zeros_like(theta)
    needed = torch.full((batch, 1), k, device=theta.device)
    for i in range(n - 1, -1, -1):
        take = prefix[i].gather(1, (needed - 1).clamp(min=0)) + theta[:, i : i + 1] - prefix[i + 1].gather(1, needed)
        taken = ((uniform[:, i : i + 1] < take.exp()) | (needed > i)) & (needed > 0)
        c[:, i : i + 1] = taken.to(c.dtype)
        needed = needed - taken.long()
    return c


class KHot(Latent):
    """k of n ones from the exact k-subset posterior, equations (2) to (4)."""

    def __init__(self, size: int, k: int) -> None:
        super().__init__(size)
        self.k = k

    def noise(self, draws: Draws) -> Tensor:
        return draws.uniform("latent", (self.size,))

    def posterior(self, parameters: tuple[Tensor, ...], noise: Tensor, step: int = 0) -> LatentDraw:
        (theta,) = parameters
        log_z, mu, prefix = k_subset(theta, self.k)
        c = sample_k_subset(theta, prefix, self.k, noise) + (mu - mu.detach())
        kl = (mu * theta).sum(1) - log_z + log_binomial(self.size, self.k)
        return LatentDraw(c, kl, kl)

    def log_weight(self, parameters: tuple[Tensor, ...], c: Tensor) -> Tensor:
        (theta,) = parameters
        log_z, _, _ = k_subset(theta, self.k)
        return log_z - (theta * c).sum(1) - log_binomial(self.size, self.k)

    def prior(self, draws: Draws) -> Tensor:
        keys = draws.uniform("latent", (self.size,))
        chosen = keys.topk(self.k, 1).indices
        return torch.zeros_like(keys).scatter(1, chosen, 1.0)


def _categorical_kl(logits: Tensor) -> Tensor:
    """Equation (5), (B,)."""
    log_q = F.log_softmax(logits, 1)
    return (log_q.exp() * log_q).sum(1) + math.log(logits.shape[1])


class PaperKHot(KHot):
    """MuLAN's k-hot latent: noisy top-k, charged a categorical KL; the valid charge is log C(n, k).

    ``kind`` of noise: "gamma", the public sum-of-Gamma approximation (k/i used as a rate, where the published
    construction has a scale), or "gumbel".
    """

    TERMS, TAU = 10, 10.0

    def __init__(self, size: int, k: int, kind: str = "gamma") -> None:
        super().__init__(size, k)
        if kind not in ("gamma", "gumbel"):
            raise ValueError(f"the noise must be gamma or gumbel, got {kind!r}")
        self.kind = kind

    def noise(self, draws: Draws) -> Tensor:
        if self.kind == "gumbel":
            return draws.gumbel("latent", (self.size,))
        return self.sum_of_gamma(draws.gamma("latent", 1 / self.k, (self.TERMS, self.size)))

    def sum_of_gamma(self, draws: Tensor) -> Tensor:
        """(tau/k) (sum_i (i/k) G_i - log 10) from G_i ~ Gamma(1/k), draws (B, 10, size): (B, size)."""
        scales = torch.arange(1, self.TERMS + 1, dtype=draws.dtype, device=draws.device) / self.k
        return self.TAU / self.k * ((draws * scales[:, None]).sum(1) - math.log(self.TERMS))

    def posterior(self, parameters: tuple[Tensor, ...], noise: Tensor, step: int = 0) -> LatentDraw:
        (theta,) = parameters
        noisy = theta + noise
        noisy = noisy - noisy.mean(1, keepdim=True)
        soft = noisy / noisy.norm(dim=1, keepdim=True)
        hard = torch.zeros_like(soft).scatter(1, noisy.topk(self.k, 1).indices, 1.0)
        valid = theta.new_full((len(theta),), log_binomial(self.size, self.k))
        return LatentDraw(hard + (soft - soft.detach()), _categorical_kl(theta), valid)

    def log_weight(self, parameters: tuple[Tensor, ...], c: Tensor) -> Tensor:
        return c.new_full((len(c),), -log_binomial(self.size, self.k))


class OneHot(Latent):
    """One of n: straight-through Gumbel softmax, annealed; its categorical KL is exact."""

    def noise(self, draws: Draws) -> Tensor:
        return draws.gumbel("latent", (self.size,))

    def posterior(self, parameters: tuple[Tensor, ...], noise: Tensor, step: int = 0) -> LatentDraw:
        (logits,) = parameters
        temperature = max(0.5, math.exp(-1e-5 * step))
        soft = F.softmax((logits + noise) / temperature, 1)
        hard = F.one_hot((logits + noise).argmax(1), self.size).to(soft.dtype)
        kl = _categorical_kl(logits)
        return LatentDraw(hard + (soft - soft.detach()), kl, kl)

    def log_weight(self, parameters: tuple[Tensor, ...], c: Tensor) -> Tensor:
        (logits,) = parameters
        return -math.log(self.size) - (F.log_softmax(logits, 1) * c).sum(1)

    def prior(self, draws: Draws) -> Tensor:
        return F.one_hot(draws.gumbel("latent", (self.size,)).argmax(1), self.size).float()


class Gaussian(Latent):
    """Real numbers, N(mu, var) against N(0, I), equation (6); the encoder's second head goes through softplus."""

    heads = 2

    def noise(self, draws: Draws) -> Tensor:
        return draws.normal("latent", (self.size,))

    def posterior(self, parameters: tuple[Tensor, ...], noise: Tensor, step: int = 0) -> LatentDraw:
        mu, raw = parameters
        return self.at(mu, F.softplus(raw), noise)

    def at(self, mu: Tensor, var: Tensor, noise: Tensor) -> LatentDraw:
        """The draw and its price for a given mean and variance, each (B, size)."""
        kl = 0.5 * (mu**2 + var - torch.log(var) - 1).sum(1)
        return LatentDraw(mu + var.sqrt() * noise, kl, kl)

    def log_weight(self, parameters: tuple[Tensor, ...], c: Tensor) -> Tensor:
        mu, raw = parameters
        var = F.softplus(raw)
        return 0.5 * ((c - mu) ** 2 / var + torch.log(var) - c**2).sum(1)

    def prior(self, draws: Draws) -> Tensor:
        return draws.normal("latent", (self.size,))


class Label(Latent):
    """The class label as a one-hot c. A bound on log p(x): the KL pays for the label."""

    heads = 0

    def noise(self, draws: Draws) -> Tensor:
        return torch.zeros(len(draws.index), 0, device=draws.device)

    def posterior(self, parameters: tuple[Tensor, ...], noise: Tensor, step: int = 0) -> LatentDraw:
        """``parameters``: the labels (B,), whole numbers below ``size``."""
        (labels,) = parameters
        kl = torch.full((len(labels),), math.log(self.size), device=labels.device)
        return LatentDraw(F.one_hot(labels.long(), self.size).float(), kl, kl)

    def log_weight(self, parameters: tuple[Tensor, ...], c: Tensor) -> Tensor:
        return c.new_full((len(c),), -math.log(self.size))

    def prior(self, draws: Draws) -> Tensor:
        labels = (draws.uniform("latent", ()) * self.size).long().clamp(max=self.size - 1)
        return F.one_hot(labels, self.size).float()


LATENTS: dict[str, type[Latent]] = {
    "k-hot": KHot,
    "k-hot-paper": PaperKHot,
    "one-hot": OneHot,
    "gaussian": Gaussian,
    "label": Label,
}
