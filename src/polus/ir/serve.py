"""A search page for a folder of documents: `python -m polus.ir serve folder`."""

import html
import re
import threading
import time
import urllib.parse
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from polus.ir.corpus import encode_corpus
from polus.ir.data import read_documents
from polus.ir.encoding import TextEncoder
from polus.ir.hybrid import BM25, Dense, Engine, Hybrid
from polus.ir.index import DenseIndex
from polus.ir.models import TextTokenizer, load_encoder

MAX_QUERY = 1000
"""Longer queries are cut, in characters."""
_SHOWN = 400  # characters of a document
_BEFORE = 80  # of these, characters before the first word that was found
# Not highlighted; words of one letter aren't either.
_COMMON = {"an", "and", "are", "as", "at", "be", "by", "for", "from", "how", "in", "is", "it", "of"}
_COMMON |= {"on", "or", "that", "the", "to", "what", "with"}
_MANY = 10  # results on a page
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # no script runs, whatever a text says


def load_search(
    folder: str | Path, encoder: str | Path | None = None
) -> tuple[Hybrid, dict[str, str]]:
    """Returns a search over the documents in a folder, and their texts.

    With an encoder, the documents are encoded to `folder/vectors` first, unless they are already.

    Args:
        folder: A folder with `corpus.jsonl`, as in the layout of BEIR.
        encoder: A folder that sentence-transformers has saved, as `load_encoder` and
            `TextTokenizer` read it. Without one, the search is by words alone.
    """
    documents = read_documents(folder)
    engines: list[Engine] = [BM25(documents)]
    if encoder is not None:
        model = load_encoder(encoder, normalize=True)
        tokenizers = {
            kind: TextTokenizer(encoder, prompt_name=kind) for kind in ("query", "document")
        }
        vectors = Path(folder) / "vectors"
        corpus = encode_corpus(vectors, documents.items(), model, tokenizers["document"])
        encode = TextEncoder(model, tokenizers["query"])  # keeps no query
        engines.append(Dense(DenseIndex(corpus.vectors, corpus.ids), encode))
    return Hybrid(*engines), documents


def make_server(
    search: Hybrid, documents: Mapping[str, str], host: str = "127.0.0.1", port: int = 8000
) -> ThreadingHTTPServer:
    """Returns a server whose page searches; call its `serve_forever`.

    Args:
        search: What searches.
        documents: The texts of the documents, by id.
        host: The address to listen on. By default only this machine reaches it.
        port: The port; 0 for one that is free.

    Raises:
        OSError: If the port is in use, or the address isn't this machine's.
    """
    lock = threading.Lock()  # an encoder runs one query at a time

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            if url.path != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            query = urllib.parse.parse_qs(url.query).get("q", [""])[0].strip()[:MAX_QUERY]
            began = time.perf_counter()
            with lock:
                found = search.search(query, _MANY) if query else []
            page = render(query, found, documents, time.perf_counter() - began).encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Content-Security-Policy", _POLICY)
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:
            pass  # queries are nobody else's business

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise OSError(
            f"The page can't be served at {host}:{port}: {error.strerror or error}. Use another "
            "--port, such as 0 for one that is free."
        ) from error


def render(
    query: str, found: list[tuple[str, float]], documents: Mapping[str, str], secs: float
) -> str:
    """Returns the page with the results of a query as HTML."""
    items = "".join(
        f'<li><p class="head"><b>{html.escape(document)}</b> <span>score {score:.4f}</span></p>'
        f"<p>{highlight(excerpt(documents[document], query), query)}</p></li>"
        for document, score in found
    )
    summary = f"{len(documents):,} documents"
    if query:
        count = f"{len(found)} results" if found else "Nothing found"
        summary = f"{count} in {summary}, {1000 * secs:.0f} ms"
    title = html.escape(f"{query} - search" if query else "Search")
    return _PAGE.format(title=title, query=html.escape(query), summary=summary, items=items)


def excerpt(text: str, query: str) -> str:
    """Returns the part of a text that has most of the query's words, cut between words."""
    if len(text) <= _SHOWN:
        return text
    matches = list(pattern.finditer(text)) if (pattern := _pattern(query)) else []
    starts = [max(0, match.start() - _BEFORE) for match in matches] or [0]

    def words_from(start: int) -> int:
        found = (each for each in matches if start <= each.start() < start + _SHOWN - _BEFORE)
        return len({each.group().lower() for each in found})

    start = max(starts, key=words_from)  # of equal ones the first
    before, after = "\N{HORIZONTAL ELLIPSIS} ", " \N{HORIZONTAL ELLIPSIS}"
    part = text[start : start + _SHOWN]
    if start and " " in part:
        part = part[part.index(" ") + 1 :]
    if start + _SHOWN < len(text) and " " in part:
        part = part[: part.rindex(" ")]
    return f"{before if start else ''}{part}{after if start + _SHOWN < len(text) else ''}"


def highlight(text: str, query: str) -> str:
    """Returns a text as HTML, with the words of the query marked."""
    pattern = _pattern(query)
    if pattern is None:
        return html.escape(text)
    parts = pattern.split(text)  # every second one is a match
    return "".join(
        f"<mark>{html.escape(part)}</mark>" if number % 2 else html.escape(part)
        for number, part in enumerate(parts)
    )


def _pattern(query: str) -> re.Pattern[str] | None:
    """Returns a pattern of the query's words, or None if it has only common ones."""
    words = {word for word in re.findall(r"\w\w+", query) if word.lower() not in _COMMON}
    if not words:
        return None
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})\b", re.IGNORECASE)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; --line: #8884; --faint: #777; --mark: #fd06 }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto;
  padding: 0 1rem }}
form {{ display: flex; gap: .5rem }}
input, button {{ font: inherit; padding: .5rem .75rem; border: 1px solid var(--line);
  border-radius: .5rem }}
input {{ flex: 1; min-width: 0 }}
ol {{ list-style: none; margin: 0; padding: 0; counter-reset: rank }}
li {{ padding: .75rem 0; border-top: 1px solid var(--line); counter-increment: rank }}
p {{ margin: .2rem 0; overflow-wrap: anywhere }}
.head::before {{ content: counter(rank) ". "; color: var(--faint) }}
.head span, .summary {{ color: var(--faint); font-size: .875rem }}
.summary {{ margin: .75rem 0 }}
mark {{ background: var(--mark); color: inherit; border-radius: .2em }}
</style></head><body>
<form role="search"><input type="search" name="q" value="{query}" aria-label="Query"
 placeholder="Search" autofocus>
<button>Search</button></form>
<p class="summary">{summary}</p><ol>{items}</ol>
</body></html>
"""
