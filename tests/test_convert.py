"""denoising-diffusion-pytorch: its U-Net, losses, steps and files, against numbers recorded with it (tests/ddp)."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from nelbo import objectives, samplers
from nelbo.cli import main
from nelbo.convert.denoising_diffusion_pytorch import read
from nelbo.errors import UserError
from nelbo.pixels import bin_log_likelihood
from nelbo.resolve import resolve
from nelbo.schedules import betas

HERE = Path(__file__).resolve().parent / "ddp"
CASES = {name: torch.from_numpy(value) for name, value in np.load(HERE / "cases.npz").items()}
T, KINDS = 100, {"pred_noise": "noise", "pred_x0": "data", "pred_v": "velocity"}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # of float32 networks, whose outputs are of size 1


def model(name="model-1.pt", kind=None, weights="raw"):
    return resolve(HERE / name, weights=weights, parameterization=kind).load(256, "cpu", (1, 8, 8))


def first_weights(kind):
    """The U-Net of seed 0, which learned.pt's is too but for its last layer: from the fixtures' own file."""
    found = model("plain.pt", kind)
    found.reverse = objectives.Reverse("fixed-small", True, "gaussian")
    return found


def gamma_of(m, n):
    return m.schedule(torch.as_tensor(n).double() / (T - 1))[0]


@pytest.mark.parametrize("weights", ("raw", "ema"))
def test_a_trainers_file_gives_its_networks(weights):
    m = model(weights=weights)
    with torch.no_grad():
        out = m(CASES["z"], gamma_of(m, CASES["n"]))
    torch.testing.assert_close(out, CASES[f"trained.{weights}"], **CLOSE)
    assert not torch.equal(CASES["trained.raw"], CASES["trained.ema"])


def test_the_networks_sizes_and_objective_follow_from_the_file():
    found = read(HERE / "model-1.pt")
    assert found.network == {
        "outputs": 1, "channels": 8, "multipliers": (1, 2), "first": 8, "self_condition": False,
        "full": [False, True], "heads": [2, 2], "features": [8, 8],
    }  # fmt: skip
    assert (found.parameterization, found.learned, found.channels, found.step) == ("velocity", False, 1, 3)
    assert read(HERE / "learned.pt").learned and read(HERE / "learned.pt").parameterization == "noise"
    assert read(HERE / "conditioned.pt").network["self_condition"]
    np.testing.assert_allclose(found.betas, np.linspace(1e-3, 0.2, 100), rtol=1e-6)


def test_a_network_that_gets_its_own_estimate_is_the_packages_with_its_gradient():
    m = model("conditioned.pt")
    z = CASES["z"].clone().requires_grad_()
    out = m.network(z, gamma_of(m, CASES["n"]), None, CASES["estimate"])
    (gradient,) = torch.autograd.grad((out * CASES["noise"]).sum(), z)
    torch.testing.assert_close(out, CASES["unet"], **CLOSE)
    torch.testing.assert_close(gradient, CASES["unet.gradient"], **CLOSE)


@pytest.mark.parametrize("name", ("linear", "cosine", "sigmoid"))
def test_betas_are_the_packages(name):
    tolerance = 2e-5 if name == "sigmoid" else 1e-9  # the ends of its sigmoid are float32 there
    np.testing.assert_allclose(betas(name, 1000), CASES[f"betas.{name}"].numpy(), rtol=tolerance)


@pytest.mark.parametrize("objective", KINDS)
@pytest.mark.parametrize("min_snr", (False, True))
def test_losses_are_the_packages(objective, min_snr):
    m = first_weights(KINDS[objective])
    weight = "min-snr" if min_snr else "snr"
    with torch.no_grad():
        terms = objectives.weighted(
            m, CASES["images"].long(), objectives.Weighting(weight=weight),
            t=(CASES["n"].double() + 0.5) / T, eps=CASES["noise"], steps=T - 1,
        )  # fmt: skip
    wanted = CASES[f"loss.{objective}{'.min_snr' if min_snr else ''}"]
    torch.testing.assert_close(terms.error.float(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", KINDS)
def test_a_step_of_ancestral_sampling_is_the_packages(objective):
    m = first_weights(KINDS[objective])
    with torch.no_grad():
        mean, std, x_hat = objectives.reverse_moments(m, CASES["z"], gamma_of(m, [39] * 4), gamma_of(m, [40] * 4))
    torch.testing.assert_close(mean + std * CASES["steps"][0], CASES[f"step.{objective}"], **CLOSE)
    torch.testing.assert_close(x_hat, CASES[f"x_hat.{objective}"], **CLOSE)


@pytest.mark.parametrize("objective", KINDS)
@pytest.mark.parametrize("eta", (0.0, 0.5))
def test_ddim_at_its_times_is_the_packages(objective, eta):
    """From level 99 by 74, 49 and 24 to x_hat, the package's last step."""
    m = first_weights(KINDS[objective])
    levels = [int(v) for v in torch.linspace(-1, T - 1, 5).int().flip(0)]
    step, z = samplers.ddim_step(m, eta=eta, clip=True), CASES["z"]
    with torch.no_grad():
        for i, (t, s) in enumerate(pairwise(levels)):
            at = torch.full((4,), t / (T - 1), dtype=torch.float64)
            if s < 0:
                z = step(z, at * 0, at)[2]
                continue
            mean, std, _ = step(z, torch.full_like(at, s / (T - 1)), at)
            z = (mean + std * CASES["steps"][i]).float()
    torch.testing.assert_close((z.float() + 1) / 2, CASES[f"ddim.{objective}.{eta}"], **CLOSE)


def test_learned_variance_has_the_packages_terms():
    m = model("learned.pt")
    m.reverse = objectives.Reverse("learned", False, "gaussian")
    with torch.no_grad():
        terms = objectives.weighted(
            m, CASES["images"].long(), objectives.Weighting(weight="none", hybrid=0.001),
            t=(CASES["n"].double() + 0.5) / T, eps=CASES["noise"], steps=T - 1,
        )  # fmt: skip
        mean, std, _ = objectives.reverse_moments(
            m, CASES["z"], gamma_of(m, [39] * 4), gamma_of(m, [40] * 4), reverse=objectives.Reverse("learned", True)
        )
    bits = terms.diffusion / T / (64 * np.log(2))
    torch.testing.assert_close(bits[1:].float(), CASES["learned.kl"][1:], rtol=1e-6, atol=0)
    # The package counts 0.001 of one step's KL beside the simple loss, not of T times as much.
    total = terms.error[1:] + 0.001 * bits[1:]
    torch.testing.assert_close(total.float(), CASES["learned.total"][1:], rtol=1e-6, atol=0)
    torch.testing.assert_close(mean + std * CASES["steps"][0], CASES["learned.step"], **CLOSE)


def packages_decoder(x, mean, log_scale):
    """Log-probabilities as the package computes them: tanh for the normal distribution, none below 1e-15."""

    def cdf(v):
        return 0.5 * (1 + torch.tanh((2 / np.pi) ** 0.5 * (v + 0.044715 * v**3)))

    def log(v):
        return v.clamp(min=1e-15).log()

    above, below = (cdf((x - mean + side / 255) * torch.exp(-log_scale)) for side in (1, -1))
    return torch.where(x < -0.999, log(above), torch.where(x > 0.999, log(1 - below), log(above - below)))


def test_the_decoder_is_the_packages_but_for_its_normal_distribution_and_its_floor():
    """The formula above gives the recorded figure, where every bin is at the package's floor: no bound. With a variance
    that fits, each probability is ours but for the error of the tanh."""
    image, mean, log_variance = (
        CASES[k][:1] for k in ("images", "learned.decoder_mean", "learned.decoder_log_variance")
    )
    x = image / 127.5 - 1
    recorded = -packages_decoder(x, mean, log_variance / 2).mean() / np.log(2)
    torch.testing.assert_close(recorded, CASES["learned.nll"][0], rtol=1e-5, atol=0)
    mean = (x + 0.02 * torch.tanh(mean)).double()
    theirs = packages_decoder(x.double(), mean, torch.tensor(0.02).double().log()).flatten().exp()
    each = torch.stack([
        bin_log_likelihood(v.reshape(1, 1, 1, 1), m.reshape(1, 1, 1, 1), torch.tensor(2 * np.log(0.02)), 256, 256 / 255)
        for v, m in zip(image.flatten(), mean.flatten(), strict=True)
    ]).flatten().exp()  # fmt: skip
    assert 0.03 < float(each.min()) and float((each - theirs).abs().max()) < 4e-4


def test_evaluate_takes_a_trainers_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(HERE / "model-1.pt", "model-1.pt")
    assert main(["evaluate", "model-1.pt", "--data", "digits", "--images", "2", "--times", "4"]) == 0
    said = capsys.readouterr().out
    assert "model-1.pt, from denoising-diffusion-pytorch, step 3: 2 of 300 test images" in said and "T = 99" in said
    assert "variance of p(z_s|z_t): fixed-small; x_hat clipped" in said
    assert list((tmp_path / "evaluations/model-1/evaluations").glob("*.json"))
    assert main(["evaluate", "model-1.pt", "--data", "photos32", "--images", "2"]) == 2
    assert "1xanyxany" in capsys.readouterr().err
    assert main(["evaluate", "model-1.pt"]) == 2
    assert "give --data" in capsys.readouterr().err


def spoiled(tmp_path, change):
    content = torch.load(HERE / "conditioned.pt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def snr_of(content):
    alpha_bar = torch.cumprod(1 - content["model"]["betas"].double(), 0)
    return alpha_bar / (1 - alpha_bar)


WEIGHTS = {"noise": lambda snr, c: c / snr, "data": lambda snr, c: c, "velocity": lambda snr, c: c / (snr + 1)}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("largest", (1e-3, 3.0, 1e9))
def test_what_the_network_estimates_follows_from_the_loss_weights_clipped_anywhere(tmp_path, kind, largest):
    content = torch.load(HERE / "conditioned.pt", weights_only=True)
    snr = snr_of(content)
    content["model"]["loss_weight"] = WEIGHTS[kind](snr, snr.clamp(max=largest)).float()
    torch.save(content, tmp_path / "x.pt")
    assert read(tmp_path / "x.pt").parameterization == kind


def test_a_learned_variance_comes_with_the_noise_whatever_the_loss_weights_say(tmp_path):
    """LearnedGaussianDiffusion's objective is pred_v by default, and it trains the noise all the same."""
    content = torch.load(HERE / "learned.pt", weights_only=True)
    snr = snr_of(content)
    content["model"]["loss_weight"] = (snr / (snr + 1)).float()
    torch.save(content, tmp_path / "x.pt")
    assert read(tmp_path / "x.pt").parameterization == "noise"


def test_images_that_the_network_cannot_halve_are_refused():
    with pytest.raises(UserError, match=r"multiples of 2.*got 7x8"):
        resolve(HERE / "model-1.pt").load(256, "cpu", (1, 7, 8))


MISTAKES = {
    "no betas": (lambda c: c["model"].pop("betas"), "no trainer checkpoint"),
    "no network": (lambda c: c.pop("model"), "no trainer checkpoint"),
    "objective": (lambda c: c["model"].pop("loss_weight"), "give --parameterization noise, data or velocity"),
    "other weights": (lambda c: c["model"].update({"loss_weight": torch.ones(100) * 2}), "give --parameterization"),
    "learned time": (
        lambda c: c["model"].update({"model.time_mlp.1.weight": torch.zeros(32, 17)}),
        "embedding of time",
    ),
    "betas of one": (lambda c: c["model"]["betas"].fill_(1.0), "strictly between 0 and 1"),
    "missing layer": (lambda c: c["model"].pop("model.mid_attn.to_qkv.weight"), "lacks 1 tensors"),
    "no average": (lambda c: None, "has no ema weights; it holds raw"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_files_that_are_none_are_refused(tmp_path, name):
    change, wanted = MISTAKES[name]
    given = {"weights": "ema" if name == "no average" else "raw"}
    if name == "betas of one":
        given["parameterization"] = "noise"
    with pytest.raises(UserError, match=wanted):
        resolve(spoiled(tmp_path, change), **given).load(256, "cpu", (1, 8, 8))


def test_a_file_that_is_cut_off_or_holds_code_is_refused(tmp_path):
    import pickle

    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    (tmp_path / "cut.pt").write_bytes((HERE / "model-1.pt").read_bytes()[:5000])
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"model": Harm()}))
    torch.save({"model": Harm()}, tmp_path / "code2.pt")
    for name in ("cut", "code", "code2"):
        with pytest.raises(UserError, match="cannot be read as a checkpoint of tensors"):
            resolve(tmp_path / f"{name}.pt")
    assert not (tmp_path / "harm").exists()


def test_the_size_of_the_images_is_asked_for():
    with pytest.raises(UserError, match="does not say how large its images are"):
        resolve(HERE / "model-1.pt").load(256, "cpu")
