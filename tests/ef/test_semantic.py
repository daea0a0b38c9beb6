"""BERTScore: equal to the bert-score package, and steady where that one stops."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

from gapo_lite.ef import score_pairs, semantic
from gapo_lite.ef.semantic import LAYERS, bert_scores
from gapo_lite.embedded import embedded_path
from gapo_lite.errors import ConfigError, ModelError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what bert-score imports
    import bert_score
    from bert_score.utils import model2layers

MINILM = "embedded:all-minilm-l6-v2"
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}


def reference(chosen: list[str], rejected: list[str], model: str, layer: int) -> np.ndarray:
    """(N, 3) from bert-score, with the roles that METHOD gives to the two responses."""
    parts = bert_score.score(
        rejected, chosen, model_type=model, num_layers=layer, device="cpu", lang=None
    )
    return torch.stack(parts, dim=1).double().numpy()


def assert_equal_to_bert_score(chosen: list[str], rejected: list[str]) -> None:
    ours = bert_scores(chosen, rejected, model=MINILM)
    theirs = reference(chosen, rejected, str(embedded_path(MINILM)), 6)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_scores_equal_bert_score_on_real_pairs(real_rows):
    # Not the longest, to save time: `benchmarks/ef_scoring.py` takes any 64 of them.
    short = [row for row in real_rows if len(row["chosen"]) < 500 and len(row["rejected"]) < 500]
    rows = random.Random(0).sample(short, 64)
    chosen, rejected = [row["chosen"] for row in rows], [row["rejected"] for row in rows]
    assert_equal_to_bert_score(chosen, rejected)


def test_scores_equal_bert_score_on_odd_texts():
    pairs = [
        ("I love it 😀👩‍👩‍👧🇩🇪", "I hate it 😡"),
        ("😀", "😡"),
        ("  \n spaces around\t", "spaces around"),
        ("\u3000\x1c\x85wide spaces\xa0", "wide spaces"),
        ("你好，世界", "世界，你好"),
        ("Привет, мир", "مرحبا بالعالم"),
        ("control\x00characters\x07 and \u200bjoiners", "control characters"),
        ("words [SEP] and [CLS] and [PAD] typed out", "words [MASK] and [UNK]"),
        ("supercalifragilisticexpialidocious" * 9, "a" * 300),
        ("the same text", "the same text"),
        ("x", "y"),
    ]
    assert_equal_to_bert_score([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def test_texts_beyond_the_limit_are_cut_as_bert_score_cuts_them():
    long = "The river runs past the old mill and on to the sea. " * 60  # some 780 tokens
    chosen = [long + "The end.", long, "no"]
    rejected = ["From here, " + long, "The river runs past the old mill.", long]
    assert_equal_to_bert_score(chosen, rejected)


def test_an_empty_text_scores_zero_as_in_bert_score(monkeypatch, caplog):
    # bert-score encodes it by a method that transformers 5 has dropped; it did the same as this.
    monkeypatch.setattr(
        transformers.BertTokenizer,
        "build_inputs_with_special_tokens",
        lambda tokenizer, ids: tokenizer.encode(""),
        raising=False,
    )
    chosen = ["", "text", "  \n", "\x00", "", "two words"]
    rejected = ["text", "", "text", "text", "", "two words"]
    assert_equal_to_bert_score(chosen, rejected)
    assert np.all(bert_scores(chosen, rejected, model=MINILM)[:5] == 0)
    assert "5 of 6 pairs have a response without any token" in caplog.text


def test_a_text_of_special_tokens_alone_has_a_number_where_bert_score_has_none():
    scores = bert_scores(["words", "[CLS]"], ["[CLS]", "words"], model=MINILM)
    theirs = reference(["words", "[CLS]"], ["[CLS]", "words"], str(embedded_path(MINILM)), 6)
    assert np.isnan(theirs).any()
    np.testing.assert_allclose(scores, np.nan_to_num(theirs), atol=1e-5)


def test_a_lone_surrogate_is_read_as_a_question_mark():
    odd = bert_scores(["a \ud800 b"], ["a b"], model=MINILM)
    np.testing.assert_array_equal(odd, bert_scores(["a ? b"], ["a b"], model=MINILM))


def test_the_three_factors_are_the_columns_and_recall_looks_from_the_chosen_side():
    chosen, rejected = ["cats and dogs and birds"], ["cats"]
    columns = bert_scores(chosen, rejected, model=MINILM)[0]
    named = [
        score_pairs(chosen, rejected, f"bertscore_{part}", model=MINILM)[0]
        for part in ("p", "r", "f1")
    ]
    np.testing.assert_array_equal(named, columns)
    swapped = bert_scores(rejected, chosen, model=MINILM)[0]
    np.testing.assert_allclose(swapped, columns[[1, 0, 2]], atol=1e-6)


def test_a_pair_alone_and_pairs_in_small_batches_equal_bert_score_too(real_rows):
    # bert-score counts a token that nothing resembles by what pads the batch: so it has to be the
    # same batch. "no" against a long text has such tokens.
    long = "The river runs past the old mill and on to the sea. " * 6
    chosen, rejected = ["no", "no", long, "no"], [long, "maybe", "no", long]
    assert_equal_to_bert_score(chosen[:1], rejected[:1])
    assert_equal_to_bert_score(chosen, rejected)
    batches = bert_scores(chosen, rejected, model=MINILM, batch_size=2)
    theirs = [
        reference(*half, str(embedded_path(MINILM)), 6)
        for half in [(chosen[:2], rejected[:2]), (chosen[2:], rejected[2:])]
    ]
    np.testing.assert_allclose(batches, np.concatenate(theirs), rtol=0, atol=1e-5)


def test_only_the_vectors_of_one_chunk_exist_at_a_time(monkeypatch):
    counts: list[int] = []
    encode = semantic.Encoder.encode

    def counting(encoder, texts, batch_size):
        encoded = encode(encoder, texts, batch_size)
        counts.append(len(encoded))
        return encoded

    monkeypatch.setattr(semantic.Encoder, "encode", counting)
    calls: list[tuple[int, int]] = []
    chosen = ["one chosen text"] * 8 + ["another"] * 3
    rejected = [f"rejected {number}" for number in range(11)]
    bert_scores(
        chosen, rejected, model=MINILM, batch_size=2, progress=lambda *call: calls.append(call)
    )
    assert calls == [(8, 11), (11, 11)]
    assert counts == [8 + 1, 3 + 1]  # and equal texts once


def test_pairs_that_are_cut_are_counted_in_one_warning(caplog):
    long = "word " * 600
    bert_scores([long, "a", long, "a"], ["b", long, long, "b"], model=MINILM, batch_size=1)
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 4 pairs have a response of more than 512 tokens; BERTScore compares its first 512 "
        "only, as that is all its encoder can read."
    ]
    assert caplog.records[0].name == "gapo_lite.ef.semantic"


def test_a_text_of_exactly_the_limit_is_not_counted_as_cut(caplog):
    bert_scores(["word " * 510], ["word"], model=MINILM)
    assert caplog.records == []
    bert_scores(["word " * 511], ["word"], model=MINILM)
    assert "1 of 1 pairs" in caplog.text


def test_the_layers_are_those_of_bert_score():
    moved = {"FacebookAI", "google-bert"}
    for name, layer in LAYERS.items():
        owner, _, bare = name.rpartition("/")
        if name != MINILM:
            assert model2layers[bare if owner in moved else name] == layer, name


def save_tiny(folder: Path, config: transformers.PretrainedConfig) -> str:
    """A random encoder of four layers that reads the embedded BERT's tokens."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((embedded_path(MINILM) / name).read_bytes())
    return str(folder)


@pytest.mark.parametrize(
    "config",
    [
        transformers.BertConfig(num_hidden_layers=4, **SIZES),
        transformers.RobertaConfig(num_hidden_layers=4, max_position_embeddings=514, **SIZES),
        transformers.XLMRobertaConfig(num_hidden_layers=4, max_position_embeddings=514, **SIZES),
        transformers.ElectraConfig(num_hidden_layers=4, embedding_size=16, **SIZES),
        transformers.AlbertConfig(num_hidden_layers=4, embedding_size=16, **SIZES),
        transformers.MPNetConfig(num_hidden_layers=4, max_position_embeddings=514, **SIZES),
        transformers.DebertaConfig(num_hidden_layers=4, **SIZES),
        transformers.DebertaV2Config(num_hidden_layers=4, **SIZES),
        transformers.DistilBertConfig(n_layers=4, dim=32, n_heads=2, hidden_dim=48),
    ],
    ids=lambda config: config.model_type,
)
def test_every_family_in_the_table_is_cut_at_the_layer_as_bert_score_cuts_it(config, tmp_path):
    config.vocab_size = 30522
    model = save_tiny(tmp_path, config)
    chosen, rejected = ["The cat sat.", "word " * 600], ["A dog sat down.", "other words " * 300]
    ours = bert_scores(chosen, rejected, model=model, layer=2)
    np.testing.assert_allclose(ours, reference(chosen, rejected, model, 2), rtol=0, atol=1e-5)
    other = bert_scores(chosen, rejected, model=model, layer=3)
    assert not np.allclose(ours, other, rtol=0, atol=1e-4)


def save_tiny_roberta(folder: Path, **tokenizer_settings: int) -> str:
    """A random RoBERTa of 64 usable positions with a byte-level tokenizer of its own."""
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(
        ["the quick brown fox says hello world " * 9], 300, special_tokens=special
    )
    tokenizer.save_model(str(folder))
    settings = {"tokenizer_class": "RobertaTokenizer", **tokenizer_settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=300, num_hidden_layers=3, max_position_embeddings=66, **SIZES
    )
    transformers.RobertaModel(config).save_pretrained(folder)
    return str(folder)


def test_scores_of_roberta_with_its_own_tokenizer_equal_bert_score(tmp_path):
    model = save_tiny_roberta(tmp_path, model_max_length=64)
    chosen, rejected = ["hello quick world", "the fox " * 80], ["The world is 😀", "fox"]
    ours = bert_scores(chosen, rejected, model=model, layer=2)
    np.testing.assert_allclose(ours, reference(chosen, rejected, model, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("told", [{}, {"model_max_length": 9000}])
def test_a_tokenizer_that_tells_no_or_too_high_a_limit_does_not_break_scoring(
    told, tmp_path, caplog
):
    model = save_tiny_roberta(tmp_path, **told)
    scores = bert_scores(["a", "hello " * 90], ["hello", "hello"], model=model, layer=1)
    assert np.all(scores[1] > 0)
    assert "1 of 2 pairs have a response of more than 64 tokens" in caplog.text


def test_weights_in_half_precision_are_computed_with_in_single_precision(tmp_path):
    config = transformers.BertConfig(num_hidden_layers=2, vocab_size=30522, **SIZES)
    model = save_tiny(tmp_path, config)
    network = transformers.AutoModel.from_pretrained(model, dtype=torch.bfloat16)
    network.save_pretrained(model)
    assert semantic.load_encoder(model, 1, "cpu").network.dtype == torch.float32


def test_an_unknown_model_needs_a_layer(tmp_path):
    for model in ("someone/some-encoder", str(tmp_path)):
        with pytest.raises(ConfigError, match="Set layer"):
            bert_scores(["a"], ["b"], model=model)


def test_a_layer_that_the_encoder_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"layer is 7, .* has 6 layers"):
        bert_scores(["a"], ["b"], model=MINILM, layer=7)


def test_a_device_that_is_not_there_is_refused():
    for device in ("cuda:99", "toaster"):
        with pytest.raises(ConfigError, match=f"no device '{device}'"):
            bert_scores(["a"], ["b"], model=MINILM, device=device)


@pytest.mark.parametrize("model", ["./no/such/folder", "/no/such/folder", "no/such/folder"])
def test_a_folder_that_is_not_there_is_named(model):
    with pytest.raises(ModelError, match="looks like a folder, but there is none"):
        bert_scores(["a"], ["b"], model=model, layer=1)


@pytest.mark.parametrize("model", ["someone/some-encoder", "https://a.b/c", "roberta-large", "-"])
def test_a_model_out_of_reach_is_named_with_what_to_do(model):
    with pytest.raises(ModelError, match=r"embedded:all-minilm-l6-v2|looks like a folder"):
        bert_scores(["a"], ["b"], model=model, layer=1)


@pytest.mark.parametrize("model", ["embedded:smollm2-135m-instruct", "embedded:minilm"])
def test_an_embedded_name_that_is_no_encoder_is_refused(model):
    with pytest.raises(ModelError):
        bert_scores(["a"], ["b"], model=model, layer=1)


def test_a_damaged_or_incomplete_encoder_is_refused(tmp_path):
    model = save_tiny(tmp_path, transformers.BertConfig(num_hidden_layers=2, **SIZES))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lacks \d+ weights \(the first is encoder.layer.2"):
        bert_scores(["a"], ["b"], model=model, layer=3)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot be loaded"):
        bert_scores(["a"], ["b"], model=model, layer=1)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ModelError, match="cannot be loaded"):
        bert_scores(["a"], ["b"], model=model, layer=1)


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    transformers.BartConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder with a decoder"):
        bert_scores(["a"], ["b"], model=str(tmp_path), layer=1)


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    model = save_tiny(tmp_path, transformers.BertConfig(num_hidden_layers=2, **SIZES))
    trace = tmp_path / "it ran"
    (tmp_path / "theirs.py").write_text(f"open({str(trace)!r}, 'w')\nclass Theirs: pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded"):
        bert_scores(["a"], ["b"], model=model, layer=1)
    assert not trace.exists()


def test_loading_says_nothing_and_leaves_the_reports_of_transformers_as_they_were(capfd):
    verbosity = transformers.utils.logging.get_verbosity()
    bert_scores(["a"], ["b"], model=MINILM, layer=3)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == verbosity
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_faster_layers_say_the_same_and_give_way_where_they_do_not(monkeypatch):
    texts = ["the cat sat on the mat", "a dog"], ["the cat ran", "a dog barks at the cat"]
    fast = bert_scores(*texts, model=MINILM)
    encoder = semantic.load_encoder(MINILM, None, "cpu")
    kinds = {type(module).__name__ for module in encoder.network.modules()}
    assert "_OneDnnLinear" in kinds
    monkeypatch.setattr(semantic._OneDnnLinear, "forward", lambda self, values: values[..., :1])
    kinds = {type(m).__name__ for m in semantic.load_encoder(MINILM, None, "cpu").network.modules()}
    assert "_OneDnnLinear" not in kinds
    np.testing.assert_allclose(bert_scores(*texts, model=MINILM), fast, atol=1e-6)
