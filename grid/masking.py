"""Hides passwords, tokens and keys in URIs, arguments and messages. Rather too much than too little.

SQLAlchemy's `make_url` ends a password at its first `@` and refuses a wrong port, and both would show a part of it, so
these rules are wider than its own. Standard library only.
"""

import re
import sys
from collections.abc import Sequence
from urllib.parse import unquote

HIDDEN = "***"
_KINDS = "(?:sqlite|postgres|mysql|mariadb|mssql|oracle)"
_DATABASE = re.compile(rf"({_KINDS}[\w+.-]*://(?!/)[^:@]*):.*@", re.S | re.I)
"""A database: its user is shown, and its password, which may hold any character, ends at the last `@`."""
_OTHER = re.compile(rf"(?<![\w+.-])((?!{_KINDS})[a-z][\w+.-]*://)(?!/).*@", re.S | re.I)
"""Anything else, such as http or s3: a user alone may be a token."""
_PARAMETER = re.compile(rf"(?<![\w.%+-])([\w.%+-]+)(\s*=\s*)(?!{re.escape(HIDDEN)})(?=\S)", re.S)
_SECRET = re.compile(
    r"password|passwd|passphrase|passcode|pwd|secret|token|credential|signature|odbc_connect"
    r"|(?:access|account|api|private|shared|signing)[\W_]*key|(?:^|[\W_])(?:pass|auth|sig|jwt|sas)$",
    re.I,
)
"""In the name of a parameter, an option or a variable whose value is a secret."""
_SCHEME = re.compile(r"\b(Basic|Bearer)\s+[\w.~+/=-]{6,}")


def mask(text: str) -> str:
    """Return a URI or an argument with its secrets replaced by `***`, and what follows a secret parameter cut off."""
    shown = _mask_parameters(_OTHER.sub(rf"\1{HIDDEN}@", _DATABASE.sub(rf"\1:{HIDDEN}@", text)))
    decoded = unquote(shown)
    masked = _mask_parameters(decoded)
    return shown if masked == decoded else masked


def mask_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command with their secrets replaced by `***`."""
    before = ["", *arguments]
    return [
        HIDDEN if option.startswith("-") and "=" not in option and _SECRET.search(option) else mask(argument)
        for option, argument in zip(before, arguments, strict=False)
    ]


def mask_message(message: str) -> str:
    """Return a message with the secrets of its words, and of this command's arguments, replaced by `***`."""
    for argument, masked in zip(sys.argv[1:], mask_arguments(sys.argv[1:]), strict=True):
        if masked != argument:
            message = message.replace(argument, masked)
    return re.sub(r"\S+", lambda word: mask(word[0]), _SCHEME.sub(rf"\1 {HIDDEN}", message))


def _mask_parameters(text: str) -> str:
    """Cut a text off at its first secret: only who wrote it knows where the secret ends."""
    for found in _PARAMETER.finditer(text):
        if _SECRET.search(unquote(found[1])):
            return f"{text[: found.end()]}{HIDDEN}"
    return text
