"""How far one predictive distribution is from another, from a compact record of the first.

For a reference distribution p and a variant's q over one vocabulary, KL(p, q) = sum p * g(log q - log p) with
g(d) = exp(d) - 1 - d, because sum p * (q / p - 1) vanishes. Every term is at least 0, so nearly equal distributions
lose no digits to cancellation.

The record keeps the K most probable tokens of p, the mass P of the rest, and M tokens drawn from the rest in proportion
to p. The variant's own mass Q of that rest is summed exactly from its logits. By the chain rule the divergence is that
of the top and of the rest taken as one token, which is exact, and P times that inside the rest, which is a sample mean:

    KL = sum_top p * g(log q - log p) + P * g(log Q - log P) + P * mean_sampled g(log(q / Q) - log(p / P))

With Q / P as one more exact term the sample only has to tell how p and q differ *inside* the rest. Without it (g of
log q - log p) the estimate is as unbiased, but for a broken variant, whose q puts much mass where p has next to none,
nearly every draw misses that mass, and the divergence reads too low by it.

Laws, tested under the same words:

* the estimate is unbiased over the draw, and exact where the vocabulary has at most K + M tokens;
* no divergence is negative, and that of a distribution to itself is 0;
* whole rows of logits are only ever read a few at a time, so memory does not grow with the vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.integer]

ROWS = 16
"""Rows of logits worked on at once: 16 of 50,000 float32 stay in the cache of a core."""
GROUP = 64
"""Tokens whose mass is summed first when some are drawn: only the groups that are hit are looked at one by one."""


@dataclass(frozen=True)
class Compact:
    """Log-probabilities of n positions, compactly.

    Attributes:
        top_ids: shape (n, K), the most probable tokens, most probable first, equals by id.
        top_log_probs: shape (n, K), float32.
        sample_ids: shape (n, M), tokens drawn from the rest with replacement; (n, 0) where all tokens are in `top_ids`.
        sample_log_probs: shape (n, M), float32.
        rest_mass: shape (n,), the probability of all tokens outside `top_ids`, summed directly.
        target_log_probs: shape (n,), of the tokens that really came next.
    """

    top_ids: Integers
    top_log_probs: Floats
    sample_ids: Integers
    sample_log_probs: Floats
    rest_mass: Floats
    target_log_probs: Floats

    @property
    def exact(self) -> bool:
        """Whether every token of the vocabulary is kept."""
        return bool(self.sample_ids.shape[1] == 0)


@dataclass(frozen=True)
class Comparison:
    """What n positions say about a variant; each array has shape (n,).

    Attributes:
        divergence: KL divergence of the variant from the reference, in nats.
        error: standard error of each divergence from the draw, a little too large as the draw is stratified; 0 where
            the divergence is exact.
        agrees: whether both hold the same token for the most probable one.
        surprisal: minus the log-probability that the variant gave the token that came next, in nats.
        reference_surprisal: the same for the reference.
    """

    divergence: Doubles
    error: Doubles
    agrees: NDArray[np.bool_]
    surprisal: Doubles
    reference_surprisal: Doubles


@dataclass(frozen=True)
class Estimate:
    """A figure and its uncertainty in the same unit."""

    value: float
    spread: float


def id_type(vocabulary: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest of the two types that token ids of a vocabulary are stored in."""
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


def log_normalizer(logits: Floats, top_ids: Integers | None = None) -> tuple[Doubles, Doubles]:
    """The logarithm of sum exp of each row, and the probability of all tokens outside the row's `top_ids`.

    Exponentials are float32, their sums and logarithms float64.

    Args:
        logits: shape (n, vocabulary).
        top_ids: shape (n, K); None for none, where the probability is 1.

    Returns:
        Two arrays of shape (n,).
    """
    result, rest = np.empty(len(logits)), np.ones(len(logits))
    scratch = np.empty((min(ROWS, len(logits)), logits.shape[1]), np.float32)
    for start in range(0, len(logits), ROWS):
        rows = slice(start, start + ROWS)
        powers, total, result[rows] = _powers(logits[rows], scratch)
        if top_ids is not None:
            np.put_along_axis(powers, top_ids[rows].astype(np.int64), 0.0, axis=1)
            rest[rows] = powers.sum(axis=1, dtype=np.float64) / total
    return result, rest


def all_finite(logits: Floats) -> bool:
    """Whether no logit is NaN or infinite."""
    with np.errstate(invalid="ignore", over="ignore"):
        total = float(logits.sum())
    # A finite sum has finite terms; an infinite one may only be an overflow.
    return math.isfinite(total) or bool(np.isfinite(logits).all())


def compress(logits: Floats, targets: Integers, *, top: int, sample: int, generator: np.random.Generator) -> Compact:
    """Keep the essence of the reference's logits.

    Args:
        logits: shape (n, vocabulary), finite.
        targets: shape (n,), the tokens that came next.
        top: K, how many of the most probable tokens to keep.
        sample: M, how many to draw from the rest.
        generator: of the draw.
    """
    vocabulary = logits.shape[1]
    exact = vocabulary <= top + sample
    kept, drawn = (vocabulary, 0) if exact else (top, sample)
    normalizer, ids = np.empty(len(logits)), id_type(vocabulary)
    scratch = np.empty((min(ROWS, len(logits)), vocabulary), np.float32)
    parts: list[tuple[Integers, Integers, Doubles]] = []
    for start in range(0, len(logits), ROWS):
        block = logits[start : start + ROWS]
        powers, total, normalizer[start : start + ROWS] = _powers(block, scratch)
        top_ids = _most_probable(block, kept)
        if exact:
            sample_ids: Integers = np.empty((len(block), 0), np.int64)
            mass = np.zeros(len(block))
        else:
            np.put_along_axis(powers, top_ids, 0.0, axis=1)
            sample_ids, mass = _draw(powers, drawn, top_ids[:, :1], generator)
            mass /= total
        parts.append((top_ids, sample_ids, mass))
    all_top = np.concatenate([part[0] for part in parts])
    all_sample = np.concatenate([part[1] for part in parts])
    return Compact(
        top_ids=all_top.astype(ids),
        top_log_probs=_log_probs(logits, normalizer, all_top).astype(np.float32),
        sample_ids=all_sample.astype(ids),
        sample_log_probs=_log_probs(logits, normalizer, all_sample).astype(np.float32),
        rest_mass=np.concatenate([part[2] for part in parts]).astype(np.float32),
        target_log_probs=_log_probs(logits, normalizer, targets[:, None])[:, 0].astype(np.float32),
    )


def compare(reference: Compact, logits: Floats, targets: Integers) -> Comparison:
    """Hold a variant's logits against the reference, position by position.

    Args:
        reference: of the same positions.
        logits: shape (n, vocabulary), finite, over the same vocabulary.
        targets: shape (n,), the tokens that came next.
    """
    normalizer, q_rest = log_normalizer(logits, None if reference.exact else reference.top_ids)
    divergence = _terms(reference.top_log_probs, _log_probs(logits, normalizer, reference.top_ids)).sum(axis=1)
    error = np.zeros(len(logits))
    if not reference.exact:
        rest = _rest(q_rest, reference, _log_probs(logits, normalizer, reference.sample_ids))
        divergence += rest.mean(axis=1)
        count = rest.shape[1]
        error = rest.std(axis=1, ddof=1) / math.sqrt(count) if count > 1 else np.full(len(logits), np.inf)
    return Comparison(
        divergence=divergence,
        error=error,
        agrees=logits.argmax(axis=1) == reference.top_ids[:, 0],
        surprisal=-_log_probs(logits, normalizer, targets[:, None])[:, 0],
        reference_surprisal=-reference.target_log_probs.astype(np.float64),
    )


def exact_kl(log_p: Floats | Doubles, log_q: Floats | Doubles) -> Doubles:
    """KL divergence of q from p by its definition, for log-probabilities of shape (n, vocabulary), in nats."""
    p = log_p.astype(np.float64)
    result: Doubles = (np.exp(p) * (p - log_q.astype(np.float64))).sum(axis=1)
    return result


def mean_by_window(values: Doubles) -> Estimate:
    """The mean over windows and positions, with a standard error that allows for windows being alike inside.

    Args:
        values: shape (windows, positions). Positions of one window share a text, so the means of the windows are the
            observations; of a single window the positions have to serve.
    """
    groups = values.mean(axis=1) if len(values) > 1 else values[0]
    spread = groups.std(ddof=1) / math.sqrt(len(groups)) if len(groups) > 1 else 0.0
    return Estimate(float(values.mean()), float(spread))


def quantile_by_window(values: Doubles, quantile: float) -> Estimate:
    """A quantile over windows and positions, with half the width of Woodruff's interval of one standard error.

    Args:
        values: shape (windows, positions).
        quantile: between 0 and 1.
    """
    value = float(np.quantile(values, quantile))
    error = mean_by_window((values <= value).astype(np.float64)).spread
    low, high = np.quantile(values, [max(0.0, quantile - error), min(1.0, quantile + error)])
    return Estimate(value, float(high - low) / 2)


def tail_by_window(values: Doubles, errors: Doubles, quantile: float) -> Estimate | None:
    """A high quantile of values that have sampling errors, or None where these could have made the tail.

    An error widens the distribution, so the quantile of noisy values lies above that of true ones. It can be told apart
    from the quantile's own uncertainty only where the errors around it are larger than half of that.

    Args:
        values: shape (windows, positions).
        errors: standard errors of the values; 0 where they are exact.
        quantile: above one half.
    """
    found = quantile_by_window(values, quantile)
    # Wide enough to hold some values on either side of the quantile.
    tail = errors[values >= np.quantile(values, 1 - 3 * (1 - quantile))]
    error = math.sqrt(float((tail**2).mean()))
    if error > found.spread / 2:
        return None
    return Estimate(found.value, math.hypot(found.spread, error))


def _powers(block: Floats, scratch: Floats) -> tuple[Floats, Doubles, Doubles]:
    """Exponentials of logits over those of each row's largest, their sums, and the logarithms of sum exp."""
    peak = block.max(axis=1, keepdims=True)
    powers = np.subtract(block, peak, out=scratch[: len(block)])
    np.exp(powers, out=powers)
    total = powers.sum(axis=1, dtype=np.float64)
    return powers, total, peak[:, 0] + np.log(total)


def _log_probs(logits: Floats, normalizer: Doubles, ids: Integers) -> Doubles:
    """Log-probabilities of chosen tokens, in float64 so that small differences survive."""
    result: Doubles = np.take_along_axis(logits, ids.astype(np.int64), axis=1).astype(np.float64)
    result -= normalizer[:, None]
    return result


def _rest(q_rest: Doubles, reference: Compact, log_q: Doubles) -> Doubles:
    """What the tokens outside the top add, as each one drawn says: exactly as one token, inside of it by chance.

    Returns:
        Shape (n, M); the estimate is the mean of each row.
    """
    p_rest = reference.rest_mass.astype(np.float64)
    tiny = np.finfo(np.float64).tiny
    log_p_rest = np.log(np.maximum(p_rest, tiny))
    # Where q's mass underflows its logarithm is unknown, and the drawn tokens have to tell all of it.
    log_q_rest = np.where(q_rest > 0, np.log(np.maximum(q_rest, tiny)), log_p_rest)
    inside = (log_q - log_q_rest[:, None]) - (reference.sample_log_probs - log_p_rest[:, None])
    drawn = np.expm1(np.minimum(inside, 700.0)) - inside
    return _terms(log_p_rest, log_q_rest)[:, None] + np.where(p_rest > 0, p_rest, 0.0)[:, None] * drawn


def _terms(log_p: Floats | Doubles, log_q: Doubles) -> Doubles:
    """The terms p * g(log q - log p); from q itself where p is so small that their quotient overflows."""
    p_log = log_p.astype(np.float64)
    p, d = np.exp(p_log), log_q - p_log
    near: Doubles = p * (np.expm1(np.minimum(d, 1.0)) - d)
    return np.where(d < 1.0, near, np.exp(log_q) - p - p * d)


def _most_probable(block: Floats, count: int) -> Integers:
    """Ids of the `count` largest logits of each row, largest first, equals by id."""
    vocabulary = block.shape[1]
    if count == vocabulary:
        return np.argsort(-block, axis=1, kind="stable")
    # Of twice as many groups as ids are wanted, the maxima of half tell a bound that enough logits reach and few more:
    # sorting those is ten times quicker than partitioning the row.
    width = vocabulary // (2 * count)
    heads = block[:, : 2 * count * width].reshape(len(block), 2 * count, width).max(axis=2) if width > 1 else block
    bounds = np.partition(heads, -count, axis=1)[:, -count]
    ids = np.empty((len(block), count), np.int64)
    for row, (values, bound) in enumerate(zip(block, bounds, strict=True)):
        enough = np.flatnonzero(values >= bound)
        ids[row] = enough[np.argsort(-values[enough], kind="stable")[:count]]
    return ids


def _draw(rest: Floats, count: int, fallback: Integers, generator: np.random.Generator) -> tuple[Integers, Doubles]:
    """Draw tokens of each row in proportion to `rest`, one from each of `count` equal shares of its mass.

    Such a stratified draw is as unbiased as an independent one and never less precise. A row without mass gives
    `fallback`.

    Returns:
        Ids of shape (rows, count), and the mass of each row.
    """
    rows, vocabulary = rest.shape
    groups = -(-vocabulary // GROUP)
    padded = np.zeros((rows, groups * GROUP), np.float32)
    padded[:, :vocabulary] = rest
    members = padded.reshape(rows, groups, GROUP)
    heights = np.cumsum(members.sum(axis=2, dtype=np.float64), axis=1)
    mass = heights[:, -1]
    points = (np.arange(count) + generator.random((rows, count))) / count * mass[:, None]
    ids = np.empty((rows, count), np.int64)
    for row, height in enumerate(heights):
        if mass[row] == 0:
            ids[row] = fallback[row]
            continue
        group = np.searchsorted(height, _below(points[row], mass[row]), side="right")
        within = np.cumsum(members[row, group], axis=1, dtype=np.float64)
        point = points[row] - np.where(group > 0, height[group - 1], 0.0)
        ids[row] = group * GROUP + (within <= _below(point, within[:, -1])[:, None]).sum(axis=1)
    return ids, mass


def _below(points: Doubles, end: Doubles | np.float64) -> Doubles:
    """The points, below the end even after rounding, so that what is found there has a share of its own."""
    return np.minimum(points, np.nextafter(end, 0.0))
