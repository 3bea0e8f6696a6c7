"""Conversion of command-line arguments to Hydra overrides."""

import json
import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from wmtp.config.groups import is_group
from wmtp.config.moved_targets import FIRST_TOKEN, PRETRAINED_TOKENIZERS, current_override
from wmtp.config.schema import CONFIG_FOLDER, ConfigError, ConfigIssue
from wmtp.config.trust import saved_override_issues
from wmtp.config.values import format_problem, validate_value
from wmtp.errors import InputError
from wmtp.runtime.run_dir import SAVED_OVERRIDES
from wmtp.runtime.untrusted_files import require_inside

NOT_SAVED = ("resume", "resume_override", "dry_run")
"""Keys of overrides that apply to only one start of a run. They are ignored when the run is resumed."""
RUN_DIR = "hydra.run.dir"
"""Key of the run's folder."""
TEXT, ANY_BYTES = "text", "surrogateescape"
ESCAPED_KEYS = ("data.template", "pretrain.data.template", "generation.stop")
"""Keys whose values contain newlines so often that `\\n` and `\\t` stand for a newline and a tab."""
BACKSLASH = "\\"
ESCAPES = {"n": "\n", "t": "\t", BACKSLASH: BACKSLASH}
ESCAPE = re.compile(r"\\([nt\\])")
CHOICE = re.compile(r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\[[^\[\]]*\]|[^,'"])+""")
"""Pattern of one value in a list or a sweep. Quotes and brackets may contain commas."""
BEFORE_QUOTE = re.compile(r"(\\*)('|\Z)")
PLAIN_OVERRIDE = re.compile(r"[+~]*(?:[\w.]+|hydra/[\w/]+)(?:@[\w.]+)?=", re.ASCII)
OmegaConf.register_new_resolver(TEXT, lambda code: bytes.fromhex(code[1:]).decode(errors=ANY_BYTES), replace=True)


def quote(value: object) -> str:
    """Return a value as a string in quotes, so that Hydra parses it as exactly this text."""

    def _escaped(found: re.Match[str]) -> str:
        """Return backslashes and the quote or the end after them. Hydra reads other backslashes as they are."""
        return found[1] * 2 + ("\\'" if found[2] else "")

    return f"'{re.sub(BEFORE_QUOTE, _escaped, str(value))}'"


def parse_value(text: str) -> Override | None:
    """Return the override `key=text` as Hydra parses it, or None if it cannot be parsed."""
    try:
        return OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return None


def override_text(argument: str) -> str:
    """Return the value of an override in Hydra's syntax as text, without quotes and with resolved interpolations.

    A number is returned as it was typed. Interpolations that refer to other keys are not resolved.
    """
    text = argument.partition("=")[2]
    parsed = parse_value(text)
    value = text if parsed is None else parsed.value()
    if not isinstance(value, str):
        return text
    try:
        return str(OmegaConf.create({"value": value})["value"])
    except OmegaConfBaseException:
        return value


def typed_values(overrides: list[str]) -> dict[str, str]:
    """Return the value of each override as it was typed, by the dotted key without a prefix."""
    return {key.lstrip("+"): value for key, equals, value in (each.partition("=") for each in overrides) if equals}


def last_value(arguments: list[str], key: str) -> str | None:
    """Return the value of the last override of a key as text, or None if there is no such override."""
    found = [argument for argument in arguments if argument.lstrip("+").startswith(f"{key}=")]
    return override_text(found[-1]) if found else None


def is_dry_run(arguments: list[str]) -> bool:
    """Return whether the arguments request a dry run.

    Raises:
        ConfigError: the value of `dry_run` is not a boolean.
    """
    text = last_value(arguments, "dry_run")
    try:
        return text is not None and bool(validate_value(bool, text))
    except ValidationError as error:
        raise ConfigError([ConfigIssue("dry_run", str(text), format_problem(error))]) from error


def chosen_folder(key: str, overrides: list[str], composed: DictConfig) -> Path | None:
    """Return the folder that an override of `key` chooses, or None if there is no such override.

    Interpolations in it are resolved in the composed config.

    Raises:
        ConfigError: the value is empty.
    """
    text = last_value(overrides, key)
    if text == "":
        raise ConfigError([ConfigIssue(key, "", "is empty; name a folder")])
    return None if text is None else Path(OmegaConf.select(composed, key) if "${" in text else text)


def chosen_run_dir(overrides: list[str]) -> Path | None:
    """Return the folder that the override `hydra.run.dir=…` chooses, or None if there is no such override."""
    chosen = last_value(overrides, RUN_DIR)
    return None if chosen is None else Path(chosen)


def shell_argument(key: str, value: object) -> str:
    """Return `key=value` as one word of a shell command. It sets the key to exactly this text."""
    text = str(value)
    parsed = parse_value(quote_text(text, is_sweep=True))
    is_exact = parsed is not None and not parsed.is_sweep_override() and parsed.value() == text
    return shlex.quote(f"{key}={text if is_exact else quote(text)}")


def shell_override(override: str) -> str:
    """Return the word of a shell command that gives an override in Hydra's syntax."""
    argument = override.removeprefix("++").replace("experiment@_global_=", "experiment=", 1)
    key = argument.partition("=")[0]
    text = override_text(argument)
    if key in ESCAPED_KEYS and "\\" in text:
        argument = f"{key}={quote(text.replace(BACKSLASH, 2 * BACKSLASH))}"
    return shlex.quote(argument)


def is_override(argument: str) -> bool:
    """Return whether a command-line argument sets a key. Otherwise, it is the path of a file or folder."""
    return PLAIN_OVERRIDE.match(argument) is not None and not Path(argument).exists()


def expand_argument(
    argument: str, raw_keys: Collection[str] = (), aliases: Mapping[str, str] | None = None, *, is_sweep: bool = False
) -> str:
    """Convert a command-line argument to Hydra's syntax.

    An alias is replaced with the full key. The short form of a group choice is expanded. The values of `raw_keys` are
    hex-encoded, so that Hydra does not parse them. Any other value that Hydra could not parse is put in quotes, because
    it is meant as it was typed. Escape sequences in the values of `ESCAPED_KEYS` are replaced.

    Args:
        argument: the argument as the user typed it.
        raw_keys: keys whose values are plain text.
        aliases: full key by alias.
        is_sweep: True if commas separate the values of a sweep.
    """
    key, equals, value = argument.partition("=")
    if not equals or key.startswith(("-", "~")):
        return argument
    if key in raw_keys and value:
        code = value.encode(errors=ANY_BYTES).hex()  # hex digits have no special meaning in Hydra's grammar
        value = f"${{{TEXT}:x{code}}}"
    elif key.lstrip("+") in ESCAPED_KEYS:
        value = ",".join(map(unescape, split_choices(value) if is_sweep else [value]))
    else:
        value = quote_text(value, is_sweep=is_sweep)
    return expand_group_choice(f"{(aliases or {}).get(key, key)}={value}")


def quote_text(value: str, *, is_sweep: bool) -> str:
    """Return a value in Hydra's syntax: unchanged if Hydra can parse it, otherwise in quotes.

    The items of a list are put in quotes one by one. So are the values of a sweep, if `is_sweep` is true.
    """
    if (parsed := parse_value(value)) is not None:
        loses_blanks = value != value.strip() and parsed.value() == value.strip()
        return quote(value) if loses_blanks else value
    if value.startswith("[") and value.endswith("]"):
        items = [quote_text(item, is_sweep=False) for item in split_choices(value[1:-1])]
        if parse_value(f"[{','.join(items)}]") is not None:
            return f"[{','.join(items)}]"
    parts = split_choices(value) if is_sweep else [value]
    return quote(value) if parts == [value] else ",".join(quote_text(part, is_sweep=False) for part in parts)


def split_choices(value: str) -> list[str]:
    """Split a value at the commas outside of quotes and brackets. If quotes are not balanced, do not split it."""
    parts = CHOICE.findall(value)
    return [part.strip() for part in parts] if ",".join(parts) == value and len(parts) > 1 else [value]


def unescape(value: str) -> str:
    """Return a text or a list of texts in quotes, with the characters in `ESCAPES` for the escape sequences."""

    def _unescaped(text: object) -> str:
        """Return one text in quotes. A value that is not text is returned as it is."""
        return quote(ESCAPE.sub(lambda found: ESCAPES[found[1]], text)) if isinstance(text, str) else str(text)

    parsed = parse_value(value)
    content = value if parsed is None else parsed.value()
    if isinstance(content, list):
        return f"[{','.join(map(_unescaped, content))}]"
    if not isinstance(content, str):
        return value
    is_quoted = value[:1] in ("'", '"') and parsed is not None
    return _unescaped(content if is_quoted else value)  # without quotes, Hydra would remove blanks at both ends


def expand_group_choice(argument: str) -> str:
    """Convert the short form of a group choice to Hydra's syntax. Return any other argument unchanged.

    The short form `algo.of=rho1` chooses the option `rho1` of the config group `algo/of`. The short form
    `pretrain.model=nano` chooses the option `nano` of the config group `model` for training stage 1.
    """
    key, _, value = argument.partition("=")
    if "." in key and is_group(key.replace(".", "/")):
        return f"{key.replace('.', '/')}={value}"
    outer, _, group = key.partition(".")
    if outer == "pretrain" and is_group(group) and (CONFIG_FOLDER / group / f"{value}.yaml").exists():
        # the files of the pretrain group already choose early_stopping; any other group must be added
        return f"{'' if group == 'early_stopping' else '+'}{group}@{key}={value}"
    return argument


def to_hydra_override(argument: str) -> str:
    """Add the prefix or the package without which Hydra would not accept an override.

    `key=value` becomes `++key=value`. Without the prefix, Hydra would stop at the first unknown key, but the config
    check reports all errors together. `experiment=name` becomes `experiment@_global_=name`, because the experiment
    files contain no package directive.
    """
    key = argument.partition("=")[0]
    if key == "experiment":
        return argument.replace("experiment=", "experiment@_global_=", 1)
    if "=" not in argument or key.startswith(("-", "~", "hydra")) or is_group(key.lstrip("+").split("@")[0]):
        return argument
    return f"++{argument.lstrip('+')}"


def parse_overrides(arguments: list[str], issues: list[ConfigIssue]) -> list[Override]:
    """Parse arguments and return the valid Hydra overrides. Append an issue to `issues` for each invalid argument."""
    parser, overrides = OverridesParser.create(), []
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException:
            issues.append(ConfigIssue(argument, "", "is not an override; write key=value, or group=option"))
            continue
        if override.is_sweep_override():
            key, _, text = argument.partition("=")
            problem = f"several values need a sweep: add -m, or write one value as {shell_argument(key, text)}"
            issues.append(ConfigIssue(override.key_or_group, "", problem))
        else:
            overrides.append(override)
    return overrides


def load_saved_overrides(arguments: list[str]) -> list[str]:
    """Return the saved overrides of the run that the argument `resume=…` names, with the current names of their keys.

    If there is no such argument or the run has no saved overrides, return an empty list. A later check reports an error
    if the folder is wrong.

    Raises:
        InputError: the file of saved overrides is damaged, or a file of the run leads out of the run's folder.
        ConfigError: a saved override is not allowed.
    """
    folder = resumed_folder(arguments)
    if folder is None or not (folder / SAVED_OVERRIDES).exists():
        return []
    require_inside(folder)
    try:
        content = validate_value(list[str], json.loads((folder / SAVED_OVERRIDES).read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder / SAVED_OVERRIDES}: is not a list of overrides: {error}") from error
    config = folder / "config.yaml"
    text = config.read_text(errors="replace") if config.is_file() else ""
    if FIRST_TOKEN not in text and any(target.rpartition(".")[2] in text for target in PRETRAINED_TOKENIZERS):
        content.insert(0, f"model.tokenizer.{FIRST_TOKEN}=false")
    saved = [current_override(text) for text in content if override_key(text) not in NOT_SAVED]
    if issues := list(saved_override_issues(saved, arguments)):
        raise ConfigError(issues)
    return saved


def resumed_folder(arguments: list[str], key: str = "resume") -> Path | None:
    """Return the folder that the argument `resume=…` names, or None if there is no such argument."""
    named = last_value(arguments, key)
    return None if named is None else Path(named)


def override_key(override: str) -> str:
    """Return the key of an override. Its value and the prefix `++` are left out."""
    return override.lstrip("+").partition("=")[0]
