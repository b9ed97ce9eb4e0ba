"""From a recipe to trials: which there are, what they share, and what is refused before any of them runs."""

import pytest

from multitune import ConfigError, make_method
from multitune.comparing.run import load, number_of_trials


def trials(recipe):
    return [job.trial for job in load(recipe).finals()]


def test_every_choice_of_every_grid_runs_with_every_seed(recipe):
    grid = {"lora": {"r": [2, 4], "learning_rate": [1e-3, 1e-2]}, "bitfit": {}}
    found = trials(recipe(methods=grid, seeds=[3, 5, 8]))
    assert len(found) == len({t.key for t in found}) == (4 + 1) * 3
    assert [t.seed for t in found] == [3] * 5 + [5] * 5 + [8] * 5  # a whole comparison before the next seed
    assert len({t.group for t in found}) == 5


def test_a_trial_says_all_that_its_score_depends_on(recipe):
    one, *_ = trials(recipe(methods=["lora"], training={"epochs": 2}))
    assert one.settings == make_method("lora").settings()
    assert one.training["learning_rate"] == make_method("lora").recipe.learning_rate
    assert one.training["pooling"] == "cls" and one.training["epochs"] == 2
    assert not {"progress", "keep_checkpoints"} & set(one.training)
    assert set(one.data) == {"data", "label", "fingerprint", "train_rows", "validation_rows", "subset_seed"}


def test_a_task_and_a_method_override_the_settings_of_all(recipe, moods):
    task = {"data": str(moods), "label": "mood", "max_length": 9, "training": {"batch_size": 4, "max_steps": 2}}
    one, *_ = trials(recipe(tasks=[task], methods={"lora": {"max_steps": 3}}))
    assert (one.training["max_length"], one.training["batch_size"], one.training["max_steps"]) == (9, 4, 3)


def test_other_rows_make_other_trials(recipe, moods):
    def keys(**rows):
        return {t.key for t in trials(recipe(tasks=[{"data": str(moods), "label": "mood", **rows}]))}

    assert keys() == keys()
    assert not keys(train_rows=20) & keys(train_rows=20, subset_seed=1)
    assert not keys(train_rows=20) & keys(train_rows=20, validation_rows=3)


def test_the_order_of_labels_is_the_recipes(recipe, moods):
    def rows_of(**of_task):
        (cell,) = load(recipe(tasks=[{"data": str(moods), "label": "mood", **of_task}], methods=["head"])).cells
        return cell.draws[0]

    usual, turned, as_text = rows_of(), rows_of(labels=["good", "bad"]), rows_of(labels="good, bad")
    assert (usual.data.task.labels, turned.data.task.labels) == (("bad", "good"), ("good", "bad"))
    assert "labels" not in usual.facts and turned.facts == as_text.facts and turned.facts["labels"] == ["good", "bad"]
    assert turned.facts["fingerprint"] != usual.facts["fingerprint"]


def test_a_changed_cell_of_the_table_makes_other_trials(recipe, moods, tmp_path):
    before = {t.key for t in trials(recipe())}
    copy = tmp_path / moods.name
    copy.write_text(moods.read_text("utf-8"), "utf-8")
    task = [{"data": str(copy), "label": "mood"}]
    assert {t.key for t in trials(recipe(tasks=task))} == before  # wherever the table lies
    judged = [{"data": str(moods), "label": "mood", "validation": str(file)} for file in (moods, copy)]
    assert len({t.key for entry in judged for t in trials(recipe(tasks=[entry], seeds=1))}) == 3  # as of one file
    copy.write_text(moods.read_text("utf-8").replace("film", "movie", 1), "utf-8")
    assert not {t.key for t in trials(recipe(tasks=task))} & before


def test_few_shots_multiply_the_draws(recipe, moods):
    plan = load(recipe(few_shot={"per_class": [2, 4], "subset_seeds": 3}, methods=["bitfit"], seeds=2))
    jobs = plan.finals()
    assert len(jobs) == 2 * 3 * 2
    assert {(j.trial.data["per_class"], len(j.data.train)) for j in jobs} == {(2, 4), (4, 8)}
    assert len({j.trial.data["fingerprint"] for j in jobs}) == 6
    assert len({tuple(j.data.validation["text"]) for j in jobs}) == 1
    with pytest.raises(ConfigError, match="leave out one of them"):
        load(recipe(few_shot={"per_class": 2}, tasks=[{"data": str(moods), "label": "mood", "train_rows": 5}]))


def test_budgets_choose_sizes_and_name_what_is_too_large(recipe, bert):
    smallest = make_method("lora", {"r": 1}).num_parameters(bert)
    plan = load(recipe(methods=["lora", "bitfit", "full"], budgets=[smallest - 1, 10_000], seeds=1))
    found = {(j.trial.method, j.budget): j.trial for j in plan.finals()}
    assert set(found) == {("lora", "10000"), ("bitfit", "10000"), ("full", None)} | (
        {("bitfit", str(smallest - 1))} if make_method("bitfit").num_parameters(bert) < smallest else set()
    )
    assert make_method("lora", found["lora", "10000"].settings).num_parameters(bert) <= 10_000
    assert found["lora", "10000"].settings["r"] > 8
    assert any("lora is left out at" in line for line in plan.left_out)


def test_budgets_too_small_for_every_method_are_refused(recipe):
    with pytest.raises(ConfigError, match="nothing is left to compare: lora is left out at 5.* larger budget"):
        load(recipe(methods=["lora", "bitfit"], budgets=[5]))


def test_choices_of_a_grid_that_a_budget_is_too_small_for_are_named(recipe):
    grid = {"lora": {"targets": [["query"], ["query", "value"]], "learning_rate": [1e-3, 1e-2]}}
    plan = load(recipe(methods=grid, budgets=[200]))  # rank 1 takes 192 parameters at the query, 384 at both
    assert plan.left_out == [
        "lora with targets=['query', 'value'] is left out at 200: its smallest form has more parameters"
    ]
    assert [point["targets"] for point in plan.cells[0].points] == [["query"]] * 2


def test_full_tuning_is_searched_and_counted_once_for_all_budgets(recipe):
    grid = {"full": {"learning_rate": [1e-3, 1e-2]}}
    plan = load(recipe(methods=grid, budgets=["1%", "2%"], search={"trials": 2}, seeds=2))
    assert len(plan.cells) == 1 and number_of_trials(plan) == 3


def test_a_method_of_one_size_runs_once_for_all_budgets(recipe):
    plan = load(recipe(methods=["bitfit"], budgets=["90%", "95%"], seeds=1))
    jobs = plan.finals()
    assert [j.budget for j in jobs] == ["90%", "95%"]
    assert len({j.trial.key for j in jobs}) == number_of_trials(plan) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"pissa": {"r": 64}}}, "method 'pissa'"),
        ({"methods": {"lora": {"r": [2, 4]}}, "budgets": ["1%"]}, "r is what the budgets choose"),
        ({"methods": {"prompt": {"length": 400}}}, "method 'prompt'"),
        ({"backbone": "nowhere/at-all"}, "cannot load backbone"),
        ({"tasks": ["demo/topics"]}, "demo/topic"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        load(recipe(**changes))


def test_two_tables_of_one_name_are_refused(recipe, moods):
    entry = {"data": str(moods), "label": "mood"}
    with pytest.raises(ConfigError, match="two tasks are called 'moods'"):
        load(recipe(tasks=[entry, entry]))
    assert len(load(recipe(tasks=[entry, {**entry, "name": "others"}])).finals()) == 12
