"""Names of held-out numbers: `eval_loss`, or `eval_easy_loss` of the set that was named easy."""

from collections.abc import Iterable

PREFIX = "eval_"


def names_of(metric: str, logged: Iterable[str]) -> list[tuple[str, str]]:
    """(name in the log, name of its set) of one metric; the set's is empty where there is one set.

    `metric` is without its prefix; each name in the log comes once, in order.
    """
    found = []
    for name in dict.fromkeys(logged):
        if name == PREFIX + metric:
            found.append((name, ""))
        elif name.startswith(PREFIX) and name.endswith(f"_{metric}"):
            found.append((name, name[len(PREFIX) : -len(metric) - 1]))
    return found


def label(words: str, of_set: str) -> str:
    """Words for held-out pairs, with the set's name where there are several."""
    return f"{words} {of_set}" if of_set else words
