r"""Initial value problems dy/dt = f(t, y), each example by its own error and with its own steps.

A method tries a step from t by h and says what error it may have made; then

    (1)  E = max over the parts of |error / tolerance|_rms,     tolerance = atol + rtol max(|y|, |y_new|)
    (2)  accepted where E <= 1:     h <- h min(G, max(S, 0.9 E^(-0.7/p) E_before^(0.4/p))),     p from E ~ h^p
         rejected otherwise:        h <- h max(S, 0.9 E^(-1/p))

Runge-Kutta pairs evaluate the field at several stages of a step (Hairer, Norsett and Wanner, section II.4),

    (3)  k_i = f(t + c_i h, y + h sum_{j<i} a_ij k_j),     y_new = y + h sum_i b_i k_i,     error = h sum_i e_i k_i

Adams methods evaluate it once and remember the last n evaluations f_0, f_1, ... at t_0 = t, t_1, ... With
I(g; s) = the integral over the step of the polynomial that has the values g at the times s (section III.5),

    (4)  y_p   = y + I(f_0 .. f_{n-1}; t_0 .. t_{n-1}),      f_p = f(t + h, y_p)                     predict, evaluate
    (5)  y_new = y + I(f_p, f_0 .. f_{n-1}; t + h, t_0 .. t_{n-1}),     error = what f_{n-1} adds to it         correct

and f_p is what the next step remembers as f_0. Over many steps every evaluation weighs as much as its share of the
time, so that what is too fast for the steps averages out; a pair of high order weighs its stages unevenly and magnifies
it.

The step, the error and the decision belong to one example, so its result does not depend on the batch that it was in.
Examples that are through leave the batch: they cost no further evaluations. Time and step are float64; the state keeps
its own precision.

Beside the state there may be a quadrature q, dq/dt = g(t, y), which nothing depends on: its integrand is not asked for
where a pair gives it no weight (the second of Dormand and Prince's seven stages).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["METHODS", "Adams", "Method", "Solution", "Tableau", "solve"]

Field = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
Tolerance = Callable[[Tensor, Tensor, Tensor], Tensor]

SUCCESS, STEP_LIMIT, STEP_TOO_SMALL, NOT_FINITE = range(4)
ADVICE = {
    STEP_LIMIT: "the step limit was reached: loosen rtol and atol, or raise max_steps (in Python)",
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


@dataclass(frozen=True)
class Past:
    """The last evaluations, newest first, each (A, ...): times t, fields k, integrands g (empty without a quadrature).

    ``count`` (A,) of them are an example's own; what follows is not looked at.
    """

    t: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    g: tuple[Tensor, ...]
    count: Tensor

    def of(self, stay: Tensor) -> "Past":
        """That of the examples ``stay``."""
        t, k, g = (tuple(v[stay] for v in values) for values in (self.t, self.k, self.g))
        return Past(t, k, g, self.count[stay])

    def then(self, good: Tensor, t: Tensor, k: Tensor, g: Tensor | None) -> "Past":
        """With one more evaluation, the oldest forgotten, for the examples that are ``good`` (A,)."""

        def pushed(new: Tensor, old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            chosen = _column(good, new).bool()
            return tuple(torch.where(chosen, a, b) for a, b in zip((new, *old), old, strict=False))

        count = torch.where(good, (self.count + 1).clamp(max=len(self.t)), self.count)
        return Past(pushed(t, self.t), pushed(k, self.k), pushed(g, self.g) if g is not None else (), count)


@dataclass(frozen=True)
class Trial:
    """A step tried. y (A, ...) after it, and its error; gain (A,) of the quadrature, and the error of that; field and
    integrand there, for the past; order (A,), the p of equation (2)."""

    y: Tensor
    error: Tensor
    gain: Tensor | None
    gain_error: Tensor | None
    k: Tensor
    g: Tensor | None
    order: Tensor


class Method(ABC):
    """How a step is tried.

    ``order`` of the solution that is kept, at its highest, and ``first_order``, that of the first step; ``cost``,
    evaluations of a step; ``memory``, evaluations remembered; ``bounds``, S and G of equation (2).
    """

    order: int
    first_order: int
    cost: int
    memory: int
    bounds: tuple[float, float]

    @abstractmethod
    def attempt(self, field: Field, y: Tensor, h: Tensor, rows: Tensor, past: Past, quadrature: bool) -> Trial:
        """A step by h (A,), with its sign, from y (A, ...) at the time past.t[0]."""


class Tableau(Method):
    """An embedded pair, equation (3): nodes c, stages a, weights b, error weights e = b - b_hat, and its order p.

    ``order`` of the solution that is kept; the error estimate's is one less. The last stage must be the first of the
    next step: its row of a is b (first same as last).
    """

    memory, bounds = 1, (0.2, 10.0)

    def __init__(
        self,
        order: int,
        c: Sequence[float],
        a: Sequence[Sequence[float]],
        b: Sequence[float],
        e: Sequence[float],
    ) -> None:
        self.order = self.first_order = order
        self.c, self.a, self.b, self.e = c, a, b, e
        self.cost = len(c) - 1

    def attempt(self, field: Field, y: Tensor, h: Tensor, rows: Tensor, past: Past, quadrature: bool) -> Trial:
        t = past.t[0]
        k: list[Tensor | None] = [past.k[0]]
        g: list[Tensor | None] = [past.g[0] if quadrature else None]

        def combined(weights: Sequence[float], values: list[Tensor | None]) -> Tensor:
            terms = [w * v for w, v in zip(weights, values, strict=False) if w and v is not None]
            return _column(h, terms[0]) * sum(terms[1:], terms[0])

        y_i = y
        for i in range(1, len(self.c)):
            y_i = y + combined(self.a[i], k)
            asked = quadrature and (self.b[i] != 0 or self.e[i] != 0)
            k_i, g_i = field(t + self.c[i] * h, y_i, rows, asked)
            k.append(k_i)
            g.append(g_i if asked else None)
        gain, gain_error = (combined(self.b, g), combined(self.e, g)) if quadrature else (None, None)
        order = torch.full_like(t, float(self.order))
        return Trial(y_i, combined(self.e, k), gain, gain_error, k_i, g[-1], order)


class Adams(Method):
    """Equations (4) and (5) with up to ``memory`` evaluations remembered: orders from 2, at the first step, to
    memory + 1."""

    cost, first_order, bounds = 1, 2, (0.5, 2.0)

    def __init__(self, memory: int) -> None:
        self.memory, self.order = memory, memory + 1

    def attempt(self, field: Field, y: Tensor, h: Tensor, rows: Tensor, past: Past, quadrature: bool) -> Trial:
        t, n = past.t[0], past.count
        times = torch.stack(past.t, 1) - t[:, None]
        k, g = field(t + h, y + _weighted(_integral(times, n, h), past.k), rows, quadrature)
        times = torch.cat([h[:, None], times], 1)
        better = _integral(times, n + 1, h)
        added = better - _integral(times, n, h)
        fields, gain, gain_error = (k, *past.k), None, None
        if quadrature:
            assert g is not None, "the field must give the integrand where it is asked for"
            gain, gain_error = (_weighted(w, (g, *past.g)) for w in (better, added))
        return Trial(y + _weighted(better, fields), _weighted(added, fields), gain, gain_error, k, g, n + 1.0)


def _integral(times: Tensor, count: Tensor, h: Tensor) -> Tensor:
    """The weights (A, N) that integrate, from 0 to h (A,), every polynomial given by its values at the first ``count``
    (A,) of the times (A, N); 0 for the others. They solve sum_i w_i s_i^m = h^(m+1)/(m+1), m = 0 .. count - 1."""
    m = torch.arange(times.shape[1], device=times.device)
    used = m < count[:, None]
    both = used[:, :, None] & used[:, None, :]
    powers = torch.where(both, (times / h[:, None])[:, None, :] ** m[:, None], torch.eye(len(m)).to(times))
    return h[:, None] * torch.linalg.solve(powers, used / (m + 1.0).to(times))


def _weighted(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    """sum_i w_i v_i for weights (A, N) and N values (A, ...)."""
    terms = [_column(w, v) * v for w, v in zip(weights.T, values, strict=False)]
    return sum(terms[1:], terms[0])


def _rms(values: Tensor) -> Tensor:
    return values.double().flatten(1).square().mean(1).sqrt()


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(A,) as a factor of ``like`` (A, ...)."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


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
    longest_step: float | Callable[[Tensor, Tensor], Tensor] = math.inf,
    max_steps: int = 1000,
) -> Solution:
    """Integrate y (B, ...) from t_0, a number or one per example (B,), to t_1, in either direction.

    ``field(t, y, rows, integrand)`` gives dy/dt shaped as y and dq/dt (B,), which may be None unless ``integrand``, for
    times t (A,) float64 and states y (A, ...) of the examples ``rows`` (A,); ``rows`` is the same object as long as the
    same examples are at work. ``quadrature``: integrate q too, from 0, its error held below the same tolerances.
    ``tolerance(t, rows, |y|)``: that of the state in equation (1), shaped as it, from the beginning of a step, in place
    of atol + rtol |y|; a quadrature keeps its own. ``first_step``: |h| to begin with, by default estimated at the price
    of one evaluation; ``longest_step``, the largest |h|, a number or f(t, rows) (A,). ``max_steps``: steps tried, per
    example. Nothing is raised where an example fails: see ``Solution.status``.
    """
    way, n, device = METHODS[method], len(y), y.device
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise ValueError(f"rtol and atol must be 0 or more and not both 0, got {rtol} and {atol}")
    if not callable(longest_step) and not longest_step > 0:
        raise ValueError(f"longest_step must be above 0, got {longest_step}")
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
    k, g = field(t, y, rows, quadrature)
    integrands = (g,) * way.memory if quadrature and g is not None else ()
    past = Past((t,) * way.memory, (k,) * way.memory, integrands, torch.ones_like(rows))
    evaluations += 1
    if first_step is None:
        h = _first_step(field, t, y, k, rows, sign, span, allowed, way.first_order)
        evaluations += 1
    else:
        h = span.clamp(max=abs(first_step))
    before = torch.ones_like(t)  # E of the last accepted step
    failed = torch.zeros_like(rows, dtype=torch.bool)  # the last try was rejected
    finite = torch.isfinite(_rms(k))
    status = torch.where(finite, SUCCESS, NOT_FINITE)
    ended = ~finite
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
            rows, y, t, q, h, before, failed, smallest = (v[stay] for v in (rows, y, t, q, h, before, failed, smallest))
            evaluations, accepted, rejected = (v[stay] for v in (evaluations, accepted, rejected))
            past = past.of(stay)
        h = torch.minimum(h, longest_step(t, rows) if callable(longest_step) else torch.full_like(h, longest_step))
        left = sign * (t_1 - t)
        last = h >= left * (1 - 1e-12)
        step = sign * torch.where(last, left, h)
        trial = way.attempt(field, y, step, rows, past, quadrature)
        evaluations = evaluations + way.cost
        q_new = q if trial.gain is None else q + trial.gain
        error = error_norm(trial.error, y, trial.y, trial.gain_error, q, q_new)
        sane = torch.isfinite(error + _rms(trial.y) + _rms(trial.k))
        error = torch.where(sane, error, torch.inf)
        good = error <= 1
        # Equation (2); a step after a rejected one does not grow.
        steady = error.clamp(min=1e-10) ** (-0.7 / trial.order) * before ** (0.4 / trial.order)
        factor = (0.9 * torch.where(good, steady, error ** (-1 / trial.order))).clamp(*way.bounds)
        factor = torch.where(good & failed | ~good, factor.clamp(max=1.0), factor)
        h = torch.where(good & last, h, step.abs() * factor)
        before = torch.where(good, error.clamp(min=1e-4), before)
        accepted, rejected, failed = accepted + good, rejected + ~good, ~good
        t = torch.where(good, torch.where(last, torch.full_like(t, t_1), t + step), t)
        y, q = torch.where(_column(good, y).bool(), trial.y, y), torch.where(good, q_new, q)
        past = past.then(good, t, trial.k, trial.g)
        ended = good & last
        status = torch.zeros_like(accepted)
        for why, condition in (
            (STEP_LIMIT, accepted + rejected >= max_steps),
            (STEP_TOO_SMALL, h < smallest),
            (NOT_FINITE, (h < smallest) & ~sane),
        ):
            status = torch.where(condition & ~ended, why, status)
        ended = ended | (status != SUCCESS)


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


METHODS: dict[str, Method] = {
    # Adams of order 5.
    "adams4": Adams(4),
    # Bogacki and Shampine 3(2): of the pairs, fewest evaluations at loose tolerances.
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
