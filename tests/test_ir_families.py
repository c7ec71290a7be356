"""Encoders of each family, beside the model that transformers itself has made of the folder."""

import json
import logging
import shutil
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from polus.ir.export import save_sentence_transformers
from polus.ir.models import BertEncoder, TextTokenizer, TransformerEncoder, load_encoder
from polus.state import layers_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    st = pytest.importorskip("sentence_transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from safetensors.torch import load_file, save_file
    from sentence_transformers.sentence_transformer import modules

logging.getLogger("transformers").setLevel(logging.ERROR)
SENTENCES = json.loads(
    (Path(__file__).parent / "data" / "minilm_reference.json").read_text("utf-8")
)["sentences"]
TEXTS = [SENTENCES[0], "short <pad> one", " ".join(SENTENCES)]  # padding spelt out counts too
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "initializer_range": 0.5,  # so that vectors of texts differ
}
IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
# Settings besides sizes, the pooling that the family's models have, and the special tokens.
FAMILIES = {
    "XLMRoberta": ({"max_position_embeddings": 514, "type_vocab_size": 1, **IDS}, "cls"),
    "MPNet": ({"max_position_embeddings": 514, **IDS}, "mean"),
    "ModernBert": (
        {
            "max_position_embeddings": 512,
            "local_attention": 12,
            "cls_token_id": 0,
            "sep_token_id": 2,
            **IDS,
        },
        "mean",
    ),
    "Qwen3": ({"num_key_value_heads": 2, "head_dim": 8, **IDS}, "lasttoken"),
}


def numpy(x):
    return ops.convert_to_numpy(x)


def write_tokenizer(folder, name):
    """Trains a small tokenizer of the family's kind, and writes its files."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    if name == "XLMRoberta":
        tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    template = "$A </s>" if name == "Qwen3" else "<s> $A </s>"  # Qwen3 has no first token
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "model_max_length": 400,
        "padding_side": "left" if name == "Qwen3" else "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Returns a folder of a family, saved by sentence-transformers, and its vectors of TEXTS."""
    made = {}

    def make(name):
        if name in made:
            return made[name]
        folder = tmp_path_factory.mktemp(name)
        settings, pooling = FAMILIES[name]
        vocab_size = write_tokenizer(folder, name)
        config = getattr(transformers, f"{name}Config")(vocab_size=vocab_size, **SIZES, **settings)
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}Model")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases start as ones and zeros
                    parameter += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            full = st.SentenceTransformer(
                modules=[
                    modules.Transformer(str(folder)),
                    modules.Pooling(16, pooling),
                    modules.Normalize(),
                ],
                prompts={"query": "query: ", "document": ""},
                device="cpu",
            )
            full.save_pretrained(str(folder / "st"))
        made[name] = folder / "st", full.encode_query(TEXTS)
        return made[name]

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_gives_the_vectors_of_sentence_transformers(folder_of, name):
    """With padding, and one text much longer than the window of local attention."""
    folder, expected = folder_of(name)
    tokens = TextTokenizer(folder, prompt_name="query")(TEXTS)
    assert tokens["attention_mask"].sum(1).max() > 100
    encoder = load_encoder(folder)
    assert isinstance(encoder, BertEncoder if name == "XLMRoberta" else TransformerEncoder)
    found = numpy(encoder(tokens, training=False))
    assert np.abs(expected[0] - expected[2]).max() > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["MPNet", "ModernBert", "Qwen3"])
def test_encoders_are_saved_and_loaded(folder_of, tmp_path, name):
    folder, expected = folder_of(name)
    load_encoder(folder).save(tmp_path / "encoder.keras")
    loaded = keras.saving.load_model(tmp_path / "encoder.keras")
    tokens = TextTokenizer(folder, prompt_name="query")(TEXTS)
    np.testing.assert_allclose(numpy(loaded(tokens, training=False)), expected, atol=1e-4)


def test_configurations_from_before_transformers_5_are_read(folder_of, tmp_path):
    """Whose ModernBERT states every how many blocks attention is global, and two bases."""
    folder, expected = folder_of("ModernBert")
    shutil.copytree(folder, tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    del config["layer_types"], config["rope_parameters"]
    old = {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0}
    path.write_text(json.dumps(config | old | {"local_rope_theta": 10000.0}))
    tokens = TextTokenizer(path.parent, prompt_name="query")(TEXTS)
    found = numpy(load_encoder(path.parent)(tokens, training=False))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_weights_in_bfloat16_are_read(folder_of, tmp_path):
    folder, _ = folder_of("Qwen3")
    shutil.copy(folder / "config.json", tmp_path)
    weights = load_file(folder / "model.safetensors")
    halves = {name: each.to(torch.bfloat16) for name, each in weights.items()}
    save_file(halves, tmp_path / "model.safetensors")
    for found, expected in zip(
        load_encoder(tmp_path).get_weights(), load_encoder(folder).get_weights(), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=2**-8)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("MPNet", {"model_type": "deberta-v2"}, "families bert, .*, mpnet, .* got 'deberta-v2' in"),
        ("MPNet", {"hidden_act": "relu"}, "mpnet encoder must have .*'gelu'.* got .*'relu'"),
        ("Qwen3", {"use_sliding_window": True}, "got {'use_sliding_window': True}"),
        ("Qwen3", {"rope_parameters": {"rope_type": "yarn"}}, "type 'default', got 'yarn'"),
    ],
)
def test_what_is_not_implemented_raises(folder_of, tmp_path, name, change, message):
    config = json.loads((folder_of(name)[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_encoder(tmp_path)


@pytest.mark.parametrize("name", ["XLMRoberta", "MPNet", "Qwen3"])
def test_weights_of_more_layers_than_the_configuration_has_raise(folder_of, tmp_path, name):
    folder = folder_of(name)[0]
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    shutil.copy(folder / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"those of 3 layers, .* but they are of 4\."):
        load_encoder(tmp_path)
    assert len(load_encoder(tmp_path, num_layers=2).blocks) == 2  # on purpose


def test_folders_without_a_model_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json must say what kind of model"):
        load_encoder(tmp_path)


def test_settings_of_each_block_are_as_many_as_blocks():
    with pytest.raises(ValueError, match=r"each of the 2 blocks, got 1 and 2"):
        TransformerEncoder(9, 8, 2, 2, 8, architecture={"windows": [None]})


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_gives_finite_vectors_of_texts_with_padding(folder_of, dtype):
    folder, expected = folder_of("ModernBert")
    tokens = TextTokenizer(folder, prompt_name="query")(TEXTS)
    encoder = load_encoder(folder, dtype=dtype)
    assert {each.compute_dtype for each in layers_of(encoder)} == {dtype.removeprefix("mixed_")}
    found = numpy(encoder(tokens, training=False)).astype("float32")
    np.testing.assert_allclose(found, expected, atol=0.1)
    assert np.abs(found - expected).max() > 1e-4, "it computes in half precision"


def test_the_dtype_is_that_of_all_layers_and_weights(folder_of):
    for name in ("XLMRoberta", "MPNet"):
        encoder = load_encoder(folder_of(name)[0], dtype="bfloat16", dense=[{"units": 3}])
        encoder.build_on_tokens()
        assert {each.dtype_policy.name for each in layers_of(encoder)} == {"bfloat16"}
        assert {weight.dtype for weight in encoder.weights} == {"bfloat16"}


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_folders_are_loaded_by_sentence_transformers(folder_of, tmp_path, name):
    folder, expected = folder_of(name)
    encoder = load_encoder(folder)
    encoder.blocks[1].expand.kernel.assign(2 * encoder.blocks[1].expand.kernel)  # trained
    tokenizer = TextTokenizer(folder, prompt_name="query")
    ours = numpy(encoder(tokenizer(TEXTS), training=False))
    assert np.abs(ours - expected).max() > 1e-3
    save_sentence_transformers(tmp_path / "new", encoder, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = st.SentenceTransformer(str(tmp_path / "new"), device="cpu")
    np.testing.assert_allclose(loaded.encode(TEXTS), ours, atol=1e-4)


def test_an_architecture_of_no_family_is_not_saved(folder_of, tmp_path):
    tokenizer = TextTokenizer(folder_of("MPNet")[0], prompt_name="query")
    encoder = TransformerEncoder(9, 8, 1, 2, 8, architecture={"causal": True})
    encoder.build_on_tokens()
    with pytest.raises(ValueError, match=r"architecture of mpnet, modernbert, qwen3 to be saved"):
        save_sentence_transformers(tmp_path / "new", encoder, tokenizer)
