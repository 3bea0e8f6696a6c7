"""Tests of `wmtp.config.schema` that need no command."""

import pytest

from wmtp.config.targets import locate
from wmtp.training.optim import cosine


def test_locate_returns_the_object_at_a_path() -> None:
    assert locate("wmtp.training.optim.cosine") is cosine


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", "a target must begin with one of wmtp., torch.optim."),
        ("wmtp_evil.run", "a target must begin with one of"),
        ("wmtp.nowhere.Model", "cannot be imported: No module named 'wmtp.nowhere'"),
        ("wmtp.models.llama.Nothing", "cannot be imported: .* has no attribute 'Nothing'"),
        ("wmtp.config.schema.PACKAGE", "is not a class or function"),
    ],
)
def test_locate_rejects_other_paths(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        locate(target)
