"""Secrets in addresses, which are masked wherever an address of data is written or shown.

    https://ann:password@host/a.parquet?sig=9f3c  →  https://***@host/a.parquet?sig=***

A run folder, a report and a dashboard are made to be shown to others, so they never contain what
opens the data. A run therefore cannot be repeated from its folder alone: the address is given
again, and one that is masked is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace

__all__ = ["MASK", "masked", "refuse_masked", "without_secrets"]

MASK = "***"

# Of a token, or long enough to be one. What else follows a `?` may stay, such as download=true.
_NAME = r"sig|sign|signature|token|secret|passw|pwd|auth|key|credential|session|policy|jwt|ticket"
_RULES = (
    (re.compile(r"(?<=://)[^/\s'\"?#]+@"), f"{MASK}@"),
    (re.compile(rf"(?i)([?&;][\w.%-]*(?:{_NAME})[\w.%-]*=)[^&;\s'\"#]+"), rf"\1{MASK}"),
    (re.compile(r"(?<=://)(\S*?[?&;][\w.%-]+=)[^&;\s'\"#]{24,}"), rf"\1{MASK}"),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), MASK),  # the id of a key of AWS
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}\b"), MASK),  # a token of the Hub
)


def without_secrets(text: str) -> str:
    """A text in which users, passwords, signatures and tokens of addresses are masked.

    Args:
        text: Any, with or without addresses.

    Example:
        >>> without_secrets("cannot read s3://ann:pass@host/a.parquet?sig=9f3c&part=2")
        'cannot read s3://***@host/a.parquet?sig=***&part=2'
    """
    for pattern, instead in _RULES:
        text = pattern.sub(instead, text)
    return text


def masked(value: Any) -> Any:
    """A config in which no text has secrets.

    Args:
        value: Text, or lists, mappings and namespaces that contain texts; others are returned.

    Example:
        >>> masked({"path": "https://ann:pass@host/a.parquet", "seed": 0})
        {'path': 'https://***@host/a.parquet', 'seed': 0}
    """
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Namespace):
        return Namespace(**{name: masked(one) for name, one in vars(value).items()})
    if isinstance(value, dict):
        return {name: masked(one) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(masked, value))
    return value


def refuse_masked(name: str, value: Any) -> None:
    """Refuse an address that was masked when a run recorded it.

    Args:
        name: Of the argument.
        value: Text, or lists and mappings that contain texts.

    Raises:
        ValueError: If a text in it is an address with a mask.
    """
    if isinstance(value, str):
        if "://" in value and MASK in value:
            raise ValueError(
                f"{name} is {value!r}: a run never stores the secret in an address, so give it "
                f"again, as --{name} or in a last --config"
            )
    elif isinstance(value, Mapping):
        refuse_masked(name, list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            refuse_masked(name, one)
