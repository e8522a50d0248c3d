"""Estimates the end of training of a grid that was stopped early, from all of its trials, without bias.

Phase one is what every trial shows up to the rung that stopped it. Phase two is the end of training. It is seen of the
trials that went on and, among those that the rule stops, of the unstopped controls; with which chance is known. A
regression predicts the ends that are not seen from phase one. The controls show how far it is off, and each represents
1 / chance trials: their residuals take out its bias, whatever its form. So a poor regression widens the intervals and
shifts next to nothing. (The controls are also in the regression, which leaves a bias of a small part of the interval
where they are few.)

References:
    Neyman 1938, https://doi.org/10.1080/01621459.1938.10503378 (double sampling); Cassel, Sarndal and Wretman 1976,
    https://doi.org/10.1093/biomet/63.3.615 (regression with corrected residuals); Robins, Rotnitzky and Zhao 1994,
    https://doi.org/10.1080/01621459.1994.10476818.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.estimates.anova import Array, Term, coding_matrix

PENALTIES = (3.0, 10.0, 30.0)
"""Strengths of the ridge penalty to choose from; weaker ones fit few controls too closely."""
STOPPED_WEIGHT = 3.0
"""Weight in the regression of a trial that the rule stops, next to 1 for one that went on: it is about the stopped."""
SMALLEST_SLACK = 0.02
"""Least value of 1 - leverage, by which a residual is divided to leave its own observation out."""
FREE, MILD, STRONG, PAIRS = 0.0, 0.05, 0.3, 16.0
"""Shares of the penalty that columns bear: the last accuracy; levels; curvature and slopes; pairs of levels."""
Integers = NDArray[np.int_]


@dataclass(frozen=True)
class Sample:
    """What was seen of each trial; one entry per trial that did not diverge."""

    rungs: Array
    """Accuracy at each rung, `[trial, rung]`; NaN where the trial did not come."""
    final: Array
    """Accuracy at the end of the full budget, `[trial]`; NaN where it is not seen."""
    stop: Integers
    """Index of the rung at which the rule stops the trial, control or not, `[trial]`; their number if at none."""
    chance: Array
    """Chance with which the end of the trial is seen if the rule stops it, `[trial]`; NaN if it is not recorded."""

    @property
    def stopped(self) -> NDArray[np.bool_]:
        """Trials that the rule stops, `[trial]`."""
        return np.asarray(self.stop < self.rungs.shape[1])

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Trials whose end is seen, `[trial]`."""
        return np.isfinite(self.final)

    @property
    def probed(self) -> NDArray[np.bool_]:
        """Trials that the rule stops and whose end is seen nevertheless, `[trial]`."""
        return self.stopped & self.seen

    def seen_chances(self) -> Array:
        """Return with which chance the end of each trial is seen: 1 if the rule lets it go on.

        The recorded chances are scaled so that they add up to the number of trials that were indeed drawn (Hajek);
        without a record all are equal.
        """
        stopped = self.stopped
        chances = np.ones(len(self.final))
        recorded = self.chance[stopped]
        known = recorded if np.isfinite(recorded).all() and recorded.sum() > 0 else np.ones(stopped.sum())
        if len(known):
            chances[stopped] = np.minimum(1, known * self.probed.sum() / known.sum())
        return chances


@dataclass(frozen=True)
class Ends:
    """The end of every trial: seen, or estimated."""

    values: Array
    """Accuracy, `[trial]`. A single one may be far off; weighted sums over many trials are without bias."""
    sampling: Array
    """What the draw of the controls contributes to a variance, `[trial]`: sum(weights^2 x sampling)."""
    noise: Array
    """What seeds and interactions of three or more factors contribute, `[trial]`; to be used likewise."""
    probed: NDArray[np.bool_]
    """Trials that `sampling` is from, `[trial]`."""
    represented: Array
    """How many trials each one stands for in `noise`, `[trial]`; 0 if its end is not seen."""
    degrees: float
    """Degrees of freedom of `noise` per trial whose end is seen, in [0, 1)."""

    def weighted_sums(self, weights: Array) -> tuple[Array, Array, Array]:
        """Return weighted sums of the ends.

        Args:
            weights: `[sum, trial]`.

        Returns:
            The sums, the standard errors, and the degrees of freedom of Student's t, each `[sum]`.
        """
        squares = weights**2
        sampling, noise = squares @ self.sampling, squares @ self.noise
        # Satterthwaite: the degrees of freedom of each part follow from how many trials it rests on
        drawn = np.maximum(_effective_number(squares[:, self.probed]) - 1, 1)
        left = np.maximum(_effective_number(squares * self.represented) * self.degrees, 1)
        parts = sampling**2 / drawn + noise**2 / left
        variance = sampling + noise
        return weights @ self.values, np.sqrt(variance), np.maximum(variance**2 / np.maximum(parts, 1e-300), 1)


def _effective_number(weights: Array) -> Array:
    """Return how many equal weights are as uneven as each row of weights, `[sum]`."""
    return np.asarray(np.sum(weights, axis=1) ** 2 / np.maximum(np.sum(weights**2, axis=1), 1e-300))


def estimate_ends(sample: Sample, terms: Sequence[Term]) -> Ends:
    """Estimate the end of every trial.

    Args:
        sample: What was seen.
        terms: Of the two-way model, coded for the trials of the sample.
    """
    chances, probed = sample.seen_chances(), sample.probed
    predicted, residuals, left_out = _predict(sample, terms)
    values = np.where(sample.stopped, predicted, sample.final)
    values[probed] += residuals[probed] / chances[probed]
    sampling = np.where(probed, left_out**2 * (1 - chances) / chances**2, 0.0)  # HC3
    noise, degrees = _noise(sample, terms, np.where(sample.seen, sample.final, predicted), chances)
    return Ends(values, sampling, noise, probed, np.where(sample.seen, 1 / chances, 0.0), degrees)


def _predict(sample: Sample, terms: Sequence[Term]) -> tuple[Array, Array, Array]:
    """Predict the ends of the stopped trials by a ridge regression for each rung.

    Returns:
        The predictions; of the probed trials the residuals; and their residuals if each is left out of its own fit. All
        are `[trial]`, 0 where there is none.
    """
    count, rung_count = sample.rungs.shape
    predicted, residuals, left_out = np.zeros(count), np.zeros(count), np.zeros(count)
    seen, ends = sample.seen, sample.final[sample.seen]
    stopped = sample.stopped[seen]
    weights = np.where(stopped, STOPPED_WEIGHT, 1.0)
    for rung in range(rung_count):
        here = sample.stop == rung
        if not here.any():
            continue
        features, shares = _features(sample.rungs[:, : rung + 1], terms)
        fit = _ridge(features[seen], ends, weights, shares, stopped)
        predicted[here] = features[here] @ fit.coefficients
        mine = here & sample.probed
        residuals[mine] = fit.residuals[mine[seen]]
        left_out[mine] = fit.left_out[mine[seen]]
    return predicted, residuals, left_out


def _features(rungs: Array, terms: Sequence[Term]) -> tuple[Array, Array]:
    """Return what is known of all trials at a rung, and the share of the penalty that each column bears.

    Args:
        rungs: Accuracies up to the rung, `[trial, rung]`.
        terms: Of the two-way model.

    Returns:
        `[trial, column]` and `[column]`.
    """
    clipped = np.clip(np.nan_to_num(rungs, nan=0.5), 0.01, 0.99)
    logits = np.log(clipped / (1 - clipped))
    now = _standardised(logits[:, -1])
    gains = [_standardised(logits[:, -1] - logits[:, -2])] if logits.shape[1] > 1 else []
    levels = [term.indicators for term in terms if len(term.parts) == 1]
    pairs = [term.design for term in terms if len(term.parts) == 2]
    scaled = [pair / np.sqrt(np.maximum(np.mean(pair**2, axis=0), 1e-12)) for pair in pairs]
    blocks = [
        *((column[:, None], FREE) for column in (np.ones(len(now)), now, *gains)),
        (now[:, None] ** 2 - 1, STRONG),
        *((now[:, None] * level, STRONG) for level in levels),
        *((level, MILD) for level in levels),
        *((pair, PAIRS) for pair in scaled),
    ]
    shares = np.repeat([share for _, share in blocks], [block.shape[1] for block, _ in blocks])
    return np.column_stack([block for block, _ in blocks]), shares


def _standardised(values: Array) -> Array:
    return np.asarray((values - values.mean()) / max(float(values.std()), 1e-9))


@dataclass(frozen=True)
class _Fit:
    coefficients: Array
    residuals: Array
    left_out: Array
    """Residuals as if each observation had been left out of the fit."""


def _ridge(features: Array, ends: Array, weights: Array, shares: Array, stopped: NDArray[np.bool_]) -> _Fit:
    """Fit by least squares with the penalty that predicts the stopped trials best when each is left out."""
    right = features.T * weights
    gram = right @ features
    fits = []
    for penalty in PENALTIES:
        smoother = np.linalg.solve(gram + np.diag(penalty * shares * weights.mean() + 1e-9), right)
        coefficients = smoother @ ends
        leverage = np.einsum("ij,ji->i", features, smoother)
        residuals = ends - features @ coefficients
        fits.append(_Fit(coefficients, residuals, residuals / np.maximum(1 - leverage, SMALLEST_SLACK)))
    return min(fits, key=lambda fit: float(np.sum(fit.left_out[stopped] ** 2)))


def _noise(sample: Sample, terms: Sequence[Term], guesses: Array, chances: Array) -> tuple[Array, float]:
    """Return what is left of the seen ends beside the two-way model (HC2), and its degrees of freedom.

    A trial that was drawn with a chance stands for 1 / chance trials.

    Args:
        sample: What was seen.
        terms: Of the two-way model.
        guesses: The end of every trial, predicted where it is not seen, `[trial]`.
        chances: With which the end of each trial is seen, `[trial]`.
    """
    basis = np.linalg.qr(coding_matrix(terms))[0]  # [trial, coefficient]
    leverage = np.sum(basis**2, axis=1)
    fitted = basis @ (basis.T @ guesses)
    degrees = len(guesses) - basis.shape[1]
    if degrees < 1:
        return np.full(len(guesses), np.nan), 0.0
    squares = (sample.final - fitted) ** 2 / np.maximum(1 - leverage, SMALLEST_SLACK) / chances
    return np.where(sample.seen, squares, 0.0), degrees / len(guesses)
