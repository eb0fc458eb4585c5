r"""VDM's flat U-Net and its training step in flax and optax, jitted: the formulas and shapes of the public networks.

Written from the formulas (flat_torch.py, equations 1 to 5) with flax.linen, its modules named as the public ones', so
that recorded weights fit. One jitted function takes the step: loss, gradient, AdamW, average; the state is donated to
it. Sampling is one jitted loop. Network, loss, sampling step and optimizer are checked against the public code's own
numbers (cases.py). bf16 computes in bfloat16 (``dtype``) and keeps parameters, statistics and losses in float32.
"""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import cases
import serve

try:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
except ImportError as error:  # said when the side is asked for
    missing = error
else:
    missing = None

GAMMA_MIN, GAMMA_MAX = -13.3, 5.0


def load() -> None:
    """What this side needs."""
    if missing is not None:
        raise missing


if missing is None:

    class ResnetBlock(nn.Module):
        """Two convolutions; the conditioning vector is added between them."""

        channels: int
        groups: int
        dropout: float
        dtype: Any

        @nn.compact
        def __call__(self, x: Any, condition: Any, deterministic: bool) -> Any:
            group_norm = partial(nn.GroupNorm, self.groups, dtype=self.dtype)
            conv = partial(nn.Conv, self.channels, (3, 3), dtype=self.dtype)
            h = conv(name="conv1")(nn.swish(group_norm(name="GroupNorm_0")(x)))
            zeros, dtype = nn.initializers.zeros, self.dtype
            shift = nn.Dense(self.channels, use_bias=False, kernel_init=zeros, dtype=dtype, name="cond_proj")(condition)
            h = nn.swish(group_norm(name="GroupNorm_1")(h + shift[:, None, None]))
            h = nn.Dropout(self.dropout)(h, deterministic)
            h = conv(kernel_init=zeros, name="conv2")(h)
            if x.shape[-1] != self.channels:
                x = nn.Dense(self.channels, dtype=self.dtype, name="nin_shortcut")(x)
            return x + h

    class AttnBlock(nn.Module):
        """One head over all pixels."""

        groups: int
        dtype: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            batch, channels = len(x), x.shape[-1]
            dense = partial(nn.Dense, channels, dtype=self.dtype)
            h = nn.GroupNorm(self.groups, dtype=self.dtype, name="GroupNorm_0")(x).reshape(batch, -1, channels)
            q, k, v = (dense(name=name)(h) for name in "qkv")
            weights = nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k) / math.sqrt(channels))
            h = jnp.einsum("bqk,bkc->bqc", weights, v)
            h = dense(kernel_init=nn.initializers.zeros, name="proj_out")(h)
            return x + h.reshape(x.shape)

    class ScoreUNet(nn.Module):
        """(z (B, H, W, C), gamma (B,), conditioning (B, columns)) -> eps_hat."""

        channels: int
        levels: int
        groups: int = 32
        dropout: float = 0.0
        dtype: Any = None

        @nn.compact
        def __call__(self, z: Any, gamma: Any, conditioning: Any, deterministic: bool = True) -> Any:
            n = self.channels
            block = partial(ResnetBlock, n, self.groups, self.dropout, self.dtype)
            t = (gamma - GAMMA_MIN) / (GAMMA_MAX - GAMMA_MIN)
            frequencies = jnp.exp(-math.log(10000) / (n // 2 - 1) * jnp.arange(n // 2))
            phase = 1000 * t[:, None] * frequencies
            condition = jnp.concatenate([jnp.sin(phase), jnp.cos(phase), conditioning], 1)
            for name in ("dense0", "dense1"):
                condition = nn.swish(nn.Dense(4 * n, dtype=self.dtype, name=name)(condition))
            scale = jnp.asarray([2.0**f * 2 * math.pi for f in (6, 7)], z.dtype)
            phase = (z[..., None] * scale).reshape(*z.shape[:-1], -1)
            h = jnp.concatenate([z, jnp.sin(phase), jnp.cos(phase)], -1)
            h = nn.Conv(n, (3, 3), dtype=self.dtype, name="conv_in")(h)
            skips = [h]
            for i in range(self.levels):
                h = block(name=f"down.block_{i}")(h, condition, deterministic)
                skips.append(h)
            h = block(name="mid.block_1")(h, condition, deterministic)
            h = AttnBlock(self.groups, self.dtype, name="mid.attn_1")(h)
            h = block(name="mid.block_2")(h, condition, deterministic)
            for i in range(self.levels + 1):
                h = block(name=f"up.block_{i}")(jnp.concatenate([h, skips.pop()], -1), condition, deterministic)
            h = nn.swish(nn.GroupNorm(self.groups, dtype=self.dtype, name="GroupNorm_0")(h))
            zeros = nn.initializers.zeros
            h = nn.Conv(z.shape[-1], (3, 3), kernel_init=zeros, dtype=self.dtype, name="conv_out")(h)
            return z + h.astype(z.dtype)


def gamma_of(parameters: Any, t: Any) -> Any:
    """The schedule, (B,) -> (B,)."""
    return parameters["gamma"]["b"] + jnp.abs(parameters["gamma"]["w"]) * t


def grey_values() -> Any:
    """x of the 256 grey levels."""
    return 2 * (jnp.arange(256) + 0.5) / 256 - 1


def loss_terms(
    score: Any, parameters: Any, images: Any, conditioning: Any, eps_0: Any, t_0: Any, eps: Any, dropout: Any = None
) -> dict[str, Any]:
    """flat_torch.py, equations (2) to (4): (B,) nats each, and what training minimises."""
    x = 2 * (images.astype(jnp.float32) + 0.5) / 256 - 1
    gamma_0, gamma_1 = gamma_of(parameters, 0.0), gamma_of(parameters, 1.0)
    rescaled = x + jnp.exp(0.5 * gamma_0) * eps_0
    logits = -0.5 * ((rescaled[..., None] - grey_values()) * jnp.exp(-0.5 * gamma_0)) ** 2
    chosen = jax.nn.one_hot(images, 256)
    recon = -jnp.sum(chosen * jax.nn.log_softmax(logits), (1, 2, 3, 4))
    var_1 = jax.nn.sigmoid(gamma_1)
    klz = 0.5 * jnp.sum((1 - var_1) * x**2 + var_1 - jnp.log(var_1) - 1, (1, 2, 3))
    t = jnp.mod(t_0 + jnp.arange(len(x)) / len(x), 1.0)
    gamma_t = gamma_of(parameters, t)
    var_t = jax.nn.sigmoid(gamma_t)[:, None, None, None]
    z_t = jnp.sqrt(1 - var_t) * x + jnp.sqrt(var_t) * eps
    more = {} if dropout is None else {"deterministic": False, "rngs": {"dropout": dropout}}
    eps_hat = score.apply({"params": parameters["score_model"]}, z_t, gamma_t, conditioning, **more)
    diff = 0.5 * jnp.abs(parameters["gamma"]["w"]) * jnp.sum((eps - eps_hat) ** 2, (1, 2, 3))
    bpd = jnp.mean(recon + klz + diff) / (x[0].size * math.log(2))
    return {"loss_recon": recon, "loss_klz": klz, "loss_diff": diff, "eps_hat": eps_hat, "bpd": bpd}


def reverse(score: Any, parameters: Any, z: Any, s: Any, t: Any, conditioning: Any, eps: Any) -> Any:
    """flat_torch.py, equation (5)."""
    gamma_s, gamma_t = gamma_of(parameters, s), gamma_of(parameters, t)
    gammas = jnp.broadcast_to(gamma_t, (len(z),))
    eps_hat = score.apply({"params": parameters["score_model"]}, z, gammas, conditioning)
    c = -jnp.expm1(gamma_s - gamma_t)
    mean = jnp.sqrt(jax.nn.sigmoid(-gamma_s) / jax.nn.sigmoid(-gamma_t)) * (
        z - jnp.sqrt(jax.nn.sigmoid(gamma_t)) * c * eps_hat
    )
    return mean + jnp.sqrt(jax.nn.sigmoid(gamma_s) * c) * eps


def decode(parameters: Any, z_0: Any) -> Any:
    """The most probable grey levels."""
    gamma_0 = gamma_of(parameters, 0.0)
    rescaled = z_0 / jnp.sqrt(jax.nn.sigmoid(-gamma_0))
    logits = -0.5 * ((rescaled[..., None] - grey_values()) * jnp.exp(-0.5 * gamma_0)) ** 2
    return jnp.argmax(logits, -1)


def make_optimizer(rate: Any, b1: float, b2: float, eps: float, decay: float) -> Any:
    """AdamW; biases are not decayed."""

    def mask(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "bias", tree)

    return optax.adamw(rate, b1, b2, eps, weight_decay=decay, mask=mask)


def updated(average: Any, parameters: Any, rate: float) -> Any:
    """The moving average of the weights."""
    return jax.tree.map(lambda mean, p: mean + (1 - rate) * (p - mean), average, parameters)


# Timing ---------------------------------------------------------------------------------------------------------------


def build(case: dict[str, Any]) -> tuple[serve.Runs, dict[str, Any]]:
    """A training step, a sampling step, and samples from noise to grey levels."""
    batch, shape, steps = case["batch"], (case["batch"], case["size"], case["size"], 3), case["steps"]
    dtype = jnp.bfloat16 if case["bf16"] else None
    score = ScoreUNet(case["channels"], case["levels"], case["groups"], case["dropout"], dtype)
    optimizer = make_optimizer(optax.linear_schedule(0.0, 2e-4, 100), 0.9, 0.99, 1e-8, 0.01)
    conditioning = jnp.zeros((batch, 1))
    draw = np.random.default_rng(0)
    data = draw.integers(0, 256, (4 * batch, *shape[1:]), dtype=np.uint8)

    @jax.jit
    def begin(key: Any) -> Any:
        own = score.init(key, jnp.zeros(shape), jnp.zeros(batch), conditioning)["params"]
        ends = {"w": jnp.full(1, GAMMA_MAX - GAMMA_MIN), "b": jnp.full(1, GAMMA_MIN)}
        parameters = {"score_model": own, "gamma": ends}
        return parameters, jax.tree.map(jnp.copy, parameters), optimizer.init(parameters)

    @partial(jax.jit, donate_argnums=0)
    def take(state: Any, images: Any, key: Any) -> Any:
        parameters, average, moments = state
        keys = jax.random.split(key, 4)
        draws = jax.random.normal(keys[0], shape), jax.random.uniform(keys[1]), jax.random.normal(keys[2], shape)

        def loss(parameters: Any) -> Any:
            return loss_terms(score, parameters, images, conditioning, *draws, dropout=keys[3])["bpd"]

        value, gradient = jax.value_and_grad(loss)(parameters)
        change, moments = optimizer.update(gradient, moments, parameters)
        parameters = optax.apply_updates(parameters, change)
        return (parameters, updated(average, parameters, 0.9999), moments), value

    @jax.jit
    def one(parameters: Any, z: Any, s: Any, t: Any, key: Any) -> Any:
        return reverse(score, parameters, z, s, t, conditioning, jax.random.normal(key, shape))

    @jax.jit
    def all_steps(parameters: Any, key: Any) -> Any:
        def down(i: Any, z: Any) -> Any:
            t = (steps - i) / steps
            return one(parameters, z, t - 1 / steps, t, jax.random.fold_in(key, i))

        z = jax.random.normal(jax.random.fold_in(key, steps), shape)
        return decode(parameters, jax.lax.fori_loop(0, steps, down, z))

    states = [begin(jax.random.key(0))]
    keys = iter(range(1, 1 << 30))
    z = jnp.asarray(draw.standard_normal(shape), jnp.float32)

    def step() -> float:
        images = data[draw.permutation(len(data))[:batch]]
        state, value = take(states.pop(), images, jax.random.key(next(keys)))
        states.append(state)
        return float(value)

    def sampling_step() -> None:
        jax.block_until_ready(one(states[0][0], z, 0.5, 0.5 + 1 / steps, jax.random.key(next(keys))))

    def sample() -> None:
        jax.block_until_ready(all_steps(states[0][0], jax.random.key(next(keys))))

    info = {
        "parameters": sum(p.size for p in jax.tree.leaves(states[0][0])),
        "precision": "computed in bfloat16, parameters and losses float32" if case["bf16"] else "float32",
        "versions": serve.versions("jax", "jaxlib", "flax", "optax"),
        "threads": f"jax's own pool, on {len(os.sched_getaffinity(0))} cores",
    }
    return {"training step": step, "sampling step": sampling_step, "samples": sample}, info


# Checking -------------------------------------------------------------------------------------------------------------


def nested(flat: dict[str, Any]) -> Any:
    """a/b -> [a][b]."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = jnp.asarray(value)
    return tree


def flattened(tree: Any) -> dict[str, Any]:
    """The other way."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(part.key for part in path): np.asarray(leaf) for path, leaf in leaves}


class Checked:
    """cases.Side."""

    def score(self, settings: dict[str, Any]) -> Any:
        """The network of a case."""
        return ScoreUNet(settings["sm_n_embd"], settings["sm_n_layer"])

    def network(self, parameters: Any, settings: Any, z: Any, gamma: Any, conditioning: Any, v: Any) -> Any:
        score, own = self.score(settings), {"params": nested(parameters)}
        found, back = jax.vjp(jax.jit(lambda z: score.apply(own, z, gamma, conditioning)), z)
        return np.asarray(found), np.asarray(back(jnp.asarray(v))[0])

    def loss(self, parameters: Any, settings: Any, images: Any, conditioning: Any, *draws: Any) -> Any:
        def bpd(own: Any) -> Any:
            terms = loss_terms(self.score(settings), own, images, conditioning[:, None], *draws)
            return terms["bpd"], terms

        (_, terms), gradient = jax.jit(jax.value_and_grad(bpd, has_aux=True))(nested(parameters))
        return {name: np.asarray(value) for name, value in terms.items()}, flattened(gradient)

    def step(self, parameters: Any, settings: Any, z: Any, s: float, t: float, conditioning: Any, eps: Any) -> Any:
        one = jax.jit(partial(reverse, self.score(settings)))
        return np.asarray(one(nested(parameters), z, s, t, conditioning[:, None], eps))

    def decode(self, parameters: Any, settings: Any, z_0: Any) -> Any:
        return np.asarray(decode(nested(parameters), z_0))

    def optimize(self, parameters: Any, gradients: Any, settings: Any) -> Any:
        optimizer = make_optimizer(
            settings["lr"], settings["b1"], settings["b2"], settings["eps"], settings["weight_decay"]
        )
        own = average = nested(parameters)
        moments, found = optimizer.init(own), []
        for gradient in map(nested, gradients):
            change, moments = optimizer.update(gradient, moments, own)
            own = optax.apply_updates(own, change)
            average = updated(average, own, settings["ema_rate"])
            found.append((flattened(own), flattened(average)))
        return found


def check(folder: Path) -> list[tuple[str, float, float]]:
    """Against the reference cases."""
    return cases.check(Checked(), folder)


if __name__ == "__main__":
    serve.serve(load, build, count=lambda step: None, check=check)
