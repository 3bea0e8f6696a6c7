"""Tests of the conversion of command-line arguments to overrides, and of overrides in printed commands."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import example, given
from hypothesis import strategies as st

from wmtp.config.overrides import (
    chosen_run_dir,
    expand_argument,
    is_dry_run,
    override_text,
    quote,
    shell_argument,
    shell_override,
)
from wmtp.config.schema import ConfigError

AS_TYPED = [
    "my runs/数据 (1)", "a=b", "a [1]", "(1)", "it's", "#1", "~/x", "{prompt}", "naïve", "a;b&c!", "a\nb",
    "x ${now:%Y} (1)", "a\\b (c)", "'a' and b", "it's, or not",
]  # fmt: skip
"""Values that Hydra cannot parse. They mean what was typed."""
AS_HYDRA = {
    "a b": "a b", "2": 2, "1e3": 1000.0, "null": None, "true": True, "[1,2]": [1, 2],
    "{a: 1}": {"a": 1}, "'a,b'": "a,b", '"it\'s"': "it's", "${seed}": "${seed}", "a\\nb": "a\\nb", "": "",
    "outputs/2026-11-21": "outputs/2026-11-21",
}  # fmt: skip
"""Values that Hydra can parse, and the result."""
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])).filter(lambda text: "${" not in text)


def parse(argument: str) -> object:
    """Return the value of an override in Hydra's syntax."""
    return OverridesParser.create().parse_override(argument).value()


@pytest.mark.parametrize("value", AS_TYPED)
@pytest.mark.parametrize("is_sweep", [False, True])
def test_a_value_that_hydra_cannot_parse_is_taken_as_typed(value: str, is_sweep: bool) -> None:
    assert parse(expand_argument(f"data.path={value}", is_sweep=is_sweep)) == value
    with pytest.raises(HydraException):
        parse(f"data.path={value}")


@pytest.mark.parametrize("value", AS_HYDRA)
def test_a_value_that_hydra_can_parse_keeps_its_meaning(value: str) -> None:
    assert parse(expand_argument(f"key={value}")) == AS_HYDRA[value]


@pytest.mark.parametrize("value", [" x ", "\tmy run", "a b "])
def test_blanks_around_a_text_are_kept(value: str) -> None:
    assert parse(expand_argument(f"key={value}")) == value
    assert parse(f"key={value}") == value.strip(), "the control"
    assert parse(expand_argument("key= 3 ")) == 3


def test_values_of_lists_and_sweeps_are_quoted_one_by_one() -> None:
    assert expand_argument("sweep.arms=[数据/1,b c,'d,e']") == "sweep.arms=['数据/1',b c,'d,e']"
    assert expand_argument("data.path=数据/1, b=2,c", is_sweep=True) == "data.path='数据/1','b=2',c"
    assert expand_argument("data.path=数据/1, b=2,c") == "data.path='数据/1, b=2,c'"
    assert expand_argument("seed=0,1", is_sweep=True) == "seed=0,1"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("data.template={prompt}\\n", "{prompt}\n"),
        ("++data.template=<s>{prompt}\\n\\tA: ", "<s>{prompt}\n\tA: "),
        ("data.template='{prompt}\\n'", "{prompt}\n"),
        ('data.template=print("\\\\n")', 'print("\\n")'),
        ("generation.stop=[\\n\\n,def ]", ["\n\n", "def"]),
        ('generation.stop=["\\n", "# "]', ["\n", "# "]),
        ("generation.stop=[]", []),
        ("data.path=a\\n", "a\\n"),
    ],
)
def test_escape_sequences_are_replaced_in_templates_and_stop_strings(argument: str, value: object) -> None:
    assert parse(expand_argument(argument)) == value


def test_each_template_of_a_sweep_is_unescaped() -> None:
    assert (
        expand_argument("data.template={prompt}\\n,{prompt}", is_sweep=True) == "data.template='{prompt}\n','{prompt}'"
    )


@given(TEXTS)
@example("a\\b")
@example("a\\'b\\")
def test_quoted_text_is_parsed_as_the_same_text(text: str) -> None:
    assert parse(f"key={quote(text)}") == text


@given(TEXTS)
@example("a,b")
@example("null")
@example("2024_11_29")
@example("[1]")
@example("it's (1)")
def test_a_printed_argument_can_be_pasted(text: str) -> None:
    (argument,) = shlex.split(shell_argument("resume", text))
    for is_sweep in (False, True):
        assert parse(expand_argument(argument, is_sweep=is_sweep)) == text


def test_control_quotes_for_the_shell_are_not_enough() -> None:
    (argument,) = shlex.split(shlex.quote("resume=a,b"))
    assert OverridesParser.create().parse_override(expand_argument(argument)).is_sweep_override()


@pytest.mark.parametrize(
    "argument",
    [
        "data.template={prompt}\\\\n\\n",
        "pretrain.model=nano",
        "experiment=smoke",
        "model.dim=64",
        "~seed",
        "run_name=it's",
    ],
)
def test_a_recorded_override_can_be_pasted(argument: str) -> None:
    override = expand_argument(argument)
    (pasted,) = shlex.split(shell_override(override.replace("experiment=", "experiment@_global_=")))
    assert expand_argument(pasted) == override


def test_overrides_that_are_read_before_the_config_is_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN", "my run")
    assert override_text("resume='${oc.env:RUN}'") == "my run"
    assert override_text(expand_argument("resume=it's")) == "it's"
    assert override_text("resume=2024_11_29") == "2024_11_29"
    assert str(chosen_run_dir(["hydra.run.dir=a", expand_argument("hydra.run.dir=b (1)")])) == "b (1)"
    values = ("yes", "no", "True", "off", "1", "0")
    assert [is_dry_run([f"++dry_run={value}"]) for value in values] == [True, False] * 3
    assert not is_dry_run([])
    with pytest.raises(ConfigError, match="dry_run=maybe: must be a valid boolean"):
        is_dry_run(["dry_run=maybe"])
