"""Text on its way to a terminal, and names on their way to a folder."""

from __future__ import annotations

import hashlib

LONGEST_NAME = 160
"""Bytes; file systems take 255, and an ending and the name of a temporary file want theirs."""


def printable(text: object, keep: str = "") -> str:
    r"""Return a text in which every character that a terminal might act on is shown as its escape, as in ``\x1b``.

    Names of models, parameters, groups and files are other people's: an escape sequence in one can recolour, move or
    overwrite what else is on the screen, and half of a surrogate pair cannot be written at all.

    Parameters
    ----------
    text : object
        What to show; ``str`` is called on it.
    keep : str
        Characters to leave alone, such as the line breaks of one's own text.
    """
    return "".join(
        character if character.isprintable() or character in keep else _escaped(character) for character in str(text)
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def file_name(name: str) -> str:
    """Return a name for a file in a folder that is given, different for every name; most names are their own.

    Modules may have any name: what would lead out of the folder, or what some system or terminal cannot take, becomes
    ``%`` and its bytes in hexadecimal, as in addresses. The end of a long name becomes a digest.
    """
    quoted = "".join(_quoted(character) if _is_special(character) else character for character in name)
    if quoted.startswith(".") or not quoted:
        quoted = f"%2E{quoted[1:]}" if quoted else "%"
    if len(quoted.encode()) > LONGEST_NAME:
        digest = hashlib.blake2b(quoted.encode(), digest_size=16).hexdigest()
        quoted = f"{quoted.encode()[: LONGEST_NAME - 40].decode(errors='ignore')}%{digest}"
    return quoted


def _is_special(character: str) -> bool:
    return not character.isprintable() or character in '%/\\:*?"<>|'


def _quoted(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))
