"""Conversion of config values to the types that the annotations of constructors name."""

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

TEXT_ERRORS = frozenset({"string_type", "path_type"})
"""Types of pydantic's errors for a value that is not text."""


def validate_value(annotation: Any, value: object) -> Any:
    """Convert a value to its annotated type, for example "3" to 3, or a list to a tuple. Return the converted value.

    Raises:
        ValidationError: the value is not valid. The message describes the valid values.
    """
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # the annotation is a model or dataclass that defines its own config
        adapter = TypeAdapter(annotation)
    result = adapter.validate_python(value)
    if isinstance(value, bool) and isinstance(result, (int, float)) and not isinstance(result, bool):
        return adapter.validate_python(str(value))  # pydantic accepts True as 1; here it is an error
    return result


def plain_value(converted: Any, value: Any) -> Any:
    """Return a converted value in the form that a config can contain. `value` is the config value before conversion.

    Numbers, booleans, text, lists and dictionaries are converted. Other objects, such as paths, keep their plain form.
    """
    if converted is None or isinstance(converted, bool | int | float | str):
        return converted
    if isinstance(converted, list | tuple):
        before = value if isinstance(value, list) else converted
        return [plain_value(item, old) for item, old in zip(converted, before, strict=True)]
    if isinstance(converted, dict) and isinstance(value, dict):
        pairs = zip(converted.items(), value.values(), strict=True)
        return {key: plain_value(item, old) for (key, item), old in pairs}
    return value


def as_typed(value: object, key: str, typed: Mapping[str, str]) -> object:
    """Return the text that the user typed for a key, or the value itself if there is none. A dictionary is searched.

    `typed` contains the texts by dotted key.
    """
    if isinstance(value, dict):
        return {name: as_typed(item, f"{key}.{name}", typed) for name, item in value.items()}
    return value if value is None else typed.get(key, value)


def convert_value(annotation: Any, value: object, key: str, typed: Mapping[str, str]) -> object:
    """Convert a config value to its annotated type, and return it in the form that a config can contain.

    If the annotation requires text or a path and the value is not text, the value that the user typed is converted.
    The texts that users typed are in `typed`, by dotted key.

    Raises:
        ValidationError: the value is not valid.
    """
    try:
        return plain_value(validate_value(annotation, value), value)
    except ValidationError as error:
        text = as_typed(value, key, typed)
        if text == value or not TEXT_ERRORS & {each["type"] for each in error.errors()}:
            raise
    return plain_value(validate_value(annotation, text), text)


def format_problem(error: ValidationError) -> str:
    """Return all messages of a validation error as one line of text."""
    messages = {e["msg"].removeprefix("Value error, ").replace("Input should be", "must be") for e in error.errors()}
    return "; ".join(sorted(messages))
