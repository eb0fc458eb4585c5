"""A verb's argument: runs, pipelines of diffusers on disk and on the hub, and what is neither."""

import json
import shutil

import numpy as np
import pytest
import torch

from nelbo import checkpoints, evaluation, likelihood
from nelbo.cli import main
from nelbo.data import load
from nelbo.errors import UserError
from nelbo.resolve import resolve

BETAS = {"num_train_timesteps": 50, "beta_start": 0.002, "beta_end": 0.3}


def pipeline(folder, prediction_type="epsilon", variance_type="fixed_large", clip_sample=True, size=8, **scheduler):
    """A DDPMPipeline with a small random U-Net, saved by diffusers itself."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=size, in_channels=1, out_channels=2 if variance_type == "learned_range" else 1,
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    settings = BETAS | scheduler
    made = DDPMScheduler(
        prediction_type=prediction_type, variance_type=variance_type, clip_sample=clip_sample, **settings
    )
    DDPMPipeline(unet, made).save_pretrained(folder)
    return folder, unet.eval(), made


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(("prediction", "variance"), [
    ("epsilon", "fixed_large"), ("sample", "fixed_small"), ("v_prediction", "learned_range"),
])  # fmt: skip
def test_a_pipelines_bound_is_what_its_network_and_scheduler_say(tmp_path, prediction, variance):
    """One image, every step once: KLs of Gaussians from the scheduler's own mean and variance, and the decoder."""
    from diffusers import DDPMScheduler

    folder, unet, _ = pipeline(tmp_path / "p", prediction, variance)
    images = load("digits").images["test"][:1]
    model = resolve(folder).load(17, "cpu")
    assert model.data_scale == 17 / 16 and model.reverse.clip
    found = likelihood.vlb(model, images, steps=49, times_per_shift=49, shifts=1)
    scheduler = DDPMScheduler(prediction_type=prediction, variance_type=variance, **BETAS)
    bar = np.cumprod(1 - scheduler.betas.double().numpy())
    x = torch.from_numpy(images).double() / 8 - 1
    from nelbo.draws import Draws

    total, shift = 0.0, float(Draws(0, [0], 0).uniform("time")[0])
    for draw in range(49):
        n = int(((shift + draw / 49) % 1) * 49) + 1
        eps = Draws(0, [0], draw).normal("eps", (1, 8, 8)).double()
        z = (bar[n] ** 0.5 * x + (1 - bar[n]) ** 0.5 * eps).float()
        with torch.no_grad():
            out = unet(z, n).sample.double()
        z, v = z.double(), out[:, 1:]
        out = out[:, :1]
        a, s = bar[n] ** 0.5, (1 - bar[n]) ** 0.5
        x_hat = {"epsilon": (z - s * out) / a, "sample": out, "v_prediction": a * z - s * out}[prediction].clamp(-1, 1)
        beta = 1 - bar[n] / bar[n - 1]
        small, large = beta * (1 - bar[n - 1]) / (1 - bar[n]), torch.tensor(beta)
        f = {"fixed_small": 0.0, "fixed_large": 1.0, "learned_range": (v + 1) / 2}[variance]
        p = torch.exp(f * large.log() + (1 - f) * np.log(small))
        moved = bar[n - 1] ** 0.5 * beta / (1 - bar[n]) * (x - x_hat)
        total += float((0.5 * (torch.log(p / small) + small / p - 1 + moved**2 / p)).expand(x.shape).sum())
    assert found.terms["diffusion"].mean == pytest.approx(total / (64 * np.log(2)), rel=1e-4)
    assert found.terms["prior"].mean < 0.01


def test_evaluate_reads_a_pipeline_and_says_which_decoder_and_variance(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipeline(tmp_path / "p")
    assert main(["evaluate", "p", "--data", "digits", "--images", "3", "--times", "2"]) == 0
    said = capsys.readouterr().out
    assert "p, from diffusers: 3 of 300 test images of digits" in said and "T = 49" in said
    assert "the network's Gaussian, integrated over the bin; variance of p(z_s|z_t): fixed-large; x_hat clipped" in said
    assert main(["evaluate", "p", "--data", "digits", "--images", "3", "--times", "2", "--variance", "fixed-small",
                 "--clip", "off"]) == 0  # fmt: skip
    assert "fixed-small; x_hat not clipped" in capsys.readouterr().out
    files = sorted(p.name for p in (tmp_path / "evaluations/p/evaluations").glob("*.json"))
    assert [name for name in files if name[0] != "."] == [
        "test-best-ema-vlb-2x2-T49-3-digits-1.json", "test-best-ema-vlb-2x2-T49-fixed-small-no-clip-3-digits-1.json",
    ]  # fmt: skip
    record = json.loads((tmp_path / "evaluations/p/evaluations" / files[-1]).read_text())
    assert record["source"] == "diffusers" and record["settings"]["variance"] == "fixed-small"
    assert not list((tmp_path / "p").rglob("evaluations"))


def test_the_ode_of_a_pipeline_ends_in_its_own_decoder(tmp_path):
    pipeline(tmp_path / "p")
    settings = evaluation.Settings(method="ode", data="digits", images=1, least_steps=8, rtol=0.01, atol=0.01)
    found = evaluation.evaluate(tmp_path / "p", settings, out=tmp_path / "figures")
    assert found.record["settings"]["dequantization"] == "variational"
    assert found.record["settings"]["decoder"] == "gaussian"
    assert found.path.parent == tmp_path / "figures" / "evaluations"
    with pytest.raises(UserError, match="lowest noise"):
        evaluation.evaluate(tmp_path / "p", evaluation.Settings(
            method="ode", data="digits", images=1, dequantization="uniform"), out=tmp_path / "figures")  # fmt: skip


def test_a_pipeline_whose_files_lie_at_the_root_is_read_too(tmp_path):
    """As google/ddpm-cifar10-32 on the hub."""
    folder, unet, _ = pipeline(tmp_path / "p")
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (*folder.glob("*.json"), *folder.glob("*/*")):
        shutil.copy(path, flat / path.name)
    model = resolve(flat).load(256, "cpu")
    z = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        gamma = model.schedule(torch.tensor([10.0, 49.0]).double() / 49)[0]
        torch.testing.assert_close(model(z, gamma), unet(z, torch.tensor([10, 49])).sample, rtol=1e-5, atol=1e-6)


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    folder, *_ = pipeline(tmp_path / "p")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: asked.append(name) or str(folder))
    source = resolve("somebody/ddpm-digits")
    assert asked == ["somebody/ddpm-digits"] and source.shape == (1, 8, 8) and source.steps == 49
    assert source.folder.as_posix() == "evaluations/ddpm-digits"


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_, **__):
        raise LocalEntryNotFoundError("An error happened while\ntrying to locate the files")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"somebody/ddpm.*the hub cannot be reached"):
        resolve("somebody/ddpm")


def test_a_run_is_a_source_like_the_others(tmp_path):
    from nelbo.training import train
    from tiny import tiny

    run = tmp_path / "run"
    train(tiny("ddpm-digits", network__multipliers=(1, 2), training__steps=3), run, say=lambda line: None)
    source = resolve(run, "last")
    assert (source.kind, source.levels, source.steps, source.step) == ("nelbo", 17, 999, 3)
    assert source.load(17, "cpu").reverse.variance == "fixed-large"
    assert checkpoints.read_run(run)["preset"] == ""


MISTAKES = {
    "latent": (lambda p: change(p / "model_index.json", vqvae=["diffusers", "VQModel"]), "only pipelines of pixels"),
    "text": (lambda p: change(p / "model_index.json", text_encoder=["transformers", "CLIP"]), "text_encoder"),
    "classes": (lambda p: change(p / "unet/config.json", num_class_embeds=10), "num_class_embeds = 10"),
    "fourier": (lambda p: change(p / "unet/config.json", time_embedding_type="fourier"), "time_embedding_type"),
    "thresholding": (lambda p: change(p / "scheduler/scheduler_config.json", thresholding=True), "thresholding"),
    "prediction": (lambda p: change(p / "scheduler/scheduler_config.json", prediction_type="flow"), "prediction_type"),
    "variance": (lambda p: change(p / "scheduler/scheduler_config.json", variance_type="learned"), "variance_type"),
    "betas": (lambda p: change(p / "scheduler/scheduler_config.json", trained_betas=[0.1, 1.0]), "betas"),
    "snr": (lambda p: change(p / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True), "rescale"),
    "json": (lambda p: (p / "unet/config.json").write_text("{"), "not readable JSON"),
    "weights": (lambda p: (p / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"no"), "cannot be read"),
    "no weights": (lambda p: (p / "unet/diffusion_pytorch_model.safetensors").unlink(), "cannot be read"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_other_pipelines_and_broken_ones_are_refused_in_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    spoil, wanted = MISTAKES[name]
    pipeline(tmp_path / "p")
    spoil(tmp_path / "p")
    assert main(["evaluate", "p", "--data", "digits", "--images", "2"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("nelbo: ") and wanted in said and "\n" not in said, said


@pytest.mark.parametrize(("arguments", "wanted"), [
    ((), "does not say on which images it was trained"), (("--data", "photos32"), "photos32 has 3x32x32"),
    (("--data", "digits", "--variance", "learned"), "has no output for it"),
    (("--data", "digits", "--steps", "0", "--variance", "fixed-small"), "--variance belongs to the bound at finite T"),
])  # fmt: skip
def test_what_does_not_fit_a_pipeline_is_said(tmp_path, monkeypatch, capsys, arguments, wanted):
    monkeypatch.chdir(tmp_path)
    pipeline(tmp_path / "p")
    assert main(["evaluate", "p", *arguments]) == 2
    assert wanted in capsys.readouterr().err


def test_the_progressive_curve_spends_the_rate_and_ends_with_the_smallest_error(tmp_path):
    folder, *_ = pipeline(tmp_path / "p")
    images = load("digits").images["test"][:8]
    model = resolve(folder).load(17, "cpu")
    found = likelihood.vlb(model, images, steps=49, times_per_shift=49, shifts=1)
    curve = evaluation.progressive(found, 17, count=49)
    rate = found.terms["prior"].mean + found.terms["diffusion"].mean
    assert np.all(np.diff(curve["rate"]) >= 0) and curve["t"][0] > curve["t"][-1]
    t, values, errors = (column.reshape(8, 49) for column in found.by_time)
    first = np.floor(t * 49).astype(int) == 48
    assert curve["rate"][0] == pytest.approx(found.terms["prior"].mean + values[first].mean() / 49 / 2)
    assert curve["rate"][-1] == pytest.approx(rate - values[np.floor(t * 49).astype(int) == 0].mean() / 49 / 2)
    assert curve["rmse"][0] == pytest.approx(np.sqrt(errors[first].mean()) * 17 / 2)
    # One draw by hand: x_hat of the scheduler's formula in grey levels.
    assert evaluation.progressive(found, 17, count=4000) is None
