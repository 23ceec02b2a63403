"""Text on its way to a terminal."""

from __future__ import annotations


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
