"""The report of a run: what stands in the page is what was recorded."""

import base64
import gzip
import html
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from polus.callbacks import Callback, ValidationDataCallback
from polus.data import from_arrays
from polus.history import Validation
from polus.metrics import Accuracy
from polus.report import write_report
from polus.report.__main__ import main
from polus.runs import read_history
from polus.runs.history_file import HistoryFile, read_record
from polus.training import ClassifierTrainer
from polus.training.epoch_logs import EpochRecord, Spent

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=5000",
    "--enable-logging=stderr",
]
# Moves the mouse over the middle of each chart, and puts the texts that appear into the title.
HOVER = """<script>setTimeout(() => {
for (const view of Bokeh.index.roots.filter(root => root.model.type == "Figure")) {
  const target = view.canvas_view.events_el, box = target.getBoundingClientRect();
  const place = {clientX: box.left + box.width / 2, clientY: box.top + box.height / 2};
  const mouse = {...place, isPrimary: true, pointerType: "mouse", bubbles: true, composed: true};
  for (const kind of ["pointerover", "pointermove"])
    target.dispatchEvent(new PointerEvent(kind, mouse));
}
setTimeout(() => {
  const texts = [];
  const walk = node => {
    if (node.matches?.(".bk-tooltip-row-value")) texts.push(node.textContent.trim());
    [...node.children, ...(node.shadowRoot?.children ?? [])].forEach(walk);
  };
  walk(document.body);
  if (document.title != "hacked") document.title = texts.join(" | ");
}, 500)}, 1500)</script></body>"""
HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\">"
RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3)).astype("float32")
Y = RNG.integers(0, 2, 24).astype("int32")


def write_run(folder, num_steps=6, epochs=2, learning_rate=0.1, skipped=(), **facts):
    """Writes the directory of a run of made-up numbers; returns its losses."""
    folder.mkdir(parents=True, exist_ok=True)
    losses = RNG.uniform(0.1, 2.0, (epochs, num_steps)).astype("float32")
    file = HistoryFile(folder / "history.jsonl", 0, 0)
    for epoch in range(epochs):
        terms = {"loss": losses[epoch], "gradient_norm": losses[epoch] * 2}
        file.add_steps(epoch, 0, terms, [step for e, step in skipped if e == epoch])
        file.add_moment(epoch, num_steps - 1, epoch + 0.5, {"learning_rate": learning_rate})
        results = {"loss": 0.5 / (epoch + 1), "accuracy": 0.75}
        matrix = np.array([[3, 1], [0, 4 + epoch]])
        file.add_validation(Validation(epoch, num_steps - 1, "val", results), matrix)
        record = {"learning_rate": learning_rate, "secs": 0.8, "steps_per_sec": num_steps / 0.8}
        record |= {"waited_secs": 0.1, "compile_secs": 0.2, "callback_secs": 0.05}
        file.end_epoch(epoch, {"loss": 1.0, "accuracy": 0.9}, record, epoch + 1.0)
    file.close()
    known = {"status": "completed", "epochs": epochs, "epochs_done": epochs}
    optimizer = {"class_name": "SGD", "config": {"learning_rate": learning_rate}}
    known |= {"optimizers": {"optimizer": optimizer}, **facts}
    (folder / "run.json").write_text(json.dumps(known))
    return losses.ravel()


def documents(page):
    """Returns the charts of a page as Bokeh describes them."""
    (text,) = re.findall(r"const docs_json = '(.*)';\n", page)
    return json.loads(html.unescape(text.replace("\\'", "'").replace("\\\\", "\\")))


def array_of(column):
    if isinstance(column, list):
        return np.asarray(column)
    data = gzip.decompress(base64.b64decode(column["array"]["data"]))
    return np.frombuffer(data, column["dtype"]).reshape(column["shape"])


def curves_of(page):
    """Returns (title of the y axis, name of the curve) -> its columns."""
    (document,) = documents(page).values()
    sources, found = {}, {}
    for figure in document["roots"]:
        label = figure["attributes"]["left"][0]["attributes"]["axis_label"]
        for renderer in figure["attributes"]["renderers"]:
            attributes = renderer["attributes"]
            source = attributes["data_source"]
            if "attributes" in source:
                entries = source["attributes"]["data"]["entries"]
                sources[source["id"]] = {key: array_of(column) for key, column in entries}
            if "name" in attributes:
                found[label, attributes["name"]] = sources[source["id"]]
    return found


def browse(path, width=1280):
    """Opens a page in Chromium: returns the document after its scripts ran, and the console."""
    profile = path.parent / "profile"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},900"]
    done = subprocess.run(
        [*command, "--dump-dom", path.absolute().as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, [line for line in lines if "setting log level" not in line]


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.mark.once
def test_numbers_in_the_page_are_those_of_the_history(tmp_path):
    losses = write_run(tmp_path, num_steps=150)
    assert write_report(tmp_path) == tmp_path / "report.html"
    page = (tmp_path / "report.html").read_text()
    curves = curves_of(page)
    history = read_history(tmp_path)
    loss = curves["loss", "loss"]
    np.testing.assert_array_equal(loss["x"], np.arange(1, 301))
    np.testing.assert_array_equal(loss["value"], losses)
    np.testing.assert_array_equal(loss["value"], history.steps["loss"])
    norm = curves["gradient norm", "gradient_norm"]
    np.testing.assert_array_equal(norm["value"], history.steps["gradient_norm"])
    validated = curves["loss", "val_loss"]
    assert (validated["x"].tolist(), validated["y"].tolist()) == ([150, 300], [0.5, 0.25])
    assert curves["accuracy", "accuracy"]["y"].tolist() == [0.9, 0.9]
    assert curves["accuracy", "val_accuracy"]["y"].tolist() == [0.75, 0.75]
    assert set(curves["learning rate", "learning_rate"]["y"].tolist()) == {0.1}
    assert '"default_span": 0.2' in json.dumps(documents(page))  # of a constant rate
    times = curves["milliseconds", "mean of the epoch"]
    np.testing.assert_allclose(times["y"], [800 / 150, 800 / 150])
    parts = {name: column["secs"] for (label, name), column in curves.items() if "%" in label}
    np.testing.assert_allclose(parts["waiting for data"], [0.1, 0.1])
    np.testing.assert_allclose(parts["compiling"], [0.2, 0.2])
    np.testing.assert_allclose(parts["callbacks"], [0.05, 0.05])
    np.testing.assert_allclose(parts["steps"], [0.45, 0.45])
    np.testing.assert_allclose(parts["validation and saving between epochs"], [0.2, 0.2])
    # The matrix of the second validation: [[3, 1], [0, 5]].
    scores = re.findall(
        r"<tr><td>(\d)</td><td>([\d.]+)</td><td>([\d.]+)</td><td>([\d.]+)</td>", page
    )
    assert scores == [("0", "1.000", "0.750", "0.857"), ("1", "0.833", "1.000", "0.909")]


@pytest.mark.once
def test_validation_has_the_color_of_the_metric_and_is_dashed(tmp_path):
    write_run(tmp_path)
    page = write_report(tmp_path).read_text()
    legend = re.findall(r'stroke="(#\w+)" [^>]*dasharray="([\d ]*)"/></svg><span>(\w+)<', page)
    styles = {name: (color, dashes) for color, dashes, name in legend}
    for metric in ("loss", "accuracy"):
        assert styles[metric][0] == styles[f"val_{metric}"][0]
        assert (styles[metric][1], styles[f"val_{metric}"][1]) == ("", "6 4")


@pytest.mark.once
def test_nothing_is_loaded_from_outside(tmp_path):
    write_run(tmp_path)
    page = write_report(tmp_path).read_text()
    assert "default-src 'none'" in page
    outside_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", outside_scripts)
    assert not re.findall(r"<script[^>]*\ssrc=", page)
    assert len(page) < 2_000_000


@pytest.mark.once
def test_two_runs_begin_with_what_differs(tmp_path):
    first = write_run(tmp_path / "a", learning_rate=0.1)
    second = write_run(tmp_path / "b", num_steps=4, learning_rate=0.02)
    page = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html").read_text()
    table = page[page.index("Differences") : page.index("Results")]
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", table)
    assert rows == [("optimizers.optimizer.learning_rate", "0.1", "0.02")]
    curves = curves_of(page)
    np.testing.assert_array_equal(curves["loss", "a: loss"]["value"], first)
    np.testing.assert_array_equal(curves["loss", "b: loss"]["value"], second)
    assert ("accuracy", "b: val_accuracy") in curves
    same = write_report([tmp_path / "a", tmp_path / "a"], tmp_path / "same.html").read_text()
    assert "They have none." in same


@pytest.mark.once
def test_restarts_and_skipped_steps_are_marked(tmp_path):
    write_run(tmp_path, skipped=[(0, 2), (1, 1), (1, 4)])
    file = HistoryFile(tmp_path / "history.jsonl", 1, 3)  # steps 1:3 and 1:4 are run again
    file.add_steps(1, 3, {"loss": [0.5, 0.25]})
    file.close()
    record = read_record(tmp_path)
    assert (record.starts, record.skipped) == ([(0, 0), (1, 3)], [(0, 2), (1, 1)])
    page = write_report(tmp_path).read_text()
    assert "1 restart, 2 skipped steps" in page
    document = json.dumps(documents(page))
    assert document.count("restart after step @x") >= 1
    xs = [sorted(column["x"].tolist()) for column in all_columns(page) if "x" in column]
    assert [9.5] in xs  # 9 steps were done before
    assert [3, 8] in xs
    write_run(tmp_path / "b", skipped=[(0, 4)])
    both = write_report([tmp_path, tmp_path / "b"], tmp_path / "both.html").read_text()
    assert {"[5]", "[9.5]", "[3, 8]"} <= {
        str(sorted(column["x"].tolist())) for column in all_columns(both) if "x" in column
    }
    assert "b: skipped: step @x" in json.dumps(documents(both))


def all_columns(page):
    (document,) = documents(page).values()
    stack = list(document["roots"])
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if node.get("name") == "ColumnDataSource":
                entries = node["attributes"]["data"]["entries"]
                yield {key: array_of(column) for key, column in entries}
            stack += node.values()
        elif isinstance(node, list):
            stack += node


@pytest.mark.once
def test_a_killed_run_shows_what_was_written(tmp_path):
    write_run(tmp_path, status="running")
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"steps": {"epo')
    old = time.time() - 3600
    os.utime(tmp_path / "history.jsonl", (old, old))
    (tmp_path / "run.json").write_text('{"status": "running"}')
    page = write_report(tmp_path).read_text()
    assert len(curves_of(page)["loss", "loss"]["value"]) == 12
    assert "Nothing was written for 1 h 0 min" in page
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "No step was written so far" in write_report(empty).read_text()
    with pytest.raises(FileNotFoundError, match="There is no run directory"):
        write_report(tmp_path / "nowhere")


@pytest.mark.once
def test_what_is_no_run_is_refused_with_what_to_pass(tmp_path, capsys):
    for name in "ab":
        write_run(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"holds some\. Pass those to look at: .*a, .*b$"):
        write_report(tmp_path)
    for given in (3, [tmp_path / "a", 3]):
        with pytest.raises(TypeError, match="write_report needs the run_dir of a run, or a list"):
            write_report(given)
    for secs in ("0", "-1", "nan", "soon"):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "a"), "--live", secs])
        assert f"must be a positive number of seconds, got '{secs}'" in capsys.readouterr().err


@pytest.mark.once
def test_a_killed_run_is_told_by_its_process(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = {"host": socket.gethostname(), "pid": child.pid}
    write_run(tmp_path, status="running", starts=[{"process": process}])
    assert ">running<" in write_report(tmp_path).read_text()
    child.kill()
    child.communicate()
    assert ">killed<" in write_report(tmp_path).read_text()

    def sleep(secs):  # it is looked at until it could have been started again
        old = time.time() - 61
        for name in ("run.json", "history.jsonl"):
            os.utime(tmp_path / name, (old, old))

    assert main([str(tmp_path), "--live"], sleep) == 0
    for other in ({"host": "elsewhere", "pid": child.pid}, {"pid": "7"}, 7, None):
        write_run(tmp_path, status="running", starts=[{"process": other}])
        assert ">running<" in write_report(tmp_path).read_text()


@pytest.mark.once
def test_a_long_run_is_thinned_to_means_and_extremes(tmp_path):
    count = 100_000
    losses = RNG.uniform(0.5, 2.0, count).astype("float32")
    losses[12_345] = np.nan
    file = HistoryFile(tmp_path / "history.jsonl", 0, 0)
    for first in range(0, count, 1000):
        file.add_steps(0, first, {"loss": losses[first : first + 1000]})
    file.close()
    page = write_report(tmp_path).read_text()
    loss = curves_of(page)["loss", "loss"]
    assert len(page) < 2_000_000
    rows = losses.reshape(len(loss["x"]), -1)
    np.testing.assert_array_equal(loss["low"], np.nanmin(rows, axis=1))
    np.testing.assert_array_equal(loss["high"], np.nanmax(rows, axis=1))
    np.testing.assert_allclose(loss["value"], np.nanmean(rows, axis=1, dtype=np.float64))
    assert loss["x"][0] == (1 + rows.shape[1]) / 2


@pytest.mark.once
def test_live_writes_until_the_run_has_ended(tmp_path, capsys):
    write_run(tmp_path, status="running")
    pages = []

    def sleep(secs):
        pages.append((tmp_path / "report.html").read_text())
        assert len(pages) <= 2, "it goes on although the run has ended"
        if len(pages) == 2:
            write_run(tmp_path)

    assert main([str(tmp_path), "--live", "3"], sleep) == 0
    assert all('http-equiv="refresh" content="3"' in page for page in pages)
    assert len(pages) == 2
    assert 'http-equiv="refresh"' not in (tmp_path / "report.html").read_text()
    write_run(tmp_path, status="running")
    assert main([str(tmp_path), "--live"], interrupt) == 0
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "There is no run directory" in capsys.readouterr().err


def interrupt(secs):
    raise KeyboardInterrupt


def make_trainer():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return ClassifierTrainer(model, keras.optimizers.SGD(0.1), loss, metrics=[Accuracy(2)])


def train(folder, *callbacks, **arguments):
    validation = ValidationDataCallback(from_arrays((X, Y), 4))
    trainer, data = make_trainer(), from_arrays((X, Y), 4)
    trainer.train(data, 2, [validation, *callbacks], run_dir=folder, **arguments)
    return trainer


class Crash(Callback):
    def on_train_batch_end(self, epoch, step, loss):
        if (epoch, step) == (1, 2):
            raise RuntimeError("a crash")


def test_training_writes_the_report_with_the_confusion_matrix(tmp_path):
    trainer = train(tmp_path)
    predicted = np.argmax(keras.ops.convert_to_numpy(trainer.model(X)), axis=1)
    expected = np.zeros((2, 2), int)
    np.add.at(expected, (Y, predicted), 1)
    np.testing.assert_array_equal(read_record(tmp_path).confusions["val"], expected)
    page = (tmp_path / "report.html").read_text()
    history = read_history(tmp_path)
    np.testing.assert_array_equal(curves_of(page)["loss", "loss"]["value"], history.steps["loss"])
    (row, _) = history.record
    parts = row["waited_secs"] + row["callback_secs"] + row["compile_secs"]
    assert 0 < row["compile_secs"] < parts < row["secs"]
    assert history.record[1]["compile_secs"] == 0


@pytest.mark.once
def test_the_first_call_of_a_program_and_what_precedes_it_count_as_compiling():
    times = iter([10.0, 13.0, 15.0, 16.0, 20.0, 21.0, 29.0, 30.0, 31.0, 32.0])
    record = EpochRecord(clock=lambda: next(times))
    one, other = object(), object()
    record.begin(0, Spent())  # at 10
    record.calls(one, waited_secs=1.0)  # at 13: 2 seconds for the trace
    record.called()  # at 15: 2 more
    record.calls(one, waited_secs=1.0)  # at 16; known, so the clock is not read again
    record.called()
    record.calls(other, waited_secs=1.5)  # at 20
    record.called()  # at 21: 1 more
    row = record.end(make_trainer(), [4, 4, 4], Spent(1.5, 0.5, 0))  # at 29
    parts = row["secs"], row["compile_secs"], row["waited_secs"], row["callback_secs"]
    assert parts == (19.0, 5.0, 1.5, 0.5)
    record.begin(0, Spent(1.5, 0.5, 0))  # at 30
    record.calls(one, waited_secs=1.5)
    assert record.end(make_trainer(), [4], Spent(1.5, 0.5, 0))["compile_secs"] == 0


@pytest.mark.once
def test_a_report_loads_no_backend(tmp_path):
    write_run(tmp_path)
    code = "import sys; from polus.report.__main__ import main; main(sys.argv[1:])"
    code += "; assert 'keras' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)


def test_a_crashed_run_leaves_its_report_and_raises_its_error(tmp_path):
    with pytest.raises(RuntimeError, match="a crash"):
        train(tmp_path, Crash())
    page = (tmp_path / "report.html").read_text()
    assert '<span class="status failed">failed</span> 1 of 2 epochs' in page
    assert "RuntimeError(&#x27;a crash&#x27;)" in page
    assert len(curves_of(page)["loss", "loss"]["x"]) == 9


def test_skipped_steps_of_a_run_are_recorded(tmp_path):
    x = X.copy()
    x[5] = np.nan
    data = from_arrays((x, Y), 4, shuffle=False)
    make_trainer().train(data, 2, run_dir=tmp_path, on_nonfinite="skip")
    assert read_record(tmp_path).skipped == [(0, 1), (1, 1)]
    assert "2 skipped steps" in (tmp_path / "report.html").read_text()


def test_a_run_does_not_fail_with_its_report(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    with monkeypatch.context() as patch:
        find = importlib.util.find_spec
        patch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *a: None if name == "bokeh" else find(name, *a),
        )
        train(tmp_path / "a")
    assert "pip install bokeh" in caplog.text
    assert not (tmp_path / "a" / "report.html").exists()
    monkeypatch.setattr("polus.report.page.page_of", lambda *a: 1 / 0)
    train(tmp_path / "b")
    assert "report.html can't be written: ZeroDivisionError" in caplog.text


@pytest.mark.once
def test_a_missing_library_is_named(tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.delitem(sys.modules, "polus.report.page", raising=False)
    monkeypatch.delitem(sys.modules, "polus.report.drawing", raising=False)
    monkeypatch.setitem(sys.modules, "bokeh.embed", None)
    with pytest.raises(ImportError, match="pip install bokeh"):
        write_report(tmp_path)


@pytest.mark.once
@needs_chromium
def test_a_page_opens_in_a_browser_and_hostile_names_are_text(tmp_path):
    file = HistoryFile(tmp_path / "run" / "history.jsonl", 0, 0)
    file.add_steps(0, 0, {"loss": [0.5, 0.5, 0.5], HOSTILE: [1.0, 2.0, 3.0]})
    validation = Validation(0, 2, HOSTILE, {"loss": 0.5, HOSTILE: 0.25})
    file.add_validation(validation, np.eye(2, dtype=int))
    file.end_epoch(0, {"accuracy": 1.0}, {"secs": 1.0, "steps_per_sec": 3.0}, 2.0)
    file.close()
    facts = {"status": HOSTILE, "exception": HOSTILE, "models": {HOSTILE: {"name": HOSTILE}}}
    facts["starts"] = [{"time": HOSTILE, "command": [HOSTILE]}]
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for runs in ([tmp_path / "run"], [tmp_path / "run", tmp_path / "other"]):
        path = write_report(runs, tmp_path / "page.html")
        assert "<img" not in re.sub(r"<script.*?</script>", "", path.read_text(), flags=re.DOTALL)
        path.write_text(path.read_text().replace("</body>", HOVER))
        document, console = browse(path)
        assert not console
        title = html.unescape(re.findall(r"<title>(.*?)</title>", document)[0])
        assert "0.5" in title.split(" | ")
        assert (HOSTILE if len(runs) == 1 else f"other: {HOSTILE}") in title.split(" | ")
        assert "<img" not in re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)
        # Bokeh fills its elements when it has drawn.
        places = re.findall(r'data-root-id="[^"]*"[^>]*>(.{5})', document)
        assert len(places) >= 6
        assert set(places) == {"<div "}


@pytest.mark.once
@needs_chromium
def test_a_page_fits_a_phone(tmp_path):
    run = tmp_path / ("run" * 30)
    write_run(run, note="a" * 500, exception="e" * 200, starts=[{"command": ["c" * 200]}])
    path = write_report(run)
    frame = tmp_path / "frame.html"
    # Chromium has a least width of its window, a frame has none.
    frame.write_text(
        f'<iframe id="f" style="width:390px;height:800px" src="{path.as_uri()}"></iframe>'
        "<script>addEventListener('message', e => document.title = e.data)</script>"
    )
    page = path.read_text()
    tell = "setTimeout(() => parent.postMessage(document.documentElement.scrollWidth, '*'), 2000)"
    path.write_text(page.replace("</body>", f"<script>{tell}</script></body>"))
    document, console = browse(frame)
    assert not console
    assert int(re.findall(r"<title>(.*?)</title>", document)[0]) <= 390
