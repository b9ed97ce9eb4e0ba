from collections import Counter
from importlib import resources

import datasets
import pytest
from datasets import Dataset

from multitune.errors import DataError, TaskError
from multitune.tasks import Task, list_tasks, load_task
from multitune.tasks.prepare import marked_pronoun
from multitune.tasks.specs import SPECS

DEMOS = {
    "demo/sentiment": ("classification", ("text",), ("negative", "positive"), "accuracy"),
    "demo/topic": ("classification", ("text",), None, "accuracy"),
    "demo/acceptability": ("classification", ("text",), ("unacceptable", "acceptable"), "matthews"),
    "demo/intent": ("classification", ("text",), None, "accuracy"),
    "demo/paraphrase": (
        "classification",
        ("sentence1", "sentence2"),
        ("different", "paraphrase"),
        "accuracy",
    ),
    "demo/urgency": ("regression", ("text",), (), "pearson_spearman"),
    "demo/trails": ("generation", ("facts",), (), "bleu"),
}


# ---- the tasks that ship


def test_the_demo_tasks_are_listed(monkeypatch):
    monkeypatch.delenv("MULTITUNE_DATA", raising=False)
    assert list_tasks() == tuple(DEMOS)


@pytest.mark.parametrize("name", DEMOS)
def test_demo_tasks(name):
    if not (resources.files("multitune.tasks") / f"{name}.jsonl").is_file():
        with pytest.raises(DataError, match=f"file of task {name!r} is missing"):
            load_task(name)
        return
    kind, parts, labels, metric = DEMOS[name]
    data = load_task(name)
    assert (data.task.name, data.task.kind, data.task.template.parts) == (name, kind, parts)
    assert labels in (None, data.task.labels)
    assert data.task.metric == metric
    assert data.test is None
    train, validation = data.task.examples(data.train), data.task.examples(data.validation)
    assert not {e.texts for e in train} & {e.texts for e in validation}
    assert 0.15 < len(validation) / (len(train) + len(validation)) <= 0.25
    if kind == "classification":
        for part in (train, validation):
            assert {e.target for e in part} == set(range(len(data.task.labels)))
    elif kind == "generation":
        assert len(train) + len(validation) == 240 and all(len(e.target) == 1 for e in train + validation)
    else:
        assert all(0 <= e.target <= 1 for e in train + validation)


def test_demo_intent_has_eight_labels():
    if (resources.files("multitune.tasks") / "demo/intent.jsonl").is_file():
        assert len(load_task("demo/intent").task.labels) == 8


def test_demo_splits_are_the_same_each_time():
    if (resources.files("multitune.tasks") / "demo/topic.jsonl").is_file():
        assert load_task("demo/topic").validation.to_list() == load_task("demo/topic").validation.to_list()


# ---- the public suites, on files made here


def save(folder, columns, names=None):
    for split, values in columns.items():
        table = datasets.Dataset.from_dict(values)
        for column, label_names in (names or {}).items():
            table = table.cast_column(column, datasets.ClassLabel(names=label_names))
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / f"{split}.parquet")


@pytest.fixture
def suites(tmp_path):
    """A folder of suites: one in the table of specs, two to infer, and some that must not be guessed."""
    rows = {"text": [f"t{i}" for i in range(40)], "label": [0, 1] * 20}
    pair = {"premise": ["p", "q"], "hypothesis": ["h", "i"], "label": [0, 2]}
    entailment = ["entailment", "neutral", "contradiction"]
    save(tmp_path / "glue/mnli", {"train": pair, "validation_matched": pair}, {"label": entailment})
    save(tmp_path / "mine/mood", {"train": rows, "validation": rows, "test": rows}, {"label": ["sad", "glad"]})
    save(tmp_path / "mine/no_validation", {"train": rows}, {"label": ["sad", "glad"]})
    save(tmp_path / "mine/no_classes", {"train": rows})
    save(tmp_path / "mine/unread", {"train": {**rows, "note": ["n"] * 40}}, {"label": ["sad", "glad"]})
    save(tmp_path / "mine/test_only", {"test": rows}, {"label": ["sad", "glad"]})
    return tmp_path


def test_what_is_found_is_listed(suites, monkeypatch):
    found = (*DEMOS, "glue/mnli", "mine/mood", "mine/no_validation")
    assert list_tasks(suites) == found
    monkeypatch.setenv("MULTITUNE_DATA", str(suites))
    assert list_tasks() == found


def test_a_task_of_the_table(suites):
    data = load_task("glue/mnli", suites)
    assert data.task.template.parts == ("premise", "hypothesis")
    assert [example.target for example in data.task.examples(data.validation)] == [0, 2]
    assert data.test is None


def test_a_task_that_is_inferred(suites):
    data = load_task("mine/mood", suites)
    assert data.task == Task(
        name="mine/mood", kind="classification", template=("text",), label="label", labels=("sad", "glad")
    )
    assert len(data.train) == len(data.validation) == len(data.test) == 40


def test_validation_is_held_out_where_there_is_none(suites):
    data = load_task("mine/no_validation", suites)
    assert (len(data.train), len(data.validation)) == (36, 4)
    assert Counter(data.validation["label"]) == {0: 2, 1: 2}
    assert data.validation.to_list() == load_task("mine/no_validation", suites).validation.to_list()


@pytest.mark.parametrize("name", ["mine/no_classes", "mine/unread"])
def test_a_task_that_columns_do_not_tell(suites, name):
    with pytest.raises(TaskError, match=r"cannot be told from its columns \('text', 'label'.*write its Task"):
        load_task(name, suites)


def test_a_task_without_training_rows(suites):
    with pytest.raises(DataError, match="nothing to train on; .* holds test"):
        load_task("mine/test_only", suites)


@pytest.mark.parametrize("name", ["mine/modd", "modd", "mine/../mine/mood", "/mine/mood"])
def test_unknown_names_list_the_near_ones(suites, name):
    with pytest.raises(TaskError, match=r"no task .* in .*Near it: .*mine/mood"):
        load_task(name, suites)


def test_a_folder_that_is_not_set(monkeypatch):
    monkeypatch.delenv("MULTITUNE_DATA", raising=False)
    with pytest.raises(
        DataError, match=r"folder that MULTITUNE_DATA names; set MULTITUNE_DATA \(export .*java_to_cs/tr"
    ):
        load_task("code/java_to_cs")
    with pytest.raises(TaskError, match=r"known without MULTITUNE_DATA, which is not set. Near it: glue/rte"):
        load_task("glue/rtee")
    with pytest.raises(TaskError, match="Some that are: demo/sentiment"):
        load_task("zzzzzzzzzz")


def test_a_folder_that_does_not_exist(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"data_dir is '.*nowhere', which is no folder"):
        load_task("glue/rte", tmp_path / "nowhere")
    monkeypatch.setenv("MULTITUNE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="MULTITUNE_DATA is"):
        list_tasks()


# ---- the public suites, as published


SUITES = {
    "glue/cola": (8551, 1043, "matthews"),
    "glue/sst2": (67349, 872, "accuracy"),
    "glue/mrpc": (3668, 408, "accuracy_and_f1"),
    "glue/stsb": (5749, 1500, "pearson_spearman"),
    "glue/qqp": (20000, 5000, "accuracy_and_f1"),
    "glue/mnli": (12925, 7468, "accuracy"),
    "glue/qnli": (9999, 5463, "accuracy"),
    "glue/rte": (2490, 277, "accuracy"),
    "glue/wnli": (635, 71, "accuracy"),
    "super_glue/boolq": (2045, 3270, "accuracy"),
    "super_glue/cb": (250, 56, "accuracy_and_macro_f1"),
    "super_glue/copa": (400, 100, "accuracy"),
    "super_glue/rte": (2490, 277, "accuracy"),
    "super_glue/wic": (5428, 638, "accuracy"),
    "super_glue/wsc": (554, 104, "accuracy"),
    "super_glue/multirc": (2287, 4848, "f1a_and_em"),
    "super_glue/record": (32, 32, "choice_f1_and_em"),
    "tweet_eval/stance_climate": (355, 40, "stance_f1"),
    "text_classification/trec": (4907, 545, "accuracy"),
    "text_classification/trec_fine": (4907, 545, "accuracy"),
    "text_classification/dbpedia_14": (5600, 1000, "accuracy"),
    "intent/clinc150": (15100, 3100, "accuracy"),
    "raft/tai_safety_research": (25, 25, "macro_f1"),
    "raft/overruling": (25, 25, "macro_f1"),
    "reasoning/commonsense_qa": (9741, 1221, "accuracy"),
    "reasoning/strategyqa": (1611, 179, "accuracy"),
    "medical/mmlu_virology": (5, 18, "accuracy"),
    "medical/pubmed_qa": (450, 50, "accuracy"),
}


@pytest.mark.data
@pytest.mark.parametrize("name", SUITES)
def test_published_suites(data_dir, name):
    num_train, num_validation, metric = SUITES[name]
    data = load_task(name)
    assert (len(data.train), len(data.validation), data.task.metric) == (num_train, num_validation, metric)
    examples = data.task.examples(data.validation)
    assert len({example.target for example in examples}) > 1
    assert len(data.task.examples(data.train.select(range(min(50, num_train))))) == min(50, num_train)
    assert Task.from_dict(data.task.to_dict()) == data.task


@pytest.mark.data
def test_published_texts(data_dir):
    copa = load_task("super_glue/copa", data_dir)
    premise = "My body cast a shadow over the grass. What was the cause?"
    assert copa.task.encode(copa.train[0]).texts == (
        (premise, "The sun was rising."),
        (premise, "The grass was cut."),
    )
    wic = load_task("super_glue/wic", data_dir)
    assert wic.task.encode(wic.train[0]).texts == (
        ("carry: You must carry your camping gear.", "Sound carries well over water."),
    )
    assert load_task("super_glue/cb").task.labels == ("entailment", "contradiction", "neutral")
    wsc = load_task("super_glue/wsc", data_dir)
    (first,) = wsc.task.encode(wsc.train[0]).texts
    assert first[1] == "He stands for Mark" and first[0].endswith("in his book. *He* should have been more skeptical.")
    assert all(text.count("*") == 2 for text in [*wsc.train["marked"], *wsc.validation["marked"]])


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("super_natural_instructions/task002_quoref_answer_generation", "token_f1"),
        ("super_natural_instructions/task591_sciq_answer_generation", "token_f1"),
        ("super_natural_instructions/task1572_samsum_summary", "rouge_l"),
    ],
)
def test_answers_to_questions_are_judged_by_the_words_they_share(tmp_path, name, metric):
    row = {"definition": "Answer.", "inputs": "Who?", "references": ["the man"]}
    folder = tmp_path / name
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        Dataset.from_list([row] * 20).to_parquet(folder / f"{split}.parquet")
    task = load_task(name, tmp_path).task
    assert task.metric == metric and task.encode(row).texts == (("Answer.\n\nWho?",),)


@pytest.mark.data
def test_a_query_is_read_with_every_entity(data_dir):
    record = load_task("super_glue/record", data_dir)
    row = record.validation[0]
    example = record.task.encode(row)
    assert example.texts[2][0] == row["passage"]
    assert example.texts[2][1] == "They will sew our lips, but we will chant, 'Long live Benazir Bhutto.'"
    assert [example.choices[place] for place in example.target] == ["Benazir Bhutto", "Bhutto"]
    for part in (record.train, record.validation):
        for row, each in zip(part, record.task.examples(part), strict=True):
            assert [set(each.choices[place] for place in each.target)] == [set(row["answers"])]
            assert len(each.texts) == len(row["entities"])


@pytest.mark.data
def test_the_questions_of_multirc(data_dir):
    multirc = load_task("super_glue/multirc", data_dir)
    groups = {e.group for e in multirc.task.examples(multirc.validation)}
    assert len(groups) == len({(row["paragraph_idx"], row["question_idx"]) for row in multirc.validation}) == 953


@pytest.mark.data
def test_tasks_for_judging_alone(data_dir):
    for name, rows, target in (
        ("reasoning/svamp", 1000, ("51",)),
        ("reasoning/aqua_rat", 254, (0,)),
        ("bbh/navigate", 250, ("No",)),
        ("commonsense/piqa", 1838, ("the correct answer is solution1",)),
    ):
        data = load_task(name, data_dir)
        assert (len(data.train), len(data.validation), len(data.test)) == (0, 0, rows)
        assert data.task.encode(data.test[0]).target == target
    aqua = load_task("reasoning/aqua_rat", data_dir)
    for row, example in zip(aqua.test, aqua.task.examples(aqua.test), strict=True):
        assert example.choices[example.target[0]].startswith(row["correct"])


@pytest.mark.parametrize(
    ("text", "index", "pronoun", "marked"),
    [
        ("Ann saw her and her cat .", 4, "her", "Ann saw her and *her* cat ."),
        ("Ann saw her , and her cat .", 3, "her", "Ann saw *her* , and her cat ."),
        ("He left, though it rained.", 3, "it", "He left, though *it* rained."),
        ("She saw him.", 2, "him", "She saw *him*."),
        ("Him they saw.", 0, "him", "*Him* they saw."),
    ],
)
def test_the_pronoun_that_is_meant_is_marked(text, index, pronoun, marked):
    table = datasets.Dataset.from_dict({"text": [text], "span2_index": [index], "span2_text": [pronoun]})
    assert marked_pronoun(table)["marked"] == [marked]


@pytest.mark.parametrize(
    ("name", "num_train", "num_validation", "metric", "prompt", "answer"),
    [
        (
            "nlg/e2e_nlg",
            42061,
            4672,
            "bleu",
            "name[The Vaults], eatType[pub], pri",
            "The Vaults pub near Café",
        ),
        ("nlg/webnlg_2017", 6940, 872, "bleu", "Aarhus_Airport | cityServed | ", "The Aarhus is the airport of"),
        ("nlg/dart", 2491, 277, "bleu", "Mars Hill College | JOINED | 1973 && Mars", "A school from Mars Hill, "),
        ("summarization/dialogsum", 12460, 500, "rouge_l", "#Person1#: Hi, Mr. Smith.", "Mr. Smith's getting a"),
        ("instruction/alpaca", 2000, 200, "rouge_l", "How many elements are there in", "A triangular matrix of"),
        ("reasoning/gsm8k", 6726, 747, "number_match", "Natalia sold clips to 48 of her", "Natalia sold 48/2 ="),
        ("commonsense/arc_easy", 2026, 225, "exact_match", "Please choose the correct answer", "the correct answer is"),
        ("super_natural_instructions/task591_sciq_answer_generation", 600, 100, "token_f1", "", ""),
        ("instruction_induction/sum", 450, 50, "exact_match", "Input: 0 10\nOutput:", "10"),
    ],
)
@pytest.mark.data
def test_published_texts_to_write(data_dir, name, num_train, num_validation, metric, prompt, answer):
    data = load_task(name)
    assert (len(data.train), len(data.validation), data.task.metric) == (num_train, num_validation, metric)
    first = data.task.encode(data.train[0])
    assert first.texts[0][0].startswith(prompt) and first.target[0].startswith(answer)
    assert len(data.task.examples(data.validation)) == num_validation
    assert Task.from_dict(data.task.to_dict()) == data.task


@pytest.mark.data
def test_all_that_is_listed_loads(data_dir):
    names = list_tasks()
    assert set(SPECS) - {"glue/mnli_mismatched"} <= set(names)  # whose rows the folder may lack
    folders = {"/".join(folder.parts[-2:]) for folder in data_dir.glob("*/*") if folder.is_dir()}
    assert folders - set(names) == {"images/omniglot", "images/omniglot_one_shot"}
    for name in set(names) - set(SUITES):
        data = load_task(name)
        judged = data.validation if len(data.validation) else data.test
        assert data.task.examples(judged.select(range(min(5, len(judged)))))


# ---- the hub, whose data sets are stood in for by tables made here


@pytest.fixture
def hub(monkeypatch):
    """The data sets that the hub has for this test, by name and configuration."""
    monkeypatch.delenv("MULTITUNE_DATA", raising=False)
    held = {}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config, split: held[name, config][split] if split else held[name, config]
    )
    return held


def test_without_a_folder_tasks_are_read_from_the_hub(hub):
    def rows(count, labels):
        table = {"premise": ["p"] * count, "hypothesis": ["h"] * count, "label": (labels * count)[:count]}
        names = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
        return datasets.Dataset.from_dict(table).cast_column("label", names)

    hub["nyu-mll/glue", "mnli"] = datasets.DatasetDict(
        {
            "train": rows(6, [0, 1, 2]),
            "validation_matched": rows(4, [0, 1]),
            "validation_mismatched": rows(3, [2]),
            "test": rows(5, [-1]),
        }
    )
    matched, other = load_task("glue/mnli"), load_task("glue/mnli_mismatched")
    assert [len(d.validation) for d in (matched, other)] == [4, 3]
    assert [e.target for e in other.task.examples(other.validation)] == [2, 2, 2]
    assert matched.test is None  # its labels are kept secret
    assert matched.task.labels == ("entailment", "neutral", "contradiction")


def test_a_test_split_whose_answers_are_secret_is_left_out(hub):
    plain = {
        "premise": ["It rained."] * 4,
        "choice1": ["Mud."] * 4,
        "choice2": ["Sun."] * 4,
        "question": ["effect"] * 4,
    }
    splits = {split: datasets.Dataset.from_dict({**plain, "label": [0, 1, 1, 0]}) for split in ("train", "validation")}
    secret = datasets.Dataset.from_dict({**plain, "label": [-1] * 4})
    hub["aps/super_glue", "copa"] = datasets.DatasetDict({**splits, "test": secret})
    assert load_task("super_glue/copa").test is None
    hub["aps/super_glue", "copa"]["test"] = splits["train"]
    assert len(load_task("super_glue/copa").test) == 4


def test_a_hub_without_the_split_to_judge_by(hub):
    table = datasets.Dataset.from_dict({"premise": ["p"], "hypothesis": ["h"], "label": [0]})
    hub["nyu-mll/glue", "mnli"] = datasets.DatasetDict({"train": table})
    with pytest.raises(DataError, match="judged by split 'validation_mismatched', which is missing; 'nyu-mll/gl"):
        load_task("glue/mnli_mismatched")


def test_a_hub_out_of_reach_leads_to_the_folder(monkeypatch):
    monkeypatch.delenv("MULTITUNE_DATA", raising=False)

    def fail(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"task 'glue/rte'.*no route.*export MULTITUNE_DATA=.*glue/rte/train.parquet"):
        load_task("glue/rte")


def test_half_of_a_raft_task_is_held_out(suites):
    rows = {"tweet": [f"t{i}" for i in range(50)], "label": [0] * 17 + [1] * 33, "id": list(range(50))}
    save(suites / "raft/complaints", {"train": rows}, {"label": ["no", "yes"]})
    data = load_task("raft/complaints", suites)
    assert (len(data.train), len(data.validation), data.task.metric) == (25, 25, "macro_f1")
    assert Counter(data.validation["label"]) in ({0: 8, 1: 17}, {0: 9, 1: 16})
