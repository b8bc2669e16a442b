"""`rmipo-lite compare MODEL DATASET --methods rmipo simpo dpo:beta=0.05`."""

from typing import Any

from rmipo_lite.cli.config_options import UsageError, read_values
from rmipo_lite.output.console import say

OK, FAILED, INTERRUPTED = 0, 1, 130


def compare(options: dict[str, Any]) -> int:
    """Run the command with its typed options."""
    import rmipo_lite

    report = options.pop("report", None)
    options["methods"] = _methods(options.pop("methods", None))
    options = {name: value for name, value in options.items() if value is not None}
    found = rmipo_lite.compare(options.pop("model"), options.pop("dataset"), **options)
    say(str(found))
    if report:
        found.report(None if report is True else report)
    if found.failed:
        return FAILED
    return OK if len(found.results) == found.planned else INTERRUPTED


def _methods(given: Any) -> Any:
    """Of words such as `dpo:beta=0.05,label_smoothing=0.1`; what a file says stays as it is."""
    if given is None or given == ["all"]:
        return given and "all"
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
