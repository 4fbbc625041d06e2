"""Paired statistics against closed forms, brute force and scipy, and the error rates of the rule built on them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import multinomial, norm, ttest_rel

from autoglm_compress.comparison.paired import (
    drop_bounds,
    drop_score,
    mcnemar,
    mcnemar_drop,
    mean_bounds,
    mean_score,
)
from autoglm_compress.comparison.verdict import (
    Verdict,
    judge_drop,
    judge_increase,
    overall,
    questions_to_decide,
    rows_to_decide,
)

COUNTS = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 200)).map(lambda n: (n[0], n[1], sum(n)))


def tails(count: int) -> list[float]:
    """The chance of each number of heads in so many throws."""
    return [math.comb(count, heads) / 2**count for heads in range(count + 1)]


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 2), (12, 12), (3, 17)])
def test_mcnemar_is_exact(lost: int, won: int):
    chances = tails(lost + won)
    as_rare = sum(chance for chance in chances if chance <= chances[lost] * (1 + 1e-9))
    assert mcnemar(lost, won) == pytest.approx(as_rare)
    assert mcnemar_drop(lost, won) == pytest.approx(sum(chances[lost:]))


def brute_score(lost: int, won: int, questions: int, drop: float) -> float:
    """The same statistic, with the likeliest model in which the drop is true found by search."""
    even = questions - lost - won

    def surprise(won_share: float) -> float:
        shares = won_share + drop, won_share, 1 - 2 * won_share - drop
        counts = lost, won, even
        return -sum(n * math.log(max(share, 1e-300)) for n, share in zip(counts, shares, strict=True) if n)

    bounds = max(0.0, -drop), (1 - drop) / 2
    share = minimize_scalar(surprise, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    variance = questions * (2 * share + drop - drop**2)
    return (lost - won - questions * drop) / math.sqrt(variance)


@pytest.mark.parametrize("counts", [(9, 3, 100), (3, 9, 100), (0, 4, 60), (4, 0, 60), (40, 20, 160), (30, 70, 101)])
@pytest.mark.parametrize("drop", [-0.3, -0.02, 0.01, 0.1, 0.4])
def test_the_score_is_that_of_the_likeliest_model(counts: tuple[int, int, int], drop: float):
    assert drop_score(*counts, drop) == pytest.approx(brute_score(*counts, drop), rel=1e-3)


@given(counts=COUNTS, drop=st.integers(-900, 900).map(lambda points: points / 1000), factor=st.integers(1, 50))
def test_the_score_grows_with_the_root_of_the_counts(counts: tuple[int, int, int], drop: float, factor: int):
    score = drop_score(*counts, drop)
    assert drop_score(*(factor * count for count in counts), drop) == pytest.approx(score * math.sqrt(factor), abs=1e-6)


def test_with_no_drop_the_score_is_mcnemars():
    assert drop_score(9, 4, 100, 0.0) == pytest.approx((9 - 4) / math.sqrt(13))


def test_bounds_that_were_published():
    # Fagerland, Lydersen, Laake, BMC Med Res Methodol 14 (2014) 8: airway hyper-responsiveness, 1 and 7 of 21.
    assert drop_bounds(1, 7, 21, 0.975) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_bounds_where_nothing_changed():
    squared = norm.ppf(0.95) ** 2
    reach = squared / (268 + squared)
    assert drop_bounds(0, 0, 268, 0.95) == pytest.approx((-reach, reach))


@given(counts=COUNTS, confidence=st.sampled_from([0.8, 0.95, 0.99]))
def test_bounds_are_where_the_score_is_the_quantile(counts: tuple[int, int, int], confidence: float):
    low, high = drop_bounds(*counts, confidence)
    lost, won, questions = counts
    assert -1 <= low <= (lost - won) / questions <= high <= 1
    for bound, expected in ((low, norm.ppf(confidence)), (high, -norm.ppf(confidence))):
        if abs(bound) < 1 - 1e-6:
            assert drop_score(*counts, bound) == pytest.approx(expected, abs=1e-3)
    swapped = drop_bounds(won, lost, questions, confidence)
    assert swapped == pytest.approx((-high, -low), abs=1e-6)


def test_all_lost_and_all_won():
    assert drop_bounds(5, 0, 5, 0.95)[1] == 1
    assert drop_bounds(0, 5, 5, 0.95)[0] == -1


def test_bounds_of_a_mean_are_those_of_scipy():
    generator = np.random.default_rng(0)
    before, after = generator.normal(3, 1, 12), generator.normal(3.1, 1, 12)
    found = mean_bounds((after - before).tolist(), 0.95)
    assert found == pytest.approx(tuple(ttest_rel(after, before).confidence_interval(0.9)))
    shifted = ttest_rel(after, before + 0.2)
    assert mean_score((after - before).tolist(), 0.2) == pytest.approx(shifted.statistic)


# The rule


def chance_of(verdict: Verdict, questions: int, changed: float, drop: float, limit: float) -> float:
    """Over all numbers of questions that can turn, exactly."""
    shares = [(changed + drop) / 2, (changed - drop) / 2, 1 - changed]
    lost, won = np.meshgrid(np.arange(questions + 1), np.arange(questions + 1), indexing="ij")
    lost, won = (counts[lost + won <= questions] for counts in (lost, won))
    chances = multinomial.pmf(np.stack([lost, won, questions - lost - won], -1), questions, shares)
    return sum(
        chance
        for chance, *counts in zip(chances.tolist(), lost.tolist(), won.tolist(), strict=True)
        if chance > 1e-8 and judge_drop(*counts, questions, limit, 0.95) is verdict
    )


@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_a_model_that_did_not_change_fails_once_in_twenty_at_most(limit: float):
    # Given how many answers turned, each is lost or won by the throw of a coin.
    for turned in range(60):
        failed = (judge_drop(lost, turned - lost, 100, limit, 0.95) is Verdict.failed for lost in range(turned + 1))
        assert sum(chance for chance, fails in zip(tails(turned), failed, strict=True) if fails) <= 0.05


@pytest.mark.parametrize("changed", [0.1, 0.3])
def test_a_drop_at_the_limit_is_decided_about_once_in_twenty_either_way(changed: float):
    for verdict in (Verdict.failed, Verdict.passed):
        assert chance_of(verdict, 200, changed, 0.05, 0.05) == pytest.approx(0.05, abs=0.02)


def test_a_drop_of_two_points_is_caught_in_all_of_mmlu_and_seldom_in_a_thousand():
    generator = np.random.default_rng(0)
    caught = {}
    for questions in (1_000, 14_042):
        turned = generator.multinomial(questions, [0.0615, 0.0385, 0.9], 500).tolist()
        verdicts = [judge_drop(lost, won, questions, 0.01, 0.95) for lost, won, _ in turned]
        caught[questions] = verdicts.count(Verdict.failed) / len(verdicts)
        assert verdicts.count(Verdict.passed) / len(verdicts) < 0.01
    assert caught[14_042] > 0.99
    assert 0.3 < caught[1_000] < 0.5


def test_verdicts():
    assert judge_drop(100, 20, 1000, 0.01, 0.95) is Verdict.failed
    assert judge_drop(20, 20, 5000, 0.01, 0.95) is Verdict.passed
    assert judge_drop(12, 8, 300, 0.01, 0.95) is Verdict.undecided
    assert judge_drop(3, 0, 300, 0.0, 0.95) is Verdict.undecided  # 1.7 standard errors, but p = 0.125
    assert judge_drop(0, 0, 300, 0.0, 0.95) is Verdict.undecided
    assert judge_drop(0, 30, 300, 0.0, 0.95) is Verdict.passed


@pytest.mark.parametrize(
    ("counts", "limit"), [((12, 8, 300), 0.01), ((5, 8, 300), 0.01), ((9, 4, 250), 0.01), ((3, 0, 300), 0.0)]
)
def test_that_many_questions_decide(counts: tuple[int, int, int], limit: float):
    needed = questions_to_decide(*counts, limit, 0.95)
    assert needed > counts[2]

    def at(times: int) -> Verdict:
        return judge_drop(*(times * count for count in counts), limit, 0.95)

    times = math.ceil(needed / counts[2])
    assert at(times) is not Verdict.undecided
    assert at(times - 1) is Verdict.undecided


def test_no_number_of_questions_decides_a_drop_at_the_limit():
    assert questions_to_decide(2, 1, 100, 0.01, 0.95) is None
    assert questions_to_decide(0, 0, 100, 0.0, 0.95) is None
    assert questions_to_decide(0, 0, 100, 0.01, 0.95) == 268  # z² (1 - limit) / limit


def test_an_increase_is_judged_by_its_bounds():
    generator = np.random.default_rng(1)
    differences = generator.normal(0.02, 0.05, 30).tolist()
    low, high = mean_bounds(differences, 0.95)
    assert judge_increase(differences, low - 1e-6, 0.95) is Verdict.failed
    assert judge_increase(differences, high + 1e-6, 0.95) is Verdict.passed
    for limit in (low + 1e-6, high - 1e-6):
        assert judge_increase(differences, limit, 0.95) is Verdict.undecided
    assert judge_increase([0.0] * 4, 0.0, 0.95) is Verdict.passed
    assert judge_increase([0.01] * 4, 0.0, 0.95) is Verdict.failed


def test_that_many_rows_decide():
    differences = [0.01, -0.02, 0.03, 0.02]
    needed = rows_to_decide(differences, 0.02, 0.95)
    times = math.ceil(needed / 4)
    assert times > 2
    assert judge_increase(differences * times, 0.02, 0.95) is Verdict.passed
    assert judge_increase(differences * (times - 1), 0.02, 0.95) is Verdict.undecided
    assert rows_to_decide([0.01, 0.03], 0.02, 0.95) is None


def test_one_failure_is_enough():
    passed, failed, undecided = Verdict
    assert overall([passed, failed, undecided]) is failed
    assert overall([passed, undecided]) is undecided
    assert overall([passed, passed]) is passed
