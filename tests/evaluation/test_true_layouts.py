"""SciQ and ConceptNet, no copy of which is at hand, in the columns of their real files: from disk and hub alike."""

from __future__ import annotations

import json

import datasets
import pytest
import torch

from helpers.networks import without_special_tokens
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.harness import Harness
from knowledge_compression.evaluation.lama import Lama
from knowledge_compression.evaluation.scoring import Scorer

SCIQ = [  # the columns of allenai/sciq in their order; a third of its questions have no support
    {"question": question, "distractor3": d3, "distractor1": d1, "distractor2": d2}
    | {"correct_answer": right, "support": text}
    for question, d3, d1, d2, right, text in (
        ("what is the red animal?", "moon", "the cat", "bird", "the dog", "  the dog is red ."),
        ("what wrote the book?", "paris", "rome", "tokyo", "wolf", ""),
        ("which animal is in berlin?", "fish", "bird", "cat", "a dog", "the dog was in berlin ."),
        ("what is the moon?", "red", "book", "wolf", "an animal", ""),
    )
]  # fmt: skip
CONCEPTNET = [  # the columns of the authors' test.jsonl; sentences come as people wrote them
    {"sub": "alive", "obj": "think", "pred": "HasSubevent", "obj_label": "think", "uuid": "d4f1"}
    | {"masked_sentences": ["One of the things you do when you are alive is [MASK]."]},
    {"sub": "sky", "obj": "blue", "pred": "HasProperty", "obj_label": "blue", "uuid": "e5a2"}
    | {"masked_sentences": ["The  [MASK] sky is  [MASK] .", "[MASK]is the sky."]},
    {"sub": "dog", "obj": "bark", "pred": "CapableOf", "obj_label": "bark", "uuid": "f6b3"}
    | {"masked_sentences": ["A dog can bark", 'A dog " [MASK] "']},
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands for the hub: what is put into it by id is given from Parquet files, all else refused."""
    files, load = {}, datasets.load_dataset

    def put(name, splits):
        for split, rows in splits.items():
            path = tmp_path / f"{name.replace('/', '-')}-{split}.parquet"
            datasets.Dataset.from_list(rows).to_parquet(path)
            files.setdefault(name, {})[split] = str(path)

    def load_dataset(path, name=None, data_files=None, split=None, **_):
        if path == "json":  # a local file
            return load(path, name, data_files=data_files, split=split)
        asked = path if path != "parquet" else str(data_files).split("/")[-3]
        if asked not in files:
            raise ConnectionError(f"no {asked}")
        return load("parquet", data_files=files[asked], split=split, cache_dir=str(tmp_path / "hub_cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return put


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_sciq_with_its_distractors_is_the_same_from_disk_and_hub_and_written_out(hub, tmp_path, tiny_model):
    model = without_special_tokens(tiny_model("llama"))
    lines(tmp_path / "data" / "sciq" / "test.jsonl", SCIQ)
    hub("allenai/sciq", {"train": SCIQ[:1], "validation": SCIQ[:1], "test": SCIQ})
    from_disk, from_hub = (
        Harness(["sciq"], data_dir=where).evaluate(Scorer(model)) for where in (str(tmp_path / "data"), None)
    )
    same = [column for column in from_disk.items.columns if column != "id"]
    assert from_hub.items.select(same).equals(from_disk.items.select(same))
    assert from_hub.metrics == from_disk.metrics
    for row, document in zip(from_disk.items.to_dicts(), SCIQ, strict=True):
        choices = [document[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
        assert row["prompt"] == f"{document['support'].lstrip()}\nQuestion: {document['question']}\nAnswer:"
        scores = [plain_score(model, row["prompt"], choice) for choice in choices]
        assert row["log_prob"] == pytest.approx(scores[3], abs=1e-4)
        assert (row["gold"], row["gold_index"], row["choices"]) == (choices[3], 3, 4)
        assert row["prediction"] == choices[scores.index(max(scores))]
        assert row["correct"] == (max(scores) == scores[3])
        by_length = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        assert row["correct_norm"] == (max(by_length) == by_length[3])


@torch.no_grad()
def plain_score(model, context, answer):
    """The sum of the log-probabilities of the answer's tokens."""
    before, ids = (model.tokenizer(text).input_ids for text in (context, f"{context} {answer}"))
    log_probs = model.network(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_probs[place - 1, ids[place]]) for place in range(len(before), len(ids)))


def test_sciq_without_a_distractor_is_one_line(tmp_path):
    lines(tmp_path / "sciq" / "test.jsonl", [{key: text for key, text in SCIQ[0].items() if key != "distractor2"}])
    with pytest.raises(
        BadInput, match=r"test\.jsonl line 1 lacks a column; it needs question, support, correct_answer"
    ):
        Harness(["sciq"], data_dir=str(tmp_path)).fingerprint()


@pytest.mark.parametrize("protocol", ["template", "sentence", "paper"])
def test_conceptnet_is_the_same_from_disk_and_hub(protocol, hub, tmp_path, tiny_model):
    lines(tmp_path / "lama" / "ConceptNet" / "test.jsonl", CONCEPTNET)
    on_the_hub = [
        {name: row[name] for name in ("uuid", "sub", "obj", "pred", "obj_label")}
        | {"masked_sentence": sentence, "negated": ""}
        for row in CONCEPTNET
        for sentence in row["masked_sentences"]
    ]
    hub("conceptnet", {"train": on_the_hub})
    from_disk, from_hub = (Lama(where, ["ConceptNet"], protocol) for where in (str(tmp_path), None))
    clozes = from_disk.clozes()
    assert [cloze.sentence for cloze in clozes] == [
        "One of the things you do when you are alive is [MASK].",
        "The  [MASK] sky is  [MASK] .",
        'A dog " [MASK] "',
    ]
    assert [(cloze.subject, cloze.gold) for cloze in clozes] == [("alive", "think"), ("sky", "blue"), ("dog", "bark")]
    assert from_hub.clozes() == clozes
    encoder, decoder = tiny_model("bert"), tiny_model("llama")
    for model, asked in (
        (encoder, 4 if protocol == "paper" else 3),
        (decoder, 3),
    ):  # the paper asks each of the two masks
        questions = from_disk.questions(model).asked
        assert len(questions) == asked
        assert questions == from_hub.questions(model).asked
