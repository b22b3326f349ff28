"""What the pictures of an attribution log show, as numbers.

Accumulators take a log piece by piece (`add`), so memory does not grow with the number of prompts; sums are float64.
Shapes: N prompts, L layers, D rows (hidden size), S subjects, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHUFFLES = 199
NO_SUBJECT = -1


@dataclass(frozen=True)
class Crowding:
    """How often a high and a low vote meet in the same layer, beside what chance gives."""

    rate: float
    """Probability that a high vote and a low vote, each drawn at random, are for rows of the same layer."""
    chance: float
    """Its exact expectation when rows, each with its votes, are dealt at random over the layers."""
    chance_range: tuple[float, float]
    """Where the middle 95 % of random deals fall."""

    @property
    def ratio(self) -> float:
        """How many times more often than by chance; 1 is chance."""
        return self.rate / self.chance


def crowding(high_LD: np.ndarray, low_LD: np.ndarray, *, seed: int = 0) -> Crowding | None:
    """Do rows of high and rows of low score crowd into the same layers (LoKI section 3.1)?

    `high_LD` and `low_LD` are votes (L, D). With h_l and v_l the shares of all high and all low votes that fall on
    layer l, the rate is Σ_l h_l v_l. It is 1/L where either kind is spread evenly, and larger where both crowd into
    the same layers.

    Chance deals the L·D rows at random over the layers, D to each, every row keeping both of its counts, so that
    rows which are high in some prompts and low in others cannot feign crowding. With c = Σ_i h_i v_i over rows, two
    different rows share a layer with probability (D−1)/(L·D−1), and the expectation is c + (1−c)(D−1)/(L·D−1).
    The range is that of `SHUFFLES` seeded deals.

    None where there is no vote of either kind.
    """
    num_layers, num_rows = high_LD.shape
    if not high_LD.sum() or not low_LD.sum():
        return None
    high_C = high_LD.astype(np.float64).ravel() / high_LD.sum()
    low_C = low_LD.astype(np.float64).ravel() / low_LD.sum()

    def rate(order_C: np.ndarray) -> float:
        by_layer = (values[order_C].reshape(num_layers, num_rows).sum(axis=1) for values in (high_C, low_C))
        return float(np.dot(*by_layer))

    same_row = float(high_C @ low_C)
    same_layer = (num_rows - 1) / (num_layers * num_rows - 1) if high_C.size > 1 else 0.0
    rng = np.random.default_rng(seed)
    deals = [rate(rng.permutation(high_C.size)) for _ in range(SHUFFLES)]
    low, high = np.quantile(deals, [0.025, 0.975])
    return Crowding(rate(np.arange(high_C.size)), same_row + (1 - same_row) * same_layer, (float(low), float(high)))


@dataclass(frozen=True)
class Specific:
    """A row that serves one subject more than the others."""

    subject: int
    """Index of the subject."""
    layer: int
    row: int
    z_score: float
    ratio: float
    """Mean magnitude over the subject's prompts, over that of all other prompts; infinity where that is zero."""


@dataclass(frozen=True)
class SubjectProfile:
    """Which layers and rows serve which subjects."""

    counts_S: np.ndarray  # noqa: N815
    """Prompts of each subject."""
    layer_means_SL: np.ndarray  # noqa: N815
    """Mean magnitude of the score over the rows of a layer and the prompts of a subject, float64."""
    best: tuple[Specific, ...]
    """The row with the highest z-score of each subject that has one above the threshold, highest z-score first."""
    threshold: float
    """The highest z-score that arises when subjects are shuffled among the prompts."""
    num_above: int
    """Pairs of a row and a subject with a z-score above the threshold."""
    num_pairs: int
    """S·L·D."""

    @property
    def relative_SL(self) -> np.ndarray:  # noqa: N802
        """Layer means over the layer's mean over subjects; 1 where all of a layer's scores are zero."""
        mean_L = self.layer_means_SL.mean(axis=0)
        relative_SL = np.ones_like(self.layer_means_SL)
        np.divide(self.layer_means_SL, mean_L, out=relative_SL, where=mean_L > 0)
        return relative_SL


class SubjectTally:
    """Sums of |score| by subject, and the same with subjects shuffled among the prompts."""

    def __init__(self, subject_N: np.ndarray, num_subjects: int, *, seed: int = 0) -> None:
        """`subject_N` is each prompt's subject, 0 to S−1, or `NO_SUBJECT`; prompts come in this order."""
        self.counts_S = np.bincount(subject_N[subject_N >= 0], minlength=num_subjects)
        self._labels = (subject_N, np.random.default_rng(seed).permutation(subject_N))
        self._sums: list[np.ndarray] = []
        self._total_LD = self._squares_LD = np.zeros(0)
        self._seen = 0

    def add(self, scores_NLD: np.ndarray) -> None:
        """Take in the next prompts: scores (n, L, D)."""
        if not self._sums:
            self._sums = [np.zeros((len(self.counts_S), *scores_NLD.shape[1:])) for _ in self._labels]
            self._total_LD, self._squares_LD = np.zeros(scores_NLD.shape[1:]), np.zeros(scores_NLD.shape[1:])
        piece = slice(self._seen, self._seen + len(scores_NLD))
        for index, (subject, shuffled) in enumerate(zip(*(label_N[piece] for label_N in self._labels), strict=True)):
            magnitudes_LD = np.abs(scores_NLD[index]).astype(np.float64)
            self._total_LD += magnitudes_LD
            self._squares_LD += magnitudes_LD * magnitudes_LD
            for sums_SLD, label in zip(self._sums, (subject, shuffled), strict=True):
                if label != NO_SUBJECT:
                    sums_SLD[label] += magnitudes_LD
        self._seen = piece.stop

    def result(self) -> SubjectProfile:
        """What the prompts so far say.

        The z-score of a subject and a row compares the row's mean magnitude over the subject's n prompts with what n
        prompts drawn from all N without replacement would give, which has the mean m of all prompts and the variance
        σ²/n · (N−n)/(N−1): exactly what shuffling the subjects does to it. With S·L·D pairs some z-scores are high by
        chance, and skewed scores make more of them than a normal distribution has; so the threshold is the highest of
        all pairs when the subjects are shuffled once (seeded).
        """
        real_SLD, shuffled_SLD = self._sums
        threshold = max(float(self._z_scores(shuffled_SLD, s).max()) for s in range(len(self.counts_S)))
        best, num_above = [], 0
        for subject, count in enumerate(self.counts_S):
            z_LD = self._z_scores(real_SLD, subject)
            num_above += int((z_LD > threshold).sum())
            layer, row = (int(i) for i in np.unravel_index(z_LD.argmax(), z_LD.shape))
            if z_LD[layer, row] > threshold:
                own = real_SLD[subject, layer, row] / count
                other = (self._total_LD[layer, row] - real_SLD[subject, layer, row]) / (self._seen - count)
                ratio = float(own / other) if other > 0 else math.inf
                best.append(Specific(subject, layer, row, float(z_LD[layer, row]), ratio))
        return SubjectProfile(
            counts_S=self.counts_S,
            layer_means_SL=real_SLD.mean(axis=2) / self.counts_S[:, None],
            best=tuple(sorted(best, key=lambda found: -found.z_score)),
            threshold=threshold,
            num_above=num_above,
            num_pairs=real_SLD.size,
        )

    def _z_scores(self, sums_SLD: np.ndarray, subject: int) -> np.ndarray:
        """z-scores (L, D) of one subject; zero where all prompts are alike."""
        count, total = int(self.counts_S[subject]), self._seen
        mean_LD = self._total_LD / total
        variance_LD = np.maximum(self._squares_LD / total - mean_LD**2, 0) / count * (total - count) / (total - 1)
        # Below this the variance is what rounding leaves of equal numbers.
        known_LD = variance_LD > 1e-12 * mean_LD**2 / count
        difference_LD = sums_SLD[subject] / count - mean_LD
        z_LD = np.zeros_like(mean_LD)
        np.divide(difference_LD, np.sqrt(variance_LD), out=z_LD, where=known_LD)
        return z_LD


def similar_order(values_SL: np.ndarray) -> np.ndarray:
    """An order of the S profiles, (S,), that puts like ones side by side: along their first principal component."""
    centred_SL = values_SL - values_SL.mean(axis=0)
    vectors, _, _ = np.linalg.svd(centred_SL, full_matrices=False)
    first_S = vectors[:, 0]
    # The sign of a singular vector is arbitrary: its largest entry counts as positive.
    sign = 1.0 if first_S[np.abs(first_S).argmax()] >= 0 else -1.0
    return np.argsort(sign * first_S, kind="stable")


def symmetric_log(values: np.ndarray, unit: float) -> np.ndarray:
    """sign(x)·log₁₀(1 + |x|/unit): linear well below `unit`, logarithmic well above."""
    return np.asarray(np.sign(values) * np.log10(1 + np.abs(values) / unit))


def layer_histograms(
    means_LD: np.ndarray, unit: float, num_bins: int, *, signed: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each layer by mean score: counts (L, B) and the B+1 edges on the symmetric-log axis.

    The edges are symmetric about zero and reach the largest magnitude; with an even `num_bins` zero is an edge.
    For scores that are not `signed` they begin at zero.
    """
    places_LD = symmetric_log(means_LD, unit)
    reach = float(np.abs(places_LD).max()) or 1.0
    edges = np.linspace(-reach if signed else 0.0, reach, num_bins + 1)
    return np.stack([np.histogram(places_D, edges)[0] for places_D in places_LD]), edges


def bin_rows(values_LD: np.ndarray, max_bins: int) -> tuple[np.ndarray, int]:
    """Means over neighbouring rows, (L, B) with B at most `max_bins`, and how many rows a bin has.

    The last bin may have fewer.
    """
    num_rows = values_LD.shape[1]
    bin_size = -(-num_rows // max_bins)
    starts = np.arange(0, num_rows, bin_size)
    sizes = np.diff(np.append(starts, num_rows))
    return np.add.reduceat(values_LD.astype(np.float64), starts, axis=1) / sizes, bin_size


def layer_shares(votes_LD: np.ndarray) -> np.ndarray:
    """Each layer's share of all votes, (L,), summing to 1; all zero where there are no votes."""
    votes_L = votes_LD.sum(axis=1, dtype=np.float64)
    total = votes_L.sum()
    return np.asarray(votes_L / total if total else votes_L)


def histogram_of_shares(shares: Sequence[float] | np.ndarray, num_bins: int = 20) -> np.ndarray:
    """How many of the shares, 0 to 1, fall into each of `num_bins` equal bins; 1 belongs to the last."""
    return np.histogram(shares, bins=num_bins, range=(0.0, 1.0))[0]
