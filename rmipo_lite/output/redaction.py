"""Keep secrets out of every file and line that a run writes.

A configuration carries hub tokens, and a path or a message can carry a key that came in through
the environment. Two rules, both applied: a value whose *name* says token, key, secret or password
is replaced, and so is any text that equals the value of an environment variable named so.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

REDACTED = "<redacted>"
_UPLOADED = ("adapter_config.json", "training_config.json", "config.json")
_NAME = re.compile(r"(?:^|[_\-.])(?:\w*(?:token|key|secret|password|passwd|credential))s?$", re.I)
_KNOWN_SHAPES = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,})\b")
_SHORTEST_SECRET = 8  # characters; shorter values ("1", "true") would redact ordinary text


def is_secret_name(name: str) -> bool:
    """Whether an option or variable of this name holds a secret (`hub_token`, `WANDB_API_KEY`)."""
    return _NAME.search(name) is not None


def _environment_secrets() -> list[str]:
    values = {v for k, v in os.environ.items() if is_secret_name(k) and len(v) >= _SHORTEST_SECRET}
    return sorted(values, key=len, reverse=True)  # a secret that contains another goes first


def redact_text(text: str) -> str:
    """`text` without the values of secret environment variables and without hub-shaped tokens."""
    for secret in _environment_secrets():
        text = text.replace(secret, REDACTED)
    return _KNOWN_SHAPES.sub(REDACTED, text)


def redact(value: Any, name: str = "") -> Any:
    """A copy of a JSON-like value in which secrets are replaced by `<redacted>`.

    Only texts are secrets: a number or None under a secret name stays, so that
    `max_tokens_per_microstep: 4096` or `hub_token: None` can still be read back.
    """
    if isinstance(value, dict):
        return {redact_text(str(k)): redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(v, name) for v in value]
    if not isinstance(value, str):
        return value
    if value and is_secret_name(name):
        return REDACTED
    return redact_text(value)


def without_paths(folder: Path) -> list[str]:
    """Take paths of this machine out of a folder that is to be uploaded; what was taken out.

    A path's last part stays, so that a base model is still named.
    """
    taken = []
    for path in (folder / name for name in _UPLOADED if (folder / name).is_file()):
        said = json.loads(path.read_text(encoding="utf-8"))
        changed = _stripped(said)
        if changed != said:
            taken.append(path.name)
            path.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
    return taken


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stripped(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_stripped(one) for one in value]
    if isinstance(value, str) and "\n" not in value and Path(value).is_absolute():
        return Path(value).name
    return value
