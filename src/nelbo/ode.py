r"""Initial value problems dy/dt = f(t, y) by explicit Runge-Kutta pairs, each example by its own error.

    (1)  k_i = f(t + c_i h, y + h sum_{j<i} a_ij k_j),     y <- y + h sum_i b_i k_i
    (2)  E   = max over the parts of |h sum_i e_i k_i / tolerance|_rms,     tolerance = atol + rtol max(|y|, |y_new|)
    (3)  accepted where E <= 1;     h <- h min(10, max(1/5, 0.9 E^(-0.7/p) E_before^(0.4/p))),   p the pair's order
         rejected otherwise;      h <- h max(1/5, 0.9 E^(-1/p))

The step, the error and the decision belong to one example, so its result does not depend on the batch that it was in.
Examples that are through leave the batch: they cost no further evaluations. Time and step are float64; the state keeps
its own precision.

Beside the state there may be a quadrature q, dq/dt = g(t, y), which nothing depends on: its integrand is not asked for
where the pair gives it no weight (the second of Dormand and Prince's seven stages).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["METHODS", "Solution", "Tableau", "solve"]

Field = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
Tolerance = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Tableau:
    """An embedded pair: nodes c, stages a, weights b, error weights e = b - b_hat, and p of equation (3).

    ``order`` of the solution that is kept; the error estimate's is one less. The last stage must be the first of the
    next step: its row of a is b (first same as last).
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    e: tuple[float, ...]


SUCCESS, STEP_LIMIT, STEP_TOO_SMALL, NOT_FINITE = range(4)
ADVICE = {
    STEP_LIMIT: "the step limit was reached: raise max_steps, or loosen rtol and atol",
    STEP_TOO_SMALL: "the step became too small: loosen rtol and atol, or use a float64 state",
    NOT_FINITE: "the field is not finite: look at the network's output at the time that was reached",
}


@dataclass(frozen=True)
class Solution:
    """What ``solve`` returns, a row for each example.

    y, shaped as it was given, at ``t`` (B,) float64: the end, or where an example stopped; quadrature (B,) float64 or
    None; evaluations, accepted and rejected (B,) whole numbers; status (B,): 0 success, otherwise see ``advice``.
    """

    y: Tensor
    quadrature: Tensor | None
    t: Tensor
    evaluations: Tensor
    accepted: Tensor
    rejected: Tensor
    status: Tensor

    @property
    def success(self) -> bool:
        """Whether every example reached the end."""
        return bool((self.status == SUCCESS).all())

    @property
    def advice(self) -> str:
        """One line: how many examples stopped early, at what time the first of them, and what to do; "" for success."""
        bad = (self.status != SUCCESS).nonzero()[:, 0]
        if not len(bad):
            return ""
        first = int(bad[0])
        why = ADVICE[int(self.status[first])]
        where = f"number {first} at t = {self.t[first]:.6g}"
        return f"{len(bad)} of {len(self.status)} examples stopped early ({where}): {why}"


def _rms(values: Tensor) -> Tensor:
    return values.double().flatten(1).square().mean(1).sqrt()


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as a factor of ``like``."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _combine(y: Tensor, h: Tensor, weights: tuple[float, ...], stages: list[Tensor | None]) -> Tensor:
    """y + h sum_i w_i k_i, (B, ...)."""
    terms = [w * k for w, k in zip(weights, stages, strict=False) if w and k is not None]
    return y + _column(h, y) * sum(terms[1:], terms[0])


@torch.no_grad()
def solve(
    field: Field,
    y: Tensor,
    t_0: float | Tensor,
    t_1: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    quadrature: bool = False,
    tolerance: Tolerance | None = None,
    first_step: float | None = None,
    max_steps: int = 1000,
) -> Solution:
    """Integrate y (B, ...) from t_0, a number or one per example (B,), to t_1, in either direction.

    ``field(t, y, rows, integrand)`` gives dy/dt shaped as y and dq/dt (B,), which may be None unless ``integrand``, for
    times t (A,) float64 and states y (A, ...) of the examples ``rows`` (A,); ``rows`` is the same object as long as the
    same examples are at work. ``quadrature``: integrate q too, from 0, its error held below the same tolerances.
    ``tolerance(t, rows, |y|)``: that of the state in equation (2), shaped as it, from the beginning of a step, in place
    of atol + rtol |y|; a quadrature keeps its own. ``first_step``: |h| to begin with, by default estimated at the price
    of one evaluation. ``max_steps``: steps tried, per example. Nothing is raised where an example fails: see
    ``Solution.status``.
    """
    tableau, n, device = METHODS[method], len(y), y.device
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise ValueError(f"rtol and atol must be 0 or more and not both 0, got {rtol} and {atol}")
    t = torch.as_tensor(t_0, dtype=torch.float64, device=device).expand(n).clone()
    sign, span = (1.0 if float((t_1 - t).sum()) >= 0 else -1.0), (t_1 - t).abs()
    if bool((sign * (t_1 - t) < 0).any()):
        raise ValueError("all examples must be integrated in the same direction")
    out = Solution(
        y.clone(),
        torch.zeros(n, dtype=torch.float64, device=device) if quadrature else None,
        t.clone(),
        *(torch.zeros(n, dtype=torch.long, device=device) for _ in range(4)),
    )
    rows = span.nonzero()[:, 0]
    if not len(rows):
        return out
    y, t, span = y[rows], t[rows], span[rows]

    allowed = tolerance or (lambda t, rows, size: atol + rtol * size)

    def error_norm(
        error: Tensor, before: Tensor, after: Tensor, e_q: Tensor | None, q: Tensor, q_new: Tensor
    ) -> Tensor:
        norm = _rms(error / allowed(t, rows, torch.maximum(before.abs(), after.abs())))
        if e_q is None:
            return norm
        return torch.maximum(norm, (e_q / (atol + rtol * torch.maximum(q.abs(), q_new.abs()))).abs())

    smallest = 64 * torch.finfo(torch.float64).eps * t.abs().clamp(min=abs(t_1))
    q = torch.zeros_like(t)
    evaluations, accepted, rejected = (torch.zeros_like(rows) for _ in range(3))
    k_0, g_0 = field(t, y, rows, quadrature)
    evaluations += 1
    if first_step is None:
        h = _first_step(field, t, y, k_0, rows, sign, span, allowed, tableau.order)
        evaluations += 1
    else:
        h = span.clamp(max=abs(first_step))
    before = torch.ones_like(t)  # E of the last accepted step
    failed = torch.zeros_like(rows, dtype=torch.bool)  # the last try was rejected
    finite = torch.isfinite(_rms(k_0))
    status = torch.where(finite, SUCCESS, NOT_FINITE)
    ended = ~finite
    stages = len(tableau.c)
    while True:
        if bool(ended.any()):
            gone, stay = ended.nonzero()[:, 0], (~ended).nonzero()[:, 0]
            at = rows[gone]
            for whole, part in (
                (out.y, y), (out.t, t), (out.evaluations, evaluations), (out.accepted, accepted),
                (out.rejected, rejected), (out.status, status),
            ):  # fmt: skip
                whole[at] = part[gone]
            if out.quadrature is not None:
                out.quadrature[at] = q[gone]
            if not len(stay):
                return out
            rows, y, t, q, h, before, failed, k_0, smallest = (
                v[stay] for v in (rows, y, t, q, h, before, failed, k_0, smallest)
            )
            evaluations, accepted, rejected = (v[stay] for v in (evaluations, accepted, rejected))
            g_0 = None if g_0 is None else g_0[stay]
        left = sign * (t_1 - t)
        last = h >= left * (1 - 1e-12)
        step = sign * torch.where(last, left, h)
        k: list[Tensor | None] = [k_0]
        g: list[Tensor | None] = [g_0]
        y_i = y
        for i in range(1, stages):
            y_i = _combine(y, step, tableau.a[i], k)
            asked = quadrature and (tableau.b[i] != 0 or tableau.e[i] != 0)
            k_i, g_i = field(t + tableau.c[i] * step, y_i, rows, asked)
            k.append(k_i)
            g.append(g_i if asked else None)
        evaluations = evaluations + (stages - 1)
        q_new = _combine(q, step, tableau.b, g) if quadrature else q
        e_q = _combine(torch.zeros_like(q), step, tableau.e, g) if quadrature else None
        y_new, k_last, g_last = y_i, k_i, g_i
        error = error_norm(_combine(torch.zeros_like(y), step, tableau.e, k), y, y_new, e_q, q, q_new)
        sane = torch.isfinite(error + _rms(y_new) + _rms(k_last))
        error = torch.where(sane, error, torch.inf)
        good = error <= 1
        # Equation (3); a step after a rejected one does not grow.
        p = float(tableau.order)
        steady = error.clamp(min=1e-10) ** (-0.7 / p) * before ** (0.4 / p)
        proposed = 0.9 * torch.where(good, steady, error ** (-1 / p))
        factor = proposed.clamp(0.2, 10.0)
        factor = torch.where(good & failed | ~good, factor.clamp(max=1.0), factor)
        h = torch.where(good & last, h, step.abs() * factor)
        before = torch.where(good, error.clamp(min=1e-4), before)
        accepted, rejected, failed = accepted + good, rejected + ~good, ~good
        t = torch.where(good, torch.where(last, torch.full_like(t, t_1), t + step), t)
        chosen = _column(good, y).bool()
        y, q = torch.where(chosen, y_new, y), torch.where(good, q_new, q)
        ended = good & last
        status = torch.zeros_like(accepted)
        for why, condition in (
            (STEP_LIMIT, accepted + rejected >= max_steps),
            (STEP_TOO_SMALL, h < smallest),
            (NOT_FINITE, (h < smallest) & ~sane),
        ):
            status = torch.where(condition & ~ended, why, status)
        ended = ended | (status != SUCCESS)
        k_0 = torch.where(chosen, k_last, k_0)
        g_0 = torch.where(good, g_last, g_0) if g_0 is not None and g_last is not None else None


def _first_step(
    field: Field, t: Tensor, y: Tensor, k: Tensor, rows: Tensor, sign: float, span: Tensor, allowed: Tolerance,
    order: int,
) -> Tensor:  # fmt: skip
    """Hairer, Norsett and Wanner's starting step (section II.4), (B,)."""
    scale = allowed(t, rows, y.abs())
    size, speed = _rms(y / scale), _rms(k / scale)
    guess = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).nan_to_num(1e-6)
    guess = torch.minimum(guess, span)
    ahead, _ = field(t + sign * guess, y + _column(sign * guess, y) * k, rows, False)
    bend = _rms((ahead - k) / scale) / guess.clamp(min=1e-300)
    most = torch.maximum(speed, bend)
    step = torch.where(most <= 1e-15, (guess * 1e-3).clamp(min=1e-6), (0.01 / most) ** (1 / order))
    return torch.minimum(torch.minimum(100 * guess, step).nan_to_num(1e-6), span)


METHODS: dict[str, Tableau] = {
    # Bogacki and Shampine 3(2): fewest evaluations at loose tolerances.
    "bosh3": Tableau(
        3,
        (0, 1 / 2, 3 / 4, 1),
        ((), (1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        (2 / 9, 1 / 3, 4 / 9, 0),
        (2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    ),
    # Dormand and Prince 5(4).
    "dopri5": Tableau(
        5,
        (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
        (
            35 / 384 - 5179 / 57600, 0, 500 / 1113 - 7571 / 16695, 125 / 192 - 393 / 640,
            -2187 / 6784 + 92097 / 339200, 11 / 84 - 187 / 2100, -1 / 40,
        ),
    ),
}  # fmt: skip
