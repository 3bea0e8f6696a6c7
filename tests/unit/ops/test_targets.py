import torch
from hypothesis import given
from hypothesis import strategies as st

from wmtp.data.collate import IGNORED
from wmtp.ops.targets import shift_to_heads, target_shares, targets


def naive_targets(labels: list[int], documents: list[int], num_heads: int) -> list[list[int]]:
    """Return the target of each head and position by the definition of valid(t, k)."""
    length = len(labels)
    return [
        [
            labels[t + k] if t + k < length and documents[t] == documents[t + k] else IGNORED
            for t in range(length)
        ]
        for k in range(1, num_heads + 1)
    ]  # fmt: skip


def test_head_k_predicts_the_token_k_ahead() -> None:
    labels = torch.tensor([[IGNORED, 11, 12, 13]])
    assert targets(labels, 3).tolist() == [
        [[11, 12, 13, IGNORED]],
        [[12, 13, IGNORED, IGNORED]],
        [[13, IGNORED, IGNORED, IGNORED]],
    ]


def test_no_target_is_in_another_document() -> None:
    labels, documents = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1]])
    assert targets(labels, 2, documents).tolist() == [
        [[2, IGNORED, 4, IGNORED]],
        [[IGNORED, IGNORED, IGNORED, IGNORED]],
    ]
    assert targets(labels, 2).tolist() != targets(labels, 2, documents).tolist()


@given(
    st.lists(st.tuples(st.sampled_from([IGNORED, 5, 6, 7]), st.integers(0, 2)), min_size=1, max_size=8),
    st.integers(1, 10),
)
def test_targets_equal_the_definition(tokens: list[tuple[int, int]], num_heads: int) -> None:
    labels, documents = [label for label, _ in tokens], [document for _, document in tokens]
    got = targets(torch.tensor([labels]), num_heads, torch.tensor([documents]))[:, 0].tolist()
    assert got == naive_targets(labels, documents, num_heads)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 8))
def test_weights_and_labels_are_shifted_equally(values: list[int], num_heads: int) -> None:
    labels, weights = torch.tensor([values]), torch.tensor([values]).float() / 10
    shifted_labels, shifted_weights = (
        shift_to_heads(labels, num_heads, IGNORED),
        shift_to_heads(weights, num_heads, 0.0),
    )
    valid = shifted_labels != IGNORED
    assert torch.equal(shifted_labels[valid] / 10, shifted_weights[valid])


def test_every_position_has_total_weight_one_for_any_number_of_heads() -> None:
    valid = torch.tensor([[True, True, False], [True, False, False]])[:, None]
    shares = target_shares(valid)
    assert shares.tolist() == [[[0.5, 1.0, 0.0]], [[0.5, 0.0, 0.0]]]
    assert shares.sum() == valid.any(dim=0).sum()
