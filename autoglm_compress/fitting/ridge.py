"""Least squares from sums over tokens: fit a linear map without keeping its inputs.

With inputs x and targets y, weighted by w per token, the sums G = sum w x x^T and C = sum w y x^T are all that a fit
needs. Ridge pulls towards the weight that is there, never towards zero:

    W = (C + mu W0) (G + mu I)^-1,  mu = strength * mean(diag G)

so directions that calibration hardly excites keep their present weights. With fewer tokens than inputs, the tokens X
[tokens, in] and residuals E = Y - X W0^T are kept instead of the sums, and give the same weight:

    W = W0 + E^T (X X^T + mu I)^-1 X
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from autoglm_compress.processes import Processes

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
SMALLEST_STRENGTH = 1e-6
SMALLEST_GAIN = 1e-6
"""The least improvement of the relative error. A smaller one may be rounding, so the weight is kept."""


class NotFiniteError(ArithmeticError):
    """The sums over tokens are not finite, so nothing can be fitted."""


@dataclass
class Moments:
    """G [in, in], C [out, in] and, where errors are to be known, sum w y^2 [out] over tokens, in fp32."""

    gram: torch.Tensor
    cross: torch.Tensor
    squares: torch.Tensor | None

    @classmethod
    def zeros(cls, in_features: int, out_features: int, device: torch.device) -> "Moments":
        """The moments of no tokens."""
        gram = torch.zeros(in_features, in_features, device=device)
        return cls(
            gram, torch.zeros(out_features, in_features, device=device), torch.zeros(out_features, device=device)
        )

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens: inputs [tokens, in], targets [tokens, out], weights [tokens]."""
        weighted = inputs * weights[:, None]
        self.gram.addmm_(weighted.T, inputs)
        self.cross.addmm_(targets.T, weighted)
        self.target_square.add_(weights @ targets.square())

    def add_up(self, processes: Processes) -> None:
        """Make them those of the tokens of all processes."""
        for total in (self.gram, self.cross, self.target_square):
            processes.add_up(total)

    @property
    def target_square(self) -> torch.Tensor:
        """Sum w y^2 per output, [out]."""
        assert self.squares is not None  # only moments that decide are asked for errors
        return self.squares

    def errors(self, weight: torch.Tensor) -> torch.Tensor:
        """Sum w (y - W x)^2 per output, [out], for W [out, in]."""
        return self.target_square + (weight @ self.gram).sub_(self.cross, alpha=2).mul_(weight).sum(1)

    def updates(self, prior: torch.Tensor) -> Callable[[float], torch.Tensor]:
        """What ridge of some strength adds to a prior [out, in]."""
        missing, scale = prior @ self.gram, self.gram.diagonal().mean()
        torch.sub(self.cross, missing, out=missing)
        return lambda strength: torch.cholesky_solve(missing.T, _factor(self.gram, missing, strength, scale)).T


class InputMoments:
    """The same for targets y = V t that are linear in the inputs t of another model. V may be large, or known later.

    Sums over tokens of x x^T [in, in], t x^T [other, in] and, where errors are to be known, t t^T [other, other].
    """

    def __init__(self, in_features: int, other_features: int, device: torch.device, for_errors: bool) -> None:
        self.gram = torch.zeros(in_features, in_features, device=device)
        self.cross = torch.zeros(other_features, in_features, device=device)
        self.other_gram = torch.zeros(other_features, other_features, device=device) if for_errors else None

    def add(self, inputs: torch.Tensor, other: torch.Tensor) -> None:
        """Add tokens: inputs [tokens, in], the other model's inputs [tokens, other]."""
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(other.T, inputs)
        if self.other_gram is not None:
            self.other_gram.addmm_(other.T, other)

    def add_up(self, processes: Processes) -> None:
        """Make them those of the tokens of all processes."""
        for total in (self.gram, self.cross, *([] if self.other_gram is None else [self.other_gram])):
            processes.add_up(total)

    def for_targets(self, weight: torch.Tensor) -> Moments:
        """The moments for y = V t, V [out, other]."""
        square = None if self.other_gram is None else ((weight @ self.other_gram) * weight).sum(1)
        return Moments(self.gram, weight @ self.cross, square)


class Examples:
    """Inputs x [tokens, in], targets y [tokens, out] and weights w [tokens] themselves.

    With fewer tokens than inputs they need less memory than sums over them, and fits and errors take less time.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[torch.Tensor, ...]] = []

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens: inputs [tokens, in], targets [tokens, out], weights [tokens]."""
        self._parts.append((inputs, targets, weights))

    def add_up(self, processes: Processes) -> None:
        """Make them the tokens of all processes."""
        self._parts = _of_all(self._parts, processes)

    @property
    def target_square(self) -> torch.Tensor:
        """Sum w y^2 per output, [out]."""
        return sum((w @ y.square() for _, y, w in self._parts), torch.zeros(()))

    def errors(self, weight: torch.Tensor) -> torch.Tensor:
        """Sum w (y - W x)^2 per output, [out], for W [out, in]."""
        return sum((w @ (y - x @ weight.T).square_() for x, y, w in self._parts), torch.zeros(()))

    def updates(self, prior: torch.Tensor) -> Callable[[float], torch.Tensor]:
        """What ridge of some strength adds to a prior [out, in]."""
        inputs = torch.cat([x * w.sqrt()[:, None] for x, _, w in self._parts])
        missing = torch.cat([(y - x @ prior.T) * w.sqrt()[:, None] for x, y, w in self._parts])
        gram, scale = inputs @ inputs.T, inputs.square().sum() / inputs.shape[1]
        return lambda strength: torch.cholesky_solve(missing, _factor(gram, missing, strength, scale)).T @ inputs


class InputExamples:
    """The same for targets y = V t that are linear in the inputs t of another model."""

    def __init__(self) -> None:
        self._parts: list[tuple[torch.Tensor, ...]] = []

    def add(self, inputs: torch.Tensor, other: torch.Tensor) -> None:
        """Add tokens: inputs [tokens, in], the other model's inputs [tokens, other]."""
        self._parts.append((inputs, other))

    def add_up(self, processes: Processes) -> None:
        """Make them the tokens of all processes."""
        self._parts = _of_all(self._parts, processes)

    def for_targets(self, weight: torch.Tensor) -> Examples:
        """The examples for y = V t, V [out, other]."""
        examples = Examples()
        for inputs, other in self._parts:
            examples.add(inputs, other @ weight.T, torch.ones_like(inputs[:, 0]))
        return examples


def _of_all(parts: list[tuple[torch.Tensor, ...]], processes: Processes) -> list[tuple[torch.Tensor, ...]]:
    """The tokens of all processes, given those of this one."""
    if processes.count == 1:
        return parts
    return [tuple(processes.put_together(torch.cat(column)) for column in zip(*parts, strict=True))]


@dataclass(frozen=True)
class Fit:
    """A fitted weight [out, in], its ridge strength (None: the weight was kept), and relative errors."""

    weight: torch.Tensor
    strength: float | None
    error_before: float
    error_after: float


def ridge(train: Moments | Examples, prior: torch.Tensor, strength: float) -> torch.Tensor:
    """The weight [out, in] that fits the tokens, pulled towards a prior [out, in].

    A Gram matrix that is not positive definite in fp32 (dead or dependent inputs) gets ten times the pull until it is.

    Raises:
        NotFiniteError: activations are not finite.
    """
    return prior + train.updates(prior)(strength)


def _factor(gram: torch.Tensor, missing: torch.Tensor, strength: float, scale: torch.Tensor) -> torch.Tensor:
    """The Cholesky factor of G + strength * scale * I; `missing` is only checked for values that are not finite."""
    if not (torch.isfinite(gram.diagonal()).all() and torch.isfinite(missing).all()):
        raise NotFiniteError("activations are NaN or infinite for some calibration tokens")
    while True:
        damped = gram.clone()
        damped.diagonal().add_(strength * scale.clamp_min(1e-30))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor
        strength = max(10 * strength, SMALLEST_STRENGTH)


def fit(
    train: Moments | Examples,
    held_out: Moments | Examples,
    prior: torch.Tensor,
    groups: Sequence[slice] = (slice(None),),
    strengths: Sequence[float] = STRENGTHS,
) -> list[Fit]:
    """Fit on some tokens. Other tokens choose the ridge strength, or keep the prior.

    Args:
        train: the tokens to fit on, or sums over them.
        held_out: the same for those that decide.
        prior: the weight that is there, [out, in].
        groups: rows that share one decision and the work for it.
        strengths: ridge strengths to try.
    """
    scales = [float(held_out.target_square[rows].sum().clamp_min(1e-30)) for rows in groups]

    def errors(weight: torch.Tensor) -> list[float]:
        each = held_out.errors(weight)
        return [float(each[rows].sum()) / scale for rows, scale in zip(groups, scales, strict=True)]

    best = [Fit(prior[rows], None, error, error) for rows, error in zip(groups, errors(prior), strict=True)]
    update = train.updates(prior)
    for strength in strengths:
        weight = prior + update(strength)
        for number, (rows, error) in enumerate(zip(groups, errors(weight), strict=True)):
            if error < best[number].error_after - SMALLEST_GAIN:
                best[number] = Fit(weight[rows].clone(), strength, best[number].error_before, error)
    return best
