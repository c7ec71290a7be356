"""What is taken for a collection of texts, or of ids."""

from collections.abc import Iterable, Mapping
from typing import Any


def as_texts(texts: Iterable[str], what: str = "texts") -> list[str]:
    """Returns texts as a list.

    A single text would be taken for its letters, and a dict for its ids, without any error.

    Args:
        texts: Strings.
        what: Their name in an error.

    Raises:
        TypeError: If they are a single string, a mapping, no collection, or not all strings.
    """
    wrong: Any = texts
    if isinstance(wrong, str | bytes):
        raise TypeError(f"{what} must be a collection of strings, got {wrong[:80]!r}. Use [text].")
    if isinstance(wrong, Mapping):
        raise TypeError(
            f"{what} must be a collection of strings, got a {type(wrong).__name__}, whose keys "
            f"would be taken for the {what}. Use list({what}.values())."
        )
    if not isinstance(wrong, Iterable):
        raise TypeError(f"{what} must be a collection of strings, got {wrong!r}.")
    found = list(texts)
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"{what} must be strings, got {text!r} at index {index}.")
    return found


def check_texts_by_id(texts: object, what: str) -> None:
    """Raises a TypeError unless some texts are strings by their ids: `{id: text}`."""
    if not isinstance(texts, Mapping):
        raise TypeError(
            f"{what} must be a dict of texts by their ids, got a {type(texts).__name__}. Use, for "
            "example, {str(i): text for i, text in enumerate(texts)}."
        )
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(
                f"{what} must be strings by their ids, got {text!r} for {name!r}. Leave it out, or "
                "write an empty string."
            )


def check_ids(ids: Iterable[str], what: str = "ids") -> None:
    """Raises a ValueError unless all ids are strings, and different ones."""
    seen: set[str] = set()
    for each in ids:
        if not isinstance(each, str):
            raise ValueError(f"{what} must be strings, got {each!r}. Use {str(each)!r}.")
        if each in seen:
            raise ValueError(f"{what} must be unique, got {each!r} twice.")
        seen.add(each)


def check_unicode(texts: Iterable[str | tuple[str, str]]) -> None:
    """Raises a ValueError unless all texts can be encoded as UTF-8, as tokenizers want them."""
    for text in (each for part in texts for each in (part if isinstance(part, tuple) else [part])):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"texts must be Unicode, but {text!r:.80} has half of a surrogate pair. Use "
                "text.encode('utf-8', 'replace').decode()."
            ) from error
