"""Latents against enumeration: normaliser, marginals, KL, samples, and the bias of the SIMPLE gradient."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from nelbo.draws import Draws
from nelbo.latents import (
    Gaussian,
    KHot,
    Label,
    OneHot,
    PaperKHot,
    k_subset,
    log_binomial,
    sample_k_subset,
)
from toys import FLOAT, tensor

N, K = 6, 3
SUBSETS = torch.zeros(20, N, dtype=FLOAT)
for row, chosen in enumerate(itertools.combinations(range(N), K)):
    SUBSETS[row, list(chosen)] = 1.0


def thetas(scale, batch=5, seed=0):
    return scale * torch.randn(batch, N, generator=torch.Generator().manual_seed(seed), dtype=FLOAT)


def enumerated(theta):
    """log Z (B,) and q(c|x) (B, 20) of the k-subset family."""
    scores = theta @ SUBSETS.T
    return torch.logsumexp(scores, 1), torch.softmax(scores, 1)


def counts(c):
    """How often each of the 20 subsets occurs in c (S, N) of exact zeros and ones."""
    code = (c.to(FLOAT) @ 2.0 ** torch.arange(N, dtype=FLOAT)).long()
    codes = (SUBSETS @ 2.0 ** torch.arange(N, dtype=FLOAT)).long()
    found = (code[:, None] == codes).sum(0)
    assert int(found.sum()) == len(c), "something that is not a subset of k"
    return found


# The exact k-subset posterior ----------------------------------------------------------------------------------------


def test_log_binomial():
    assert log_binomial(50, 15) / math.log(2) == pytest.approx(41.03, abs=5e-3)
    assert log_binomial(50, 15) / math.log(2) / 3072 == pytest.approx(0.01335729, abs=5e-9)
    assert log_binomial(50, 15) == pytest.approx(math.log(math.comb(50, 15)), rel=1e-13)


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 30.0])
def test_normaliser_marginals_and_kl_against_enumeration(scale):
    theta = thetas(scale)
    log_z, q = enumerated(theta)
    found, mu, _ = k_subset(theta, K)
    assert torch.allclose(found, log_z, rtol=1e-13, atol=1e-13)
    assert torch.allclose(mu, q @ SUBSETS, rtol=1e-11, atol=1e-300)
    kl = torch.special.xlogy(q, q * 20).sum(1)
    draw = KHot(N, K).posterior((theta,), torch.full_like(theta, 0.5))
    assert torch.allclose(draw.kl, kl, rtol=1e-11, atol=1e-12)
    assert draw.valid_kl is draw.kl


@pytest.mark.parametrize("k", range(1, N + 1))
def test_every_k(k):
    """One to all of six; all of them is certain and costs nothing."""
    subsets = torch.zeros(math.comb(N, k), N, dtype=FLOAT)
    for row, chosen in enumerate(itertools.combinations(range(N), k)):
        subsets[row, list(chosen)] = 1.0
    theta = thetas(2.0)
    log_z, mu, prefix = k_subset(theta, k)
    scores = theta @ subsets.T
    assert torch.allclose(log_z, torch.logsumexp(scores, 1), rtol=1e-12)
    assert torch.allclose(mu, torch.softmax(scores, 1) @ subsets, rtol=1e-11)
    c = sample_k_subset(theta, prefix, k, torch.rand(5, N, generator=torch.Generator().manual_seed(0), dtype=FLOAT))
    assert torch.equal(c.sum(1), torch.full((5,), float(k), dtype=FLOAT))


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_kl_gradient_is_exact(scale):
    """d KL/d theta = Cov(c) theta: against autodiff through the enumeration."""
    theta = thetas(scale).requires_grad_()
    (found,) = torch.autograd.grad(KHot(N, K).posterior((theta,), torch.full_like(theta, 0.5)).kl.sum(), theta)
    _, q = enumerated(theta)
    (expected,) = torch.autograd.grad((q * (q * 20).log()).sum(), theta)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_sampler_frequencies():
    """40 000 draws over the 20 subsets, chi-square against the enumerated probabilities, float64 and float32."""
    for dtype in (FLOAT, torch.float32):
        theta = thetas(0.8, 1).to(dtype)
        _, q = enumerated(theta.to(FLOAT))
        _, _, prefix = k_subset(theta, K)
        size = 40_000
        uniform = Draws(1, range(size)).uniform("latent", (N,)).to(dtype)
        c = sample_k_subset(theta.expand(size, -1), prefix.expand(-1, size, -1), K, uniform)
        assert stats.chisquare(counts(c).numpy(), size * q[0].numpy()).pvalue > 1e-3


def forced(theta, subset):
    """Uniforms that make the sampler return this subset: 0 where an item is in it, almost 1 where it is not."""
    return (1 - subset) * (1 - 2.0**-50) + 0 * theta


def test_every_subset_can_be_drawn():
    """The sampler's conditional probabilities multiply to q(c|x): by bisection over the uniform of each item."""
    theta = thetas(0.8, 1)
    _, q = enumerated(theta)
    _, _, prefix = k_subset(theta, K)
    for subset, probability in zip(SUBSETS, q[0], strict=True):
        total = 1.0
        for i in range(N):  # P(item i as in the subset | the later items as in the subset)
            low, high = 0.0, 1.0
            for _ in range(45):
                middle = (low + high) / 2
                uniform = forced(theta, subset[None]).clone()
                uniform[0, i] = middle
                taken = bool(sample_k_subset(theta, prefix, K, uniform)[0, i])
                low, high = (middle, high) if taken else (low, middle)
            total *= low if subset[i] else 1 - low
        assert total == pytest.approx(probability.item(), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 60.0, 1e3])
def test_always_exactly_k_ones(dtype, scale):
    """n = 50, k = 15: theta from flat to +-60 and +-1000, uniforms at their extremes 0 and 1 - 2^-24 among them."""
    random = torch.Generator().manual_seed(3)
    theta = scale * torch.randn(3000, 50, generator=random).to(dtype)
    theta[:500] = scale * theta[:500].sign()
    uniform = torch.rand(3000, 50, generator=random).to(dtype)
    uniform[500:600], uniform[600:700] = 0.0, 1 - 2.0**-24
    uniform[700:1500] = (uniform[700:1500] > 0.5).to(dtype) * (1 - 2.0**-24)
    draw = KHot(50, 15).posterior((theta,), uniform)
    assert torch.equal(draw.c.sum(1), torch.full((3000,), 15.0, dtype=dtype))
    assert set(draw.c.unique().tolist()) == {0.0, 1.0}


def test_exactly_k_ones_whatever_the_rounding():
    """Tables off by another rounding, as other devices may give: the last items are still taken for certain."""
    random = torch.Generator().manual_seed(0)
    theta = torch.randn(2000, 50, generator=random)
    _, _, prefix = k_subset(theta, 15)
    prefix = prefix + 1e-4 * torch.randn(prefix.shape, generator=random)
    uniform = torch.full((2000, 50), 1 - 2.0**-24)
    uniform[1000:] = 0.0
    c = sample_k_subset(theta, prefix, 15, uniform)
    assert torch.equal(c.sum(1), torch.full((2000,), 15.0))


def test_a_certain_subset_is_drawn():
    """theta = +60 on 15 items and -60 on the others: those 15, at a price of log C(50, 15)."""
    theta = torch.full((4, 50), -60.0)
    theta[:, 7:22] = 60.0
    draw = KHot(50, 15).posterior((theta,), Draws(0, range(4)).uniform("latent", (50,)))
    assert torch.equal(draw.c, (theta > 0).float())
    assert torch.allclose(draw.kl, torch.full((4,), log_binomial(50, 15)), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stable_at_large_gaps(dtype):
    """Gaps of 1e3 between items, n = 50, k = 15: values and both gradients stay finite, and the values are right."""
    random = torch.Generator().manual_seed(0)
    theta = torch.zeros(4, 50, dtype=dtype)
    theta[0, 10:25] = 1e3
    theta[1, 30:] = -1e3
    theta[2] = 1e3 * torch.randperm(50, generator=random).to(dtype)
    theta[3] = 1e3 * torch.sign(torch.randn(50, generator=random)).to(dtype)
    theta.requires_grad_()
    draw = KHot(50, 15).posterior((theta,), torch.rand(4, 50, generator=random).to(dtype))
    ((draw.c * torch.arange(50)).sum() + draw.kl.sum()).backward()
    assert bool(torch.isfinite(draw.kl).all() and torch.isfinite(draw.c).all() and torch.isfinite(theta.grad).all())
    log_c = log_binomial(50, 15)
    tolerance = 1e-9 if dtype == FLOAT else 0.1  # theta itself is known to 6e-5 there, times 15
    assert draw.kl[0].item() == pytest.approx(log_c, abs=tolerance)
    assert draw.kl[1].item() == pytest.approx(log_c - log_binomial(30, 15), abs=tolerance)
    assert draw.kl[2].item() == pytest.approx(log_c, abs=tolerance * 10)
    _, mu, _ = k_subset(theta.detach(), 15)
    assert torch.allclose(mu.sum(1), torch.full((4,), 15.0, dtype=dtype), atol=1e-9 if dtype == FLOAT else 1e-2)


def test_prior_is_uniform_over_subsets():
    """Both k-hot kinds: 40 000 draws of p(c), chi-square over the 20 subsets."""
    for latent in (KHot(N, K), PaperKHot(N, K)):
        c = latent.prior(Draws(2, range(40_000)))
        assert stats.chisquare(counts(c).numpy()).pvalue > 1e-3
    c = KHot(50, 15).prior(Draws(2, range(500)))
    assert torch.equal(c.sum(1), torch.full((500,), 15.0))


# The SIMPLE gradient -------------------------------------------------------------------------------------------------


def functions():
    """f(c) of rising curvature: linear, quadratic, a small network, and a product of three entries."""
    random = torch.Generator().manual_seed(7)
    w = torch.randn(N, generator=random, dtype=FLOAT)
    matrix = torch.randn(N, N, generator=random, dtype=FLOAT)
    first, second = (torch.randn(8, n, generator=random, dtype=FLOAT) for n in (N, 1))
    return {
        "linear": lambda c: c @ w,
        "quadratic": lambda c: ((c @ matrix) ** 2).sum(1),
        "network": lambda c: torch.tanh(c @ first.T - 1) @ second[:, 0],
        "product": lambda c: c[:, 0] * c[:, 1] * c[:, 2],
    }


def gradients(f, theta):
    """The enumerated gradient of E f(c), and the expectation of SIMPLE's, both (N,), for theta (1, N)."""
    theta = theta.clone().requires_grad_()
    _, q = enumerated(theta)
    (true,) = torch.autograd.grad((q[0] * f(SUBSETS)).sum(), theta)
    q, latent = q[0].detach(), KHot(N, K)
    draws = latent.posterior((theta.expand(20, -1),), forced(theta.detach(), SUBSETS))
    assert torch.equal(draws.c.detach(), SUBSETS)
    (simple,) = torch.autograd.grad((q * f(draws.c)).sum(), theta)
    return true[0], simple[0]


def simple_bias(name, scale):
    """Over 50 theta: the mean cosine, and the root mean square of simple - true relative to that of true."""
    cosines, apart, size = [], 0.0, 0.0
    for theta in thetas(scale, 50, seed=11):
        true, simple = gradients(functions()[name], theta[None])
        cosines.append(F.cosine_similarity(true, simple, dim=0).item())
        apart, size = apart + ((simple - true) ** 2).sum().item(), size + (true**2).sum().item()
    return sum(cosines) / 50, math.sqrt(apart / size)


def test_simple_gradient_is_exact_for_linear_functions():
    """E f is then linear in the marginals, through which the gradient goes."""
    cosine, bias = simple_bias("linear", 1.0)
    assert cosine == pytest.approx(1.0, abs=1e-12) and bias < 1e-12


@pytest.mark.parametrize(("name", "scale", "cosine", "bias"), [
    ("quadratic", 0.3, 0.9835, 0.2322),
    ("quadratic", 2.0, 0.7174, 0.5306),
    ("network", 0.3, 0.9847, 0.2103),
    ("network", 2.0, 0.8770, 0.4131),
    ("product", 0.3, 0.9863, 0.2907),
    ("product", 2.0, 0.8365, 0.5717),
])  # fmt: skip
def test_simple_gradient_bias_is_as_measured(name, scale, cosine, bias):
    """SIMPLE's gradient of E f(c), its expectation over c enumerated, beside the enumerated gradient.

    n = 6, k = 3, theta normal of standard deviation ``scale``: cosine and relative bias as stated. Near a flat
    posterior it is off by a fifth to a third and points the right way (cosine 0.98); far from it by half (0.7 to 0.9).
    """
    found = simple_bias(name, scale)
    assert found == pytest.approx((cosine, bias), abs=2e-3)
    assert found[0] > 0.7 and 0.2 < found[1] < 0.6


# The paper's k-hot ---------------------------------------------------------------------------------------------------


def plackett_luce(theta):
    """The distribution over the 20 subsets of the top k of theta + Gumbel noise, enumerated: theta (N,) -> (20,)."""
    weights, probabilities = theta.exp(), []
    for subset in SUBSETS:
        total = 0.0
        for order in itertools.permutations(subset.nonzero().flatten().tolist()):
            left, p = float(weights.sum()), 1.0
            for item in order:
                p, left = p * float(weights[item]) / left, left - float(weights[item])
            total += p
        probabilities.append(total)
    return tensor(probabilities)


def test_paper_k_hot_by_hand():
    """Logits plus noise, centred, over their norm: the straight-through gradient; the top k are the ones."""
    theta = thetas(1.0).requires_grad_()
    noise = thetas(0.3, seed=5)
    draw = PaperKHot(N, K).posterior((theta,), noise)
    noisy = (theta + noise).detach()
    for row in range(5):
        assert set(draw.c[row].nonzero().flatten().tolist()) == set(noisy[row].argsort(descending=True)[:K].tolist())
    assert torch.equal(draw.c.sum(1), torch.full((5,), 3.0, dtype=FLOAT))
    cotangent = thetas(1.0, seed=6)
    (found,) = torch.autograd.grad((draw.c * cotangent).sum(), theta)
    centred = noisy - noisy.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    soft = centred / norm
    # d soft/d theta = (I - soft soft^T)(I - 1 1^T/n)/norm
    back = (cotangent - soft * (soft * cotangent).sum(1, keepdim=True)) / norm
    assert torch.allclose(found, back - back.mean(1, keepdim=True), rtol=1e-10, atol=1e-13)


def test_paper_k_hot_has_two_figures():
    """Charged: KL(softmax(theta) || uniform(n)). Valid: log C(n, k), for any theta."""
    theta = thetas(2.0)
    draw = PaperKHot(N, K).posterior((theta,), torch.zeros_like(theta))
    q = torch.softmax(theta, 1)
    assert torch.allclose(draw.kl, (q * (q * N).log()).sum(1), rtol=1e-12)
    assert torch.allclose(draw.valid_kl, torch.full((5,), math.log(20), dtype=FLOAT), rtol=1e-14)


def test_the_valid_figure_bounds_the_true_kl_and_the_papers_does_not():
    """Gumbel top-k is Plackett-Luce, whose KL to the uniform subset is enumerated: log C(n, k) always bounds it.

    The categorical KL falls short wherever several items stand out: with three of six favoured it says log 2 = 0.69
    nats where the truth is log 20 = 3.00. With a single item that stands out it is too large instead.
    """
    theta = torch.cat([thetas(0.1), thetas(1.0), thetas(5.0), 30 * SUBSETS[:1], 30 * torch.eye(N, dtype=FLOAT)[:1]])
    draw = PaperKHot(N, K, "gumbel").posterior((theta,), torch.zeros_like(theta))
    q = torch.stack([plackett_luce(row) for row in theta])
    assert torch.allclose(q.sum(1), torch.ones(len(q), dtype=FLOAT), rtol=1e-9)
    true = torch.special.xlogy(q, q * 20).sum(1)
    assert bool((true <= draw.valid_kl + 1e-9).all())
    short = true > draw.kl
    assert int(short.sum()) >= 10 and not bool(short[-1])
    assert draw.kl[-2].item() == pytest.approx(math.log(2), abs=1e-6)
    assert true[-2].item() == pytest.approx(math.log(20), abs=1e-6)
    assert draw.kl[-1].item() == pytest.approx(math.log(6), abs=1e-6)
    assert true[-1].item() == pytest.approx(math.log(2), abs=1e-6)


def test_gumbel_top_k_is_plackett_luce():
    """The latent's own noise and draw: 40 000 subsets, chi-square against the enumeration."""
    latent, theta = PaperKHot(N, K, "gumbel"), thetas(0.7, 1)
    noise = latent.noise(Draws(4, range(40_000))).to(FLOAT)
    c = latent.posterior((theta.expand(40_000, -1),), noise).c
    assert stats.chisquare(counts(c).numpy(), 40_000 * plackett_luce(theta[0]).numpy()).pvalue > 1e-3


def test_sum_of_gamma_noise():
    """s = (tau/k)(sum_i (i/k) G_i - log 10): by hand, and its standard deviation at k = 15, 0.23, not Gumbel's 1.28."""
    latent = PaperKHot(50, 15)
    gammas = torch.rand(2, 10, 50, generator=torch.Generator().manual_seed(0), dtype=FLOAT)
    by_hand = 10 / 15 * (sum((i / 15) * gammas[:, i - 1] for i in range(1, 11)) - math.log(10))
    assert torch.allclose(latent.sum_of_gamma(gammas), by_hand, rtol=1e-13)
    noise = latent.noise(Draws(0, range(2000)))
    assert noise.shape == (2000, 50)
    variance = (10 / 15) ** 2 * sum((i / 15) ** 2 for i in range(1, 11)) / 15  # of Gamma(1/15): 1/15
    assert math.sqrt(variance) == pytest.approx(0.2252, abs=1e-4)
    assert noise.double().std().item() == pytest.approx(math.sqrt(variance), rel=0.03)
    mean = 10 / 15 * (55 / 225 - math.log(10))
    assert noise.double().mean().item() == pytest.approx(mean, abs=5 * 0.23 / 100_000**0.5)


def test_unknown_noise_is_refused():
    with pytest.raises(ValueError, match="gamma or gumbel"):
        PaperKHot(N, K, "normal")


# The others ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "temperature"), [(0, 1.0), (50_000, 0.6065307), (200_000, 0.5), (69_315, 0.5)])
def test_one_hot_is_straight_through_at_its_temperature(step, temperature):
    """The value is the argmax, the gradient that of softmax((logits + g)/temperature)."""
    logits, noise = thetas(1.0).requires_grad_(), thetas(1.0, seed=2)
    draw = OneHot(N).posterior((logits,), noise, step)
    assert torch.equal(draw.c, F.one_hot((logits + noise).argmax(1), N).to(FLOAT))
    cotangent = thetas(1.0, seed=3)
    (found,) = torch.autograd.grad((draw.c * cotangent).sum(), logits)
    soft = torch.softmax((logits.detach() + noise) / temperature, 1)
    expected = soft * (cotangent - (soft * cotangent).sum(1, keepdim=True)) / temperature
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-9)


def test_one_hot_kl_is_exact():
    logits = thetas(2.0)
    draw = OneHot(N).posterior((logits,), torch.zeros_like(logits))
    q, p = torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=torch.zeros(5, N))
    assert torch.allclose(draw.kl, torch.distributions.kl_divergence(q, p), rtol=1e-6)
    assert torch.allclose(draw.kl, (q.probs * (q.probs * N).log()).sum(1), rtol=1e-12)
    assert draw.valid_kl is draw.kl


def test_one_hot_frequencies():
    """Gumbel noise makes c ~ softmax(logits); the prior is uniform. 40 000 draws each, chi-square."""
    latent, logits = OneHot(N), thetas(1.0, 1)
    noise = latent.noise(Draws(5, range(40_000)))
    c = latent.posterior((logits.expand(40_000, -1),), noise).c
    assert stats.chisquare(c.sum(0).numpy(), 40_000 * torch.softmax(logits[0], 0).numpy()).pvalue > 1e-3
    prior = latent.prior(Draws(5, range(40_000)))
    assert torch.equal(prior.sum(1), torch.ones(40_000))
    assert stats.chisquare(prior.sum(0).numpy()).pvalue > 1e-3


def test_gaussian_kl_and_draw():
    """Against torch.distributions; c = mu + sqrt(var) noise, var the softplus of the second head."""
    mu, raw, noise = thetas(2.0), thetas(3.0, seed=1), thetas(1.0, seed=2)
    draw = Gaussian(N).posterior((mu, raw), noise)
    var = torch.log1p(torch.exp(raw))
    q, p = torch.distributions.Normal(mu, var.sqrt()), torch.distributions.Normal(torch.zeros_like(mu), 1.0)
    assert torch.allclose(draw.kl, torch.distributions.kl_divergence(q, p).sum(1), rtol=1e-12)
    assert torch.allclose(draw.c, mu + var.sqrt() * noise, rtol=1e-12)
    assert draw.valid_kl is draw.kl
    prior = Gaussian(N).prior(Draws(0, range(3000)))
    assert prior.shape == (3000, N) and stats.kstest(prior.flatten(), "norm").pvalue > 1e-3
    assert torch.equal(Gaussian(N).noise(Draws(0, range(3000))), prior)


def test_label():
    """c is the class, at log(classes); its prior is uniform over the classes."""
    latent, labels = Label(10), torch.tensor([3, 0, 9])
    draw = latent.posterior((labels,), latent.noise(Draws(0, range(3))))
    assert torch.equal(draw.c.argmax(1), labels) and torch.equal(draw.c.sum(1), torch.ones(3))
    assert torch.allclose(draw.kl, torch.full((3,), math.log(10))) and draw.valid_kl is draw.kl
    prior = latent.prior(Draws(0, range(20_000)))
    assert torch.equal(prior.sum(1), torch.ones(20_000))
    assert stats.chisquare(prior.sum(0).numpy()).pvalue > 1e-3


# The weight of a draw -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.8, 5.0])
def test_k_hot_weight_by_enumeration(scale):
    """log p(c)/q(c|x) of every subset: its mean under q is one in weights, and minus the KL in logarithms."""
    theta, latent = thetas(scale), KHot(N, K)
    _, q = enumerated(theta)
    found = torch.stack([latent.log_weight((theta,), subset.expand(5, -1)) for subset in SUBSETS], 1)
    assert torch.allclose(found, -math.log(20) - q.log(), rtol=1e-10, atol=1e-12)
    assert torch.allclose((q * found.exp()).sum(1), torch.ones(5, dtype=FLOAT), rtol=1e-11)
    noise = Draws(0, range(5)).uniform("latent", (N,)).to(FLOAT)
    draw = latent.posterior((theta,), noise)
    assert torch.allclose(-(q * found).sum(1), draw.kl, rtol=1e-10, atol=1e-11)
    place = (draw.c @ SUBSETS.T).argmax(1)  # the weight of the draw itself, as it comes
    assert torch.allclose(latent.log_weight((theta,), draw.c), found[torch.arange(5), place], rtol=1e-10, atol=1e-11)


def test_one_hot_weight_by_enumeration():
    logits, latent = thetas(2.0), OneHot(N)
    q = torch.softmax(logits, 1)
    found = torch.stack([latent.log_weight((logits,), c.expand(5, -1)) for c in torch.eye(N, dtype=FLOAT)], 1)
    assert torch.allclose(found, -math.log(N) - q.log(), rtol=1e-11)
    assert torch.allclose((q * found.exp()).sum(1), torch.ones(5, dtype=FLOAT), rtol=1e-12)
    assert torch.allclose(-(q * found).sum(1), latent.posterior((logits,), 0 * logits).kl, rtol=1e-11)


def test_gaussian_weight_by_quadrature():
    """N(0, I) over N(mu, var), against torch.distributions; its mean under q is one (trapezoidal rule in the plane),
    and that of its logarithm minus the KL (quadratic in the noise: two points per axis are exact)."""
    latent = Gaussian(2)
    mu, raw = tensor([[0.7, -1.1]]), tensor([[-0.5, 1.3]])
    deviation = F.softplus(raw).sqrt()
    q, p = torch.distributions.Normal(mu, deviation), torch.distributions.Normal(tensor(0.0), tensor(1.0))
    line = torch.linspace(-9, 9, 181, dtype=FLOAT)
    grid = torch.cartesian_prod(line, line)
    parameters = (mu.expand(len(grid), -1), raw.expand(len(grid), -1))
    found = latent.log_weight(parameters, grid)
    assert torch.allclose(found, (p.log_prob(grid) - q.log_prob(grid)).sum(1), rtol=1e-10, atol=1e-10)
    total = (q.log_prob(grid).sum(1).exp() * found.exp()).sum() * 0.1**2
    assert total.item() == pytest.approx(1, abs=1e-10)
    signs = tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    four = (mu.expand(4, -1), raw.expand(4, -1))
    draw = latent.posterior(four, signs)
    assert -latent.log_weight(four, draw.c).mean().item() == pytest.approx(draw.kl[0].item(), rel=1e-12)


def test_a_label_s_weight_is_its_price():
    """q is a point: the weight is p(c), whose logarithm is minus the KL; over the labels it sums to one."""
    latent, labels = Label(10), torch.arange(10)
    draw = latent.posterior((labels,), torch.zeros(10, 0))
    found = latent.log_weight((labels,), draw.c)
    assert torch.allclose(-found, draw.kl) and found.exp().sum().item() == pytest.approx(1, rel=1e-6)


def test_the_papers_k_hot_weighs_with_q_replaced_by_1():
    """Its q(c|x) is not known, and at most 1: the weight is p(c), whose logarithm is minus the valid charge."""
    theta, latent = thetas(2.0, 20), PaperKHot(N, K)
    found = latent.log_weight((theta,), SUBSETS)
    assert found.exp().sum().item() == pytest.approx(1, rel=1e-12)
    assert torch.allclose(-found, latent.posterior((theta,), 0 * theta).valid_kl, rtol=1e-13)
    for gumbel in (plackett_luce(row) for row in theta[:5]):  # so its mean under any true q is at most one
        assert float((gumbel * found.exp()).sum()) <= 1


def test_draws_of_a_latent_do_not_depend_on_the_batch():
    """The same image has the same noise and the same c alone and in company, for every kind."""
    for latent in (KHot(N, K), PaperKHot(N, K), PaperKHot(N, K, "gumbel"), OneHot(N), Gaussian(N), Label(N)):
        together, alone = Draws(3, [8, 5, 2], 4), Draws(3, [5], 4)
        assert torch.equal(latent.noise(together)[1:2], latent.noise(alone))
        assert torch.equal(latent.prior(together)[1:2], latent.prior(alone))
