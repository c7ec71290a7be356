"""Where texts, queries and judgements come from, and how pairs become batches."""

import csv
import gzip
import json
from pathlib import Path
from typing import NamedTuple


class Collection(NamedTuple):
    """A test collection: `{id: text}` of documents and of the judged queries, and judgements."""

    documents: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_beir(folder: str | Path, split: str = "test") -> Collection:
    """Reads a folder in the layout of BEIR (Thakur et al. 2021, arXiv:2104.08663).

    That is `corpus.jsonl` and `queries.jsonl` (either may be gzipped) and `qrels/<split>.tsv`.
    A document's text is its title and its text; an unjudged query is left out.
    """
    folder = Path(folder)
    path = folder / "qrels" / f"{split}.tsv"
    if not path.exists():
        found = sorted(each.stem for each in path.parent.glob("*.tsv"))
        raise FileNotFoundError(f"{path} is not there; splits found: {found or 'none'}.")
    qrels: dict[str, dict[str, int]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    documents = {
        each["_id"]: f"{each.get('title', '')} {each['text']}".strip()
        for each in _json_lines(folder / "corpus.jsonl")
    }
    queries = {each["_id"]: each["text"] for each in _json_lines(folder / "queries.jsonl")}
    return Collection(documents, {query: queries[query] for query in qrels}, qrels)


def _json_lines(path: Path) -> list[dict[str, str]]:
    if path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        with gzip.open(f"{path}.gz", "rt", encoding="utf-8") as file:
            text = file.read()
    # Not splitlines(): that breaks at Unicode line separators inside a text.
    return [json.loads(line) for line in text.split("\n") if line]
