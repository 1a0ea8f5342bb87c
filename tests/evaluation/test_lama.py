"""LAMA in its original layout, its protocols, and what broken files get."""

from __future__ import annotations

import csv
import json

import pytest
import torch

import knowledge_compression as kc
from helpers.networks import lower_cased
from knowledge_compression.analysis.published import EXPERIMENTS
from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.cloze import opened
from knowledge_compression.evaluation.lama import Lama
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.sweeping.cli import main


@pytest.fixture(scope="module")
def bert_tiny():
    return kc.choose("model=bert_tiny").load("cpu")


def lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def trex(uuid, subject, gold, *sentences):
    evidences = [{"masked_sentence": sentence} for sentence in sentences]
    return {"uuid": uuid, "sub_label": subject, "obj_label": gold, "predicate_id": "P36", "evidences": evidences}


@pytest.fixture
def small(tmp_path):
    """A data folder with all four data sets."""
    lama = tmp_path / "lama"
    lines(
        lama / "TREx" / "P36.jsonl",
        [
            trex("a", "France", "Paris", "The city of [MASK] is the capital of France.", "[MASK] is in France."),
            trex("b", "Italy", "Rome", "no mask here", "The capital of Italy is [MASK]."),
            trex("c", "France", "paris", "The city of [MASK] is the capital of France."),
            trex("d", "Nowhere", "New York City", "They moved to [MASK] together."),
        ],
    )
    lines(lama / "relations.jsonl", [{"relation": "P36", "template": "The capital of [X] is [Y] ."}])
    lines(
        lama / "Google_RE" / "place_of_birth_test.jsonl",
        [{"uuid": "g", "sub_label": "Mozart", "obj_label": "Vienna", "masked_sentences": ["Born .", "In [MASK] ."]}],
    )
    squad = {"id": "s", "sub_label": "Squad", "obj_label": "gold", "masked_sentences": ["The color was [MASK]."]}
    lines(lama / "Squad" / "test.jsonl", [squad])
    net = {"uuid": "n", "sub": "dog", "obj": "bark", "obj_label": "bark", "masked_sentences": ["A dog can [MASK]."]}
    lines(lama / "ConceptNet" / "test.jsonl", [net])
    (lama / "common_vocab_cased.txt").write_text("Paris\nRome\nbark\n")
    return tmp_path


def test_the_default_asks_trex_by_template_and_the_others_by_sentence(small):
    clozes = {cloze.id: cloze for cloze in Lama(str(small)).clozes()}
    assert clozes["TREx.P36/a/template"].sentence == "The capital of France is [MASK] ."
    assert clozes["Google_RE.place_of_birth/g/sentence"].sentence == "In [MASK] ."
    assert clozes["Squad/s/sentence"].gold == "gold"
    assert clozes["ConceptNet/n/sentence"].subject == "dog"
    assert len(clozes) == 7


def test_sentences_are_the_first_that_have_a_mask(small):
    clozes = {cloze.fact: cloze.sentence for cloze in Lama(str(small), protocol="sentence").clozes()}
    assert clozes["TREx.P36/a"] == "The city of [MASK] is the capital of France."
    assert clozes["TREx.P36/b"] == "The capital of Italy is [MASK]."


def test_the_papers_protocol(small, bert_tiny):
    evaluation = Lama(str(small), protocol="paper").evaluate(Scorer(bert_tiny))
    items = {row["fact"]: row for row in evaluation.items.to_dicts()}
    assert "TREx.P36/c" not in items  # the same sentence and answer as a, but for case
    assert evaluation.description["duplicates_dropped"] == 1
    long = items["TREx.P36/d"]
    assert (long["correct"], long["rank"], long["log_prob"]) == (False, None, None)
    assert evaluation.description["objects_of_several_tokens"] == {"TREx.P36": 1}
    assert evaluation.description["left_out"] == {}
    assert all(row["prediction"] == row["prediction"].lower() for row in items.values())
    micro = sum(row["correct"] for row in items.values()) / len(items)
    assert evaluation.metrics["accuracy"] == pytest.approx(micro)


def test_the_default_counts_long_objects_and_leaves_them_out(small, bert_tiny):
    evaluation = Lama(str(small)).evaluate(Scorer(bert_tiny))
    assert evaluation.description["left_out"] == {"object_of_several_tokens": {"TREx.P36": 1}}
    assert evaluation.items.height == 6
    typed = Lama(str(small), candidates="typed").evaluate(Scorer(bert_tiny))
    assert typed.description["left_out"] == {}
    assert typed.items.height == 7
    assert {"TREx.accuracy", "TREx.accuracy_macro", "Squad.accuracy", "TREx.P36.accuracy", "mrr_macro"} <= set(
        evaluation.metrics
    )


def test_data_sets_found_and_missing_are_named(small, bert_tiny):
    (small / "lama" / "ConceptNet" / "test.jsonl").unlink()
    description = Lama(str(small), candidates="common").evaluate(Scorer(bert_tiny)).description
    assert description["data_sets"] == ["TREx", "Google_RE", "Squad"]
    assert description["data_sets_missing"] == ["ConceptNet"]
    assert sum(description["left_out"]["object_not_in_common_vocabulary"].values()) == 2


@pytest.mark.parametrize("architecture", ["bert", "t5", "bart", "llama"])
def test_all_families_and_candidates(architecture, small, tiny_model):
    model = lower_cased(tiny_model(architecture))
    for candidates in ("full", "common", "typed"):
        for protocol in ("template", "sentence"):
            suite = Lama(str(small), protocol=protocol, candidates=candidates)
            evaluation = suite.evaluate(Scorer(model))
            left_out = sum(sum(tasks.values()) for tasks in evaluation.description["left_out"].values())
            assert evaluation.items.height + left_out == 7
            assert evaluation.items.height >= 1


def test_the_fingerprint_is_of_what_is_read(small, tmp_path_factory):
    first = Lama(str(small)).fingerprint()
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "data"
    (small / "lama").rename(elsewhere.parent / "lama")
    assert Lama(str(elsewhere.parent)).fingerprint() == first
    squad = elsewhere.parent / "lama" / "Squad" / "test.jsonl"
    squad.write_text(squad.read_text().replace("gold", "blue"))
    assert Lama(str(elsewhere.parent)).fingerprint() != first
    assert Lama(str(elsewhere.parent), datasets=["TREx"]).fingerprint() != first


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", r"P36.jsonl:2: not JSON"),
        ("[1, 2]", r"P36.jsonl:2: not a JSON object"),
        (json.dumps(trex("x", "France", "Paris", "no blank")), r"P36.jsonl:2: its sentences have no \[MASK\]"),
        (json.dumps(trex("x", "France", "", "In [MASK].")), r"P36.jsonl:2: obj_label, the right answer, is missing"),
    ],
)
@pytest.mark.parametrize("protocol", ["template", "sentence", "paper"])
def test_a_broken_line_is_named_before_a_model_is_asked(line, says, protocol, small):
    path = small / "lama" / "TREx" / "P36.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([rows[0], line, *rows[1:]]))
    suite = Lama(str(small), protocol=protocol)
    with pytest.raises(BadInput, match=says) as refusal:
        suite.fingerprint()
    assert "\n" not in str(refusal.value)


def test_what_is_not_there_is_named(small, tmp_path):
    with pytest.raises(DataUnavailable, match=r"the folder .*nowhere/lama does not exist"):
        Lama(str(tmp_path / "nowhere")).fingerprint()
    (small / "lama" / "relations.jsonl").unlink()
    with pytest.raises(DataUnavailable, match=r"relations.jsonl.*protocol=sentence"):
        Lama(str(small)).fingerprint()
    assert Lama(str(small), protocol="sentence").fingerprint()
    (tmp_path / "bare" / "lama").mkdir(parents=True)
    with pytest.raises(DataUnavailable, match=r"holds none of TREx/\*\.jsonl"):
        Lama(str(tmp_path / "bare")).fingerprint()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"protocol": "papers"}, "'papers'.*template, sentence, paper"),
        ({"candidates": "all"}, "'all'.*full, common, typed"),
        ({"datasets": ["Trex"]}, "'Trex'.*TREx, Google_RE"),
        ({"protocol": "paper", "candidates": "typed"}, "full vocabulary"),
        ({"limit": 0}, "limit=0"),
        ({"top_k": [0]}, "top_k=0"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(wrong, says):
    with pytest.raises(BadInput, match=says) as refusal:
        Lama("anywhere", **wrong)
    assert "\n" not in str(refusal.value)


def test_the_hubs_rows_are_the_same_facts(monkeypatch, bert_tiny):
    import datasets

    row = {"uuid": "a", "sub_label": "France", "obj_label": "Paris", "predicate_id": "P36"}
    row |= {"template": "The capital of [X] is [Y] .", "masked_sentence": "The city of [MASK] is in France."}
    tables = {
        "trex": [row, row | {"masked_sentence": "[MASK] again."}, row | {"uuid": "b", "sub_label": "Italy"}],
        "google_re": [{"pred": "/people/person/place_of_birth", "obj_label": "Rome", "masked_sentence": "In [MASK]."}],
    }

    def load_dataset(kind, data_files, split):
        name = data_files.split("/")[-3]
        assert data_files.startswith("hf://datasets/facebook/lama@refs%2Fconvert%2Fparquet/")
        if name not in tables:
            raise ConnectionError("no route")
        return datasets.Dataset.from_list(tables[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    suite = Lama()
    assert [cloze.id for cloze in suite.clozes()] == [
        "TREx.P36/a/template",
        "TREx.P36/b/template",
        "Google_RE.place_of_birth/0/sentence",
    ]
    description = suite.evaluate(Scorer(bert_tiny)).description
    assert description["data_sets_missing"] == ["Squad", "ConceptNet"]
    tables.clear()
    with pytest.raises(DataUnavailable, match=r"hub did not provide .*no route.*data_dir=DIR") as refusal:
        Lama().clozes()
    assert "\n" not in str(refusal.value)


def published_loop(lama, model):
    """Facts in their order, LAMA's templates or its sentences, each once; the best token at each mask, lower-cased."""
    questions, asked = [], set()
    templates = {row["relation"]: row["template"] for row in read(lama / "relations.jsonl")}
    for row in read(lama / "TREx" / "P138.jsonl"):
        sentence = templates["P138"].replace("[X]", row["sub_label"]).replace("[Y]", "[MASK]")
        questions.append(("TREx", sentence, row["obj_label"]))
    for row in read(lama / "Google_RE" / "place_of_death_test.jsonl"):
        questions.append(("Google_RE", f"{row['sub_label']} died in [MASK] .", row["obj_label"]))
    questions += [
        ("Squad", row["masked_sentences"][0], row["obj_label"]) for row in read(lama / "Squad" / "test.jsonl")
    ]
    tokenizer = model.tokenizer
    for data_set, sentence, gold in questions:
        if (data_set, sentence) in asked:
            continue
        asked.add((data_set, sentence))
        encoded = tokenizer(sentence, truncation=True, max_length=128, return_tensors="pt")
        logits = model.network(**encoded).logits[0]
        for place in (encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten().tolist():
            yield data_set, sentence, gold.lower(), tokenizer.decode([int(logits[place].argmax())]).strip().lower()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.data
@torch.no_grad()
def test_real_lama_is_asked_and_answered_as_the_published_loop_does(data_dir, tmp_path, bert_tiny):
    for name in ("relations.jsonl", "TREx/P138.jsonl", "Google_RE/place_of_death_test.jsonl", "Squad/test.jsonl"):
        (tmp_path / "lama" / name).parent.mkdir(parents=True, exist_ok=True)
        first = (data_dir / "lama" / name).read_text().splitlines(keepends=True)[:300]
        (tmp_path / "lama" / name).write_text("".join(first))
    evaluation = Lama(str(tmp_path), protocol="paper").evaluate(Scorer(bert_tiny))
    assert evaluation.description["data_sets_missing"] == ["ConceptNet"]
    expected = list(published_loop(tmp_path / "lama", bert_tiny))
    items = evaluation.items.to_dicts()
    ours = [(row["task"].split(".")[0], row["prompt"], row["gold"].lower(), row["prediction"]) for row in items]
    assert ours == expected
    assert len(expected) > 850
    right = {data_set: [gold == said for of, _, gold, said in expected if of == data_set] for data_set, *_ in expected}
    assert evaluation.metrics["accuracy"] == pytest.approx(sum(map(sum, right.values())) / len(expected))
    for data_set, correct in right.items():
        assert evaluation.metrics[f"{data_set}.accuracy"] == pytest.approx(sum(correct) / len(correct))


@pytest.mark.data
@torch.no_grad()
def test_ranks_and_log_probabilities_of_real_lama_are_those_of_each_sentence_by_itself(data_dir, bert_tiny):
    tokenizer = bert_tiny.tokenizer
    for row in Lama(str(data_dir), protocol="paper", limit=60).evaluate(Scorer(bert_tiny)).items.to_dicts():
        ids = tokenizer(row["prompt"], truncation=True, max_length=128, padding="max_length", return_tensors="pt")
        places = [n for n, token in enumerate(ids["input_ids"][0].tolist()) if token == tokenizer.mask_token_id]
        gold = tokenizer(row["gold"], add_special_tokens=False)["input_ids"]
        if len(gold) == 1:
            place = places[int(row["id"].partition("#")[2] or 1) - 1]
            scores = bert_tiny.network(**ids).logits[0, place].log_softmax(-1)
            assert row["log_prob"] == pytest.approx(float(scores[gold[0]]), abs=1e-4)
            assert row["rank"] == pytest.approx(int((scores > scores[gold[0]]).sum()) + 1, abs=2)


FLAT = {"sub_label": "France", "obj_label": "Paris", "predicate_id": "P36", "obj_surface": "Paris"}


@pytest.mark.parametrize("protocol", ["template", "sentence"])
def test_rows_with_one_evidence_each_are_one_fact_on_disk_as_on_the_hub(protocol, small):
    rows = [
        FLAT | {"uuid": "a", "masked_sentence": "no blank here"},
        FLAT | {"uuid": "b", "sub_label": "Italy", "obj_label": "Rome", "masked_sentence": "[MASK] is in Italy."},
        FLAT | {"uuid": "a", "masked_sentence": "France has [MASK]."},
        FLAT | {"uuid": "a", "masked_sentence": "[MASK] again."},
    ]
    lines(small / "lama" / "TREx" / "P36.jsonl", rows)
    clozes = Lama(str(small), ["TREx"], protocol).clozes()
    assert [cloze.fact for cloze in clozes] == ["TREx.P36/a", "TREx.P36/b"]
    if protocol == "sentence":
        assert [cloze.sentence for cloze in clozes] == ["France has [MASK].", "[MASK] is in Italy."]


def test_facts_of_one_id_are_told_apart(small):
    net = {"uuid": "n", "sub": "dog", "obj_label": "bark", "masked_sentences": ["A dog can [MASK]."]}
    lines(small / "lama" / "ConceptNet" / "test.jsonl", [net, net | {"obj_label": "run"}])
    clozes = Lama(str(small), datasets=["ConceptNet"]).clozes()
    assert [cloze.id for cloze in clozes] == ["ConceptNet/n/sentence", "ConceptNet/n:2/sentence"]


def test_an_id_without_any_mask_is_named_by_its_first_row(small):
    rows = [FLAT | {"uuid": "a", "masked_sentence": "no blank"}, FLAT | {"uuid": "a", "masked_sentence": "none"}]
    lines(small / "lama" / "TREx" / "P36.jsonl", rows)
    with pytest.raises(BadInput, match=r"P36.jsonl:1: its sentences have no \[MASK\]"):
        Lama(str(small)).clozes()


@pytest.mark.parametrize("mask", ["[MASK]", "[mask]", "<mask>", "<extra_id_0>"])
def test_a_mask_in_another_models_writing_is_a_mask(mask, small):
    lines(
        small / "lama" / "Squad" / "test.jsonl", [{"id": "s", "obj_label": "gold", "masked_sentences": [f"A {mask}."]}]
    )
    assert Lama(str(small), ["Squad"]).clozes()[0].sentence == "A [MASK]."


def test_another_models_mask_is_text_where_the_own_one_stands(small):
    sentence = "The tag <mask> is a [MASK]."
    lines(small / "lama" / "Squad" / "test.jsonl", [{"id": "s", "obj_label": "gold", "masked_sentences": [sentence]}])
    assert Lama(str(small), ["Squad"]).clozes()[0].sentence == sentence


CONCEPTNET = [  # the columns of the authors' file
    {"sub": "alive", "obj": "think", "pred": "HasSubevent", "uuid": "d4f1", "obj_label": "think"}
    | {"masked_sentences": ["One of the things you do when you are alive is [MASK]."]},
    {"sub": "sky", "obj": "blue", "pred": "HasProperty", "uuid": "e5a2", "obj_label": "blue"}
    | {"masked_sentences": ["The  [MASK] sky is  [MASK] ."]},
]


def test_the_paper_asks_each_mask_of_an_encoder_and_each_sentence_once(small, bert_tiny, tiny_model):
    twice = CONCEPTNET[1] | {"uuid": "same", "obj_label": "grey"}
    lines(small / "lama" / "ConceptNet" / "test.jsonl", [*CONCEPTNET, twice])
    suite = Lama(str(small), ["ConceptNet"], protocol="paper")
    ids = ["ConceptNet/d4f1/sentence", "ConceptNet/e5a2/sentence", "ConceptNet/e5a2/sentence#2"]
    assert [cloze.id for cloze in suite.questions(bert_tiny).asked] == ids
    assert [cloze.id for cloze in suite.questions(tiny_model("llama")).asked] == ids[:2]
    items = {row["id"]: row for row in suite.evaluate(Scorer(bert_tiny)).items.to_dicts()}
    tokenizer = bert_tiny.tokenizer
    encoded = tokenizer(CONCEPTNET[1]["masked_sentences"][0], return_tensors="pt")
    logits = bert_tiny.network(**encoded).logits[0].log_softmax(-1)
    places = (encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
    (gold,) = tokenizer("blue", add_special_tokens=False)["input_ids"]
    for place, name in zip(places, ids[1:], strict=True):
        assert items[name]["log_prob"] == pytest.approx(float(logits[place, gold].detach()), abs=1e-4)


@pytest.mark.data
def test_the_papers_protocol_asks_as_many_as_its_table_counts(data_dir, bert_tiny):
    asked = Lama(str(data_dir), ["Google_RE", "Squad"], protocol="paper").questions(bert_tiny).asked
    counts = {name: sum(cloze.task.startswith(name) for cloze in asked) for name in ("Google_RE", "Squad")}
    assert counts == {"Google_RE": 5510, "Squad": 308}


def test_every_value_of_table_3_is_a_share_of_those_counts():
    """And of 11,329 for ConceptNet, which is not here, and of 31,468 for T-REx but for three of its 70."""
    with (EXPERIMENTS / "cost_of_compression" / "published" / "table3.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    counts = {"Squad": 308, "GoogleRe": 5510, "Conceptnet": 11329, "TRex": 31468}
    wrong = set()
    for row in rows:
        of = counts[row["dataset"]]
        for key in row.keys() - {"model", "dataset"}:
            if round(100 * round(float(row[key]) * of / 100) / of, 3) != float(row[key]):
                wrong.add((row["model"], row["dataset"], key))
    assert len(rows) == 28
    unexplained = (("BERT", "baseline"), ("RoBERTa", "baseline"), ("RoBERTa", "att_gpq_40"))
    assert wrong == {(f"{model}-base", "TRex", key) for model, key in unexplained}


def test_subjects_keep_their_letters_in_lamas_templates(small):
    relations = [{"relation": "P36", "template": "[X] is made by [Y] ."}]
    lines(small / "lama" / "relations.jsonl", relations)
    lines(small / "lama" / "TREx" / "P36.jsonl", [trex("a", "iOS", "Apple"), trex("b", "dog", "nobody")])
    sentences = [cloze.sentence for cloze in Lama(str(small), ["TREx"]).clozes()]
    assert sentences == ["iOS is made by [MASK] .", "dog is made by [MASK] ."]
    assert [opened(sentence) for sentence in sentences] == ["iOS is made by [MASK] .", "Dog is made by [MASK] ."]


@pytest.mark.parametrize("name", ["TREx/P36.jsonl", "Squad/test.jsonl", "relations.jsonl", "common_vocab_cased.txt"])
@pytest.mark.parametrize("content", [b"\x80\x00\xff\xfe", "caf\u00e9".encode("latin-1")])
def test_a_file_that_is_no_utf8_is_one_line_and_status_2(name, content, small, capsys, monkeypatch):
    (small / "lama" / name).write_bytes(content)
    candidates = "common" if name.endswith("txt") else "full"
    arguments = [f"data_dir={small}", "model=bert_tiny", "compression=none", "eval=[lama]", f"output.dir={small}/out"]
    monkeypatch.chdir(small)
    monkeypatch.setattr("sys.argv", ["run.py", *arguments, f"eval.lama.candidates={candidates}"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = [line for line in capsys.readouterr().err.splitlines() if "is not UTF-8 text" in line]
    assert ended.value.code == 2
    assert len(said) == 1 and name in said[0]
