"""Search by words, by vectors and by both, and its page."""

import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest

from polus.ir.__main__ import main
from polus.ir.evaluation import reciprocal_rank_fusion
from polus.ir.hybrid import BM25, Dense, Hybrid
from polus.ir.index import DenseIndex
from polus.ir.serve import excerpt, highlight, load_search, make_server

pytestmark = pytest.mark.once
DOCUMENTS = {
    "copy": "copies a file with its times and permissions",
    "rmtree": "removes a folder with everything in it",
    "zip": "reads and writes archives <script>alert(1)</script>",
}
VECTORS = {"copy": [1.0, 0.0], "rmtree": [0.0, 1.0], "zip": [0.6, 0.6]}


class Fixed:
    """An engine that finds the same for each query."""

    def __init__(self, **scores):
        self.scores = scores

    def run(self, queries, k=100):
        return {query: dict(list(self.scores.items())[:k]) for query in queries}


def dense():
    index = DenseIndex(list(VECTORS.values()), list(VECTORS))
    return Dense(index, lambda texts: np.array([[0.1, 1.0]] * len(texts)))


def test_bm25_finds_documents_that_share_words():
    engine = BM25(DOCUMENTS)
    found = engine.run({"1": "folder", "2": "unheard"}, 3)
    assert list(found["1"]) == ["rmtree"]
    assert found["2"] == {}
    assert engine.run({}) == {}
    with pytest.raises(TypeError, match="documents must be strings by their ids, got nan for 'b'"):
        BM25({"a": "text", "b": float("nan")})
    with pytest.raises(
        TypeError, match="documents must be a dict of texts by their ids, got a list"
    ):
        BM25(["text"])
    with pytest.raises(TypeError, match=r"search takes one query, a string, got \['text'\]"):
        Hybrid(BM25({"a": "text"})).search(["text"])
    with pytest.raises(TypeError, match=r"Write Dense\(DenseIndex\(\.\.\.\), TextEncoder"):
        Hybrid(DenseIndex([[1.0]], ["a"]))
    with pytest.raises(TypeError, match="queries must be strings by their ids, got None for 'q'"):
        BM25({"a": "text"}).run({"q": None})
    with pytest.raises(ValueError, match="at least one document"):
        BM25({})


def test_hybrid_fuses_by_rank():
    engines = BM25(DOCUMENTS), dense()
    queries = {"1": "a file", "2": "archives"}
    expected = reciprocal_rank_fusion(*(engine.run(queries) for engine in engines))
    found = Hybrid(*engines).run(queries, 3)
    assert found == expected
    for scores in found.values():
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert Hybrid(*engines).search("archives", 1) == [next(iter(found["2"].items()))]


def test_a_weight_sums_scaled_scores():
    engines = Fixed(a=8.0, b=4.0, c=0.0), Fixed(c=0.9, a=0.5, d=0.4)
    (scores,) = Hybrid(*engines, weight=0.25).run({"q": "text"}).values()
    assert scores == pytest.approx({"a": 0.75 + 0.25 * 0.2, "b": 0.375, "c": 0.25, "d": 0.0})


def test_tune_takes_the_best_weight():
    good, bad = {"a": 2.0, "b": 1.0}, {"b": 2.0, "c": 1.5, "a": 1.0}
    hybrid = Hybrid(Fixed(**bad), Fixed(**good))
    values = hybrid.tune({"q": "text"}, {"q": {"a": 1}})
    assert len(values) == 12
    assert hybrid.weight is not None
    assert values[hybrid.weight] == 1.0 == max(values.values())
    assert values[0.0] == min(values.values()) < 1
    assert Hybrid(Fixed(**good)).tune({"q": "text"}, {"q": {"a": 1}}) == {None: 1.0}


def test_bad_settings_raise():
    for engines, weight in (((), None), ((Fixed(),), 0.5), ((Fixed(), Fixed()), 1.5)):
        with pytest.raises(ValueError, match="exactly two with a weight from 0 to 1"):
            Hybrid(*engines, weight=weight)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: BM25({1: "a text"}), "ids of documents must be strings, got 1. Use '1'"),
        (lambda: BM25({"a": "", "b": "the"}), "At least one of the 2 documents must have a word"),
        (lambda: BM25(DOCUMENTS).run({"q": "file"}, 0), "k must be a positive integer, got 0"),
        (
            lambda: Hybrid(BM25(DOCUMENTS)).search("file", -1),
            "k must be a positive integer, got -1",
        ),
        (
            lambda: Hybrid(BM25(DOCUMENTS)).tune({"q": "file"}, {"q": {"a": 1}, "r": {"a": 1}}),
            "the 1 queries that are searched, but 1 others are judged, such as 'r'",
        ),
        (lambda: Hybrid(BM25(DOCUMENTS), depth=0), "depth must be a positive integer, got 0"),
    ],
)
def test_ids_words_and_numbers_of_results_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_words_of_the_query_are_highlighted_and_all_is_escaped():
    marked = highlight("A File, files & <b>", "file b")
    assert marked == "A <mark>File</mark>, files &amp; &lt;b&gt;"
    assert highlight("<x>", "") == "&lt;x&gt;"


def test_common_words_are_not_highlighted():
    assert highlight("the flow of heat", "The heat of") == "the flow of <mark>heat</mark>"
    assert highlight("the flow of heat", "of the") == "the flow of heat"


def test_the_part_with_most_words_of_the_query_is_shown():
    filler = "nothing of interest here, " * 40
    text = f"{filler}heat. {filler}heat transfer in layers. {filler}"
    shown = excerpt(text, "heat transfer in layers")
    assert "heat transfer in layers." in shown
    assert len(shown) < 410
    assert (shown[:2], shown[-2:]) == ("\N{HORIZONTAL ELLIPSIS} ", " \N{HORIZONTAL ELLIPSIS}")
    words = shown[2:-2].split()
    assert set(words) <= set(text.split()), "no word is cut"
    assert excerpt(text, "absent").startswith("nothing of interest")
    assert excerpt("short", "absent") == "short"
    assert excerpt("x" * 1000, "absent") == "x" * 400 + " \N{HORIZONTAL ELLIPSIS}"


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps({"_id": name, "text": text}) for name, text in DOCUMENTS.items()]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_the_page_searches(folder):
    server = make_server(*load_search(folder), port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def page(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}{path}") as answer:
            return answer.read().decode()

    try:
        assert "3 documents</p><ol></ol>" in page("/")
        assert "Nothing found in 3 documents" in page("/?q=absent")
        found = page("/?" + urllib.parse.urlencode({"q": "archives <script>"}))
        assert "<b>zip</b>" in found
        assert "<mark>archives</mark>" in found
        assert "<script" not in found
        assert 'value="archives &lt;script&gt;"' in found
        with pytest.raises(urllib.error.HTTPError, match="404"):
            page("/etc/passwd")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_a_browser_shows_the_results(folder, tmp_path):
    server = make_server(*load_search(folder), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/?q=archives"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    try:
        shown = subprocess.run(
            ["chromium", *options, "--dump-dom", address],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    finally:
        server.shutdown()
        server.server_close()
    assert "<mark>archives</mark> &lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "<title>archives - search</title>" in shown


def test_the_command_line_serves_until_it_is_interrupted(folder, capsys, monkeypatch):
    def interrupted(server):
        raise KeyboardInterrupt

    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", interrupted)
    main(["serve", str(folder), "--port", "0"])
    assert "3 documents: http://127.0.0.1:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["nowhere"], "nowhere must have corpus.jsonl or corpus.jsonl.gz"),
        ([".", "--encoder", "nowhere"], "nowhere/config.json must say what kind of model"),
        ([".", "--port", "99999999"], "port must be 0-65535"),
    ],
)
def test_a_wrong_command_line_ends_with_one_line(folder, capsys, monkeypatch, given, message):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="2"):
        main(["serve", *given])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("python -m polus.ir serve: error:")
    assert message in line


def test_a_port_in_use_is_named(folder):
    search, documents = load_search(folder)
    with make_server(search, documents, port=0) as server:
        port = server.server_port
        with pytest.raises(OSError, match=rf"at 127.0.0.1:{port}: .* Use another --port"):
            make_server(search, documents, port=port)
