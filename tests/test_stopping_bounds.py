import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.stopping.bounds import MIN_FOR_LOSS, beat_by_chance, best_at_most, clopper_pearson, spearman


@pytest.mark.parametrize(("tried", "survivors"), [(1, 1), (81, 90), (30, 4)])
def test_coin_flips_let_as_many_beat_all_survivors_as_expected(tried: int, survivors: int) -> None:
    ends = np.random.default_rng(0).uniform(size=(20_000, tried + survivors))
    beat = (ends[:, :tried] > ends[:, tried:].max(axis=1, keepdims=True)).sum(axis=1)
    assert abs(beat.mean() - beat_by_chance(tried, survivors)) < 4 * beat.std() / math.sqrt(len(beat))


SHAPES = {
    "normal": lambda rng, size: rng.normal(0.6, 0.05, size),
    "skewed": lambda rng, size: 0.8 - rng.gamma(2, 0.05, size),
    "even": lambda rng, size: rng.uniform(0.3, 0.8, size),
    "two groups": lambda rng, size: rng.normal(np.where(rng.random(size) < 0.15, 0.7, 0.5), 0.03),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("seen", "unseen"), [(MIN_FOR_LOSS, 100), (30, 800), (80, 800), (30, 20)])
def test_the_bound_on_the_best_of_the_stopped_holds_as_often_as_stated(shape: str, seen: int, unseen: int) -> None:
    rng, draw = np.random.default_rng(2), SHAPES[shape]
    truth = draw(rng, (500, unseen)).max(axis=1).mean()
    bounds = [best_at_most(ends, unseen, 0.95) for ends in draw(rng, (500, seen))]
    assert np.mean(np.array(bounds) >= truth) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 500)


def test_the_bound_on_the_best_of_the_stopped_is_that_of_the_formula() -> None:
    ends = np.array([*[0.1] * 17, 0.5, *[0.6] * 2, *[0.7] * 2, 0.8])  # the tail of 23: the best 5 over the sixth, 0.5
    scale = (0.1 + 0.1 + 0.2 + 0.2 + 0.3) / (stats.chi2.ppf(0.05, 10) / 2)
    reach = (stats.norm.ppf((50 - 0.375) / 50.25) - 0.6745) / (stats.norm.pdf(0.6745) * 4 - 0.6745)
    assert best_at_most(ends / 10, 50, 0.95) == pytest.approx((0.5 + scale * reach) / 10, rel=1e-3)
    assert best_at_most(ends, 50, 0.95) == 1  # no accuracy is higher
    assert math.isnan(best_at_most(ends[: MIN_FOR_LOSS - 1], 50, 0.95))


def test_the_rank_correlation_equals_that_of_scipy_with_the_interval_of_bonett_and_wright() -> None:
    rng = np.random.default_rng(0)
    first = pd.Series(rng.normal(size=30))
    last = first + rng.normal(size=30)
    r, low, high = spearman(first, last, 0.95)
    assert r == pytest.approx(stats.spearmanr(first, last).statistic)
    reach = 1.959964 * math.sqrt((1 + r**2 / 2) / 27)
    assert (math.atanh(low), math.atanh(high)) == pytest.approx((math.atanh(r) - reach, math.atanh(r) + reach))


def test_the_interval_of_a_rank_correlation_covers_it_as_often_as_stated() -> None:
    rng = np.random.default_rng(1)
    normal = rng.multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], size=(1000, 15))
    intervals = [spearman(pd.Series(sample[:, 0]), pd.Series(sample[:, 1]), 0.95) for sample in normal]
    truth = 6 / math.pi * math.asin(0.7 / 2)
    assert 0.93 <= np.mean([low <= truth <= high for _, low, high in intervals]) <= 0.98


def test_few_controls_have_no_interval_and_a_perfect_order_is_not_certain() -> None:
    rising = pd.Series([1.0, 2.0, 3.0, 4.0])
    assert spearman(rising[:3], rising[:3], 0.95)[0] == pytest.approx(1)
    assert all(map(math.isnan, spearman(rising[:3], rising[:3], 0.95)[1:]))
    assert spearman(rising, rising, 0.95)[1] < 0.5
    assert all(map(math.isnan, spearman(rising, rising * 0, 0.95)))


def test_the_exact_interval_of_no_success_and_of_no_trial() -> None:
    assert clopper_pearson(0, 30, 0.90) == pytest.approx((0, 1 - 0.05 ** (1 / 30)))
    assert clopper_pearson(0, 0, 0.95) == (0, 1)
