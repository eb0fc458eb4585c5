r"""VDM's flat U-Net and its training step, in plain PyTorch: the formulas written down, as one would at first.

Eager, contiguous (B, C, H, W), ``torch.nn``'s own layers, AdamW with two groups, an average that is a deep copy. Its
network, loss, sampling step and optimizer are checked against the public code's numbers (cases.py).

    (1)  x = 2 (v + 1/2)/256 - 1,   gamma(t) = b + |w| t,   sigma^2 = sigmoid(gamma),   alpha^2 = sigmoid(-gamma)
    (2)  recon = -sum log softmax_v[ -(z_0/alpha_0 - x_v)^2 exp(-gamma_0)/2 ],   z_0/alpha_0 = x + exp(gamma_0/2) eps_0
    (3)  klz   = 1/2 sum (sigma_1^2 + alpha_1^2 x^2 - log sigma_1^2 - 1)
    (4)  diff  = 1/2 |w| sum (eps - eps_hat)^2   at z_t = alpha_t x + sigma_t eps,   t = (t_0 + i/B) mod 1
    (5)  z_s   = alpha_s/alpha_t (z_t - sigma_t c eps_hat) + sigma_s sqrt(c) eps,   c = -expm1(gamma_s - gamma_t)
"""

import copy
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import cases
import serve

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError as error:  # said when the side is asked for
    torch, nn, F, missing = None, None, None, error
else:
    missing = None

GAMMA_MIN, GAMMA_MAX = -13.3, 5.0


class ResidualBlock(nn.Module):
    """Two convolutions; the conditioning vector is added between them."""

    def __init__(self, inputs: int, channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm_0 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1)
        self.cond_proj = nn.Linear(4 * channels, channels, bias=False)
        self.norm_1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, channels, 1) if inputs != channels else nn.Identity()
        nn.init.zeros_(self.cond_proj.weight)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Any, condition: Any) -> Any:
        h = self.conv1(F.silu(self.norm_0(x))) + self.cond_proj(condition)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm_1(h))))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """One head over all pixels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm_0 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Linear(channels, channels) for _ in range(4))
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x: Any) -> Any:
        h = self.norm_0(x).flatten(2).transpose(1, 2)
        q, k, v = self.q(h), self.k(h), self.v(h)
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1)
        return x + self.proj_out(weights @ v).transpose(1, 2).reshape(x.shape)


class ScoreUNet(nn.Module):
    """(z, gamma (B,), conditioning (B, columns)) -> eps_hat."""

    def __init__(self, channels: int, levels: int, columns: int, groups: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.channels = channels
        self.dense0 = nn.Linear(channels + columns, 4 * channels)
        self.dense1 = nn.Linear(4 * channels, 4 * channels)
        self.conv_in = nn.Conv2d(15, channels, 3, padding=1)
        self.down = nn.ModuleList(ResidualBlock(channels, channels, groups, dropout) for _ in range(levels))
        self.mid_block_1 = ResidualBlock(channels, channels, groups, dropout)
        self.mid_attn_1 = Attention(channels, groups)
        self.mid_block_2 = ResidualBlock(channels, channels, groups, dropout)
        self.up = nn.ModuleList(ResidualBlock(2 * channels, channels, groups, dropout) for _ in range(levels + 1))
        self.norm_0 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, z: Any, gamma: Any, conditioning: Any) -> Any:
        t = (gamma - GAMMA_MIN) / (GAMMA_MAX - GAMMA_MIN)
        half = self.channels // 2
        frequencies = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
        phase = 1000 * t[:, None] * frequencies
        condition = torch.cat([phase.sin(), phase.cos(), conditioning], 1)
        condition = F.silu(self.dense1(F.silu(self.dense0(condition))))
        phase = torch.cat([2.0**f * 2 * math.pi * z[:, i : i + 1] for i in range(3) for f in (6, 7)], 1)
        h = self.conv_in(torch.cat([z, phase.sin(), phase.cos()], 1))
        skips = [h]
        for block in self.down:
            h = block(h, condition)
            skips.append(h)
        h = self.mid_block_2(self.mid_attn_1(self.mid_block_1(h, condition)), condition)
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], 1), condition)
        return z + self.conv_out(F.silu(self.norm_0(h)))


class VDM(nn.Module):
    """The network and the learned ends of the schedule."""

    def __init__(self, score: Any) -> None:
        super().__init__()
        self.score = score
        self.w = nn.Parameter(torch.tensor([GAMMA_MAX - GAMMA_MIN]))
        self.b = nn.Parameter(torch.tensor([GAMMA_MIN]))

    def gamma(self, t: Any) -> Any:
        """(B,) -> (B,), equation (1)."""
        return self.b + self.w.abs() * t

    def loss(self, images: Any, conditioning: Any, eps_0: Any, t_0: Any, eps: Any) -> dict[str, Any]:
        """Equations (2) to (4) for uint8 images, (B,) nats each, and what training minimises."""
        values = 2 * (torch.arange(256) + 0.5) / 256 - 1
        x = 2 * (images.float() + 0.5) / 256 - 1
        gamma_0, gamma_1 = self.gamma(torch.zeros(1)), self.gamma(torch.ones(1))
        z_0 = x + torch.exp(gamma_0 / 2) * eps_0
        logits = -0.5 * ((z_0[..., None] - values) * torch.exp(-gamma_0 / 2)) ** 2
        recon = -torch.log_softmax(logits, -1).gather(-1, images.long()[..., None]).flatten(1).sum(1)
        var_1 = torch.sigmoid(gamma_1)
        klz = 0.5 * ((1 - var_1) * x**2 + var_1 - torch.log(var_1) - 1).flatten(1).sum(1)
        t = (t_0 + torch.arange(len(x)) / len(x)) % 1
        gamma_t = self.gamma(t)
        var_t = torch.sigmoid(gamma_t)[:, None, None, None]
        z_t = torch.sqrt(1 - var_t) * x + torch.sqrt(var_t) * eps
        eps_hat = self.score(z_t, gamma_t, conditioning)
        diff = 0.5 * self.w.abs() * ((eps - eps_hat) ** 2).flatten(1).sum(1)
        bpd = (recon + klz + diff).mean() / (x[0].numel() * math.log(2))
        return {"loss_recon": recon, "loss_klz": klz, "loss_diff": diff, "eps_hat": eps_hat, "bpd": bpd}

    @torch.no_grad()
    def reverse(self, z: Any, s: float, t: float, conditioning: Any, eps: Any) -> Any:
        """Equation (5)."""
        gamma_s, gamma_t = self.gamma(torch.tensor([s])), self.gamma(torch.tensor([t]))
        eps_hat = self.score(z, gamma_t.expand(len(z)), conditioning)
        c = -torch.expm1(gamma_s - gamma_t)
        mean = torch.sqrt(torch.sigmoid(-gamma_s) / torch.sigmoid(-gamma_t)) * (
            z - torch.sqrt(torch.sigmoid(gamma_t)) * c * eps_hat
        )
        return mean + torch.sqrt(torch.sigmoid(gamma_s) * c) * eps

    @torch.no_grad()
    def decode(self, z_0: Any) -> Any:
        """The most probable grey levels."""
        gamma_0 = self.gamma(torch.zeros(1))
        values = 2 * (torch.arange(256) + 0.5) / 256 - 1
        rescaled = z_0 / torch.sqrt(torch.sigmoid(-gamma_0))
        logits = -0.5 * ((rescaled[..., None] - values) * torch.exp(-gamma_0 / 2)) ** 2
        return logits.argmax(-1)


def make_optimizer(model: Any, lr: float, b1: float, b2: float, eps: float, decay: float) -> Any:
    """AdamW; biases are not decayed."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if not name.endswith("bias")], "weight_decay": decay},
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(b1, b2), eps=eps)


def update(average: Any, model: Any, rate: float) -> None:
    """The moving average of the weights."""
    with torch.no_grad():
        for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(parameter, 1 - rate)


# Timing ---------------------------------------------------------------------------------------------------------------


def load() -> None:
    """What this side needs."""
    if missing is not None:
        raise missing


def build(case: dict[str, Any]) -> tuple[serve.Runs, dict[str, Any]]:
    """A training step, a sampling step, and samples from noise to grey levels."""
    torch.manual_seed(0)
    model = VDM(ScoreUNet(case["channels"], case["levels"], 1, case["groups"], case["dropout"]))
    average = copy.deepcopy(model)
    optimizer = make_optimizer(model, 2e-4, 0.9, 0.99, 1e-8, 0.01)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(n / 100, 1.0))
    batch, shape = case["batch"], (case["batch"], 3, case["size"], case["size"])
    data = torch.randint(0, 256, (4 * batch, *shape[1:]), dtype=torch.uint8)
    conditioning = torch.zeros(batch, 1)
    times = torch.linspace(1, 0, case["steps"] + 1).tolist()

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=case["bf16"])

    def step() -> float:
        model.train()
        images = data[torch.randperm(len(data))[:batch]]
        with autocast():
            loss = model.loss(images, conditioning, torch.randn(shape), torch.rand(()), torch.randn(shape))["bpd"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()
        update(average, model, 0.9999)
        return loss.item()

    def reverse(z: Any, s: float, t: float) -> Any:
        with autocast():
            return model.reverse(z, s, t, conditioning, torch.randn(shape))

    def sample() -> Any:
        model.eval()
        z = torch.randn(shape)
        for t, s in pairwise(times):
            z = reverse(z, s, t)
        return model.decode(z)

    z = torch.randn(shape)

    def sampling_step() -> Any:
        model.eval()
        return reverse(z, 0.5, 0.5 + 1 / case["steps"])

    info = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": "autocast to bfloat16" if case["bf16"] else "float32",
        "versions": serve.versions("torch"),
        "threads": f"{torch.get_num_threads()} threads of torch",
    }
    return {"training step": step, "sampling step": sampling_step, "samples": sample}, info


# Checking -------------------------------------------------------------------------------------------------------------


def name_of(name: str) -> str:
    """A flax name (without score_model/) as ours."""
    name = name.removeprefix("gamma/")
    name = re.sub(r"^(down|up)\.block_(\d+)", r"\1.\2", name)
    name = re.sub(r"^mid\.(\w+)", r"mid_\1", name).replace("GroupNorm_", "norm_").replace("/", ".")
    return re.sub(r"\.(kernel|scale)$", ".weight", name)


def put(module: Any, parameters: dict[str, Any]) -> Any:
    """The module with recorded parameters: kernels (H, W, in, out) or (in, out) transposed."""
    ours = dict(module.named_parameters())
    taken = {}
    for name, array in parameters.items():
        parameter = ours.pop(name_of(name))
        taken[name] = parameter
        array = torch.from_numpy(array)
        if name.endswith("kernel"):
            array = array.permute(3, 2, 0, 1) if array.ndim == 4 else array.T
            array = array[..., None, None] if array.ndim < parameter.ndim else array
        assert array.shape == parameter.shape, name
        parameter.data.copy_(array)
    assert not ours, f"without a recorded value: {', '.join(ours)}"
    return taken


def last(image: Any) -> Any:
    """(B, H, W, C) of numpy -> (B, C, H, W), or back."""
    if isinstance(image, torch.Tensor):
        return image.detach().permute(0, 2, 3, 1).numpy()
    return torch.from_numpy(image).permute(0, 3, 1, 2).contiguous()


class Checked:
    """cases.Side."""

    def score(self, parameters: dict[str, Any], settings: dict[str, Any], prefix: str) -> tuple[Any, dict[str, Any]]:
        """The network with recorded parameters, and those by their names."""
        own = {k.removeprefix(prefix): v for k, v in parameters.items() if k.startswith(prefix)}
        columns = own["dense0/kernel"].shape[0] - settings["sm_n_embd"]
        score = ScoreUNet(settings["sm_n_embd"], settings["sm_n_layer"], columns)
        return score, {prefix + k: v for k, v in put(score, own).items()}

    def vdm(self, parameters: dict[str, Any], settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The model with recorded parameters."""
        score, taken = self.score(parameters, settings, "score_model/")
        model = VDM(score)
        for name in ("w", "b"):
            parameter = getattr(model, name)
            parameter.data.copy_(torch.from_numpy(parameters[f"gamma/{name}"]))
            taken[f"gamma/{name}"] = parameter
        return model, taken

    def network(self, parameters: Any, settings: Any, z: Any, gamma: Any, conditioning: Any, v: Any) -> Any:
        score, _ = self.score(parameters, settings, "")
        image = last(z).requires_grad_()
        found = score(image, torch.from_numpy(gamma), torch.from_numpy(conditioning))
        (of_z,) = torch.autograd.grad(found, image, last(v))
        return last(found), last(of_z)

    def loss(
        self, parameters: Any, settings: Any, images: Any, conditioning: Any, eps_0: Any, t0: Any, eps: Any
    ) -> Any:
        model, taken = self.vdm(parameters, settings)
        terms = model.loss(
            last(images), torch.from_numpy(conditioning)[:, None], last(eps_0), torch.from_numpy(t0), last(eps)
        )
        terms["bpd"].backward()
        found = {name: value.detach().numpy() for name, value in terms.items()}
        return found | {"eps_hat": last(terms["eps_hat"])}, {k: p.grad.numpy() for k, p in taken.items()}

    def step(self, parameters: Any, settings: Any, z: Any, s: float, t: float, conditioning: Any, eps: Any) -> Any:
        model, _ = self.vdm(parameters, settings)
        return last(model.reverse(last(z), s, t, torch.from_numpy(conditioning)[:, None], last(eps)))

    def decode(self, parameters: Any, settings: Any, z_0: Any) -> Any:
        return last(self.vdm(parameters, settings)[0].decode(last(z_0)))

    def optimize(self, parameters: Any, gradients: Any, settings: Any) -> Any:
        """In float64, rounded after each step: torch's AdamW rounds twice a step where optax rounds once."""
        names = {key: key.replace(".", "_").replace("/", "_") for key in parameters}
        model = nn.ParameterDict({names[k]: nn.Parameter(torch.from_numpy(v).double()) for k, v in parameters.items()})
        average = copy.deepcopy(model).float()
        optimizer = make_optimizer(
            model, settings["lr"], settings["b1"], settings["b2"], settings["eps"], settings["weight_decay"]
        )
        found = []
        for gradient in gradients:
            for name, ours in names.items():
                model[ours].grad = torch.from_numpy(gradient[name]).double()
            optimizer.step()
            for parameter in model.values():
                parameter.data.copy_(parameter.data.float())
            update(average, copy.deepcopy(model).float(), settings["ema_rate"])
            both = ({k: m[v].detach().numpy().copy() for k, v in names.items()} for m in (model, average))
            found.append(tuple(both))
        return found


def check(folder: Path) -> list[tuple[str, float, float]]:
    """Against the reference cases."""
    return cases.check(Checked(), folder)


if __name__ == "__main__":
    serve.serve(load, build, check=check)
