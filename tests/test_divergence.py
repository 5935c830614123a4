"""The mathematics of the ruler: the estimate against the definition."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from modelmint import divergence
from modelmint.divergence import Compact

pytestmark = pytest.mark.pure


def log_softmax(logits: Any) -> Any:
    """The definition, in float64 throughout."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def pair(positions: int, vocabulary: int, noise: float, seed: int = 0) -> tuple[Any, Any, Any]:
    """Logits of a reference as peaked as a language model's, of a noisy variant, and targets."""
    generator = np.random.default_rng(seed)
    reference = (3 * generator.standard_normal((positions, vocabulary))).astype(np.float32)
    variant = reference + (noise * generator.standard_normal(reference.shape)).astype(np.float32)
    return reference, variant, generator.integers(0, vocabulary, positions)


def compress(logits: Any, targets: Any, top: int, sample: int, seed: int = 0) -> Compact:
    return divergence.compress(logits, targets, top=top, sample=sample, generator=np.random.default_rng(seed))


def logits_of(low: float, high: float) -> Any:
    return arrays(np.float32, (4, 12), elements=st.floats(low, high, width=32))


@given(logits_of(-30, 30), logits_of(-30, 30))
@settings(max_examples=200, deadline=None)
def test_estimate_is_exact_where_every_token_is_kept(reference: Any, variant: Any) -> None:
    targets = np.array([0, 3, 6, 11])
    compact = compress(reference, targets, top=8, sample=4)
    assert compact.exact
    found = divergence.compare(compact, variant, targets)
    log_p, log_q = log_softmax(reference), log_softmax(variant)
    # The record is float32: log-probabilities near -60 have an error of 2e-6.
    np.testing.assert_allclose(found.divergence, divergence.exact_kl(log_p, log_q), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.surprisal, -log_q[np.arange(4), targets], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.reference_surprisal, -log_p[np.arange(4), targets], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found.agrees, reference.argmax(axis=1) == variant.argmax(axis=1))


@given(logits_of(-500, 500), logits_of(-500, 500), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_no_divergence_is_negative_and_that_to_itself_is_zero(reference: Any, variant: Any, top: int) -> None:
    targets = np.zeros(4, np.int64)
    compact = compress(reference, targets, top=top, sample=2)
    found = divergence.compare(compact, variant, targets).divergence
    assert (found >= -1e-12).all()
    assert np.isfinite(found).all()
    same = divergence.compare(compact, reference, targets)
    # Where the rest has lost all its mass the float32 of its log-probabilities is the only error.
    np.testing.assert_allclose(same.divergence, 0, atol=1e-9)
    assert same.agrees.all()


@pytest.mark.parametrize("noise", [0.02, 0.3, 1.5])
def test_estimate_is_unbiased_over_the_draw(noise: float) -> None:
    reference, variant, targets = pair(positions=6, vocabulary=1500, noise=noise)
    exact = divergence.exact_kl(log_softmax(reference), log_softmax(variant))
    runs = np.array(
        [
            divergence.compare(compress(reference, targets, 16, 8, seed), variant, targets).divergence
            for seed in range(600)
        ]
    )
    error = runs.mean(axis=0) - exact
    standard_error = runs.std(axis=0, ddof=1) / math.sqrt(len(runs))
    assert (np.abs(error) < 4.5 * standard_error).all(), error / standard_error
    # The draw matters here: a test of an estimate that hardly varies would prove nothing.
    assert (runs.std(axis=0) > 0.01 * exact).all()


def test_top_alone_is_biased_and_the_estimate_is_not() -> None:
    """The most probable 256 of 20,000 miss a share of the divergence that grows with the mass of the rest."""
    reference, variant, targets = pair(positions=400, vocabulary=20_000, noise=0.3)
    exact = divergence.exact_kl(log_softmax(reference), log_softmax(variant)).mean()
    compact = compress(reference, targets, 256, 64)
    estimate = divergence.compare(compact, variant, targets).divergence.mean()
    log_q = np.take_along_axis(log_softmax(variant), compact.top_ids.astype(int), axis=1)
    p = np.exp(compact.top_log_probs.astype(float))
    top_only = (p * (compact.top_log_probs - log_q)).sum(axis=1).mean()
    assert abs(estimate / exact - 1) < 0.01
    assert abs(top_only / exact - 1) > 0.1


def test_estimate_is_tighter_than_a_plain_sample_mean_for_a_nearly_lossless_variant() -> None:
    reference, variant, targets = pair(positions=200, vocabulary=5000, noise=0.02)
    exact = divergence.exact_kl(log_softmax(reference), log_softmax(variant))
    compact = compress(reference, targets, 64, 64)
    ours = divergence.compare(compact, variant, targets).divergence - exact
    log_q = log_softmax(variant)
    gap = compact.sample_log_probs - np.take_along_axis(log_q, compact.sample_ids.astype(int), axis=1)
    top = np.exp(compact.top_log_probs.astype(float)) * (
        compact.top_log_probs - np.take_along_axis(log_q, compact.top_ids.astype(int), axis=1)
    )
    plain = top.sum(axis=1) + compact.rest_mass * gap.mean(axis=1) - exact
    assert np.sqrt((ours**2).mean()) < np.sqrt((plain**2).mean()) / 10


def test_divergence_of_a_broken_variant_does_not_read_too_low() -> None:
    """What a broken kernel makes of a peaked model: its mass lies where the reference has next to none."""
    generator = np.random.default_rng(1)
    reference = (6 * generator.standard_normal((60, 8000))).astype(np.float32)
    variant = (6 * generator.standard_normal(reference.shape)).astype(np.float32)
    targets = np.zeros(60, np.int64)
    exact = divergence.exact_kl(log_softmax(reference), log_softmax(variant)).mean()
    found = divergence.compare(compress(reference, targets, 256, 64), variant, targets).divergence.mean()
    assert exact > 10
    assert abs(found - exact) < 0.05


def test_mass_of_the_variant_that_underflows_is_told_by_the_tokens_drawn() -> None:
    reference = np.zeros((1, 40), np.float32)
    variant = np.full((1, 40), -900, np.float32)
    variant[0, 0] = 0
    log_q = np.where(np.arange(40) == 0, 0.0, -900.0)
    found = divergence.compare(compress(reference, np.array([0]), 2, 2), variant, np.array([0])).divergence
    np.testing.assert_allclose(found, (1 / 40 * (np.log(1 / 40) - log_q)).sum(), rtol=1e-6)


def test_error_of_an_estimate_is_that_of_repeated_draws() -> None:
    reference, variant, targets = pair(positions=20, vocabulary=1500, noise=0.3)
    runs = [divergence.compare(compress(reference, targets, 16, 32, seed), variant, targets) for seed in range(200)]
    claimed = np.sqrt(np.mean([run.error**2 for run in runs], axis=0))
    seen = np.std([run.divergence for run in runs], axis=0, ddof=1)
    np.testing.assert_allclose(claimed, seen, rtol=0.35)
    assert (divergence.compare(compress(reference, targets, 1000, 500), variant, targets).error == 0).all()
    assert np.isinf(divergence.compare(compress(reference, targets, 16, 1), variant, targets).error).all()


def test_tail_is_told_only_where_the_draw_is_large_enough() -> None:
    generator = np.random.default_rng(4)
    exact = generator.exponential(size=(12, 255))
    truth = divergence.quantile_by_window(exact, 0.99)
    noise = np.full(exact.shape, 0.05)
    little = divergence.tail_by_window(exact + noise * generator.standard_normal(exact.shape), noise, 0.99)
    assert little is not None
    assert abs(little.value - truth.value) < little.spread
    assert little.spread > truth.spread * 0.8
    assert divergence.tail_by_window(exact, np.full(exact.shape, 1.0), 0.99) is None
    # Exact values have a tail whatever its spread, even none.
    assert divergence.tail_by_window(np.ones((3, 5)), np.zeros((3, 5)), 0.99) == divergence.Estimate(1.0, 0.0)


def test_drawn_tokens_come_from_the_rest_in_proportion_to_their_probability() -> None:
    logits = np.log(np.array([[0.5, 0.2, 0.1, 0.15, 0.05]], np.float32))
    counts = np.zeros(5)
    for seed in range(2000):
        compact = compress(logits, np.array([0]), 2, 2, seed)
        assert compact.top_ids.tolist() == [[0, 1]]
        counts += np.bincount(compact.sample_ids[0], minlength=5)
    np.testing.assert_allclose(compact.rest_mass, [0.3], rtol=1e-6)
    # 4000 draws: the standard error of a share near one half is below 0.008.
    np.testing.assert_allclose(counts / counts.sum(), [0, 0, 1 / 3, 1 / 2, 1 / 6], atol=0.03)


@pytest.mark.parametrize("vocabulary", [40, 203, 5000])
def test_tokens_drawn_from_many_groups_come_in_proportion_too(vocabulary: int) -> None:
    logits, _, targets = pair(positions=1, vocabulary=vocabulary, noise=0)
    weights = np.exp(log_softmax(logits / 3)[0])
    logits = np.log(weights, dtype=np.float32)[None]
    drawn = [compress(logits, targets, 4, 32, seed) for seed in range(400)]
    rest = weights.copy()
    rest[drawn[0].top_ids[0]] = 0
    counts = np.bincount(np.concatenate([it.sample_ids[0] for it in drawn]), minlength=vocabulary)
    assert counts[rest == 0].sum() == 0
    # In tenths of the vocabulary, each with several hundred of the 12,800 draws.
    shares = [
        [part.sum() for part in np.array_split(array, 10)] for array in (counts / counts.sum(), rest / rest.sum())
    ]
    np.testing.assert_allclose(shares[0], shares[1], rtol=0.1)


@given(arrays(np.float32, (2, 300), elements=st.integers(-3, 3)), st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_top_tokens_are_the_first_of_a_stable_sort(logits: Any, top: int) -> None:
    compact = compress(logits, np.array([0, 0]), top=top, sample=2)
    np.testing.assert_array_equal(compact.top_ids, np.argsort(-logits, axis=1, kind="stable")[:, :top])


def test_rest_without_mass_adds_nothing() -> None:
    logits = np.full((1, 9), -300, np.float32)
    logits[0, 4] = 0
    compact = compress(logits, np.array([1]), 2, 2)
    assert compact.rest_mass.tolist() == [0.0]
    found = divergence.compare(compact, np.zeros((1, 9), np.float32), np.array([1]))
    assert found.divergence[0] == pytest.approx(math.log(9))
    assert found.reference_surprisal[0] == pytest.approx(300)


def test_equally_probable_tokens_are_kept_in_the_order_of_their_ids() -> None:
    logits = np.zeros((1, 30), np.float32)
    logits[0, [7, 21]] = 2
    compact = compress(logits, np.array([0]), 4, 2)
    assert compact.top_ids[0, :2].tolist() == [7, 21]
    # llama.cpp and numpy both take the first of equals, so a variant with the same tie agrees.
    assert divergence.compare(compact, logits, np.array([0])).agrees.all()


@pytest.mark.parametrize(("vocabulary", "kind"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_are_stored_in_the_smallest_type(vocabulary: int, kind: type) -> None:
    logits = np.zeros((1, vocabulary), np.float32)
    logits[0, -1] = 1
    compact = compress(logits, np.array([0]), 3, 2)
    assert compact.top_ids.dtype == compact.sample_ids.dtype == kind
    assert compact.top_ids[0, 0] == vocabulary - 1


def test_same_seed_gives_the_same_record() -> None:
    reference, _, targets = pair(positions=20, vocabulary=800, noise=0.1)
    first, second = (compress(reference, targets, 16, 8, 5) for _ in range(2))
    for name in vars(first):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert (compress(reference, targets, 16, 8, 6).sample_ids != first.sample_ids).any()


@pytest.mark.parametrize(
    ("bad", "finite"), [(np.nan, False), (np.inf, False), (-np.inf, False), (3e38, True), (-3e38, True)]
)
def test_finite_logits_are_told_from_others(bad: float, finite: bool) -> None:
    logits = np.ones((40, 700), np.float32)
    logits[17, 300:303] = bad
    assert divergence.all_finite(logits) is finite


def test_standard_error_counts_windows_where_positions_repeat_each_other() -> None:
    means = np.array([1.0, 2.0, 4.0, 5.0])
    alike = np.repeat(means[:, None], 100, axis=1)
    found = divergence.mean_by_window(alike)
    assert found.value == pytest.approx(3.0)
    assert found.spread == pytest.approx(means.std(ddof=1) / 2)
    # As independent observations the 400 positions would claim a tenth of that.
    assert found.spread > 9 * alike.std(ddof=1) / math.sqrt(alike.size)


def test_standard_error_of_a_single_window_comes_from_its_positions() -> None:
    values = np.array([[1.0, 2.0, 3.0, 4.0]])
    assert divergence.mean_by_window(values).spread == pytest.approx(values.std(ddof=1) / 2)
    assert divergence.mean_by_window(np.array([[1.0]])) == divergence.Estimate(1.0, 0.0)


def test_spread_of_a_quantile_is_that_of_repeated_samples() -> None:
    generator = np.random.default_rng(3)
    samples = [generator.exponential(size=(40, 50)) for _ in range(200)]
    found = [divergence.quantile_by_window(sample, 0.9) for sample in samples]
    assert np.mean([f.value for f in found]) == pytest.approx(-math.log(0.1), rel=0.01)
    assert np.mean([f.spread for f in found]) == pytest.approx(np.std([f.value for f in found]), rel=0.25)
