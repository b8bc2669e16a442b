"""The methods of `rmipo-lite compare --methods`: words such as `dpo:beta=0.05,ld_alpha=0.5`."""

from collections.abc import Sequence
from typing import Any

from rmipo_lite.cli.config_options import UsageError, read_values


def methods_of(given: Sequence[Any]) -> Any:
    """Names and options of the command line's words; what a file says stays as it is.

    Raises:
        UsageError: a word that can't be read.
    """
    if list(given) == ["all"]:
        return "all"
    return [_method(one) if isinstance(one, str) else one for one in given]


def _method(word: str) -> dict[str, Any]:
    name, _, rest = word.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"--methods {word}: wanted option=value after the colon, got {part!r}")
        options[key.strip().replace("-", "_")] = value
    return {"loss_type": name, **read_values(options)}
