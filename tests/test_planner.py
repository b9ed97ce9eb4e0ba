"""The planner: counted sizes are exact, the memory estimate follows what autograd keeps, limits are honoured."""

import dataclasses
import json
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from multitune import (
    DSEE,
    AdaLoRA,
    BitFit,
    Combined,
    ConfigError,
    FullFineTuning,
    HeadOnly,
    LoRA,
    PromptTuning,
    convert_to_lsg,
    get_method,
    method_names,
    planner,
    prune,
)
from multitune.cli import app
from multitune.cli.plan import num_bytes
from multitune.plan import DeltaSet, Plan
from multitune.pruned import flops


@pytest.mark.parametrize("name", method_names())
def test_the_file_size_is_that_of_a_saved_adapter(bert, name, random_adapter, tmp_path):
    method = get_method(name)()
    cost = planner.cost_of(bert, method, planner.Workload(length=8), rounds=0)
    adapter = random_adapter(bert, method.expected(bert))
    finished, params = adapter.method.finish(adapter.params, bert)
    adapter = replace(adapter, method=finished, params=params)
    saved = (adapter.save(tmp_path / "a").path / "adapter.safetensors").stat().st_size
    third_output = 4 * (bert.hidden_size + 1)  # the planner counts a head of two outputs, the adapter has three
    header = saved - third_output - cost.file_bytes
    assert 0 < header < 250 * (len(adapter.params) + 3)
    assert cost.parameters == method.num_parameters(bert)


def kept_by_a_pass(backbone, method, tensors, rows, length):
    """Bytes that autograd keeps of one training pass, beside the weights and the method's own tensors."""
    kept: dict[int, int] = {}
    params = {k: t.requires_grad_(True) for k, t in tensors.items()}
    own = [p.data_ptr() for p in [*backbone.model.parameters(), *backbone.model.buffers(), *params.values()]]
    if method.changes_weights:
        params = {}
        backbone.model.requires_grad_(True)

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    backbone.model.train()
    ids = torch.full((rows, length), 7)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        deltas = DeltaSet({} if method.changes_weights else method.deltas(params, backbone))
        hidden = backbone.run(Plan([deltas] * rows), ids, decoder_input_ids=ids if backbone.decodes else None)
    backbone.model.eval()
    assert hidden.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("method", [LoRA(), PromptTuning(length=4), FullFineTuning()], ids=lambda m: m.name)
def test_the_estimate_extrapolates_what_autograd_keeps(make_backbone, method):
    backbone = make_backbone("bert")
    tensors = method.init(backbone, torch.Generator().manual_seed(0))
    rows, length = 6, 30
    estimate = planner.activation_bytes(backbone, method, tensors, planner.Workload(rows=rows, length=length))
    assert estimate == pytest.approx(kept_by_a_pass(backbone, method, tensors, rows, length), rel=0.1)


def test_a_long_row_of_an_lsg_backbone_is_counted_in_blocks(make_backbone):
    """Twice the rows keep twice as much, and a length of whole blocks less than the next token."""
    backbone = convert_to_lsg(make_backbone("bert"), max_length=64, block=4)
    tensors = LoRA().init(backbone, torch.Generator().manual_seed(0))

    def estimate(rows, length):
        return planner.activation_bytes(backbone, LoRA(), tensors, planner.Workload(rows=rows, length=length))

    assert estimate(3, 60) == pytest.approx(kept_by_a_pass(backbone, LoRA(), tensors, 3, 60), rel=0.1)
    assert estimate(1, 56) < estimate(1, 57) == pytest.approx(estimate(1, 60), rel=0.1)


def test_what_training_decides_is_counted_as_the_settings_aim_at(bert):
    """AdaLoRA starts wide and ends at its budget: served and saved it is as large as LoRA of that rank."""
    adaptive, fixed = AdaLoRA(r=12, target_r=4, targets=("query",)), LoRA(r=4, targets=("query",))
    workload = planner.Workload(length=8)
    wide, narrow = (planner.cost_of(bert, m, workload, rounds=0) for m in (adaptive, fixed))
    scores = 4 * 4 * bert.num_layers  # E, 4 values at each site
    assert wide.file_bytes == narrow.file_bytes + scores
    assert wide.serving_bytes == narrow.serving_bytes and wide.parameters > 2.9 * narrow.parameters
    both = planner.cost_of(bert, Combined(methods=(adaptive, BitFit())), workload, rounds=0)
    bias = planner.cost_of(bert, BitFit(), workload, rounds=0)
    assert both.file_bytes - bias.file_bytes == 4 * 4 * (64 + 1) * bert.num_layers

    # A run does end there: all steps of one, with scores that differ.
    params = adaptive.init(bert, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 21):
        for name, t in params.items():
            t.grad = torch.randn(t.shape, generator=generator) if adaptive.trains(name) else None
        adaptive.after_step(params, step, 20)
    assert sum(adaptive.finish(params, bert)[0].ranks) == sum(adaptive.expected(bert).ranks)


def test_the_backbone_is_left_as_it_was(bert):
    before = {k: t.clone() for k, t in bert.model.state_dict().items()}
    for method in (LoRA(), FullFineTuning()):
        planner.cost_of(bert, method, planner.Workload(rows=2, length=8, tasks=2), rounds=1)
    assert not bert.model.training
    assert not any(p.requires_grad for p in bert.model.parameters())
    assert all(torch.equal(t, before[k]) for k, t in bert.model.state_dict().items())


def test_serving_counts_the_backbone_once_and_a_full_copy_per_fully_tuned_task(bert):
    weights = sum(4 * p.numel() for p in bert.model.parameters())
    one, three = (planner.Workload(length=8, tasks=k) for k in (1, 3))
    lora = [planner.cost_of(bert, LoRA(), w, rounds=0).serving_bytes for w in (one, three)]
    each = 4 * (LoRA().num_parameters(bert) + 2 * (bert.hidden_size + 1))
    assert lora == [weights + each, weights + 3 * each]
    assert planner.cost_of(bert, FullFineTuning(), three, rounds=0).serving_bytes == 4 * weights


def test_limits_are_named(bert):
    tight = planner.Workload(rows=4, length=8, tasks=2, memory=1000, must_merge=True, latency=1.1)
    cost = planner.cost_of(bert, PromptTuning(length=8), tight, rounds=2)
    assert cost.latency > 0
    cost = dataclasses.replace(cost, latency=1.2)
    assert [p.split()[0] for p in planner.problems_of(cost, tight)] == ["training", "serving", "a", "cannot"]
    assert len(planner.problems_of(dataclasses.replace(cost, latency=1.05), tight)) == 3
    full = planner.cost_of(bert, FullFineTuning(), planner.Workload(length=8, tasks=2), rounds=2)
    assert full.latency is None
    assert full.problems == ("changes the backbone's weights, so every task needs a backbone and batches of its own",)
    assert planner.cost_of(bert, HeadOnly(), planner.Workload(length=8), rounds=0).problems == ()


@pytest.mark.parametrize("wrong", [dict(rows=0), dict(tasks=0), dict(length=0), dict(memory=0), dict(latency=1.0)])
def test_an_impossible_workload_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
        planner.Workload(**wrong)


def test_rows_longer_than_the_backbone_are_refused(bert):
    with pytest.raises(ConfigError, match="length=99 is not possible; the backbone has 40 positions"):
        planner.cost_of(bert, LoRA(), planner.Workload(length=99))


def test_amounts_of_memory():
    assert [num_bytes(t) for t in ("8GB", "1.5 GiB", "500mb", "12")] == [8 * 10**9, 3 * 2**29, 5 * 10**8, 12]
    with pytest.raises(ConfigError, match=r"'8GBB' is no amount of memory\. Did you mean 'GB'\?"):
        num_bytes("8GBB")
    with pytest.raises(ConfigError, match="'lots' is no amount"):
        num_bytes("lots")


def cost(name, file_bytes, latency, accuracy=None, problems=()):
    return planner.Cost(
        method=name, parameters=1, file_bytes=file_bytes, training_bytes=1, serving_bytes=1,
        latency=latency, merges=True, mixes=True, accuracy=accuracy, problems=problems,
    )  # fmt: skip


def test_recommendations_come_from_measured_scores_where_there_are_any():
    costs = [cost("a", 900, 1.3, 90.0), cost("b", 10, 1.2, 89.5), cost("c", 50, 1.1, 89.2), cost("d", 1, 1.0, 80.0)]
    costs += [cost("new", 1, 1.0), cost("e", 1, 1.0, 95.0, problems=("cannot be folded into a checkpoint",))]
    found = planner.recommend(costs)
    assert [r.method for r in found] == ["a", "b", "c"]
    assert "90.0 %" in found[0].reason and "1.10 times" in found[2].reason
    assert planner.recommend(costs[-1:]) == []


def test_without_a_measured_score_the_advice_says_so():
    found = planner.recommend([cost("new", 50, 1.1), cost("newer", 9, 1.2), cost("e", 1, 1.0, 95.0, problems=("no",))])
    assert [r.method for r in found] == ["newer", "new"]
    assert "how well they do was not measured" in found[0].reason


def test_a_score_is_that_of_the_settings_it_was_measured_with(bert):
    measured = planner.scores()
    assert {"lora", "bitfit"} <= set(measured.methods) <= set(method_names())
    assert measured.of(LoRA()) == measured.methods["lora"]["percent"] and measured.methods["lora"]["seeds"] >= 1
    assert measured.of(LoRA(r=9)) is None and measured.of(Combined(methods=(LoRA(), BitFit()))) is None
    workload = planner.Workload(length=8)
    found = [planner.cost_of(bert, m, workload, rounds=0).accuracy for m in (LoRA(), LoRA(r=9))]
    assert found == [measured.of(LoRA()), None]


def test_the_benchmark_writes_the_means_that_the_planner_reads(script, monkeypatch):
    real_data = script("real_data")
    monkeypatch.setattr(sys, "argv", ["real_data.py", "--table"])
    args = real_data._arguments()
    cells = [c for c in real_data.cells_of(args) if c["task"] == "glue/sst2" and c["method"] in ("lora", "bitfit")]
    ours = [c for c in cells if c["system"] == "multitune" and c["training"]["seed"] < 2]
    of_lora = iter([0.8, 0.81])
    rows = [{"cell": c, "scores": {"accuracy": next(of_lora)}} for c in ours if c["method"] == "lora"]
    others = [c for c in cells if c["system"] == "peft"] + [dict(c, settings={"r": 1}) for c in ours]
    rows += [{"cell": c, "scores": {"accuracy": 0.5}} for c in others]
    found = planner.Scores(**json.loads(json.dumps(real_data.planner_scores(args, rows))))
    assert (found.task, found.backbone, set(found.methods)) == ("SST-2 accuracy", "minilm", {"lora"})
    assert found.of(LoRA()) == 80.5 and found.methods["lora"]["seeds"] == 2


@pytest.mark.parametrize("name", ["bart/writes", "t5/writes"])
def test_an_encoder_decoder_is_planned_with_as_many_tokens_written_as_read(make_backbone, name):
    backbone = make_backbone(name)
    method, rows, length = LoRA(targets=("query", "cross.value")), 1, 20  # T5 keeps one bias for all rows of a batch
    workload = planner.Workload(rows=rows, length=length)
    found = planner.cost_of(backbone, method, workload, rounds=1)
    assert found.latency > 0 and found.merges and found.file_bytes == 4 * method.num_parameters(backbone)

    tensors = method.init(backbone, torch.Generator().manual_seed(0))
    estimate = planner.activation_bytes(backbone, method, tensors, workload)
    assert estimate == pytest.approx(kept_by_a_pass(backbone, method, tensors, rows, length), rel=0.1)


def test_zeros_and_shut_heads_are_counted_where_there_are_any(bert):
    workload = planner.Workload(length=8)
    assert planner.cost_of(bert, LoRA(), workload, rounds=0).flops is None
    shut = DSEE(pruned_heads=0.5, num_sparse=9)
    found = planner.cost_of(bert, shut, workload, rounds=0).flops
    assert found == flops(bert, 8, pruned_heads=0.5, update=shut.num_parameters(bert)) and found.without_heads > 0
    pruned = prune(bert, 0.5)
    found = planner.cost_of(pruned, LoRA(r=2), workload, rounds=0).flops
    assert found == flops(pruned, 8, update=LoRA(r=2).num_parameters(pruned)) and found.without_zeros > 0
    assert planner.cost_of(pruned, PromptTuning(length=2), workload, rounds=0).flops is None  # it lengthens the row


def test_the_command_prints_a_row_per_method(minilm):
    options = ["plan", "--rows", "2", "--length", "8", "--rounds", "1", "--method", "lora", "--method", "head"]
    result = CliRunner().invoke(app, [*options, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [m["method"] for m in found["methods"]] == ["lora", "head"]
    assert all(m["latency"] > 0 and m["training_bytes"] > 80e6 for m in found["methods"])
    refused = CliRunner().invoke(app, ["plan", "--latency", "1.1", "--rounds", "0"])
    assert refused.exit_code == 1 and "--latency needs measured batches" in refused.stderr


def test_the_command_takes_settings_and_joined_methods(minilm):
    def plan(*options):
        return CliRunner().invoke(app, ["plan", "--rows", "2", "--length", "8", "--rounds", "0", *options])

    result = plan("--method", "lora+bitfit", "--set", "lora.r=2", "--json")
    assert result.exit_code == 0, result.output
    (both,) = json.loads(result.stdout)["methods"]
    assert both["method"] == "lora+bitfit" and both["accuracy"] is None
    assert both["parameters"] == Combined(methods=(LoRA(r=2), BitFit())).num_parameters(minilm)

    result = plan("--method", "dsee", "--set", "pruned_heads=0.25", "--set", "support=random")
    assert result.exit_code == 0, result.output
    assert "could save" in result.stdout and "not measured" in result.stdout and "try dsee" in result.stdout
    assert "dense ones that run here save nothing" in result.stderr
    for options in (["--set", "r=2"], ["--method", "lora", "--method", "dora", "--set", "r=2"]):
        refused = plan(*options)
        assert refused.exit_code == 1 and "--set is for one method" in refused.stderr


def test_the_command_plans_for_an_encoder_with_its_decoder(make_model, make_backbone, tmp_path):
    make_model("bart/writes").save_pretrained(tmp_path)
    make_backbone("bart/writes").tokenizer.save_pretrained(tmp_path)
    options = ["--backbone", f"{tmp_path}+decoder", "--method", "lora", "--rows", "2", "--length", "6", "--rounds", "1"]
    result = CliRunner().invoke(app, ["plan", *options])
    assert result.exit_code == 0, result.output
    assert "try lora" in result.stdout and "does not fit" not in result.stderr
