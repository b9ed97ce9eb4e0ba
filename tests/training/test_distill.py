"""Context distillation of texts: a teacher that reads an instruction and examples, a student that does not."""

import copy

import pytest
import torch

from multitune import ConfigError, DataError, LoRA, Pattern, Plan, Task, TrainConfig, TrainJob, get_method, train_many
from multitune.answers import PromptFormat
from multitune.generation.settings import GenerationSettings
from multitune.heads import Head
from multitune.prompting import RandomExamples, rank
from multitune.tasks import TaskData
from multitune.training import distill
from multitune.training.data import Collator, TaskRows
from multitune.training.distill import TextTeacher
from multitune.training.model import TuningModel
from multitune.training.written import write_rows

WRITE = Task(name="name it", kind="generation", template=("{text} :",), label="answer")
ROWS = [
    {"text": "good film", "answer": "good"},
    {"text": "bad bad film x1", "answer": "bad bad"},
    {"text": "the very good film", "answer": ["good", "very good"]},
    {"text": "not good", "answer": "bad"},
]
DATA = TaskData(task=WRITE, train=ROWS, validation=ROWS, test=None)
SAID = "not a film, not the cat"


@pytest.fixture(scope="module")
def roomy(make_backbone):
    """With positions for a context."""
    return make_backbone("gpt2", n_positions=160)


def tuning(backbone, **settings):
    """LoRA that changes something."""
    method = get_method("lora")()
    params = {k: t + 0.1 for k, t in method.init(backbone, torch.Generator().manual_seed(0)).items()}
    return TuningModel(backbone, method, params, Head.for_task(WRITE), {}, **settings).eval()


def taught_rows(backbone, config):
    rows = TaskRows(backbone, WRITE, ROWS, max_length=60, split="train")
    return rows.with_teacher(TextTeacher(backbone, DATA, "train", config).teach(rows))


def chances(backbone, deltas, prompt, answer):
    """Slow twin: log-probabilities of all words at every token of an answer, of one row alone."""
    ids = torch.tensor([[*prompt, *answer]])
    return backbone.logits(Plan([deltas]), ids)[0, len(prompt) - 1 : -1].double().log_softmax(-1)


def divergence(p, q, kept):
    """Slow twin: of two distributions, the words that are no favourites of the first counted as one."""
    words = p.argsort(descending=True).tolist()
    parts = [[word] for word in words[:kept]] + ([words[kept:]] if kept < len(words) else [])
    shares = [(sum(p.exp()[w] for w in part), sum(q.exp()[w] for w in part)) for part in parts]
    return float(sum(mine * (mine / other).log() for mine, other in shares))


def contexts(backbone):
    """What the teacher with two examples by seed 5 reads in front of each row, written by hand."""
    examples = RandomExamples(ROWS, 2, seed=5)
    examples.prepare(Pattern("{text} :"))
    writer = PromptFormat(backbone, WRITE)
    first = {row["text"]: row["answer"] if isinstance(row["answer"], str) else row["answer"][0] for row in ROWS}
    for row in ROWS:
        shown = [f"{e['text']} :\n{first[e['text']]}" for e in examples.choose(f"{row['text']} :")]
        assert row["text"] not in [e.split(" :")[0] for e in shown]
        own = f"{row['text']} :"
        (taught,), (plain,) = (writer.prompts([text]) for text in ("\n\n".join([SAID, *shown, own]), own))
        yield taught, plain, writer.answers(row["answer"] if isinstance(row["answer"], list) else [row["answer"]])


@pytest.mark.parametrize("kept", [5, 1000])
def test_the_loss_is_the_divergence_at_the_tokens_of_answers(roomy, monkeypatch, kept):
    """A few words and the rest, or all words: one mean over all tokens, as the loss without a teacher is."""
    monkeypatch.setattr(distill, "NUM_WORDS", kept)
    rows = taught_rows(roomy, TrainConfig(distill_examples=2, distill_instruction=SAID, seed=5))
    batch = Collator("generation", roomy.pad_id)(rows.items)
    model = tuning(roomy, distill_weight=0.25)
    away, own = [], []
    for taught, plain, answers in contexts(roomy):
        for answer in answers:
            p, q = chances(roomy, None, taught, answer), chances(roomy, model.delta_set(), plain, answer)
            away += [divergence(p[t], q[t], kept) for t in range(len(answer))]
            own += [-float(q[t, word]) for t, word in enumerate(answer)]
    assert len(own) == 2 + 3 + 2 + 3 + 2
    mean, plain = sum(away) / len(away), sum(own) / len(own)
    judged = model(**batch)
    assert judged["loss"].item() == pytest.approx(plain, rel=1e-4)
    assert judged["distillation"].item() == pytest.approx(0.25 * mean + 0.75 * plain, rel=1e-4)
    model.train()
    loss = model(**batch)["loss"]
    model.eval()  # the backbone is shared
    assert loss.item() == pytest.approx(0.25 * mean + 0.75 * plain, rel=1e-4)


def test_the_student_alone_has_gradients(roomy):
    before = copy.deepcopy(roomy.model.state_dict())
    rows = taught_rows(roomy, TrainConfig(distill_examples=2))
    batch = Collator("generation", roomy.pad_id)(rows.items)
    assert not batch["teacher"].requires_grad and not roomy.model.training
    model = tuning(roomy).train()
    model(**batch)["loss"].backward()
    model.eval()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(p.grad is None for p in roomy.model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in roomy.model.state_dict().items())


@pytest.mark.parametrize(
    "asked", [{"distill_examples": 2}, {"distill_instruction": SAID, "distill_new_tokens": 4}], ids=["own", "written"]
)
def test_a_student_comes_to_write_as_its_teacher(roomy, quick, one_thread, asked):
    """The first loss is how far the bare model is from itself with a context; the last, and best, far lower."""
    settings = dict(max_steps=60, learning_rate=1e-2, evaluations_per_epoch=1, seed=1)
    found = quick(roomy, DATA, LoRA(r=8), **settings, **asked)
    losses = [e["loss"] for e in found.history]
    assert losses[-1] < losses[0] / 3
    assert found.metric == "distillation" and found.best_step > 50 and found.best_metric < losses[0] / 3
    assert found.adapter.metrics["perplexity"] > 1
    teacher = TextTeacher(roomy, DATA, "train", TrainConfig(seed=1, **asked))
    plain = PromptFormat(roomy, WRITE).prompts([f"{row['text']} :" for row in ROWS])
    answers = [written.token_ids for written in wrote(roomy, None, teacher.prompts)]
    away = []
    for deltas in (None, found.adapter.delta_set(roomy)):
        pairs = zip(teacher.prompts, plain, answers, strict=True)
        both = [(chances(roomy, None, t, a), chances(roomy, deltas, own, a)) for t, own, a in pairs]
        away.append(sum(float((p.exp() * (p - q)).sum(1).mean()) for p, q in both))
    assert away[1] < away[0] / 2  # at the very texts that the teacher writes
    if "distill_new_tokens" in asked:  # what stands in its texts is what it learns to write
        bare, own = (wrote(roomy, d, plain) for d in (None, found.adapter.delta_set(roomy)))
        assert agreement(own, answers) > agreement(bare, answers)


def wrote(backbone, deltas, prompts):
    return write_rows(backbone, deltas, prompts, [GenerationSettings(max_new_tokens=4)] * len(prompts), batch_size=4)


def agreement(written, answers):
    return sum(a == b for w, answer in zip(written, answers, strict=True) for a, b in zip(w.token_ids, answer))  # noqa: B905


def test_a_teacher_writes_by_seed_and_needs_no_answers(roomy, quick):
    unanswered = [{"text": row["text"]} for row in ROWS] * 2
    data = TaskData(task=WRITE, train=unanswered, validation=unanswered[:2], test=None)
    config = TrainConfig(distill_instruction=SAID, distill_new_tokens=3, seed=4)
    texts = TextTeacher(roomy, data, "train", config).write()
    one_by_one = TrainConfig(**{**config.to_dict(), "eval_batch_size": 1})
    assert TextTeacher(roomy, data, "train", one_by_one).write() == texts
    assert texts[:4] != texts[4:]  # rows that read alike, each with a text of its own
    assert all(1 <= len(text) <= 3 for text in texts)
    other = TrainConfig(**{**config.to_dict(), "seed": 5})
    assert TextTeacher(roomy, data, "train", other).write() != texts
    rows = TaskRows(roomy, WRITE, unanswered, max_length=60, split="train", answers=texts)
    assert [tuple(i.sequences[0].input_ids[-i.target :]) for i in rows.items] == texts
    found = quick(roomy, data, "lora", distill_instruction=SAID, distill_new_tokens=3)
    assert found.metric == "distillation"
    some = [*ROWS[:2], *unanswered[:2]]  # rows with an answer can be shown
    data = TaskData(task=WRITE, train=some, validation=unanswered[:1], test=None)
    quick(roomy, data, "lora", distill_examples=2, distill_new_tokens=3)
    with pytest.raises(DataError, match="2 rows are too few for 3 examples"):
        quick(roomy, data, "lora", distill_examples=3, distill_new_tokens=3)


@pytest.mark.parametrize(
    "asked", [{"distill_examples": 2}, {"distill_instruction": SAID, "distill_new_tokens": 4}], ids=["own", "written"]
)
def test_a_stopped_run_has_the_same_teacher_and_packs_the_same_rows(
    roomy, quick, same_tensors, stopping, tmp_path, one_thread, asked
):
    """The teacher speaks again when the run goes on: what it draws, and with it every bit, is as it was."""
    settings = dict(epochs=4, max_steps=None, batch_size=2, learning_rate=1e-2, evaluations_per_epoch=1, packing=True)
    whole = quick(roomy, DATA, "lora", **settings, **asked)
    with pytest.raises(stopping.error):
        quick(roomy, DATA, stopping(LoRA, 13)(), tmp_path / "a", **settings, **asked)
    lines = []
    again = quick(roomy, DATA, "lora", tmp_path / "a", **settings, **asked, report=lines.append)
    assert any(line.startswith("resuming at step") for line in lines)
    same_tensors(whole.adapter, again.adapter)
    assert again.history == whole.history


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_encoder_decoder_distils_what_its_decoder_says(make_backbone, quick, one_thread, method, monkeypatch):
    """Under full fine-tuning the teacher is the backbone as it was, and not what is trained."""
    monkeypatch.setattr(distill, "NUM_WORDS", 1000)
    backbone = make_backbone("t5/writes", max_position_embeddings=160)
    writer = PromptFormat(backbone, WRITE)
    away = []
    for row in ROWS[:2]:
        own = f"{row['text']} :"
        (answer,) = writer.answers([row["answer"]])
        read = torch.tensor([[*backbone.start_ids, *answer]])
        said = []
        for text in (f"{SAID}\n\n{own}", own):
            hidden = backbone.run(Plan([None]), torch.tensor(writer.prompts([text])), None, None, None, read)
            said.append(backbone.lm_head(hidden[0, len(backbone.start_ids) - 1 : -1]).double().log_softmax(-1))
        p, q = said
        away += (p.exp() * (p - q)).sum(1).tolist()
    data = TaskData(task=WRITE, train=ROWS[:2], validation=ROWS[:2], test=None)
    settings = dict(max_steps=6, learning_rate=1e-2 if method == "lora" else 1e-3, evaluations_per_epoch=1)
    history = quick(backbone, data, method, distill_instruction=SAID, **settings).history
    assert history[0]["loss"] == pytest.approx(sum(away) / len(away), rel=1e-3)
    assert history[-1]["loss"] < history[0]["loss"]


def test_what_is_distilled_is_packed_with_its_texts(roomy, quick, one_thread):
    settings = dict(max_steps=3, batch_size=8, distill_examples=2, learning_rate=1e-2, evaluations_per_epoch=1)
    losses = [[e["loss"] for e in quick(roomy, DATA, **settings, packing=p).history] for p in (False, True)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_jobs_distil_together_as_alone(roomy, quick, one_thread):
    settings = dict(max_steps=2, batch_size=8, distill_examples=2, evaluations_per_epoch=1, progress=False)
    alone = [quick(roomy, DATA, LoRA(r=r), **settings) for r in (2, 4)]
    jobs = [TrainJob(data=DATA, method=LoRA(r=r), name=f"r{r}") for r in (2, 4)]
    for one, job in zip(alone, train_many(roomy, jobs, **settings), strict=True):
        assert job.best_metric == pytest.approx(one.best_metric, rel=1e-4)
        assert [e["loss"] for e in job.history] == pytest.approx([e["loss"] for e in one.history], rel=1e-4)


def test_an_instruction_is_distilled_into_what_is_chosen(roomy, quick, one_thread):
    """The pattern's own instruction is read by both, behind the teacher's."""
    pattern = Pattern("text {text} is :", instruction="the film")
    task = Task(name="m", kind="classification", template=("text",), label="y", labels=("bad", "good"), pattern=pattern)
    rows = [{"text": "good film", "y": "good"}, {"text": "the bad film", "y": "bad"}]
    p, q = (
        torch.tensor(rank(roomy, task, Pattern(pattern.prompt, instruction=said), rows).scores).log_softmax(1)
        for said in (f"{SAID}\n\nthe film", "the film")
    )
    data = TaskData(task=task, train=rows, validation=rows, test=None)
    found = quick(roomy, data, "lora", distill_instruction=SAID, max_steps=1, evaluations_per_epoch=1)
    assert found.history[0]["loss"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    with pytest.raises(ConfigError, match="distill_new_tokens=3 is for generation, and task 'm' is of kind class"):
        quick(roomy, data, "lora", distill_instruction=SAID, distill_new_tokens=3)


def test_what_cannot_be_distilled_is_refused(roomy, make_backbone, make_data, quick):
    for settings, error, words in [
        ({"distill_examples": 5}, DataError, "4 rows are too few for 5 examples"),
        ({"distill_new_tokens": 3}, ConfigError, "there is none; give distill_examples or distill_instruction too"),
        ({"distill_instruction": " "}, ConfigError, "distill_instruction=' ' is not possible; give a text"),
        ({"distill_examples": 1, "losses": "choice"}, ConfigError, "losses='choice' is for tasks with a pattern"),
        ({"distill_instruction": "bad " * 160}, DataError, r"train row 0 of task 'name it': with the context.*160 pos"),
        (
            {"distill_instruction": "bad " * 140, "distill_new_tokens": 30},
            DataError,
            r"train row 0.*answer are 1\d\d tokens, but backbone 'gpt2' has 160.*a smaller distill_new_tokens",
        ),
    ]:
        with pytest.raises(error, match=words):
            quick(roomy, DATA, "lora", **settings)
    for row, problem in [
        ({"text": "x"}, "the answer is empty"),
        ({"text": "x", "answer": []}, "the list of answers is"),
    ]:
        lacking = TaskData(task=WRITE, train=[ROWS[0], row], validation=ROWS, test=None)
        with pytest.raises(DataError, match=f"train row 1 of task 'name it': {problem}.*distill_new_tokens=64"):
            quick(roomy, lacking, "lora", distill_instruction=SAID)
    judged = TaskData(task=Task(**{**vars_of(WRITE), "metric": "rouge_l"}), train=ROWS, validation=ROWS, test=None)
    with pytest.raises(ConfigError, match="eval_texts=2 judges texts by the rows' own answers"):
        quick(roomy, judged, "lora", distill_examples=1, distill_new_tokens=3, eval_texts=2)
    with pytest.raises(ConfigError, match="distill_instruction='x' is for tasks with a pattern"):
        quick(make_backbone("bert"), make_data(), "lora", distill_instruction="x")


@pytest.mark.parametrize("asked", [{}, {"distill_new_tokens": 3}], ids=["own", "written"])
@pytest.mark.parametrize(
    ("dtype", "fix"), [("float32", "weights of it that are not finite"), ("bfloat16", "load it with dtype='float32'")]
)
def test_a_teacher_that_says_no_numbers_is_named_by_its_row(make_backbone, quick, asked, dtype, fix):
    broken = make_backbone("gpt2", n_positions=160)
    broken.model.to(getattr(torch, dtype))
    with torch.no_grad():
        broken.model.wpe.weight[20:] = torch.nan  # which only rows with a context reach
    words = f"train row 0 of task 'name it': the teacher's scores are not finite numbers.*{fix}, or drop the row"
    with pytest.raises(DataError, match=words):
        quick(broken, DATA, "lora", distill_instruction=f"{SAID} " * 2, **asked)


def vars_of(task):
    return {name: getattr(task, name) for name in ("name", "kind", "template", "label")}
