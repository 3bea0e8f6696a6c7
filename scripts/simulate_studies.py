"""Print the tables of docs/statistics.md: error rates, power and coverage in simulated studies. It takes 2 minutes.

Each table has a control: what a method without the correction would do.
"""

from collections.abc import Callable, Iterator
from functools import cache
from math import ceil, sqrt

import numpy as np
from estimate_scaling import table
from numpy.typing import NDArray
from scipy import stats

from wmtp.statistics.clustered import clustered_estimate, clustered_standard_error
from wmtp.statistics.decisions import Decision, Look, decide
from wmtp.statistics.power import planned_power, planned_study, power, seeds_needed
from wmtp.statistics.sequential import two_sided_boundaries
from wmtp.statistics.token_factor import HorizonPoint, TokenRatio, mean_token_factor, token_ratio

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Floats]
STUDIES, RESAMPLES, LEVEL = 2_000, 2_000, 0.05
SIZES = tuple(range(3, 9))
"""Numbers of seeds at the looks of the simulated studies."""
NUM_ARMS = (1, 7, 12)


def gamma_difference(generator: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Return differences of gamma variables with scales 1 and ½, with mean 0, standard deviation 1 and skewness 0.9."""
    return np.asarray((generator.gamma(2, 1, shape) - generator.gamma(2, 0.5, shape) - 1) / sqrt(2.5))


def value_differences(generator: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Return differences between the values of arms and of one baseline for all arms, which have skewness 2.

    Without a true difference, such differences are symmetric although the values are not.
    """
    has_arms = len(shape) > 2
    baseline = generator.exponential(size=(shape[0], 1, shape[-1]) if has_arms else shape)
    return np.asarray((generator.exponential(size=shape) - baseline) / sqrt(2))


DIFFERENCES: dict[str, Draw] = {
    "normal": lambda generator, shape: generator.standard_normal(shape),
    "of skewed values": lambda generator, shape: value_differences(generator, shape),
    "heavy-tailed (t₃)": lambda generator, shape: generator.standard_t(3, shape) / sqrt(3),
    "skewness 0.9": gamma_difference,
    "skewness 2 (exponential)": lambda generator, shape: generator.exponential(size=shape) - 1,
}
"""Distributions of differences with mean 0 and standard deviation 1.

The arms are independent, except that those "of skewed values" share a baseline.
"""


def moments(studies: Floats, sizes: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Return the means and the standard errors at each look, as float[study, arm, look].

    Args:
        studies: float[study, arm, pair], the differences.
        sizes: number of pairs at each look.
    """
    means = np.stack([studies[..., :size].mean(axis=-1) for size in sizes], axis=-1)
    errors = np.stack([studies[..., :size].std(axis=-1, ddof=1) / sqrt(size) for size in sizes], axis=-1)
    return means, errors


def decisions(studies: Floats, sizes: tuple[int, ...], delta: float | None = None) -> Iterator[list[Decision]]:
    """Yield the decisions on the arms of each study of float[study, arm, pair]. Negative differences are better."""
    for means, errors in zip(*(each.tolist() for each in moments(studies, sizes)), strict=True):
        looks = {
            str(number): [Look(*look) for look in zip(sizes, *arm, strict=True)]
            for number, arm in enumerate(zip(means, errors, strict=True))
        }
        yield [each.decision for each in decide(looks, sizes, delta=delta, lower_is_better=True).values()]


def false_differences() -> str:
    """Return the share of studies without any difference that find one, and that of t tests without correction."""
    rows = []
    for name, draw in DIFFERENCES.items():
        for num_arms in NUM_ARMS:
            studies = draw(np.random.default_rng(num_arms), (STUDIES, num_arms, SIZES[-1]))
            found = np.mean([{"better", "worse"} & set(each) != set() for each in decisions(studies, SIZES)])
            means, errors = moments(studies, SIZES)
            bounds = stats.t.isf(LEVEL / 2, np.array(SIZES) - 1)
            naive = np.mean((np.abs(means) > bounds * errors).any(axis=(1, 2)))
            rows.append([name, num_arms, f"{found:.3f}", f"{naive:.3f}"])
    return table(["differences", "arms", "any false better or worse", "5 % tests after each seed"], rows)


def false_equalities(delta: float = 1.5) -> str:
    """Return the share of studies that find an arm the same whose true difference is δ, here in standard deviations."""
    rows = []
    for name, draw in DIFFERENCES.items():
        for num_arms in NUM_ARMS:
            studies = draw(np.random.default_rng(num_arms), (STUDIES, num_arms, SIZES[-1])) + delta
            found = np.mean(["the same" in each for each in decisions(studies, SIZES, delta)])
            means, errors = moments(studies, SIZES)
            bounds = stats.t.isf(LEVEL, np.array(SIZES) - 1)
            naive = np.mean((delta - np.abs(means) > bounds * errors).any(axis=(1, 2)))
            rows.append([name, num_arms, f"{found:.3f}", f"{naive:.3f}"])
    return table(["differences", "arms", "any false “the same”", "5 % tests after each seed"], rows)


def planned_powers() -> str:
    """Return the share of studies that find a planted effect, with the seeds that `planned_power` plans for it."""
    rows = []
    for effect in (1.0, 1.5, 2.0, 3.0):
        for num_arms in NUM_ARMS:
            last = max(4, seeds_needed(effect, 1.0, num_arms) or 0)  # a single look needs at most as many
            while planned_power(effect, looks_to(last), num_arms) < 0.8:
                last += 1
            sizes, planned = looks_to(last), planned_study(effect, looks_to(last), num_arms)
            studies = np.random.default_rng(last).standard_normal((STUDIES, num_arms, last))
            studies[:, 0] -= effect
            found = np.mean([each[0] == "better" for each in decisions(studies, sizes)])
            once = power(effect, last, num_arms)
            rows.append([effect, num_arms, last, f"{planned.num_pairs:.1f}", f"{planned.power:.3f}", f"{found:.3f}",
                         f"{once:.3f}"])  # fmt: skip
    head = ["effect", "arms", "last look", "mean seeds", "planned power", "found", "power of one look at the end"]
    return table(head, rows)


def looks_to(last: int) -> tuple[int, ...]:
    """Return looks after each seed from 3 to `last`."""
    return tuple(range(3, last + 1))


def single_look_coverage() -> str:
    """Return the coverage of 95 % intervals for one look: t, Johnson's modified t, and the symmetric bootstrap-t.

    Source of Johnson's interval: Johnson 1978, Modified t Tests and Confidence Intervals for Asymmetrical Populations.
    """
    rows = []
    for name, draw in DIFFERENCES.items():
        for num_pairs in (3, 5, 10):
            generator = np.random.default_rng(num_pairs)
            studies = draw(generator, (2 * STUDIES, num_pairs))
            means, deviations = studies.mean(axis=1), studies.std(axis=1, ddof=1)
            standardized = (studies - means[:, None]) / deviations[:, None]
            width = float(stats.t.isf(LEVEL / 2, num_pairs - 1)) * deviations / sqrt(num_pairs)
            third = (standardized**3).sum(axis=1) * num_pairs / (num_pairs - 1) / (num_pairs - 2)
            center = means + third * deviations / (6 * num_pairs)
            bootstrap = bootstrap_widths(standardized, generator) * deviations / sqrt(num_pairs)
            covered = [np.abs(means) <= width, np.abs(center) <= width, np.abs(means) <= bootstrap]
            rows.append([name, num_pairs, *(f"{each.mean():.3f}" for each in covered),
                         f"{np.median(bootstrap / width):.2f}"])  # fmt: skip
    head = ["differences", "pairs", "t", "Johnson's t", "bootstrap-t", "width of bootstrap-t / t"]
    return table(head, rows)


def bootstrap_widths(standardized: Floats, generator: np.random.Generator) -> Floats:
    """Return the half width of the symmetric bootstrap-t interval of each study, in standard errors of the mean.

    Resampling makes the variance too small by a factor of 1 − 1/n. Normal noise restores half of this loss, with each
    value used once with each sign. Without noise, three pairs would have no finite interval.

    Args:
        standardized: float[study, pair], differences with mean 0 and standard deviation 1 in each study.
        generator: generator of the resamples and of the noise, which are the same for all studies.

    Source: Hall 1988, On Symmetric Bootstrap Confidence Intervals. The noise is from Hesterberg 2015, What Teachers
    Should Know About the Bootstrap (arXiv 1411.5279).
    """
    num = standardized.shape[1]
    chosen = generator.integers(num, size=(RESAMPLES // 2, num))
    noise = generator.standard_normal(chosen.shape) * sqrt(0.5 / num)
    is_chosen = (chosen[:, :, None] == np.arange(num)).astype(np.float64)
    counts, noise_sums = is_chosen.sum(axis=1), np.einsum("rij,ri->rj", is_chosen, noise)
    sums, squares, mixed = standardized @ counts.T, standardized**2 @ counts.T, standardized @ noise_sums.T
    statistics = []
    for sign in (1, -1):
        means = (sums + sign * noise.sum(axis=1)) / num
        variances = (squares + 2 * sign * mixed + (noise**2).sum(axis=1)) / num - means**2
        statistics.append(np.abs(means) / np.sqrt(variances / (num - 1)))
    found = np.concatenate(statistics, axis=1)
    rank = ceil((1 - LEVEL) * (1 + RESAMPLES)) - 1
    return np.partition(found, rank, axis=1)[:, rank]


def repeated_coverage() -> str:
    """Return the coverage of repeated intervals at each look, and of t intervals at all looks together as a control."""
    rows = []
    for name, draw in DIFFERENCES.items():
        means, errors = moments(draw(np.random.default_rng(1), (4 * STUDIES, SIZES[-1])), SIZES)
        is_covered = np.abs(means) <= np.array(two_sided_boundaries(SIZES, LEVEL)) * errors
        is_naive = np.abs(means) <= stats.t.isf(LEVEL / 2, np.array(SIZES) - 1) * errors
        shares = is_covered[:, -1].mean(), is_covered.all(axis=1).mean(), is_naive.all(axis=1).mean()
        rows.append([name, *(f"{share:.3f}" for share in shares)])
    head = ["differences", "repeated: last look", "repeated: all looks", "t intervals: all looks"]
    return table(head, rows)


def powers_of_seeds_needed() -> str:
    """Return the power of the numbers of `seeds_needed`, for true and for measured effects."""
    rows = []
    for effect in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0):
        for num_arms in NUM_ARMS:
            needed = seeds_needed(effect, 1.0, num_arms) or 0
            studies = np.random.default_rng(needed).standard_normal((5 * STUDIES, needed)) + effect
            bound = stats.t.isf(LEVEL / num_arms / 2, needed - 1)
            found = np.mean(np.abs(studies.mean(axis=1)) * sqrt(needed) > bound * studies.std(axis=1, ddof=1))
            pilots = np.random.default_rng(1).standard_normal((300, 5)) + effect
            measured = [
                np.mean([
                    power(effect, seeds_needed(each.mean(), each.std(ddof=1), num_arms, num_pilot) or 0, num_arms)
                    for each in pilots
                ])
                for num_pilot in (5, None)
            ]  # fmt: skip
            shares = power(effect, needed, num_arms), found, power(effect / sqrt(2), needed, num_arms), *measured
            rows.append([effect, num_arms, needed, *(f"{share:.2f}" for share in shares)])
    head = ["effect", "arms", "seeds", "power", "found", "power if the effect is in deviations of a run",
            "measured with 5 pairs, corrected", "uncorrected"]  # fmt: skip
    return table(head, rows)


LAWS = ((1.7, 1.5, 0.3), (0.0, 3.0, 0.1), (1.7, 0.5, 0.3), (1.0, 2.0, 0.5), (2.0, 0.4, 0.2), (0.5, 1.5, 0.2))
"""E, A and α of losses E + A · D^(−α), with D = 1 at the longest horizon."""
FACTORS = (0.5, 0.7, 1.0, 1.5)


def token_factor_coverage(num_studies: int = 60) -> str:
    """Return the share of studies whose interval contains the planted factor of tokens.

    An interval without a limit on one side contains all factors on this side. The control is the t interval of the
    logarithms of the factors of single seeds that have one.
    """
    rows = []
    for num_horizons in (2, 3):
        for num_seeds in (3, 8):
            for noise in (0.01, 0.03):
                generator = np.random.default_rng(num_horizons)
                covered, naive, limited = [], list[bool](), list[bool]()
                for factor in FACTORS:
                    shares = list[bool]()
                    for number in range(num_studies):
                        law = LAWS[number % len(LAWS)]
                        ratios = simulated_ratios(generator, law, factor, num_horizons, num_seeds, noise)
                        found = mean_token_factor(ratios)
                        shares.append((found.low or 0) <= factor <= (found.high or np.inf))
                        limited.append(found.low is not None and found.high is not None)
                        logs = np.log([each.ratio for each in ratios if each.ratio is not None])
                        if len(logs) > 1:
                            naive.append(bool(stats.ttest_1samp(logs, np.log(factor)).pvalue >= LEVEL))
                    covered.append(f"{np.mean(shares):.3f}")
                rows.append([num_horizons, num_seeds, f"{noise:.0%}", *covered, f"{np.mean(limited):.2f}",
                             f"{np.mean(naive):.3f}"])  # fmt: skip
    head = ["horizons", "seeds", "noise", *(f"covers {factor:g}" for factor in FACTORS), "limited on both sides",
            "single seeds: covers"]  # fmt: skip
    return table(head, rows)


def simulated_ratios(
    generator: np.random.Generator,
    law: tuple[float, float, float],
    factor: float,
    num_horizons: int,
    num_seeds: int,
    noise: float,
) -> list[TokenRatio]:
    """Return the factor of tokens of each seed. 70 % of the variance of the noise is common to the arm and baseline."""
    asymptote, scale, exponent = law
    tokens = 0.5 ** np.arange(num_horizons)[::-1]
    shape = (num_seeds, num_horizons)
    common = generator.standard_normal(shape) * sqrt(0.7)
    groups = []
    for speed in (1.0, 1 / factor):
        errors = common + generator.standard_normal(shape) * sqrt(0.3)
        losses = (asymptote + scale * (speed * tokens) ** -exponent) * np.exp(noise * errors)
        groups.append([[HorizonPoint(*map(float, pair)) for pair in zip(tokens, each, strict=True)] for each in losses])
    return [token_ratio(*pair) for pair in zip(*groups, strict=True)]


def clustered_coverage() -> str:
    """Return the coverage of the mean difference of pass rates, for three ways to compute the standard error.

    The bootstrap's variance is its exact value over all resamples of seeds and problems (Owen 2007).
    """
    rows = []
    for num_seeds in (3, 5, 10):
        for num_problems in (50, 200):
            generator = np.random.default_rng(num_seeds)
            studies = [pass_rates(generator, num_seeds, num_problems) for _ in range(STUDIES)]
            truth = pass_rates(np.random.default_rng(0), 3_000, 3_000).mean()
            found = [clustered_estimate(each) for each in studies]
            covered = np.mean([(each.low or 0) <= truth <= (each.high or 0) for each in found])
            means, quantile = np.array([each.mean() for each in studies]), float(stats.t.isf(LEVEL / 2, num_seeds - 1))
            by_problem = np.array([each.mean(axis=0).std(ddof=1) / sqrt(num_problems) for each in studies])
            pigeonhole = np.sqrt([pigeonhole_variance(each) for each in studies])
            controls = np.abs(means - truth) <= 1.96 * by_problem, np.abs(means - truth) <= quantile * pigeonhole
            errors = [clustered_standard_error(each) for each in studies]
            ratio = np.median(pigeonhole / errors)
            shares = covered, *(each.mean() for each in controls)
            rows.append([num_seeds, num_problems, *(f"{share:.3f}" for share in shares), f"{ratio:.2f}"])
    head = ["seeds", "problems", "clustered", "resampling only problems", "bootstrap of seeds and problems",
            "width of this bootstrap / clustered"]  # fmt: skip
    return table(head, rows)


def pass_rates(generator: np.random.Generator, num_seeds: int, num_problems: int) -> Floats:
    """Return differences of passed problems, as float[seed, problem]. Seeds and problems change the odds."""
    difficulty, gain = generator.normal(0, 1.5, num_problems), generator.normal(0.3, 0.3, num_problems)
    passed = []
    for effect in (0.0, gain):
        odds = difficulty + effect + generator.normal(0, 0.3, (num_seeds, 1))
        passed.append(generator.random((num_seeds, num_problems)) < 1 / (1 + np.exp(-odds)))
    return np.asarray(passed[1], dtype=np.float64) - passed[0]


def pigeonhole_variance(differences: Floats) -> float:
    """Return the variance of the mean over all resamples of seeds and problems."""
    num_seeds, num_problems = differences.shape
    by_seed, by_problem = differences.mean(axis=1), differences.mean(axis=0)
    noise = differences - by_seed[:, None] - by_problem + differences.mean()
    return float(by_seed.var() / num_seeds + by_problem.var() / num_problems + noise.var() / (num_seeds * num_problems))


SECTIONS: dict[str, Callable[[], str]] = {
    "Studies without difference that find one": false_differences,
    "Studies that find arms the same whose difference is δ = 1.5 standard deviations": false_equalities,
    "Studies that find an effect with the planned seeds": planned_powers,
    "Coverage of 95 % intervals at a single look": single_look_coverage,
    "Coverage of repeated 95 % intervals": repeated_coverage,
    "Power with the number of seeds that is said to be enough": powers_of_seeds_needed,
    "Coverage of 95 % intervals of factors of tokens": token_factor_coverage,
    "Coverage of 95 % intervals of differences of pass rates": clustered_coverage,
}


@cache
def tables() -> tuple[str, ...]:
    """Return all tables, in the order of `SECTIONS`."""
    return tuple(section() for section in SECTIONS.values())


if __name__ == "__main__":
    for title, section in SECTIONS.items():
        print(f"\n{title}\n\n{section()}", flush=True)
