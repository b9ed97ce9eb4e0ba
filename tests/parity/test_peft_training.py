"""The same start, batches and settings in PEFT and here train to the same tensors.

PEFT's side is a plain loop over AdamW. Whole runs are compared without dropout, whose numbers the two draw from other
seeds; single steps with it, from the same ones. Prompt tuning is left out: PEFT's classifier reads the first prompt
token, which no adapter exported from here asks for.
"""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from safetensors.torch import load_file

import multitune as mt
from multitune.convert.heads import SEQUENCE, model_with_head
from multitune.tasks import Task, TaskData
from multitune.training.data import BatchOrder, Collator, TaskRows
from multitune.training.model import TuningModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    pytest.mark.filterwarnings("ignore:The PEFT config.s"),
]
peft = pytest.importorskip("peft", reason="PEFT is not installed; pip install 'multitune[parity]'")

WORDS = ["good", "bad", "film", "the", "not", "very", "a", "b", "cat", "dog"]
METHODS = {
    "lora": mt.LoRA(r=4, alpha=8, targets=("query", "value", "ffn_in")),
    "rslora": mt.RsLoRA(r=4, alpha=8),
    "ia3": mt.IA3(),
    "layernorm": mt.LayerNormTuning(),
}
#: One epoch, so that the only evaluation is after the last step and the best checkpoint is the last.
CONFIG = mt.TrainConfig(
    epochs=1.0, batch_size=8, learning_rate=5e-3, weight_decay=0.0, warmup_ratio=0.1, max_grad_norm=0.5, seed=3,
    pooling="pooler", head_dropout=0.0, progress=False,
)  # fmt: skip


@pytest.fixture
def tiny(make_backbone):
    """A tiny BERT with a pretrained pooler and no dropout."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_backbone("bert")
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    texts = [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist())
        for n in torch.randint(2, 9, (130,), generator=generator).tolist()
    ]
    table = Dataset.from_list([{"text": text, "y": ["no", "yes"]["good" in text]} for text in texts])
    task = Task(name="toy", kind="classification", template=mt.Template("{text}"), label="y", labels=("no", "yes"))
    return TaskData(task=task, train=table.select(range(120)), validation=table.select(range(120, 130)))


def peft_start(backbone, data, method, folder, dropout=0.0):
    """A fresh adapter, and PEFT's model with the same tensors."""
    task = data.task
    head = mt.Head.for_task(task, pooling=CONFIG.pooling, dropout=dropout)
    start = mt.Adapter(
        name="start",
        method=method,
        params=method.init(backbone, torch.Generator().manual_seed(CONFIG.seed)),
        backbone=backbone.describe(),
        task=task,
        head=head,
        head_params=head.init(backbone, torch.Generator().manual_seed(CONFIG.seed + 2**32)),
    )
    mt.export_adapter(start, backbone, folder / "start")
    base = model_with_head(backbone, SEQUENCE, len(task.labels))
    config = peft.PeftConfig.from_pretrained(folder / "start")
    config.inference_mode = False
    model = peft.get_peft_model(base, config)
    peft.set_peft_model_state_dict(model, load_file(folder / "start" / "adapter_model.safetensors"))
    return start, model


def peft_trained(backbone, data, method, folder):
    """PEFT's adapter after the same steps, as our adapter."""
    task = data.task
    start, model = peft_start(backbone, data, method, folder)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=CONFIG.learning_rate, weight_decay=0.0)
    rows = TaskRows(backbone, task, data.train, max_length=CONFIG.max_length, split="train")
    collate = Collator(task.kind, backbone.pad_id)
    order = BatchOrder([len(i) for i in rows.items], CONFIG.batch_size, accumulation=1, seed=CONFIG.seed, grouped=True)
    steps = len(order)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, math.ceil(steps * CONFIG.warmup_ratio), steps)
    model.train()
    for numbers in order:
        batch = collate([rows.items[i] for i in numbers])
        targets = batch.pop("targets")
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        F.cross_entropy(model(**batch).logits, targets).backward()
        torch.nn.utils.clip_grad_norm_(trained, CONFIG.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "trained")
    mt.import_adapter(folder / "trained", backbone, folder / "ours", labels=task.labels)
    return start, mt.Adapter.load(folder / "ours", backbone)


@pytest.mark.parametrize("name", METHODS)
def test_training_takes_the_same_steps_as_peft(tiny, data, tmp_path, name):
    method = METHODS[name]
    start, theirs = peft_trained(tiny, data, method, tmp_path)
    ours = mt.train(tiny, data, method, tmp_path / "run", config=CONFIG)
    last = ours.adapter
    for found, expected, first in (
        (last.params, theirs.params, start.params),
        (last.head_params, theirs.head_params, start.head_params),
    ):
        assert set(found) == set(expected)
        for key, tensor in found.items():
            moved = (expected[key] - first[key]).norm()
            assert moved > 0
            assert (tensor - expected[key]).norm() <= 1e-4 * moved, key


@pytest.mark.parametrize("name", METHODS)
def test_dropout_acts_in_the_same_places(make_backbone, data, tmp_path, name):
    """From one seed, both drop the same entries: of embeddings, attention, sub-layers and what the head reads."""
    dropout = 0.2
    backbone = make_backbone("bert", hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.1)
    start, theirs = peft_start(backbone, data, METHODS[name], tmp_path, dropout)
    params, head_params = ({k: t.clone() for k, t in ts.items()} for ts in (start.params, start.head_params))
    ours = TuningModel(backbone, start.method, params, start.head, head_params)
    rows = TaskRows(backbone, data.task, data.train, max_length=CONFIG.max_length, split="train")
    batch = Collator(data.task.kind, backbone.pad_id)(rows.items[:8])
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    targets = batch.pop("targets")
    passes = {
        theirs: lambda: F.cross_entropy(theirs(**batch).logits, targets),
        ours: lambda: ours(**batch, targets=targets)["loss"],
    }
    optimizers = {m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=5e-3) for m in passes}
    for seed in range(4):
        losses = []
        with torch.no_grad():
            whole = passes[ours.eval()]().item()
        for model, loss_of in passes.items():
            model.train()
            torch.manual_seed(seed)
            loss = loss_of()
            loss.backward()
            optimizers[model].step()
            optimizers[model].zero_grad()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert whole != pytest.approx(losses[1], rel=1e-3)
