"""Converters of PyTorch's formats, against what the programs themselves recorded (tests/addtt, tests/ddp) or compute
(diffusers): outputs, losses and steps of a converted run, the step that Adam takes next, and round trips."""

import inspect
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nelbo import checkpoints, likelihood, objectives, pixels, samplers
from nelbo.compose import build_model, noise_parameters
from nelbo.config import from_dict
from nelbo.convert import Images, addtt, denoising_diffusion_pytorch, write_run
from nelbo.convert import diffusers as pipelines
from nelbo.data import load
from nelbo.errors import UserError
from nelbo.optimizers import parameter_groups
from nelbo.presets import preset
from nelbo.resolve import resolve
from nelbo.schedules import betas
from nelbo.training import train
from test_resolve import change as change_json
from test_resolve import pipeline
from tiny import change, entries, tiny

HERE = Path(__file__).resolve().parent
ADDTT, DDP = HERE / "addtt", HERE / "ddp"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # of float32 networks, whose outputs are of size 1


def recorded(path):
    return {name: torch.from_numpy(value) for name, value in np.load(path).items()}


def model_of(converted, weights="raw"):
    model = build_model(converted.config, converted.shape, converted.levels)
    checkpoints.load_weights(model, converted.weights[weights], Path("test"))
    return model.eval()


def after_one_step(converted, loss):
    """The weights after nelbo's optimizer has taken a step from the converted moments; and how far each moved."""
    model, o = model_of(converted), converted.config.optimizer
    groups = parameter_groups(model, o, noise_parameters(model))
    optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.beta_1, o.beta_2), eps=o.eps, fused=True)
    for name, parameter in model.named_parameters():
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {key: converted.optimizer[f"{key}.{name}"].clone() for key in keys}
    loss(model).backward()
    if o.clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
    optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def check_next_step(before, found, wanted, rate):
    """Every step is right to a hundredth of what Adam may move a weight, and the weights did move. (The gradient of a
    bias of keys is nothing but rounding.)"""
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-2 * rate, msg=lambda m, n=name: f"{n}: {m}")
        assert name.endswith("attention.k.bias") or float((value - before[name]).abs().max()) > 0.1 * rate, name


# addtt/variational-diffusion-models ----------------------------------------------------------------------------------


def converted_addtt(name, file="model.pt"):
    return addtt.convert(ADDTT / name / file, preset("vdm-cifar10"), Images((8, 8)))


@pytest.mark.parametrize("name", ("learned", "fixed"))
@pytest.mark.parametrize("weights", ("raw", "ema"))
def test_vdms_port_puts_out_what_it_did(name, weights):
    cases, model = recorded(ADDTT / f"{name}.npz"), model_of(converted_addtt(name), weights)
    with torch.no_grad():
        gamma = model.schedule(cases["t"])[0]
        out = model(cases["z"], gamma)
        terms = objectives.elbo(
            model, cases["images"].long(), t=cases["t"], eps=cases["noise"], eps_0=cases["noise_0"]
        )  # fmt: skip
    torch.testing.assert_close(gamma.flatten(), cases[f"{weights}.gamma"], rtol=1e-6, atol=0)
    # Of what the network adds to z, too: an error there would hide behind z.
    wanted = cases[f"{weights}.out"] - cases["z"]
    assert float((out - cases["z"] - wanted).norm() / wanted.norm()) < 1e-6
    for term in ("diffusion", "prior", "reconstruction"):
        found = float(pixels.bits_per_dim(getattr(terms, term).mean(), model.dimensions))
        assert found == pytest.approx(float(cases[f"{weights}.{term}"]), rel=1e-5), term
    assert not torch.equal(cases["raw.out"], cases["ema.out"])


@pytest.mark.parametrize("name", ("learned", "fixed"))
@pytest.mark.parametrize("clip", (False, True))
def test_a_step_of_vdms_port_is_its_own(name, clip):
    cases, model = recorded(ADDTT / f"{name}.npz"), model_of(converted_addtt(name))
    with torch.no_grad():
        s, t = (model.schedule(torch.full((4,), t))[0] for t in (0.4, 0.5))
        reverse = objectives.Reverse("fixed-small", clip)
        mean, std, _ = objectives.reverse_moments(model, cases["z"], s, t, reverse=reverse)
    torch.testing.assert_close(
        mean + std * cases["step_noise"], cases["step.clipped" if clip else "step.free"], **CLOSE
    )


def test_adam_goes_on_with_vdms_port():
    cases, start = recorded(ADDTT / "learned.npz"), converted_addtt("learned")

    def loss(model):
        terms = objectives.elbo(model, cases["images"].long(), t=cases["t"], eps=cases["noise"], eps_0=cases["noise_0"])
        return pixels.bits_per_dim(terms.loss.mean(), model.dimensions)

    wanted = converted_addtt("learned", "next.pt").weights["raw"]
    check_next_step(start.weights["raw"], after_one_step(start, loss), wanted, 1e-3)
    assert start.optimizer["step.network.trunk.middle.0.attention.k.weight"] == 3


def test_a_run_of_vdms_port_holds_what_the_folder_says(tmp_path):
    config = converted_addtt("learned").config
    network, o = config.network, config.optimizer
    assert (network.channels, network.levels, network.groups, network.head_features) == (8, 1, 2, (4,))
    assert (network.fourier, network.norm_eps, network.attention) == ((5.0, 6.0), 1e-5, "everywhere")
    assert (config.schedule.ends, config.schedule.gamma_min, config.schedule.gamma_max) == ("learned", -13.3, 5.0)
    assert (o.learning_rate, o.weight_decay, o.clip, o.warmup, o.decay) == (1e-3, 0.0, 1.0, 0, "none")
    assert (config.objective.times, config.training.batch, config.data.encoding) == ("stratified", 4, "centres")
    other = converted_addtt("fixed").config
    assert (other.network.fourier, other.network.dropout, other.network.head_features) == ((), 0.1, None)
    assert (other.schedule.ends, other.schedule.gamma_min, other.objective.times) == ("fixed", -10.0, "uniform")
    run = write_run(converted_addtt("learned"), tmp_path / "run", "vdm-cifar10")
    cases, model = recorded(ADDTT / "learned.npz"), checkpoints.load_model(run, "last", "ema")
    with torch.no_grad():
        out = model(cases["z"], model.schedule(cases["t"])[0])
    torch.testing.assert_close(out, cases["ema.out"], **CLOSE)
    assert checkpoints.read_checkpoint(run).step == 3
    moments = checkpoints.load_tensors(checkpoints.read_checkpoint(run), checkpoints.OPTIMIZER)
    assert len(moments) == 3 * len(list(model.parameters()))


def yaml_with(folder, **settings):
    path = folder / "config.yaml"
    lines = path.read_text()
    for key, value in settings.items():
        lines = re.sub(rf"^{key}:.*\n", f"{key}: {value}\n" if value is not None else "", lines, flags=re.M)
    path.write_text(lines)


def file_with(folder, spoil):
    content = torch.load(folder / "model.pt", weights_only=True)
    spoil(content)
    torch.save(content, folder / "model.pt")


ADDTT_MISTAKES = {
    "no settings": (lambda f: (f / "config.yaml").unlink(), "which says what the network is: No such file"),
    "no weights": (lambda f: (f / "model.pt").unlink(), "there is no file"),
    "yaml": (lambda f: (f / "config.yaml").write_text("a: [1"), "not readable YAML"),
    "code": (lambda f: (f / "config.yaml").write_text("!!python/object/apply:os.getcwd []"), "not readable YAML"),
    "no table": (lambda f: (f / "config.yaml").write_text("- 1"), "must be a table of settings"),
    "lacking": (lambda f: yaml_with(f, lr=None), r"lacks settings \(lr\)"),
    "unknown": (lambda f: yaml_with(f, lr="1\nnew_thing: 3"), r"has unknown settings \(new_thing\)"),
    "type": (lambda f: yaml_with(f, n_blocks="many"), "n_blocks must be of type int, got 'many'"),
    "schedule": (lambda f: yaml_with(f, noise_schedule="learned_net"), "fixed_linear, learned_linear, got"),
    "heads": (lambda f: yaml_with(f, n_attention_heads=3), "must divide embedding_dim = 8, got 3"),
    "range": (lambda f: yaml_with(f, dropout_prob=1.5), r"network.dropout must lie in \[0, 1\)"),
    "size": (lambda f: yaml_with(f, n_blocks=2), "lacks .* tensors"),
    "width": (lambda f: yaml_with(f, embedding_dim=16), "has shape"),
    "channels": (lambda f: yaml_with(f, input_channels=2), "does not fit its config.yaml|has shape"),
    "cut off": (lambda f: (f / "model.pt").write_bytes((f / "model.pt").read_bytes()[:9000]), "cannot be read as a"),
    "other file": (lambda f: torch.save({"weights": 1}, f / "model.pt"), "it lacks model"),
    "no tensors": (lambda f: file_with(f, lambda c: c.update(model={"a": 1})), "no table of named tensors"),
    "moments": (lambda f: file_with(f, lambda c: c["opt"]["state"][3].pop("exp_avg")), "no Adam of this network"),
    "fewer": (lambda f: file_with(f, lambda c: c["opt"]["param_groups"][0]["params"].pop()), "no Adam of this network"),
    "order": (
        lambda f: file_with(f, lambda c: c["opt"]["param_groups"][0]["params"].reverse()),
        "no Adam of this network: exp_avg of .* has shape",
    ),
    "step": (lambda f: file_with(f, lambda c: c.update(step="3")), "step must be a whole number"),
}


@pytest.mark.parametrize("name", ADDTT_MISTAKES)
def test_folders_that_are_no_vdms_port_are_refused_in_one_line(tmp_path, name):
    spoil, wanted = ADDTT_MISTAKES[name]
    shutil.copytree(ADDTT / "learned", tmp_path / "in")
    spoil(tmp_path / "in")
    with pytest.raises(UserError, match=wanted) as said:
        write_run(addtt.convert(tmp_path / "in", preset("vdm-cifar10"), Images((8, 8))), tmp_path / "run")
    assert "\n" not in str(said.value) and not (tmp_path / "run").exists()


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("plain", (True, False))
def test_a_file_that_holds_code_runs_none(tmp_path, plain):
    shutil.copytree(ADDTT / "learned", tmp_path / "in")
    content, file = {"model": Harm(tmp_path / "harm")}, tmp_path / "in" / "model.pt"
    if plain:
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    for convert in (addtt.convert, denoising_diffusion_pytorch.convert):
        with pytest.raises(UserError, match="cannot be read as a checkpoint of tensors"):
            convert(file, preset("vdm-cifar10"), Images((8, 8)))
    assert not (tmp_path / "harm").exists()


def test_sizes_that_a_file_does_not_say_are_the_presets_or_the_users(tmp_path):
    assert addtt.convert(ADDTT / "learned", preset("vdm-photos32")).shape == (3, 32, 32)
    with pytest.raises(UserError, match="images of 3 channels, and digits has images of 1x8x8"):
        addtt.convert(ADDTT / "learned", preset("vdm-digits"))
    with pytest.raises(UserError, match="of 256 grey levels, and digits has 17"):
        addtt.convert(ADDTT / "fixed", preset("vdm-digits"))
    unknown = change(preset("vdm-digits"), {"data.source": "elsewhere"})
    with pytest.raises(UserError, match="not known here: give --size HEIGHT WIDTH"):
        denoising_diffusion_pytorch.convert(DDP / "model-1.pt", unknown)
    found = denoising_diffusion_pytorch.convert(DDP / "model-1.pt", unknown, Images((12, 6), 4))
    assert (found.shape, found.levels) == ((1, 12, 6), 4)


# denoising-diffusion-pytorch -----------------------------------------------------------------------------------------


def converted_ddp(name, base="ddpm-digits", levels=256, **fields):
    config = change(preset(base), fields)
    return denoising_diffusion_pytorch.convert(DDP / name, config, Images((8, 8), levels))


@pytest.mark.parametrize(("name", "weights"), [
    ("model-1.pt", "raw"), ("model-1.pt", "ema"), ("learned.pt", "raw"), ("conditioned.pt", "raw"),
])  # fmt: skip
def test_a_converted_trainers_file_is_what_the_resolver_makes_of_it(tmp_path, name, weights):
    found = denoising_diffusion_pytorch.convert(DDP / name, preset("ddpm-digits"))
    run = write_run(found, tmp_path / "run", "ddpm-digits")
    ours = checkpoints.load_model(run, "last", weights)
    theirs = resolve(DDP / name, weights=weights).load(17, "cpu", (1, 8, 8))
    images = load("digits").images["test"][:3]
    bounds = [likelihood.vlb(m, images, steps=99, times_per_shift=9, shifts=1) for m in (ours, theirs)]
    np.testing.assert_allclose(bounds[0].per_image, bounds[1].per_image, rtol=1e-6)
    chains = [samplers.sample(m, 3, steps=20) for m in (ours, theirs)]
    assert torch.equal(*chains)
    assert ours.reverse == theirs.reverse and found.levels == 17


def test_adam_goes_on_with_denoising_diffusion_pytorch():
    cases, start = recorded(DDP / "cases.npz"), converted_ddp("model-1.pt")
    assert (start.config.objective.weight, start.config.objective.loss) == ("snr", "simple")

    def loss(model):
        o = start.config.objective
        terms = objectives.weighted(
            model, cases["images"].long(), objectives.Weighting(weight=o.weight), t=(cases["n"].double() + 0.5) / 100,
            eps=cases["noise"], steps=o.steps,
        )  # fmt: skip
        return terms.error.mean()

    wanted = converted_ddp("next.pt").weights["raw"]
    check_next_step(start.weights["raw"], after_one_step(start, loss), wanted, 1e-3)


def test_a_run_of_denoising_diffusion_pytorch_holds_what_the_file_says(tmp_path):
    found = converted_ddp("model-1.pt")
    config = found.config
    assert (config.schedule.kind, config.schedule.form, config.schedule.timesteps) == ("betas", "linear", 100)
    assert config.schedule.betas is None and config.parameterization == "velocity" and found.step == 3
    network = config.network
    assert (network.kind, network.channels, network.multipliers) == ("attention", 8, (1, 2))
    assert (network.heads, network.head_features, network.full_at, network.first_channels) == ((2,), (8,), None, None)
    o = config.optimizer
    assert (o.learning_rate, o.beta_1, o.beta_2, o.weight_decay, o.warmup) == (1e-3, 0.9, 0.99, 0.0, 0)
    assert (config.data.encoding, config.objective.steps, config.reverse.clip) == ("ends", 99, True)
    conditioned = converted_ddp("conditioned.pt").config
    assert conditioned.network.self_condition and conditioned.schedule.form == "cosine"
    assert converted_ddp("conditioned.pt").optimizer is None
    assert converted_ddp("plain.pt", parameterization="data").config.parameterization == "data"


def test_the_hybrid_loss_of_a_converted_run_is_the_packages():
    cases, found = recorded(DDP / "cases.npz"), converted_ddp("learned.pt")
    o, model = found.config.objective, model_of(found)
    assert (o.loss, found.config.reverse.variance) == ("hybrid", "learned")
    model.reverse = objectives.Reverse("learned", False, "gaussian")  # the package clips in sampling alone
    with torch.no_grad():
        terms = objectives.weighted(
            model, cases["images"].long(), objectives.Weighting(weight=o.weight, hybrid=o.hybrid),
            t=(cases["n"].double() + 0.5) / 100, eps=cases["noise"], steps=o.steps,
        )  # fmt: skip
    total = pixels.bits_per_dim(terms.loss, 64)[1:]  # level 0 is the decoder's, which differs (tests/ddp/README.md)
    torch.testing.assert_close(total.float(), cases["learned.total"][1:], rtol=1e-6, atol=0)


def spoiled_ddp(tmp_path, spoil):
    content = torch.load(DDP / "model-1.pt", weights_only=True)
    spoil(content)
    torch.save(content, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def test_weights_of_the_loss_are_read_off_the_file(tmp_path):
    def clip(content):
        alpha_bar = torch.cumprod(1 - content["model"]["betas"].double(), 0)
        snr = alpha_bar / (1 - alpha_bar)
        content["model"]["loss_weight"] = (snr.clamp(max=5) / (snr + 1)).float()

    found = denoising_diffusion_pytorch.convert(spoiled_ddp(tmp_path, clip), preset("ddpm-digits"), Images((8, 8)))
    assert (found.config.objective.weight, found.config.objective.min_snr) == ("min-snr", 5.0)


def test_betas_that_are_no_form_are_kept(tmp_path):
    path = spoiled_ddp(tmp_path, lambda c: c["model"]["betas"].mul_(1.01))
    config = denoising_diffusion_pytorch.convert(path, preset("ddpm-digits"), Images((8, 8))).config
    wanted = torch.load(path, weights_only=True)["model"]["betas"].double().tolist()
    assert list(config.schedule.betas) == wanted and config.schedule.timesteps == 100
    with pytest.raises(UserError, match="strictly between 0 and 1"):
        path = spoiled_ddp(tmp_path, lambda c: c["model"]["betas"].fill_(1.0))
        denoising_diffusion_pytorch.convert(path, preset("ddpm-digits"), Images((8, 8)))


DDP_MISTAKES = {
    "moments": (lambda c: c["opt"]["state"][0].pop("exp_avg"), "no Adam of this network: it lacks 'exp_avg'"),
    "of another": (lambda c: c["opt"]["state"][0].update(exp_avg=torch.zeros(3)), "exp_avg of .* has shape"),
    "rate": (lambda c: c["opt"]["param_groups"][0].pop("lr"), "no rate, betas, eps and decay"),
    "layer": (lambda c: c["model"].pop("model.mid_attn.to_qkv.weight"), "no Adam of this network|lacks 1 tensors"),
    "step": (lambda c: c.update(step=-1), "step must be a whole number, got -1"),
}


@pytest.mark.parametrize("name", DDP_MISTAKES)
def test_spoiled_trainers_files_are_refused_in_one_line(tmp_path, name):
    spoil, wanted = DDP_MISTAKES[name]
    path = spoiled_ddp(tmp_path, spoil)
    with pytest.raises(UserError, match=wanted) as said:
        found = denoising_diffusion_pytorch.convert(path, preset("ddpm-digits"), Images((8, 8)))
        write_run(found, tmp_path / "run")
    assert "\n" not in str(said.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("fields", "wanted"), [
    ({"network.kind": "attention", "network.heads": (1, 2, 3)}, r"network.heads must be 1 whole.*got \(1, 2, 3\)"),
    ({"network.head_features": ()}, r"network.head_features must be 1 whole number.*got \(\)"),
    ({"network.head_features": (4, 8)}, r"network.head_features must be 1 whole number.*got \(4, 8\)"),
    ({"network.head_features": (3,)}, "network.head_features must divide the channels where attention acts.*got 3"),
    ({"network.frequency_shift": 16.0}, "frequency_shift must lie below half of network.channels = 32, got 16"),
    ({"network.norm_eps": 0.0}, "network.norm_eps must be above 0, got 0.0"),
])  # fmt: skip
def test_heads_that_do_not_fit_are_refused_by_name(fields, wanted):
    with pytest.raises(UserError, match=wanted):
        build_model(change(preset("ddpm-digits"), fields), (1, 8, 8), 17)
    with pytest.raises(UserError, match=r"network.head_features must divide network.channels = 32, got 5"):
        change(preset("vdm-digits"), {"network.head_features": (5,)})


def test_a_network_of_other_heads_at_every_resolution_is_built_again(tmp_path):
    """What ddp's Unet(full_attn=(True, False), attn_heads=(1, 2), attn_dim_head=(4, 6), init_dim=12) would leave."""
    fields = {"network.kind": "attention", "network.heads": (1, 2), "network.head_features": (4, 6),
              "network.full_at": (8,), "network.first_channels": 12, "network.channels": 8}  # fmt: skip
    model = build_model(change(preset("ddpm-digits"), fields), (1, 8, 8), 17)
    unet = model.network.network
    kinds = [type(level.attention).__name__ for level in (*unet.down, *unet.up)]
    assert kinds == ["FullAttention", "LinearAttention", "LinearAttention", "FullAttention"]
    assert [tuple(level.attention.memory.shape) for level in unet.down] == [(2, 1, 4, 4), (2, 2, 4, 6)]
    assert unet.conv_in.weight.shape[0] == 12
    found = denoising_diffusion_pytorch._network(
        denoising_diffusion_pytorch.read(DDP / "model-1.pt").__class__(
            network={"outputs": 1, "channels": 8, "multipliers": (1, 2), "first": 12, "self_condition": False,
                     "full": [True, False], "heads": [1, 2], "features": [4, 6]},
            betas=np.ones(2), parameterization="noise", largest_snr=None, learned=False, channels=1, step=0,
            weights={}, optimizer=None, adam=None,
        ), 8, preset("ddpm-digits").network,
    )  # fmt: skip
    assert (found.heads, found.head_features, found.full_at, found.first_channels) == ((1, 2), (4, 6), (8,), 12)


# diffusers -----------------------------------------------------------------------------------------------------------


def other_pipeline(folder):
    """diffusers' own defaults where DDPM's are others, an odd order of attention, sizes no multiples of the first."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(1)
    unet = UNet2DModel(
        sample_size=(8, 4), in_channels=3, out_channels=3, block_out_channels=(8, 12, 16), layers_per_block=1,
        norm_num_groups=2, attention_head_dim=4, dropout=0.1,
        down_block_types=("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    )  # fmt: skip
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=40, clip_sample=False)
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


def folders(tmp_path):
    yield pipeline(tmp_path / "a", "v_prediction", "learned_range")[0]
    yield pipeline(tmp_path / "b", "sample", "fixed_small", beta_start=0.002, beta_end=0.4)[0]
    yield other_pipeline(tmp_path / "c")


def settings_of(folder):
    """What a pipeline's files say, without who wrote them and where."""
    return {
        name: {k: v for k, v in json.loads((folder / name).read_text()).items() if k[0] != "_"}
        for name in ("unet/config.json", "scheduler/scheduler_config.json")
    }


def unet_of(folder):
    from diffusers import UNet2DModel

    return UNet2DModel.from_pretrained(folder / "unet").eval()


def test_a_pipelines_run_has_its_network_its_scheduler_and_its_figures(tmp_path):
    for number, folder in enumerate(folders(tmp_path)):
        run = write_run(pipelines.convert(folder, preset("ddpm-digits")), tmp_path / f"run{number}")
        ours, theirs, unet = checkpoints.load_model(run), resolve(folder).load(17, "cpu"), unet_of(folder)
        levels = ours.schedule.timesteps
        z, n = torch.randn(2, *ours.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([3, levels - 1])
        with torch.no_grad():
            gamma = ours.schedule(n.double() / (levels - 1))[0]
            out = ours.network(z, gamma)
            torch.testing.assert_close(out, unet(z, n).sample, rtol=1e-6, atol=1e-6)
            assert float(unet(z, n).sample.abs().mean()) > 0.01
        images = torch.randint(0, ours.levels, (2, *ours.shape), generator=torch.Generator().manual_seed(0))
        theirs.levels, theirs.data_scale = ours.levels, ours.data_scale
        bounds = [
            likelihood.vlb(m, images.byte(), steps=levels - 1, times_per_shift=5, shifts=1) for m in (ours, theirs)
        ]
        np.testing.assert_array_equal(bounds[0].per_image, bounds[1].per_image)
        assert ours.reverse == theirs.reverse
        assert torch.equal(*(m.schedule(n / levels)[0] for m in (ours, theirs)))


def test_a_folder_that_was_a_run_is_the_folder_again(tmp_path):
    for number, folder in enumerate(folders(tmp_path)):
        run = write_run(pipelines.convert(folder, preset("ddpm-digits")), tmp_path / f"run{number}")
        again = pipelines.save_diffusers(run, tmp_path / f"again{number}")
        before, after = unet_of(folder), unet_of(again)
        assert before.state_dict().keys() == after.state_dict().keys()
        assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items())
        said, wanted = settings_of(again), settings_of(folder)
        assert said["unet/config.json"] == wanted["unet/config.json"]
        scheduler, theirs = (s["scheduler/scheduler_config.json"] for s in (said, wanted))
        ends = ("beta_start", "beta_end")
        assert {k: v for k, v in scheduler.items() if k not in ends} == {
            k: v for k, v in theirs.items() if k not in ends
        }
        if scheduler["beta_schedule"] == "linear":
            np.testing.assert_allclose([scheduler[k] for k in ends], [theirs[k] for k in ends], rtol=1e-7)


def own_run(folder, **fields):
    config = tiny("ddpm-digits", network__multipliers=(1, 2), training__steps=3, training__evaluate_every=0, **fields)
    train(config, folder, say=lambda line: None)
    return folder


IRREGULAR = tuple(np.linspace(0.001, 0.3, 30) ** 1.5)


@pytest.mark.parametrize("fields", [
    {}, {"schedule__form": "quadratic", "reverse__variance": "learned", "objective__loss": "hybrid"},
    {"schedule__form": "cosine", "schedule__timesteps": 50, "objective__steps": 49, "parameterization": "velocity"},
    {"schedule__form": "sigmoid", "schedule__timesteps": 50, "objective__steps": 49, "reverse__clip": False},
    {"schedule__betas": IRREGULAR, "schedule__timesteps": 30, "objective__steps": 29, "parameterization": "data",
     "network__head_features": (4,)},
    {"network__cosines_first": True, "network__frequency_shift": 0.5, "network__downsample_padding": 1,
     "network__norm_eps": 1e-4, "reverse__variance": "fixed-small"},
])  # fmt: skip
def test_a_run_that_was_a_folder_is_the_run_again(tmp_path, fields):
    run = own_run(tmp_path / "run", **fields)
    folder = pipelines.save_diffusers(run, tmp_path / "out", checkpoint="last")
    config = from_dict(checkpoints.read_run(run)["config"])
    found = pipelines.convert(folder, config)
    assert found.config == config and (found.shape, found.levels) == ((1, 8, 8), 17)
    again = write_run(found, tmp_path / "again")
    before, after = checkpoints.load_model(run, "last"), checkpoints.load_model(again)
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items())
    images = load("digits").images["test"][:2]
    bounds = [
        likelihood.vlb(m, images, steps=m.schedule.timesteps - 1, times_per_shift=3, shifts=1) for m in (before, after)
    ]
    np.testing.assert_array_equal(bounds[0].per_image, bounds[1].per_image)


def test_betas_that_are_a_forms_but_for_rounding_are_written_as_that_form():
    config = tiny("ddpm-digits", schedule__betas=tuple(np.float32(betas("cosine", 50)).astype(float).tolist()))
    found = pipelines._scheduler(config)
    assert (found["beta_schedule"], found["num_train_timesteps"]) == ("squaredcos_cap_v2", 50)


def test_the_weights_that_are_asked_for_are_written(tmp_path):
    run = own_run(tmp_path / "run")
    raw = unet_of(pipelines.save_diffusers(run, tmp_path / "raw", "raw", "last")).state_dict()
    ema = unet_of(pipelines.save_diffusers(run, tmp_path / "ema", checkpoint="last")).state_dict()
    model = checkpoints.load_model(run, "last", "raw")
    assert torch.equal(raw["conv_in.weight"], model.network.network.unet.conv_in.weight)
    assert not torch.equal(raw["conv_in.weight"], ema["conv_in.weight"])


@pytest.mark.parametrize("fields", [
    {}, {"parameterization": "velocity", "reverse__variance": "fixed-small", "reverse__clip": False},
    {"parameterization": "data", "reverse__variance": "learned", "objective__loss": "hybrid"},
])  # fmt: skip
def test_diffusers_takes_the_steps_of_the_run(tmp_path, fields):
    """DDPMPipeline.from_pretrained's network and scheduler, in float64, at three levels."""
    from diffusers import DDPMPipeline

    run = own_run(tmp_path / "run", schedule__timesteps=100, objective__steps=99, **fields)
    loaded = DDPMPipeline.from_pretrained(pipelines.save_diffusers(run, tmp_path / "out"))
    model, unet, scheduler = checkpoints.load_model(run).double(), loaded.unet.double().eval(), loaded.scheduler
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    scheduler.alphas, scheduler.betas = 1 - scheduler.betas.double(), scheduler.betas.double()
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in (1, 50, 99):
        with torch.no_grad():
            s, t = (model.schedule(torch.full((2,), m / 99, dtype=torch.float64))[0] for m in (n - 1, n))
            mean, std, x_hat = objectives.reverse_moments(model, z, s, t)
            out = unet(z, n).sample
            step = scheduler.step(out, n, z, generator=torch.Generator().manual_seed(3))
        noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        torch.testing.assert_close(x_hat, step.pred_original_sample, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mean + std * noise, step.prev_sample, rtol=1e-5, atol=1e-6)
    images = loaded(batch_size=1, num_inference_steps=3, output_type="np").images
    assert images.shape == (1, 8, 8, 1) and np.isfinite(images).all()


CIFAR10 = {
    "sample_size": 32, "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2, "norm_eps": 1e-6,
    "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "dropout": 0.0,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
AT_256 = CIFAR10 | {
    "sample_size": 256, "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}  # fmt: skip


def full(settings):
    from diffusers import UNet2DModel

    defaults = {k: p.default for k, p in inspect.signature(UNet2DModel.__init__).parameters.items() if k != "self"}
    return defaults | settings


def test_the_settings_of_published_ddpms_are_a_configuration():
    """google/ddpm-cifar10-32; -celebahq-256, -church-256, -bedroom-256 and -cat-256, which share one."""
    base = preset("ddpm-cifar10").network
    assert pipelines._network("cifar10", full(CIFAR10 | {"dropout": 0.1}), 32, base) == base
    found = pipelines._network("celebahq", full(AT_256), 256, base)
    assert (found.channels, found.multipliers, found.attention_at) == (128, (1, 1, 2, 2, 4, 4), (16,))


SETTINGS = {
    "center_input_sample": True, "time_embedding_dim": 64, "mid_block_type": None, "downsample_type": "resnet",
    "act_fn": "relu", "resnet_time_scale_shift": "scale_shift", "add_attention": False, "attn_norm_num_groups": 2,
    "norm_num_groups": None, "downsample_padding": 2, "mid_block_scale_factor": 2, "upsample_type": "resnet",
    "up_block_types": ("UpBlock2D",) * 4, "down_block_types": ("SkipDownBlock2D",) * 4,
}  # fmt: skip


@pytest.mark.parametrize("key", SETTINGS)
def test_a_setting_that_no_field_says_is_named(key):
    with pytest.raises(UserError, match=f"{key}.*") as said:
        pipelines._network("p", full(CIFAR10 | {key: SETTINGS[key]}), 32, preset("ddpm-cifar10").network)
    assert "\n" not in str(said.value)


def drop_a_weight(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights.pop("conv_out.bias")
    save_file(weights, path, {"format": "pt"})


PIPELINE_MISTAKES = {
    "weight": (drop_a_weight, "1 missing keys, among them conv_out.bias"),
    "outputs": (lambda p: change_json(p / "unet/config.json", out_channels=2), "out_channels must be 1"),
    "range": (lambda p: change_json(p / "scheduler/scheduler_config.json", clip_sample_range=2.0), "clip_sample_range"),
    "levels": (lambda p: change_json(p / "scheduler/scheduler_config.json", trained_betas=[0.1, 0.2]), "they are 2"),
    "words": (lambda p: change_json(p / "scheduler/scheduler_config.json", trained_betas=["a"]), "cannot be used"),
    "size": (lambda p: change_json(p / "unet/config.json", sample_size="8"), "sample_size must be a height and"),
    "list": (lambda p: (p / "unet/config.json").write_text("[]"), "must be a table of settings"),
    "cut off": (
        lambda p: (p / "unet/diffusion_pytorch_model.safetensors").write_bytes(
            (p / "unet/diffusion_pytorch_model.safetensors").read_bytes()[:5000]
        ),
        "cannot be read",
    ),
    "groups": (lambda p: change_json(p / "unet/config.json", act_fn="relu"), "act_fn = 'relu'"),
    "nothing": (lambda p: shutil.rmtree(p), "No such file"),
}


@pytest.mark.parametrize("name", PIPELINE_MISTAKES)
def test_pipelines_that_no_run_can_be_are_refused_in_one_line(tmp_path, name):
    spoil, wanted = PIPELINE_MISTAKES[name]
    pipeline(tmp_path / "p")
    spoil(tmp_path / "p")
    with pytest.raises(UserError, match=wanted) as said:
        pipelines.convert(tmp_path / "p", preset("ddpm-digits"))
    assert "\n" not in str(said.value)


def test_weights_of_torch_save_are_read_as_data(tmp_path):
    folder, unet, _ = pipeline(tmp_path / "p")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.unlink()
    torch.save(unet.state_dict(), file.with_suffix(".bin"))
    found = pipelines.convert(folder, preset("ddpm-digits")).weights["raw"]
    assert torch.equal(found["network.network.unet.conv_in.weight"], unet.conv_in.weight)
    torch.save({"conv_in.weight": Harm(tmp_path / "harm")}, file.with_suffix(".bin"))
    with pytest.raises(UserError, match="cannot be read"):
        pipelines.convert(folder, preset("ddpm-digits"))
    assert not (tmp_path / "harm").exists()


def test_published_checkpoints_with_the_old_names_of_attention_are_read_from_the_hub(tmp_path, monkeypatch):
    """As google/ddpm-cifar10-32: files at the root, weights of torch.save, query, key, value and proj_attn."""
    import huggingface_hub

    folder, unet, _ = pipeline(tmp_path / "p")
    flat, old = tmp_path / "flat", {}
    flat.mkdir()
    for path in (*folder.glob("*.json"), *folder.glob("*/*.json")):
        shutil.copy(path, flat / path.name)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, value in unet.state_dict().items():
        for new, before in names.items():
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = value
    assert sum("query" in name for name in old) == 8
    torch.save(old, flat / "diffusion_pytorch_model.bin")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: str(flat))
    found = pipelines.convert(Path("somebody/ddpm"), preset("ddpm-digits"))
    for name, value in unet.state_dict().items():
        assert torch.equal(found.weights["raw"][f"network.network.unet.{name}"], value), name
    assert found.origin["source"] == "somebody/ddpm"


def test_a_pipeline_without_a_size_takes_the_presets(tmp_path):
    folder, *_ = pipeline(tmp_path / "p")
    change_json(folder / "unet/config.json", sample_size=None)
    found = pipelines.convert(folder, preset("ddpm-digits"))
    assert (found.shape, found.levels, found.config.network.attention_at) == ((1, 8, 8), 17, (4,))
    assert pipelines.convert(folder, preset("ddpm-digits"), Images((16, 8))).config.network.attention_at == (8,)
    assert resolve(folder).shape == (1, None, None)
    with pytest.raises(UserError, match="does not say how large its images are"):
        resolve(folder).load(17, "cpu")
    change_json(folder / "unet/config.json", sample_size=8)
    with pytest.raises(UserError, match="--size must be"):
        pipelines.convert(folder, preset("ddpm-digits"), Images((16, 8)))


def test_a_preset_of_another_kind_gives_way(tmp_path):
    folder, *_ = pipeline(tmp_path / "p", "v_prediction", "learned_range")
    for base in ("mulan-digits", "idode-sp-digits", "vdm-photos32"):
        config = pipelines.convert(folder, preset(base)).config
        assert (config.path, config.latent.kind, config.objective.loss) == ("vp", "none", "hybrid")
        assert (config.objective.steps, config.data.encoding, config.reverse.decoder) == (49, "ends", "gaussian")


RUN_MISTAKES = {
    "network.kind must be ddpm": ("vdm-digits", {}),
    "network.self_condition must be False": ("ddpm-digits", {"network__self_condition": True}),
    "data.encoding must be ends": ("ddpm-digits", {"data__encoding": "centres"}),
    "path must be vp": ("ddpm-digits", {"path": "straight"}),
}


@pytest.mark.parametrize("wanted", RUN_MISTAKES)
def test_runs_that_no_pipeline_can_be_are_refused_by_name(tmp_path, wanted):
    name, fields = RUN_MISTAKES[wanted]
    config = tiny(name, training__steps=1, training__evaluate_every=0, **{"network__multipliers": (1, 1)} | fields)
    train(config, tmp_path / "run", say=lambda line: None)
    with pytest.raises(UserError, match=wanted):
        pipelines.save_diffusers(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from diffusers import UNet2DModel
    from safetensors import SafetensorError

    run = own_run(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(UserError, match="--out needs a new or empty folder"):
        pipelines.save_diffusers(run, tmp_path / "full")
    before = entries(tmp_path)
    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error:\nNo space left on device")):

        def fail(*given, _error=error, _save=UNet2DModel.save_pretrained, **more):
            _save(*given, **more)
            raise _error

        with monkeypatch.context() as patched:
            patched.setattr(UNet2DModel, "save_pretrained", fail)
            with pytest.raises(UserError, match="No space left on device") as said:
                pipelines.save_diffusers(run, tmp_path / "out")
        assert "\n" not in str(said.value) and entries(tmp_path) == before
    (tmp_path / "out").mkdir()
    assert pipelines.save_diffusers(run, tmp_path / "out").is_dir()
