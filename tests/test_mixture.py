"""Mixtures of instructions: shares, wordings, whole tasks held out, and zero-shot scores by a slow twin."""

import json
import statistics
from collections import Counter
from dataclasses import replace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from multitune import Bank, ConfigError, DataError, Head, Plan, Task, TaskError, get_method, train
from multitune.prompting import (
    InstructedTask,
    Mixture,
    Pattern,
    by_pattern,
    by_template,
    instructed,
    save_scores,
    score_tasks,
)
from multitune.prompting.exemplars import prompt_task
from multitune.prompting.mixture import rows_of
from multitune.tasks.p3 import Asked, P3Template, p3_templates

MOOD = Task(name="mood", kind="classification", template=("text",), label="y", labels=("bad", "good"))
WORDS = "abcdefghijklmnopqrst"


def free(row):
    return Asked(prompt=f"say {row['text']}", answers=(row["text"],))


def made(name, count=6, cluster="", wordings=(free,), train=True, texts=WORDS):
    rows = [{"text": f"{name} {c}", "y": i % 2} for i, c in zip(range(count), texts, strict=False)]
    return InstructedTask(
        name=name,
        cluster=cluster or name,
        wordings=wordings,
        metric="exact_match",
        train=rows if train else None,
        test=rows,
    )


def counted(name, count):
    return InstructedTask(
        name=name, cluster=name, wordings=(free,), metric="exact_match", train=[{"text": name}] * count, test=[]
    )


def test_shares_follow_rows_up_to_the_cap_and_weights():
    tasks = (counted("small", 10), counted("large", 5000), counted("huge", 90000))
    assert Mixture(tasks=tasks, cap=30).shares == {"small": 10, "large": 30, "huge": 30}
    assert Mixture(tasks=tasks, cap=30, rows=140).shares == {"small": 20, "large": 60, "huge": 60}
    weighted = Mixture(tasks=tasks, cap=30, rows=100, weights={"small": 4, "huge": 1})
    assert weighted.shares == {"small": 40, "large": 30, "huge": 30}


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=8), st.integers(1, 4000), st.integers(1, 3000), st.data())
def test_shares_add_up_and_are_rounded_by_less_than_one(counts, cap, rows, data):
    tasks = tuple(counted(f"t{i}", n) for i, n in enumerate(counts))
    weights = {t.name: data.draw(st.floats(0.1, 10)) for t in tasks[::2]}
    mixture = Mixture(tasks=tasks, cap=cap, rows=rows, weights=weights)
    exact = [min(n, cap) * weights.get(t.name, 1) for n, t in zip(counts, tasks, strict=True)]
    assert sum(mixture.shares.values()) == rows
    for share, weight in zip(mixture.shares.values(), exact, strict=True):
        assert abs(share - rows * weight / sum(exact)) < 1 + 1e-6


def test_rows_come_again_only_when_all_have_come():
    mixture = Mixture(tasks=(made("one", 5), made("two", 20)), rows=50)
    rows = Counter(row["prompt"] for row in mixture.data().train)
    assert sorted(rows[p] for p in rows if " one " in p) == [2] * 5  # 10 rows of 5, and 40 of 20
    assert set(rows.values()) == {2}
    again, other = Mixture(tasks=mixture.tasks, rows=50), Mixture(tasks=mixture.tasks, rows=50, seed=1)
    assert again.data().train[:] == mixture.data().train[:] != other.data().train[:]


def test_every_wording_is_used_and_one_that_does_not_fit_is_passed_over():
    def loud(row):
        return Asked(prompt=f"SHOUT {row['text']}", answers=("x",))

    def never(row):
        return None

    rows = Mixture(tasks=(made("one", 20, wordings=(free, loud, never)),)).data().train
    begins = Counter(row["prompt"].split()[0] for row in rows)
    assert set(begins) == {"say", "SHOUT"} and min(begins.values()) > 3 and len(rows) == 20
    with pytest.raises(DataError, match="task 'one' has no row that can be learnt from"):
        Mixture(tasks=(made("one", wordings=(never,)),)).data()


def test_a_task_of_ones_own_is_put_by_several_templates():
    """Every pass over its rows draws their wordings anew, by the seed."""
    task = Task(name="say", kind="generation", template=("say {text}",), label="y")
    wordings = (by_template(task), by_template(task, "{text}, once more:", instruction="Repeat."))
    own = made("one", 12, wordings=wordings)
    assert own.asked(own.test[1], 1) == Asked(prompt="Repeat.\n\none b, once more:", answers=("1",))
    rows = Mixture(tasks=(own,), rows=36).data().train
    passes = [
        {r["prompt"].split("one ")[1][0]: r["prompt"].startswith("say") for r in rows.select(range(i, i + 12))}
        for i in (0, 12, 24)
    ]
    assert all(len(of) == 12 for of in passes) and passes[0] != passes[1] != passes[2]
    assert (
        rows[:]
        == Mixture(tasks=(own,), rows=36).data().train[:]
        != Mixture(tasks=(own,), rows=36, seed=1).data().train[:]
    )
    with pytest.raises(TaskError, match=r"of kind classification.*by_pattern\(task"):
        by_template(MOOD, "{text}")
    with pytest.raises(TaskError, match="has no slots"):
        by_template(task, "{text} {|}")


def test_tasks_are_held_out_by_name_and_by_cluster_and_when_for_testing_only():
    tasks = (made("a", cluster="x"), made("b", cluster="x"), made("c"), made("d"), made("e", train=False))
    mixture = Mixture(tasks=tasks, held_out=("x", "d"))
    assert [t.name for t in mixture.held] == ["a", "b", "d", "e"]
    data = mixture.data()
    assert {row["task"] for row in [*data.train, *data.validation]} == {"c"}
    assert data.task.columns == ("prompt",) and data.task.label == "answers"


def test_training_rows_that_share_a_text_with_a_held_out_row_are_left_out():
    leaked = "a sentence that is long enough to tell"
    held = InstructedTask(
        name="h",
        cluster="h",
        wordings=(free,),
        metric="exact_match",
        train=None,
        test=[{"text": f"  {leaked.upper()}\n"}],
    )
    learnt = InstructedTask(
        name="l",
        cluster="l",
        wordings=(free,),
        metric="exact_match",
        train=[{"text": leaked}, {"text": "short"}, {"text": "another long sentence of its own"}],
        test=[{"text": leaked}, {"text": "short"}],
    )
    data = Mixture(tasks=(held, learnt), rows=9).data()
    assert not any(leaked in row["prompt"] for row in [*data.train, *data.validation])
    assert {row["prompt"] for row in data.train} == {"say short", "say another long sentence of its own"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(held_out=("twoo",)), "held_out names 'twoo', which the mixture has not.*two"),
        (dict(weights={"three": 1}), "weights names 'three'"),
        (dict(weights={"one": 0}), "the weight 0 of 'one' is not possible"),
        (dict(weights={"one": "2"}), "the weight '2' of 'one' is not possible"),
        (dict(cap=0), "cap=0 of a mixture is not possible"),
        (dict(rows=1.5), "rows=1.5 of a mixture is not possible; give a whole number"),
        (dict(cap=None), "cap=None of a mixture"),
        (dict(held_out=("one", "two")), "nothing is left to learn from"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Mixture(tasks=(made("one"), made("two")), **values)


def test_a_task_stands_in_a_mixture_once():
    with pytest.raises(ConfigError, match="'one' twice; weights="):
        Mixture(tasks=(made("one"), made("one")))


# ---------------------------------------------------------------- zero-shot scores


@pytest.fixture(scope="module")
def gpt2(make_backbone):
    return make_backbone("gpt2", n_positions=128)


def mood_task(count=8):
    patterns = [
        Pattern("{text} is it good or bad ?"),
        Pattern("the film {text} is", {"good": "very very not the film"}),
    ]
    return made("mood", count, wordings=tuple(by_pattern(MOOD, p) for p in patterns))


def by_hand(backbone, prompt, option, deltas=None):
    """Mean log-probability of an option's tokens and its end, from the whole row's logits."""
    tokenizer = backbone.tokenizer
    ids = tokenizer(f"{prompt}\n")["input_ids"]
    own = [*tokenizer(option, add_special_tokens=False)["input_ids"], backbone.eos_ids[0]]
    logits = backbone.logits(Plan([deltas]), torch.tensor([ids + own]))[0].double().log_softmax(-1)
    return statistics.mean(float(logits[len(ids) + i - 1, t].detach()) for i, t in enumerate(own))


def test_options_are_ranked_by_their_mean_log_probability(gpt2):
    (score,) = score_tasks(gpt2, [mood_task(7)], num_rows=7, num_wordings=5)
    long, short = (
        by_hand(gpt2, rows_of(mood_task(7), 7, 1)[0].prompt, said) for said in ("very very not the film", "bad")
    )
    tokens = len(gpt2.tokenizer("very very not the film", add_special_tokens=False)["input_ids"]) + 1
    assert long > short and long * tokens < short * 2  # the sum, which favours short answers, would choose otherwise
    expected = []
    for wording in (0, 1):
        rows = rows_of(mood_task(7), 7, wording)
        picked = [max(r.options, key=lambda o: by_hand(gpt2, r.prompt, o)) for r in rows]
        expected.append(statistics.mean(p in r.answers for p, r in zip(picked, rows, strict=True)))
    assert score.by_wording == tuple(expected) and score.score == statistics.median(expected)
    assert (score.metric, score.num_rows, score.chance) == ("accuracy", 7, 0.5)


def test_free_answers_are_what_the_model_writes(gpt2):
    task = made("echo", 5)
    (score,) = score_tasks(gpt2, [task], num_rows=3, settings={"max_new_tokens": 3})
    rows = rows_of(task, 3)
    found = Bank(gpt2).generate([(None, f"{r.prompt}\n") for r in rows], {"max_new_tokens": 3})
    assert score.score == statistics.mean(g.text.strip() in r.answers for g, r in zip(found, rows, strict=True))
    assert (score.metric, score.chance) == ("exact_match", None)


def test_rows_of_every_wording_are_kept_and_saved(gpt2, tmp_path):
    ranked, written = score_tasks(
        gpt2, [mood_task(7), made("echo", 5)], num_rows=4, num_wordings=2, settings={"max_new_tokens": 3}
    )
    assert [(row.task, row.wording) for row in ranked.rows] == [("mood", 0)] * 4 + [("mood", 1)] * 4
    halves = (ranked.rows[:4], ranked.rows[4:])
    assert ranked.by_wording == tuple(statistics.mean(row.right for row in half) for half in halves)
    for row in ranked.rows:
        assert row.answer == row.options[row.scores.index(max(row.scores))]
        assert row.scores[0] == pytest.approx(by_hand(gpt2, row.prompt, row.options[0]), rel=1e-4)
    assert all(row.texts == (row.answer,) and row.right is None for row in written.rows)
    assert written.score == statistics.mean(row.answer in row.answers for row in written.rows)
    place = save_scores(tmp_path / "held", [ranked, written])
    lines = [json.loads(line) for line in (place / "predictions.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["mood"] * 8 + ["echo"] * len(written.rows)
    facts = json.loads((place / "scores.json").read_text())
    assert [(f["task"], f["score"], "rows" in f) for f in facts] == [
        ("mood", ranked.score, False), ("echo", written.score, False)
    ]  # fmt: skip
    assert "<th>task</th>" in (place / "predictions.html").read_text()


def test_training_on_a_mixture_changes_the_score_of_its_own_tasks(make_backbone):
    """Learnt by heart, a task whose answer is always "good" is answered so; the bare model does not answer at all."""
    backbone = make_backbone("llama", tie_word_embeddings=True, max_position_embeddings=128)

    def always(row):
        return Asked(prompt=f"{row['text']} is", answers=("good",))

    task = made("always", 12, wordings=(always,))
    trained = train(
        backbone,
        Mixture(tasks=(task,), rows=24).data(format="plain"),
        "lora",
        epochs=12,
        learning_rate=0.05,
        batch_size=8,
        max_length=40,
        progress=False,
    )
    before, after = (
        score_tasks(backbone, [task], adapter, num_rows=6, settings={"max_new_tokens": 4})[0].score
        for adapter in (None, trained.adapter)
    )
    assert (before, after) == (0.0, 1.0)


def test_an_adapter_ranks_with_its_own_deltas(gpt2, random_adapter):
    adapter = random_adapter(gpt2, get_method("lora")(), pooling="last")
    deltas = adapter.delta_set(gpt2)
    rows = rows_of(mood_task(), 6)
    picked = [max(r.options, key=lambda o: by_hand(gpt2, r.prompt, o, deltas)) for r in rows]
    (score,) = score_tasks(gpt2, [mood_task()], _writer(adapter), num_rows=6)
    assert score.score == statistics.mean(p in r.answers for p, r in zip(picked, rows, strict=True))


def _writer(adapter):
    task = prompt_task("m", metric="rouge_l", format="plain")
    return replace(adapter, task=task, head=Head.for_task(task, pooling="last"), head_params={}, max_length=60)


def test_numbers_below_one_and_tasks_without_wordings_are_refused(gpt2):
    with pytest.raises(ConfigError, match="num_rows=0"):
        score_tasks(gpt2, [mood_task()], num_rows=0)
    with pytest.raises(ConfigError, match="num_wordings=0"):
        score_tasks(gpt2, [mood_task()], num_wordings=0)
    with pytest.raises(DataError, match="has no wording that puts its rows"):
        score_tasks(gpt2, [replace(mood_task(), wordings=())])


# ---------------------------------------------------------------- reading


@pytest.fixture
def folder(tmp_path):
    """A folder of suites with one task of every sort."""

    def write(path, rows, features=None):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(file)

    label = Features(
        {"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=["yes", "no"])}
    )
    rte = [{"premise": f"p{i}", "hypothesis": f"h{i}", "label": i % 2} for i in range(12)]
    for split in ("train", "validation"):
        write(f"super_glue/rte/{split}.parquet", rte, label)
    rows = [
        {"definition": "Say the sign.", "inputs": f"i{i}", "targets": s, "references": [s]}
        for i, s in enumerate("+-" * 10)
    ]
    write("super_natural_instructions/task1_signs/train.parquet", rows)
    write(
        "super_natural_instructions/tasks.parquet",
        [{"task": "task1_signs", "category": "Basic Sentiment Analysis", "definition": "Say the sign."}],
    )
    write("instruction_induction/sum/train.parquet", [{"input": "1 2", "output": "3", "references": ["3"]}] * 12)
    write("instruction_induction/tasks.parquet", [{"task": "sum", "instructions": ["Add.", "Sum up.", "Add."]}])
    write("bbh/lies/test.parquet", [{"input": "X?\nOptions:\n(A) one\n(B) two", "target": "(B)"}])
    write("bbh/sports/test.parquet", [{"input": "Is it?", "target": t} for t in ("no", "yes", "no")])
    write(
        "bbh/sort/test.parquet",
        [{"input": "b a", "target": "a b"}, *({"input": "x", "target": str(i)} for i in range(20))],
    )
    write("bbh/tasks.parquet", [{"task": "lies", "description": "Who lies?"}])
    common = {"id": "1", "question": "Where?", "question_concept": "x", "choices": ["here", "there"], "label": 1}
    for split in ("train", "validation"):
        write(f"reasoning/commonsense_qa/{split}.parquet", [common] * 3)
    template = {"original_task": True, "subset": "", "choices_in_prompt": True}
    write(
        "p3_templates/templates.parquet",
        [
            {
                "dataset": "super_glue",
                "name": "follows",
                "jinja": "{{premise}} So {{hypothesis}}? ||| {{answer_choices[label]}}",
                "answer_choices": "Sure ||| Hardly",
                **template,
                "subset": "rte",
            },
            {
                "dataset": "super_glue",
                "name": "needs a column",
                "jinja": "{{passage}}? ||| x",
                "answer_choices": "",
                **template,
                "subset": "rte",
            },
            {
                "dataset": "super_glue",
                "name": "turned round",
                "jinja": "{{answer_choices[label]}}: ||| {{premise}}",
                "answer_choices": "Sure ||| Hardly",
                **template,
                "subset": "rte",
                "original_task": False,
            },
            {
                "dataset": "commonsense_qa",
                "name": "letters",
                "jinja": "{{question}}{% for l, t in zip(choices.label, choices.text) %} {{l}}: {{t}}{% endfor %}"
                " ||| {{answerKey}}",
                "answer_choices": "A ||| B",
                **template,
            },
        ],
    )
    return tmp_path


def first(task):
    return task.asked(task.test[0])


def test_templates_of_the_pool_are_taken_where_they_fit(folder):
    task = instructed("super_glue/rte", folder)
    assert (task.cluster, len(task.wordings), len(task.train)) == ("inference", 1, 12)
    assert first(task) == Asked(prompt="p0 So h0?", answers=("Sure",), options=("Sure", "Hardly"))
    assert len(p3_templates("super_glue", "rte", data_dir=folder)) == 2
    assert len(p3_templates("super_glue", "rte", original=False, data_dir=folder)) == 3


def test_commonsense_qa_is_given_the_columns_of_the_pool(folder):
    asked = first(instructed("reasoning/commonsense_qa", folder))
    assert asked == Asked(prompt="Where? A: here B: there", answers=("B",), options=("A", "B"))


def test_a_definition_stands_in_front_and_repeated_answers_are_options(folder):
    task = instructed("super_natural_instructions/task1_signs", folder)
    asked = first(task)
    assert task.cluster == "sentiment" and asked.options == ("+", "-")
    assert asked.prompt.startswith("Say the sign.\n\ni")


def test_every_instruction_is_a_wording(folder):
    task = instructed("instruction_induction/sum", folder)
    assert [task.asked(task.test[0], i).prompt for i in (0, 1)] == [
        "Add.\n\nInput: 1 2\nOutput:",
        "Sum up.\n\nInput: 1 2\nOutput:",
    ]
    assert len(task.wordings) == 2 and first(task).options == ()


def test_big_bench_hard_is_for_testing_only(folder):
    lies, sports, sort = (instructed(f"bbh/{name}", folder) for name in ("lies", "sports", "sort"))
    assert lies.train is None and first(lies).options == ("(A)", "(B)")
    assert first(lies).prompt == "Who lies?\n\nQ: X?\nOptions:\n(A) one\n(B) two\nA:"
    assert first(sports).options == ("no", "yes") and first(sort).options == ()
    mixture = Mixture.read({"tasks": ["bbh/lies", "super_glue/rte"]}, folder)
    assert [t.name for t in mixture.held] == ["bbh/lies"]
    with pytest.raises(TaskError, match="no task 'bbh/lie'; bbh has lies, sort, sports"):
        instructed("bbh/lie", folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"taks": []}, "a mixture has no 'taks'.*tasks"),
        ({"tasks": "super_glue/rte"}, "'tasks' of a mixture is a list of names"),
        ({"tasks": ["super_glue/rte"], "held_out": None}, "'held_out' of a mixture is a list of names, not None"),
        ({"tasks": ["super_glue/rte"], "weights": ["super_glue/rte"]}, "'weights' of a mixture is a mapping"),
        ({"tasks": ["super_glue/rte"] * 2}, "has task 'super_glue/rte' twice"),
        ({}, "a mixture needs 'tasks'"),
    ],
)
def test_recipes_that_say_something_else_are_refused(values, message, folder):
    with pytest.raises(ConfigError, match=message):
        Mixture.read(values, folder)


def test_templates_run_in_a_sandbox():
    escape = P3Template(
        name="bad", jinja="{{ ''.__class__.__mro__[1].__subclasses__() }} ||| x", answer_choices="", original=True
    )
    with pytest.raises(DataError, match="template 'bad' does not fit the row"):
        escape.put({"a": 1})
    nothing = P3Template(name="n", jinja="{% if a %}p ||| x{% endif %}", answer_choices="", original=True)
    assert nothing.put({"a": 0}) is None and nothing.put({"a": 1}) == Asked(prompt="p", answers=("x",))


def test_choices_in_a_list_are_options_and_several_may_be_right(tmp_path):
    row = {"question": "Which?", "options": ["A)red", "B)blue", "C)green"], "rationale": "x", "correct": "B"}
    (tmp_path / "reasoning" / "aqua_rat").mkdir(parents=True)
    Dataset.from_list([row] * 3).to_parquet(tmp_path / "reasoning" / "aqua_rat" / "test.parquet")
    task = instructed("reasoning/aqua_rat", tmp_path)
    assert task.train is None  # published for judging alone
    assert first(task).options == ("A)red", "B)blue", "C)green") and first(task).answers == ("B)blue",)
    cloze = {"passage": "Ann met Bo.", "query": "Then @placeholder left.", "entities": ["Ann", "Bo", "Cy"]}
    rows = [{**cloze, "answers": ["Bo", "Ann"], "passage_idx": i, "query_idx": i} for i in range(4)]
    (tmp_path / "super_glue" / "record").mkdir(parents=True)
    for split in ("train", "validation"):
        Dataset.from_list(rows).to_parquet(tmp_path / "super_glue" / "record" / f"{split}.parquet")
    asked = first(instructed("super_glue/record", tmp_path))
    assert set(asked.answers) == {"Ann", "Bo"} and asked.options == ("Ann", "Bo", "Cy")
