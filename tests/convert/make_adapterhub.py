"""Makes checkpoints with AdapterHub's library and says what they compute; run by the Python of its own environment.

`python make_adapterhub.py FOLDER` reads `FOLDER/cases.json`, a list of cases with an `id`, the folder of a `backbone`,
a `config` (class of the library, with its settings; several make a union) and a `head`: null, settings of a
classification head (`{"type": ...}`), or the name of one of transformers' classes. Each becomes `FOLDER/ID`, a
checkpoint with random tensors, and `FOLDER/ID.safetensors`: its `logits` or `hidden` states for the rows beside the
backbone.
"""

import json
import sys
import warnings
from pathlib import Path

import adapters
import torch
import transformers
from safetensors.torch import load_file, save_file

NAME = "mood"


def config_of(case):
    made = [getattr(adapters, name)(**settings) for name, settings in case["config"].items()]
    return made[0] if len(made) == 1 else adapters.ConfigUnion(*made)


def model_of(case):
    head = case["head"]
    if isinstance(head, str):
        model = getattr(transformers, head).from_pretrained(case["backbone"], num_labels=3)
        adapters.init(model)
        model.add_adapter(NAME, config=config_of(case))
        return model
    model = adapters.AutoAdapterModel.from_pretrained(case["backbone"])
    model.add_adapter(NAME, config=config_of(case))
    if head is not None:
        settings = {k: v for k, v in head.items() if k not in ("type", "names")}
        getattr(model, f"add_{head['type']}_head")(NAME, **settings, id2label=dict(enumerate(head["names"])))
    return model


def make(case, folder):
    model = model_of(case).eval()
    model.config.pad_token_id = case["pad_id"]
    model.set_active_adapters(NAME)
    before = {name: p.clone() for name, p in model.base_model.named_parameters() if f".{NAME}." not in name}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.removeprefix(f"{model.base_model_prefix}.") not in before:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    try:
        model.save_adapter(folder, NAME, use_safetensors=True, with_head=case["head"] is not None)
    except RuntimeError:  # it cannot write tensors that share memory, as those of prefixes do
        (folder / "adapter.safetensors").unlink(missing_ok=True)
        model.save_adapter(folder, NAME, with_head=case["head"] is not None)
    rows = load_file(Path(case["backbone"]) / "rows.safetensors")
    with torch.no_grad():
        out = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
    kind, found = ("hidden", out.last_hidden_state) if case["head"] is None else ("logits", out.logits)
    save_file({kind: found.contiguous()}, f"{folder}.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    root = Path(sys.argv[1])
    for case in json.loads((root / "cases.json").read_text()):
        torch.manual_seed(len(case["id"]))
        make(case, root / case["id"])
