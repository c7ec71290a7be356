"""Takes the report's picture: `python docs/screenshot.py`, where Chromium is installed.

Trains a small classifier of scikit-learn's digits into a temporary run directory, opens its report
and writes `docs/_static/report.png`.
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import keras
from PIL import Image
from sklearn.datasets import load_digits

import polus

PICTURE = Path(__file__).parent / "_static" / "report.png"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
SIZE = 1100, 860


def train(folder: Path) -> None:
    """Trains for a few seconds."""
    keras.utils.set_random_seed(1)
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype("float32"), labels.astype("int32")
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, "relu"),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(10),
        ]
    )
    trainer = polus.ClassifierTrainer(
        model,
        keras.optimizers.Adam(polus.schedules.Cosine(0.005, warmup=0.1)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[polus.Accuracy(10)],
    )
    held_out = polus.from_arrays((images[1437:], labels[1437:]), 120)
    data = polus.from_arrays((images[:1437], labels[:1437]), 32, shuffle=True)
    trainer.train(data, 12, [polus.ValidationDataCallback(held_out)], run_dir=folder, record=True)


def main() -> None:
    """Writes the picture."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise SystemExit("Chromium is not installed.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "digits"
        train(folder)
        facts = json.loads((folder / "run.json").read_text())
        # Not the paths of this machine, nor a commit before the one with the picture.
        facts["starts"][0] |= {"command": ["python", "train.py"], "git": None}
        (folder / "run.json").write_text(json.dumps(facts))
        page = polus.write_report(folder)
        shot = Path(scratch) / "report.png"
        size = f"--window-size={SIZE[0]},{SIZE[1]}"
        command = [browser, *FLAGS, f"--user-data-dir={scratch}/profile", size]
        command += ["--virtual-time-budget=5000", f"--screenshot={shot}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        Image.open(shot).convert("RGB").quantize(64).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
