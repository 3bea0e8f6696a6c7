from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp.data.records import Record
from wmtp.data.sampling import Sampling, counts_for, select
from wmtp.errors import InputError


def records(right: int, wrong: int, difficulty: int = 1) -> list[Record]:
    return [
        Record(task_id=f"t{difficulty}/{i}", prompt="p", solution=f"s{i}", is_correct=i < right, difficulty=difficulty)
        for i in range(right + wrong)
    ]


def test_without_wishes_everything_stays() -> None:
    everything = records(3, 4)
    assert select(everything, Sampling()) == everything


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.05, 0.95))
def test_the_ratio_of_correct_records_is_met_with_as_many_as_possible(right: int, wrong: int, ratio: float) -> None:
    try:
        chosen = select(records(right, wrong), Sampling(correct_ratio=ratio))
    except InputError:
        assert min(right / ratio, wrong / (1 - ratio)) < 1
        return
    count = sum(record.is_correct for record in chosen)
    assert abs(count - ratio * len(chosen)) <= 1
    assert len(chosen) >= int(min(right / ratio, wrong / (1 - ratio))) - 1


def test_bins_of_difficulty_get_their_weights() -> None:
    everything = [record for d in (1, 2, 3, 4) for record in records(20, 20, d)]
    chosen = select(everything, Sampling(n_samples=40, correct_ratio=0.5, difficulty_bins={"1-2": 3.0, "4": 1.0}))
    assert Counter(record.is_correct for record in chosen) == {True: 20, False: 20}
    counts = Counter(record.difficulty for record in chosen)
    assert counts[1] + counts[2] == 30 and counts[4] == 10 and counts[3] == 0


def test_the_seed_decides_which() -> None:
    everything = records(50, 0)
    first = select(everything, Sampling(n_samples=10, seed=1))
    assert first == select(everything, Sampling(n_samples=10, seed=1))
    assert first != select(everything, Sampling(n_samples=10, seed=2))


@pytest.mark.parametrize("wish", [Sampling(n_samples=11), Sampling(n_samples=8, correct_ratio=0.9)])
def test_more_than_there_is_is_an_error(wish: Sampling) -> None:
    with pytest.raises(InputError, match="are asked for"):
        select(records(5, 5), wish)


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), st.integers(0, 100))
def test_counts_add_up_and_stay_near_their_shares(weights: list[float], n: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    counts = counts_for(shares, n)
    assert sum(counts) == n
    assert all(abs(count - share * n) < 1 + 1e-6 for count, share in zip(counts, shares, strict=True))
