"""Data whose best denoiser is known exactly, and integrals in place of Monte Carlo.

A toy is a mixture x ~ sum_m w_m N(mu_m, diag v) with one variance per dimension for all components:
one component is Gaussian data, v = 0 is discrete data (each component an image), the rest are mixtures.
With V = alpha^2 v + sigma^2 and responsibilities r_m(z) proportional to w_m N(z; alpha mu_m, V),

    E[x|z]   = (sigma^2 mu_hat + alpha v z) / V,      mu_hat = sum_m r_m mu_m
    E[eps|z] = sigma (z - alpha mu_hat) / V

for one gamma or one per dimension. Expectations over x and eps are over z and what z leaves open: given a component,
(x, eps) turns into (zeta, eta), both standard normal, with z = alpha mu + sqrt(V) zeta; squared errors are quadratic in
eta, so two points integrate it exactly. zeta lies on a regular grid, whose sums converge exponentially for these
integrands.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nelbo.model import DiffusionModel
from nelbo.objectives import Terms, diffusion_term, elbo
from nelbo.parameterizations import PARAMETERIZATIONS
from nelbo.paths import PATHS, Path
from nelbo.schedules import Linear, Polynomial, Schedule

FLOAT = torch.float64


def tensor(values):
    """A float64 tensor."""
    return torch.as_tensor(values, dtype=FLOAT)


# Rules ---------------------------------------------------------------------------------------------------------------


def gauss_legendre(panels=1, order=48, low=0.0, high=1.0):
    """Nodes and weights of composite Gauss-Legendre quadrature on [low, high]."""
    import numpy as np

    nodes, weights = (tensor(v) for v in np.polynomial.legendre.leggauss(order))
    width = (high - low) / panels
    middles = low + width * (torch.arange(panels, dtype=FLOAT) + 0.5)
    return (middles[:, None] + nodes * width / 2).flatten(), (weights * width / 2).repeat(panels)


def normal_grid(step=0.3, reach=6.3):
    """Nodes and weights of the trapezoidal rule for expectations under N(0, 1)."""
    count = round(reach / step)
    nodes = step * torch.arange(-count, count + 1, dtype=FLOAT)
    weights = torch.exp(-(nodes**2) / 2)
    return nodes, weights / weights.sum()


def product_grid(nodes, weights, dimensions):
    """The tensor product rule: (N^D, D) nodes and (N^D,) weights."""
    grid = torch.cartesian_prod(*[nodes] * dimensions).reshape(-1, dimensions)
    w = torch.cartesian_prod(*[weights] * dimensions).reshape(-1, dimensions).prod(1)
    return grid, w


# Toys ----------------------------------------------------------------------------------------------------------------


@dataclass
class Toy:
    """A mixture: means (M, D); log_weights (M,), or (K, M) where the rows are those of p(x|c) for one-hot c of size K;
    variance (D,); images (M, D) whole numbers where the toy is discrete."""

    means: Tensor
    log_weights: Tensor
    variance: Tensor
    levels: int = 4
    images: Tensor | None = None
    shape: tuple[int, int, int] = field(init=False)

    def __post_init__(self):
        self.shape = (1, 1, self.means.shape[1])

    @property
    def dimensions(self):
        return self.means.shape[1]

    def weights(self, c=None):
        """(M,) or (B, M) log weights given c."""
        if self.log_weights.ndim == 1:
            return self.log_weights
        return self.log_weights[c.argmax(1)]

    def component_mean(self, z, alpha, sigma, c=None):
        """mu_hat (B, D) of z (B, D)."""
        total = alpha**2 * self.variance.to(z) + sigma**2
        means = self.means.to(z)
        logits = (z * alpha / total) @ means.T - (alpha**2 / (2 * total)).expand_as(z) @ (means**2).T
        return torch.softmax(logits + self.weights(c).to(z), 1) @ means

    def estimates(self, z, alpha, sigma, c=None):
        """(E[x|z], E[eps|z]), each (B, D)."""
        mean = self.component_mean(z, alpha, sigma, c)
        variance = self.variance.to(z)
        total = alpha**2 * variance + sigma**2
        return (sigma**2 * mean + alpha * variance * z) / total, sigma * (z - alpha * mean) / total

    def log_density(self, z, alpha, sigma, log_weights):
        """log p(z) (B,) of z = alpha x + sigma eps; alpha, sigma (D,) or numbers; log_weights (M,)."""
        total = alpha**2 * self.variance + sigma**2
        apart = z[:, None] - alpha * self.means
        normal = -0.5 * (apart**2 / total + torch.log(2 * math.pi * total)).sum(2)
        return torch.logsumexp(normal + log_weights, 1)


def gaussian(deviations):
    """Independent x_i ~ N(0, s_i^2)."""
    deviations = tensor(deviations)
    return Toy(torch.zeros(1, len(deviations), dtype=FLOAT), torch.zeros(1, dtype=FLOAT), deviations**2)


def mixture():
    """Three components in the plane that make its two pixels dependent."""
    means = tensor([[-0.7, -0.5], [0.6, 0.4], [0.5, -0.6]])
    return Toy(means, tensor([0.5, 0.3, 0.2]).log(), tensor([0.02, 0.05]))


def discrete(pmf, levels):
    """Images of D pixels from an enumerated joint pmf with one axis of length ``levels`` per pixel."""
    dimensions = pmf.ndim
    images = torch.cartesian_prod(*[torch.arange(levels)] * dimensions).reshape(-1, dimensions)
    return Toy(
        (2 * images.to(FLOAT) + 1) / levels - 1,
        pmf.flatten().log(),
        torch.zeros(dimensions, dtype=FLOAT),
        levels,
        images,
    )


def two_pixels():
    """Two dependent pixels of four levels."""
    pmf = tensor([[8, 2, 1, 1], [3, 6, 2, 1], [1, 2, 1, 5], [1, 4, 3, 9]])
    return discrete(pmf / pmf.sum(), 4)


def uniform_pixel(levels):
    """One pixel, every level as likely."""
    return discrete(torch.full((levels,), 1 / levels, dtype=FLOAT), levels)


def given_code(toy, probability):
    """p(x|c) of a two-valued c with q(c = 1|x) = probability (M,): the toy given c, and q(c) (2,)."""
    joint = torch.stack([1 - probability, probability]) * toy.log_weights.exp()
    code = joint.sum(1)
    return Toy(toy.means, (joint / code[:, None]).log(), toy.variance, toy.levels, toy.images), code


# Networks ------------------------------------------------------------------------------------------------------------


def network(toy, path: Path, parameterization, distort=None, mean_gamma=False):
    """The exact denoiser as a DiffusionModel's network: output = a x_hat + b eps_hat.

    ``distort(eps_hat, z, gamma)`` makes it err; ``mean_gamma``: it sees the mean of gamma over the pixels only.
    """

    def call(z, gamma, conditioning=None):
        flat, level = z.flatten(1), gamma.expand(len(z), *gamma.shape[1:]).flatten(1)
        seen = level.mean(1, keepdim=True) if mean_gamma else level
        alpha, sigma = path.coefficients(seen)
        x_hat, eps_hat = toy.estimates(flat, alpha, sigma, conditioning)
        if distort is not None:
            eps_hat = distort(eps_hat, flat, seen)
        if distort is not None or mean_gamma:
            alpha, sigma = path.coefficients(level)
            x_hat = (flat - sigma * eps_hat) / alpha
        a, b = parameterization.pair(path, alpha, sigma)
        return (a * x_hat + b * eps_hat).reshape(z.shape)

    return call


def build(toy, schedule, path="vp", parameterization="noise", latent=None, encoder=None, wrong=None, **fields):
    """A DiffusionModel with the toy's exact denoiser; ``wrong``, keywords of ``network`` that make it err."""
    p, q = PATHS[path](), PARAMETERIZATIONS[parameterization]()
    net = network(toy, p, q, **(wrong or {}))
    return DiffusionModel(net, schedule, p, q, toy.shape, toy.levels, latent, encoder, **fields).to(FLOAT)


def polynomial(shape, gamma_0, gamma_1, seed=0, scale=1.0, ends="fixed", condition=0):
    """A polynomial schedule with random a, b, d (given one of ``condition`` codes: other ones for each)."""
    random = torch.Generator().manual_seed(seed)
    if condition:
        interior = CodedPolynomial(shape, condition)
    else:
        interior = Polynomial(shape)
    with torch.no_grad():
        for parameter in interior.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=random, dtype=FLOAT))
    return Schedule(interior, gamma_0, gamma_1, ends).to(FLOAT)


class CodedPolynomial(Polynomial):
    """A polynomial whose coefficients are a table with one row for each of the values of c."""

    def __init__(self, shape, condition):
        super().__init__(shape)
        size = math.prod(shape)
        self.a, self.b, self.d = (torch.nn.Parameter(torch.zeros(condition, size)) for _ in range(3))

    def coefficients(self, c):
        from torch.nn.functional import softplus

        rows = (v.reshape(len(v), *self.shape)[c.argmax(1)] for v in (self.a, self.b, self.d))
        a, b, d = rows
        return a, b, 1e-3 + softplus(d)


def linear(gamma_0, gamma_1, ends="fixed"):
    """The straight schedule."""
    return Schedule(Linear(), gamma_0, gamma_1, ends).to(FLOAT)


# Expectations --------------------------------------------------------------------------------------------------------


def _batches(rows, size=1 << 16):
    return (torch.arange(i, min(i + size, rows)) for i in range(0, rows, size))


@torch.no_grad()
def diffusion_per_component(toy, model, times=None, grid=None, steps=0, c=None):
    """E over t and eps (and x, where components are not points) of ``objectives.diffusion_term``, (M,) nats.

    times: nodes and weights over [0, 1); grid: nodes and weights for zeta along one axis; c (1, size) or None, given to
    schedule and network.
    """
    t, t_weights = times or gauss_legendre()
    if toy.means.shape[0] == 1:  # no dependence between pixels: one axis serves all, and two points are exact
        zeta, weights = tensor([[-1.0], [1.0]]), tensor([0.5, 0.5])
    else:
        zeta, weights = product_grid(*(grid or normal_grid()), toy.dimensions)
    eta = tensor([-1.0, 1.0] if toy.variance.any() else [1.0])
    deviation = toy.variance.sqrt()
    sums = torch.zeros(len(toy.means), dtype=FLOAT)
    rows = torch.cartesian_prod(*map(torch.arange, (len(t), len(toy.means), len(zeta), len(eta))))
    for part in _batches(len(rows)):
        i, m, j, k = rows[part].T
        shape = (len(i), *toy.shape)
        codes = None if c is None else c.expand(len(i), -1)
        x, eps = toy.means[m], zeta[j]
        if toy.variance.any():
            # (x, eps) depends on gamma, which the library takes at the end of the step that t falls into.
            at = t[i] if not steps else (torch.floor(t[i] * steps) + 1) / steps
            alpha, sigma = model.path.coefficients(model.curve(codes)(at)[0].flatten(1))
            spread = torch.sqrt(alpha**2 * toy.variance + sigma**2)
            sign = eta[k][:, None]
            x = x + deviation * (alpha * deviation * zeta[j] + sigma * sign) / spread
            eps = (sigma * zeta[j] - alpha * deviation * sign) / spread
        term = diffusion_term(model, x.reshape(shape), t[i], eps.reshape(shape), codes, steps=steps)
        sums.index_add_(0, m, t_weights[i] * weights[j] / len(eta) * term)
    return sums


def expected_diffusion(toy, model, times=None, grid=None, steps=0, c=None):
    """The mean of ``diffusion_per_component`` over the toy's components, or those of p(x|c): a number."""
    each = diffusion_per_component(toy, model, times, grid, steps, c)
    return float((toy.weights(c).flatten().exp() * each).sum())


@torch.no_grad()
def expected_terms(toy, model, times=None, grid=None, steps=0, latent=None, per_image=False):
    """E over images, t, eps and eps_0 of the bound of a discrete toy: Terms of numbers, nats.

    The diffusion is integrated by itself; ``objectives.elbo`` gives the other terms, which do not depend on t.
    ``latent(m)`` gives the LatentDraw of components m; the toy is then weighted by p(x|c) of that draw, so that a
    caller can sum over c. ``per_image``: (M,) numbers, for each image.
    """
    zeta, weights = product_grid(*(grid or normal_grid()), toy.dimensions)
    m, j = torch.cartesian_prod(torch.arange(len(toy.means)), torch.arange(len(zeta))).T
    shape, t = (len(m), *toy.shape), torch.full((len(m),), 0.5, dtype=FLOAT)
    draw = None if latent is None else latent(m)
    eps, images = zeta[j].reshape(shape), toy.images[m].reshape(shape)
    terms = elbo(model, images, t=t, eps=eps, eps_0=eps, latent=draw, steps=steps, dtype=FLOAT)
    c = None if draw is None else draw.c[:1]
    names = ("prior", "reconstruction", "diffusion", "latent", "valid_latent")
    sums = {name: torch.zeros(len(toy.means), dtype=FLOAT) for name in names}
    for name, values in sums.items():
        values.index_add_(0, m, weights[j] * getattr(terms, name))
    sums["diffusion"] = diffusion_per_component(toy, model, times, grid, steps, c)
    if per_image:
        return Terms(**sums)
    probability = toy.weights(c).flatten().exp()
    return Terms(**{name: (values * probability).sum() for name, values in sums.items()})


# Truths --------------------------------------------------------------------------------------------------------------


def gaussian_diffusion(deviations, gamma_0, gamma_1):
    """E = 1/2 sum log[(1 + s_i^2 e^-g0)/(1 + s_i^2 e^-g1)]; ends are numbers or one per dimension."""
    s_2, g_0, g_1 = tensor(deviations) ** 2, tensor(gamma_0), tensor(gamma_1)
    return float(0.5 * (torch.log1p(s_2 * torch.exp(-g_0)) - torch.log1p(s_2 * torch.exp(-g_1))).sum())


def entropy(toy):
    """-sum p log p of a discrete toy, nats."""
    return float(-(toy.log_weights.exp() * toy.log_weights).sum())


def prior_mismatch(toy, alpha, sigma, scale=1.0, log_weights=None, grid=None):
    """KL(q(z_1) || N(0, scale^2 I)) by integration over z_1; alpha, sigma numbers."""
    log_weights = toy.log_weights if log_weights is None else log_weights
    zeta, weights = product_grid(*(grid or normal_grid(0.15, 8.0)), toy.dimensions)
    spread = torch.sqrt(alpha**2 * toy.variance + sigma**2)
    total = 0.0
    for mean, log_weight in zip(toy.means, log_weights, strict=True):
        z = alpha * mean + spread * zeta
        own = toy.log_density(z, alpha, sigma, log_weights)
        prior = (-0.5 * (z / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)).sum(1)
        total += float(log_weight.exp() * (weights * (own - prior)).sum())
    return total


def decoder_mismatch(toy, gamma_0, log_weights=None, grid=None):
    """E KL(q(x|z_0) || p(x|z_0)) of a discrete toy; p is the product over pixels of the softmax over all levels.

    The signal alone matters: z_0/alpha_0 = x + e^(gamma_0/2) eps on every path.
    """
    log_weights = toy.log_weights if log_weights is None else log_weights
    zeta, weights = product_grid(*(grid or normal_grid(0.15, 8.0)), toy.dimensions)
    noise = math.exp(gamma_0 / 2)
    values = (2 * torch.arange(toy.levels, dtype=FLOAT) + 1) / toy.levels - 1
    total = 0.0
    for m, mean in enumerate(toy.means):
        y = mean + noise * zeta
        apart = ((y[:, None] - toy.means) / noise) ** 2
        exact = torch.log_softmax(log_weights - 0.5 * apart.sum(2), 1)[:, m]
        pixel = torch.log_softmax(-0.5 * ((y[..., None] - values) / noise) ** 2, 2)
        decoder = pixel.gather(2, toy.images[m].expand(len(y), -1)[..., None]).sum((1, 2))
        total += float(log_weights[m].exp() * (weights * (exact - decoder)).sum())
    return total
