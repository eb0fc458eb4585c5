"""The likelihood by the probability flow against enumerated data: what it bounds, by how much, and what it costs."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from nelbo.draws import Draws
from nelbo.flow import Flow, log_prior, time_of
from nelbo.latents import Gaussian, KHot, Label, OneHot, PaperKHot
from nelbo.likelihood import SolverError, ode, ode_table
from nelbo.pixels import DEQUANTIZATIONS, log_likelihood
from nelbo.schedules import PixelMonotone, Schedule, default_gamma_0
from toys import (
    FLOAT,
    Toy,
    build,
    gauss_legendre,
    given_code,
    linear,
    normal_grid,
    polynomial,
    product_grid,
    tensor,
    two_pixels,
)

# At gamma = 30 z_1 is N(0, I) to six digits: the model's density of z_0 is then the exact marginal, in closed form. At
# the start there is more noise than by default, so that the dequantizations' own bounds are not tight.
G1 = 30.0
STARTS = {"truncated-normal": -3.0, "uniform": default_gamma_0(4), "variational": -3.0}
# Where the density is taken: the uniform one has a time of its own.
LEVELS = STARTS | {"uniform": -11.8 + 2 * math.log(256 / 4)}
KINDS = list(STARTS)
NATS = 2 * math.log(2)  # per bit/dim of two pixels
COUNT, REPLICATES, SAMPLES = 16, 8, 64
TIGHT = {"rtol": 1e-5, "atol": 1e-5, "method": "dopri5"}
EXACT = {"trace": "exact", "double": True, "batch": 100_000} | TIGHT


def all_images():
    """The 16 images of the enumerated toy, in its order."""
    return two_pixels().images.reshape(COUNT, 1, 1, 2).to(torch.uint8)


def ends(gamma):
    """alpha and sigma of the variance-preserving path, numbers."""
    return math.sqrt(1 / (1 + math.exp(gamma))), math.sqrt(1 / (1 + math.exp(-gamma)))


def normal_cdf(values):
    return 0.5 * torch.special.erfc(-values / math.sqrt(2))


def exact_nll(toy, dequantization, log_weights):
    """-log p(v) of the dequantized model for every image of the toy, (16,) nats: the mixture's mass in the bin of v, by
    erf; for the variational one the integral of its density times the decoder, pixel by pixel."""
    alpha, sigma = ends(LEVELS[dequantization])
    if dequantization == "variational":
        nodes, weights = normal_grid(0.1, 8.0)
        z = (alpha * toy.means[:, :, None] + sigma * nodes)[None]  # component, pixel, node
        gamma = torch.full_like(z, LEVELS[dequantization])
        inside = []
        for image in toy.images:
            levels = image[None, None, :, None].expand(1, len(toy.means), 2, len(nodes)).reshape(-1, 1, 1, 1)
            flat = (v.reshape(-1, 1, 1, 1) for v in (z, torch.full_like(z, alpha), gamma))
            inside.append((log_likelihood(levels, *flat, 4).exp().reshape(z.shape[1:]) * weights).sum(2))
        inside = torch.stack(inside)
    else:
        low, high = (alpha * (2 * (toy.images + edge) / 4 - 1)[:, None] for edge in (0, 1))
        inside = normal_cdf((high - alpha * toy.means) / sigma) - normal_cdf((low - alpha * toy.means) / sigma)
    return -(inside.prod(2) @ log_weights.exp()).log().numpy()


def expected_cost(toy, dequantization, log_weights):
    """E of the K = 1 figure of every image, (16,) nats, by quadrature over q(z|v) and the closed-form log p(z)."""
    alpha, sigma = ends(LEVELS[dequantization])
    if dequantization == "uniform":
        u, weights = product_grid(*gauss_legendre(), 2)
        entropy, places = math.log(4 / (2 * alpha)), 2 * alpha * (u - 0.5) / 4
    else:
        if dequantization == "variational":
            nodes, weights = normal_grid(0.1, 8.0)
        else:
            tau = alpha / (4 * sigma)
            nodes, weights = gauss_legendre(1, 48, -tau, tau)
            weights = weights * torch.exp(-(nodes**2) / 2)
            weights = weights / weights.sum()
        mass = 1.0 if dequantization == "variational" else math.erf(tau / math.sqrt(2))
        entropy = float((weights * (-(nodes**2) / 2)).sum()) - math.log(math.sqrt(2 * math.pi) * sigma * mass)
        u, weights = product_grid(nodes, weights, 2)
        places = sigma * u
    costs = []
    for mean, image in zip(toy.means, toy.images, strict=True):
        z = alpha * mean + places
        cost = 2 * entropy - toy.log_density(z, alpha, sigma, log_weights)
        if dequantization == "variational":
            shape = (len(z), 1, 1, 2)
            flat = (torch.full(shape, v, dtype=FLOAT) for v in (alpha, LEVELS[dequantization]))
            cost = cost - log_likelihood(image.expand(len(z), 2).reshape(shape), z.reshape(shape), *flat, 4)
        costs.append(float((weights * cost).sum()))
    return np.array(costs)


def exact_model(dequantization, **fields):
    return build(two_pixels(), linear(STARTS[dequantization], G1), parameterization="velocity", **fields)


def regroup(table, samples):
    """The same draws, ``samples`` to a replicate."""
    return {name: values.reshape(len(values), -1, samples) for name, values in table.items()}


def figure(model, table, samples, **options):
    """``ode`` of a table that is full: nothing is solved. A BitsPerDim."""

    def unused(z, gamma, conditioning=None):
        raise AssertionError("a full table needs no solve")

    network, model.network = model.network, unused
    try:
        grouped = regroup(table, samples)
        shape = {"samples": samples, "replicates": grouped["prior"].shape[1]}
        return ode(model, all_images(), table=grouped, **(EXACT | shape | options))
    finally:
        model.network = network


@pytest.fixture(scope="module")
def draws():
    """8 x 64 draws of every image with the exact trace, for every dequantization: model and table."""
    found = {}
    for kind in KINDS:
        model, table = exact_model(kind), ode_table(COUNT, REPLICATES, SAMPLES)
        options = {"samples": SAMPLES, "replicates": REPLICATES, "dequantization": kind}
        ode(model, all_images(), table=table, **(EXACT | options))
        found[kind] = model, table
    return found


def gap(result, truth):
    """The mean over images of figure - truth, and the draws' error of it; nats."""
    return float((result.per_image * NATS - truth).mean()), result.draws_error * NATS


# A bound on the truth that tightens with K ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_falls_to_the_exact_likelihood(draws, kind):
    """K = 1, 4, 16, 64 draws: from above, within 4 standard errors of the draws; each K below the one before it, draw
    by draw; at K = 64 a tenth of the first gap is left."""
    toy, (model, table) = two_pixels(), draws[kind]
    truth = exact_nll(toy, kind, toy.log_weights)
    results = {k: figure(model, table, k, dequantization=kind) for k in (1, 2, 4, 16, 64)}
    gaps = {k: gap(result, truth) for k, result in results.items()}
    for mean, error in gaps.values():
        assert mean > -4 * error and all(result.is_bound for result in results.values())
    for more, less in ((2, 4), (4, 16), (16, 64)):  # Jensen: a mean of logarithms is below the logarithm of the mean
        assert bool((results[less].per_image <= results[more].per_image + 1e-12).all())
    first = (expected_cost(toy, kind, toy.log_weights) - truth).mean()
    assert first > 0.03 and gaps[1][0] > gaps[4][0] > gaps[64][0]
    assert abs(gaps[64][0]) < 0.1 * first + 4 * gaps[64][1] and gaps[64][1] < 0.1 * first


@pytest.mark.parametrize("kind", KINDS)
def test_the_expectation_with_one_sample(draws, kind):
    """K = 1, the entropy in closed form: the mean over 512 draws of an image is the quadrature's, within 4.5 standard
    errors for each of the 16 images, and their mean within 4."""
    toy, (model, table) = two_pixels(), draws[kind]
    truth = expected_cost(toy, kind, toy.log_weights)
    result = figure(model, table, 1, dequantization=kind)
    mean, error = gap(result, truth)
    assert abs(mean) < 4 * error < 0.05
    assert bool((np.abs(result.per_image * NATS - truth) < 4.5 * result.per_image_error * NATS).all())


# What must not be dropped --------------------------------------------------------------------------------------------
# Each of these fails if its constant is: log 64 is 4.2 nats, two log sigma_0 are 3.1, two log(L/2) are 1.4.


def test_dropping_log_k_would_show(draws):
    """K identical weights are one: log K - log(K e^w) = -w. And 64 draws leave the figure at the exact likelihood."""
    model, table = draws["variational"]
    same = {name: np.repeat(values[:, :, :1], SAMPLES, 2) for name, values in table.items()}
    alike = figure(model, same, SAMPLES, dequantization="variational").per_image * NATS
    one = {name: values[:, :, 0] for name, values in table.items()}
    by_hand = -(one["prior"] + one["divergence"] + one["decoder"] - one["log_q"] + one["log_weight"]).mean(1)
    assert np.allclose(alike, by_hand, rtol=1e-12)
    truth = exact_nll(two_pixels(), "variational", two_pixels().log_weights)
    assert abs(gap(figure(model, table, SAMPLES, dequantization="variational"), truth)[0]) < 0.05


@pytest.mark.parametrize("samples", [1, 64])
@pytest.mark.parametrize("kind", ["truncated-normal", "variational"])
def test_dropping_log_sigma_0_would_show(draws, kind, samples):
    """In the entropy (K = 1) and in the density of each draw (K > 1)."""
    toy, (model, table) = two_pixels(), draws[kind]
    truth = (expected_cost if samples == 1 else exact_nll)(toy, kind, toy.log_weights)
    assert abs(2 * math.log(ends(STARTS[kind])[1])) > 3
    assert abs(gap(figure(model, table, samples, dequantization=kind), truth)[0]) < 0.06


@pytest.mark.parametrize("samples", [1, 64])
def test_dropping_the_constant_of_the_levels_would_show(draws, samples):
    """log(L/2) per pixel of the uniform one, 1.4 nats here."""
    toy, (model, table) = two_pixels(), draws["uniform"]
    truth = (expected_cost if samples == 1 else exact_nll)(toy, "uniform", toy.log_weights)
    assert abs(gap(figure(model, table, samples, dequantization="uniform"), truth)[0]) < 0.06


def by_hand(model, images, kind, trace, probes, samples, replicates, seed, options):
    """The entries of ``ode``'s table draw by draw, from the keyed numbers: a dictionary of (n, R, K)."""
    found = ode_table(len(images), replicates, samples)
    for i in range(len(images)):
        for r in range(replicates):
            keyed = Draws(seed, [i], r)  # the probe belongs to the replicate
            probe = None
            if trace == "rademacher":
                probe = 1 - 2 * (keyed.uniform("probe", (probes, *model.shape)) < 0.5).to(FLOAT)
            elif trace == "gaussian":
                probe = keyed.normal("probe", (probes, *model.shape))
            for k in range(samples):
                own, flow, rule = Draws(seed, [i], r * samples + k), Flow(model, probes=probe), DEQUANTIZATIONS[kind]()
                t = torch.zeros(1, dtype=FLOAT)
                if kind == "uniform":
                    t = time_of(flow.gamma, LEVELS[kind], t)
                alpha, sigma = model.path.coefficients(flow.gamma(t))
                numbers = (own.normal if kind == "variational" else own.uniform)("eps_0", model.shape).to(FLOAT)
                start = rule.draw(images[i : i + 1], alpha, sigma, model.levels, numbers)
                end = flow.transport(start.z, t, 1.0, divergence=True, **options)
                row = {
                    "prior": log_prior(end.z, model.prior_scale), "divergence": end.divergence,
                    "decoder": start.decoder, "log_q": start.log_q, "entropy_form": start.entropy_form,
                }  # fmt: skip
                for name, value in row.items():
                    found[name][i, r, k] = value.item()
    return found


def per_pixel_ends(shape, seed=0):
    """A schedule with another start for every pixel: free ends."""
    random, interior = torch.Generator().manual_seed(seed), PixelMonotone(shape, -4.0, 6.0, 0, 8)
    schedule = Schedule(interior, -4.0, 6.0, "free").to(FLOAT)
    with torch.no_grad():
        interior.l3.weight.copy_(8.0 * tensor([[0.3], [1.0]]).expand(2, 8))
        interior.l2.weight.copy_(torch.randn(8, 1, generator=random, dtype=FLOAT))
        interior.l_int.weight.copy_(torch.randn(8, 8, generator=random, dtype=FLOAT))
    return schedule


@pytest.mark.parametrize(("kind", "trace", "probes", "path"), [
    ("truncated-normal", "rademacher", 1, "vp"), ("uniform", "gaussian", 2, "vp"),
    ("variational", "exact", 1, "straight"),
])  # fmt: skip
def test_every_draw_is_keyed_and_the_probe_is_its_replicates(kind, trace, probes, path):
    """Two images, R = 2, K = 2: each z by the stream eps_0 of its own draw, the probe by the replicate's, the same for
    its K draws and for the whole of a solve; per-pixel ends; the prior has its own scale. Redrawing the probe fails."""
    toy, images = two_pixels(), all_images()[[3, 12]]
    model = build(toy, per_pixel_ends(toy.shape), path, "velocity", prior_scale=0.9)
    table, options = ode_table(2, 2, 2), {"rtol": 1e-3, "atol": 1e-3, "method": "bosh3"}
    result = ode(
        model, images, dequantization=kind, samples=2, replicates=2, trace=trace, probes=probes, double=True, seed=3,
        table=table, **options,
    )  # fmt: skip
    expected = by_hand(model, images, kind, trace, probes, 2, 2, 3, options)
    for name in ("prior", "divergence", "decoder", "log_q", "entropy_form"):
        assert np.allclose(table[name], expected[name], rtol=1e-9, atol=1e-9), name
    with torch.no_grad():
        starts = model.schedule(tensor([0.0]))[0].flatten()
    assert abs(starts[0] - starts[1]).item() > 0.1
    weights = expected["prior"] + expected["divergence"] + expected["decoder"] - expected["log_q"]
    costs = math.log(2) - np.logaddexp(weights[:, :, 0], weights[:, :, 1])
    assert np.allclose(result.per_image * NATS, costs.mean(1), rtol=1e-9)
    assert np.allclose(result.per_image_error * NATS, costs.std(1, ddof=1) / math.sqrt(2), rtol=1e-7)
    assert result.draws_error * NATS == pytest.approx(math.sqrt((costs.var(1, ddof=1) / 2).sum()) / 2, rel=1e-7)
    assert result.standard_error * NATS == pytest.approx(costs.mean(1).std(ddof=1) / math.sqrt(2), rel=1e-9)
    assert sum(v.mean for v in result.terms.values()) == pytest.approx(result.mean, rel=1e-9)
    assert result.is_bound == (trace == "exact") and result.settings["probes"] == (0 if trace == "exact" else probes)
    if trace == "exact":  # with K = 1 the same four draws, their entropy in place of their density
        single = ode(model, images, dequantization=kind, replicates=4, trace=trace, double=True, seed=3, **options)
        terms = (expected[name] for name in ("entropy_form", "prior", "decoder", "divergence"))
        by_entropy = sum(next(terms).mean((1, 2)) * sign for sign in (1, -1, -1, -1))
        assert np.allclose(single.per_image * NATS, by_entropy, rtol=1e-9)
        assert sum(v.mean for v in single.terms.values()) == pytest.approx(single.mean, rel=1e-9)


@pytest.fixture(scope="module")
def hutchinson():
    """Rademacher's trace with K = 16: probes shared by a replicate's draws, and one of its own for each; the same z."""
    model, found = exact_model("truncated-normal"), {}
    for name, replicates, samples in (("shared", 32, 16), ("own", 512, 1)):
        table = ode_table(COUNT, replicates, samples)
        ode(model, all_images(), table=table, samples=samples, replicates=replicates,
            **(EXACT | {"trace": "rademacher"}))  # fmt: skip
        found[name] = regroup(table, 16)
    return model, found


def test_independent_probes_would_fall_below_the_exact_likelihood(hutchinson):
    """K = 16. One probe for a replicate: no lower than the exact likelihood, and no higher than the bound of the exact
    trace at K = 1, within 4 standard errors. A probe for each draw: below it by more than 10 standard errors."""
    toy, (model, found) = two_pixels(), hutchinson
    truth = exact_nll(toy, "truncated-normal", toy.log_weights)
    most = (expected_cost(toy, "truncated-normal", toy.log_weights) - truth).mean()
    (shared, error), (own, own_error) = (
        gap(figure(model, found[name], 16, trace="rademacher"), truth) for name in ("shared", "own")
    )
    assert -4 * error < shared < most + 4 * error
    assert own < -10 * own_error and own < -0.1
    assert not figure(model, found["shared"], 16, trace="rademacher").is_bound


def turned(replicates):
    """Whether the two entries of the keyed probe differ in sign, for draws 0 .. replicates - 1 of every image."""
    index, draw = np.repeat(np.arange(COUNT), replicates), np.tile(np.arange(replicates), COUNT)
    low = Draws(0, index, draw).uniform("probe", (1, 1, 1, 2)).reshape(-1, 2).numpy() < 0.5
    return low[:, 0] != low[:, 1]


def test_the_probe_is_shared_by_the_draws_of_a_replicate(hutchinson):
    """Drawing it anew for every sample fails here. The two tables hold the same z; in the plane a probe matters by the
    sign of e_1 e_2 alone, and their divergences differ exactly where the replicate's sign is not the draw's."""
    _, found = hutchinson
    assert np.allclose(found["shared"]["prior"], found["own"]["prior"], atol=1e-3)
    apart = np.abs(found["shared"]["divergence"] - found["own"]["divergence"])
    differ = turned(32).reshape(COUNT, 32, 1) != turned(512).reshape(COUNT, 32, 16)
    assert np.array_equal(apart > 1e-9, differ) and np.median(apart[differ]) > 0.5


# With a latent -------------------------------------------------------------------------------------------------------

PROBABILITY = torch.linspace(0.05, 0.6, 16, dtype=FLOAT)[torch.randperm(16, generator=torch.Generator().manual_seed(2))]


def number(x):
    """Which of the 16 images an encoded one is."""
    index = ((x.flatten(1) + 1) * 2 - 0.5).round().long()
    return index[:, 0] * 4 + index[:, 1]


class Table(nn.Module):
    """Parameters of q(c|x), by the image: tensors (16, size)."""

    def __init__(self, *tables):
        super().__init__()
        self.tables = tables

    def forward(self, x):
        return tuple(table[number(x)].to(x) for table in self.tables)


class Missing(Toy):
    """p(x|c) by which entry of c is 0."""

    def weights(self, c=None):
        return self.log_weights[c.argmin(1)]


def coded(kind):
    """A model whose p(x|c) is exact for each value of c, p(c), and the log weights (values, 16) of p(x|c)."""
    toy, random = two_pixels(), torch.Generator().manual_seed(4)
    logits = torch.stack([1 - PROBABILITY, PROBABILITY], 1).log()
    inside, _ = given_code(toy, PROBABILITY)
    schedule = polynomial(toy.shape, -3.0, G1, seed=6, condition=2, scale=0.5)
    options = {"schedule": schedule, "parameterization": "velocity"}
    if kind == "one-hot":
        return build(inside, **options, latent=OneHot(2), encoder=Table(logits)), inside.log_weights
    if kind == "1-hot of 2":
        return build(inside, **options, latent=KHot(2, 1), encoder=Table(logits)), inside.log_weights
    if kind == "gaussian":  # p(x|c) by which of two real numbers is larger
        mean = torch.stack([PROBABILITY, -PROBABILITY], 1)
        return build(inside, **options, latent=Gaussian(2), encoder=Table(mean, mean + 0.5)), inside.log_weights
    weights = torch.log_softmax(torch.randn(3, 16, generator=random, dtype=FLOAT), 1)
    toy = Missing(toy.means, weights, toy.variance, toy.levels, toy.images)
    theta = torch.randn(16, 3, generator=random, dtype=FLOAT)
    options["schedule"] = linear(-3.0, G1)
    return build(toy, **options, latent=KHot(3, 2), encoder=Table(theta)), weights


@pytest.mark.parametrize("kind", ["one-hot", "1-hot of 2", "2-hot of 3", "gaussian"])
def test_a_latent_is_paid_for(kind):
    """The truth is -log sum_c p(c) p(v|c), by erf. K = 1 pays the KL: E_q of it by quadrature where c has values. More
    draws: from above, and a tenth of the gap is left at K = 64. Within 4 standard errors."""
    toy = two_pixels()
    model, weights = coded(kind)
    each = np.stack([exact_nll(toy, "truncated-normal", w) for w in weights])
    truth = -np.log(np.exp(-each).mean(0))
    table = ode_table(COUNT, REPLICATES, SAMPLES)
    ode(model, all_images(), table=table, samples=SAMPLES, replicates=REPLICATES, **EXACT)
    gaps = {k: gap(figure(model, table, k), truth) for k in (1, 4, 16, 64)}
    assert all(mean > -4 * error for mean, error in gaps.values())
    assert gaps[1][0] > gaps[4][0] > gaps[16][0] > gaps[64][0]
    assert abs(gaps[64][0]) < 0.1 * gaps[1][0] + 4 * gaps[64][1] and gaps[1][0] > 0.1
    cost = np.stack([expected_cost(toy, "truncated-normal", w) for w in weights])
    if kind == "2-hot of 3":
        q = torch.softmax(-model.encoder.tables[0], 1).T  # of the one left out: exp(theta_sum - theta_i)
    elif kind == "gaussian":
        mean, raw = model.encoder.tables
        spread = torch.nn.functional.softplus(raw).sum(1).sqrt()
        first = normal_cdf((mean[:, 0] - mean[:, 1]) / spread)
        q = torch.stack([first, 1 - first])
    else:
        q = torch.stack([1 - PROBABILITY, PROBABILITY])
    result = figure(model, table, 1)
    kl = result.per_image_terms["latent"] * NATS
    expected = (q.numpy() * cost).sum(0) + kl
    if kind != "gaussian":
        assert np.allclose(kl, (q * (q * len(q)).log()).sum(0).numpy(), atol=1e-6)
    mean, error = gap(result, expected)
    assert abs(mean) < 4 * error < 0.05


@pytest.mark.parametrize("samples", [1, 4])
def test_the_papers_k_hot_has_two_figures(samples):
    """as_published and the value differ by the two charges and by nothing else; c is the mode, the k largest logits;
    and what it pays for is p(v|c) of that c."""
    model, weights = coded("2-hot of 3")
    theta = model.encoder.tables[0]
    model.latent = PaperKHot(3, 2)
    result = ode(model, all_images(), samples=samples, replicates=64 // samples, **EXACT)
    q = torch.softmax(theta, 1)
    charge = (q * (q * 3).log()).sum(1).mean().item()
    apart = (result.mean - result.as_published.mean) * NATS
    assert apart == pytest.approx(math.log(3) - charge, abs=1e-6) and abs(apart) > 0.1
    toy, left_out = two_pixels(), theta.argmin(1).numpy()
    cost = np.stack([exact_nll(toy, "truncated-normal", w) for w in weights])[left_out, np.arange(COUNT)]
    if samples == 1:
        cost = np.stack([expected_cost(toy, "truncated-normal", w) for w in weights])[left_out, np.arange(COUNT)]
        assert result.terms["latent"].mean * NATS == pytest.approx(math.log(3), rel=1e-6)
    mean, error = gap(result, cost + math.log(3))
    assert -4 * error < mean < 4 * error + (0.05 if samples > 1 else 0.0)
    assert ode(coded("2-hot of 3")[0], all_images()[:1], **EXACT).as_published is None


def test_labels_are_paid_for():
    """log(classes) whatever K; the labels belong to the images, whatever their order and batch."""
    toy = two_pixels()
    inside, _ = given_code(toy, PROBABILITY)
    model = build(inside, linear(-3.0, G1), parameterization="velocity", latent=Label(2))
    labels = (torch.arange(COUNT) % 3 == 0).long().numpy()
    result = ode(model, all_images(), labels=labels, samples=4, replicates=4, **EXACT)
    each = np.stack([exact_nll(toy, "truncated-normal", w) for w in inside.log_weights])
    truth = each[labels, np.arange(COUNT)] + math.log(2)
    mean, error = gap(result, truth)
    assert -4 * error < mean < 4 * error + 0.05
    assert result.terms["latent"].mean * NATS == pytest.approx(math.log(2), rel=1e-6)
    order = np.random.default_rng(0).permutation(COUNT)
    options = EXACT | {"batch": 61, "samples": 4, "replicates": 4}
    other = ode(model, all_images()[order], index=order, labels=labels[order], **options)
    assert np.allclose(other.per_image, result.per_image[order], rtol=1e-9)
    with pytest.raises(ValueError, match="labels"):
        ode(model, all_images(), **EXACT)


# Invariances, interruptions and failures -----------------------------------------------------------------------------

MIXED = {"samples": 2, "replicates": 2, "double": True, "rtol": 1e-4, "atol": 1e-4, "method": "dopri5"}


@pytest.fixture(scope="module")
def whole():
    """A latent, per-pixel curves given it, Rademacher's trace: five images in one batch."""
    model, images, table = coded("one-hot")[0], all_images()[[1, 6, 6, 11, 15]], ode_table(5, 2, 2)
    return model, images, ode(model, images, table=table, **MIXED), table


@pytest.mark.parametrize("batch", [1, 7])
def test_the_batch_size_does_not_matter(whole, batch):
    """Solves one at a time, or in batches that split an image: the same figures to 1e-9, the same evaluations."""
    model, images, result, table = whole
    again = ode_table(5, 2, 2)
    other = ode(model, images, table=again, batch=batch, **MIXED)
    assert np.allclose(other.per_image, result.per_image, rtol=1e-9) and other.mean == pytest.approx(
        result.mean, rel=1e-9
    )
    assert np.array_equal(again["evaluations"], table["evaluations"])
    assert len(np.unique(table["evaluations"])) > 1
    assert len(np.unique(result.per_image.round(9))) == 5  # the same image under another index has other draws


def test_the_order_of_the_images_does_not_matter(whole):
    """Nor their company: an image is its index."""
    model, images, result, _ = whole
    order = np.array([3, 0, 4, 1, 2])
    other = ode(model, images[order], index=order, **MIXED)
    assert np.allclose(other.per_image, result.per_image[order], rtol=1e-9) and np.array_equal(other.index, order)
    alone = ode(model, images[3:4], index=np.array([3]), **MIXED)
    assert alone.per_image[0] == pytest.approx(result.per_image[3], rel=1e-9) and math.isnan(alone.standard_error)
    assert np.abs(ode(model, images, **(MIXED | {"seed": 1})).per_image - result.per_image).min() > 1e-4


def test_an_interrupted_evaluation_goes_on_where_it_was(whole):
    """``save`` is called after each batch with the table so far; what is in it is not solved again, and the figures are
    those of one that was not interrupted."""
    model, images, result, _ = whole
    table, saved = ode_table(5, 2, 2), []

    def save(current):
        assert current is table
        saved.append(int(np.isfinite(current["prior"]).sum()))
        if len(saved) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ode(model, images, table=table, save=save, batch=6, **MIXED)
    assert saved == [6, 12]
    kept = {name: values.copy() for name, values in table.items()}
    other = ode(model, images, table=table, save=save, batch=6, **MIXED)
    assert saved == [6, 12, 18, 20]
    assert np.allclose(other.per_image, result.per_image, rtol=1e-9)
    for name, values in kept.items():
        assert np.array_equal(values[np.isfinite(values)], table[name][np.isfinite(values)])


def test_progress_ends_at_the_figure(whole):
    """Images done, none before all of an image's draws are; the last value is the result's."""
    model, images, result, _ = whole
    seen = []
    ode(model, images, batch=3, progress=lambda done, bits: seen.append((done, bits)), **MIXED)
    assert [done for done, _ in seen] == [0, 1, 2, 3, 3, 4, 5] and math.isnan(seen[0][1])
    assert seen[-1][1] == pytest.approx(result.mean, rel=1e-9)
    assert seen[1][1] == pytest.approx(result.per_image[0], rel=1e-9)


def test_the_cost_is_that_of_the_solves(whole):
    _, _, result, table = whole
    assert result.cost["evaluations_per_solve"] == pytest.approx(table["evaluations"].mean())
    assert result.cost["most_evaluations"] == table["evaluations"].max() > 20
    assert result.cost["rejected_per_solve"] == pytest.approx(table["rejected"].mean())
    assert result.cost["seconds_per_image"] == pytest.approx(table["seconds"].sum() / 5)


def test_a_solve_that_fails_is_an_error():
    """It says why; the table keeps what was solved before, and the model its mode."""
    model, images, table = exact_model("truncated-normal"), all_images()[:2], ode_table(2, 1, 1)
    inner = model.network
    model.train()

    def network(z, gamma, conditioning=None):
        out = inner(z, gamma, conditioning)
        return torch.where(gamma > 2, torch.nan, out) if table["prior"][0, 0, 0] < 0 else out  # from the second on

    model.network = network
    with pytest.raises(
        SolverError, match=r"1 of 1 examples stopped early \(number 0 at t = 0\.\d+\): the field is not fin"
    ):
        ode(model, images, replicates=1, table=table, batch=1, rtol=1e-3, atol=1e-3, trace="exact")
    assert np.isfinite(table["prior"][0]).all() and np.isnan(table["prior"][1]).all() and model.training


def test_float32_is_close_to_float64():
    """The state's precision: 1e-4 bits/dim apart at tolerances of 1e-5; and the model's mode is restored."""
    images, results = all_images(), {}
    for double in (False, True):
        model = exact_model("truncated-normal").to(torch.float32)
        model.train()
        results[double] = ode(model, images, **(EXACT | {"double": double}))
        assert model.training and results[double].settings["double"] is double
    assert np.abs(results[True].per_image - results[False].per_image).max() < 1e-4


def test_one_replicate_has_no_draws_error():
    result = ode(exact_model("uniform"), all_images()[:3], replicates=1, dequantization="uniform", least_steps=20)
    assert math.isnan(result.draws_error) and np.isnan(result.per_image_error).all() and result.standard_error > 0


def test_the_default_takes_224_steps_and_they_are_enough():
    """Of equal ones in tau, from the start of the truncated normal: within 1e-4 bits/dim of a tight solve by a pair."""
    options = {"replicates": 1, "trace": "exact"}
    found = ode(exact_model("truncated-normal"), all_images()[::5], **options)
    assert (found.settings["solver"], found.settings["least_steps"]) == ("adams4", 224)
    assert 224 <= found.cost["evaluations_per_solve"] < 260
    tight = ode(exact_model("truncated-normal"), all_images()[::5], **(EXACT | options))
    assert tight.settings["least_steps"] == 1
    assert np.abs(found.per_image - tight.per_image).max() < 1e-4


@pytest.mark.parametrize("fields", [
    {"samples": 0}, {"least_steps": 0}, {"replicates": 0}, {"probes": 0}, {"trace": "none"}, {"rtol": 0.0, "atol": 0.0},
])  # fmt: skip
def test_impossible_evaluations_are_refused(fields):
    with pytest.raises(ValueError, match="must be"):
        ode(exact_model("uniform"), all_images()[:1], **fields)


def test_the_same_figure_on_other_paths_and_of_other_parameterizations():
    """Shared draws put z in the same places: the same likelihood, to 3e-5 bits/dim at tolerances of 1e-6."""
    options = EXACT | {"replicates": 1, "rtol": 1e-6, "atol": 1e-6}
    found = [
        ode(build(two_pixels(), linear(-3.0, G1), path, parameterization), all_images()[::5], **options).per_image
        for path, parameterization in (
            ("vp", "velocity"),
            ("vp", "data"),
            ("straight", "velocity"),
            ("straight", "data"),
        )
    ]
    assert max(np.abs(other - found[0]).max() for other in found[1:]) < 3e-5
