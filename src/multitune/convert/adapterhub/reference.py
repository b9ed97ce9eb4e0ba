"""What AdapterHub's library computes: a program for the Python of an environment that has it, not a part of this one.

`python reference.py JOB ...` reads `JOB/job.json` (`backbone` and `adapter`: folders, `dtype`, `pad_id`, `head`:
whether to run the head) and `JOB/rows.safetensors` (`input_ids`, `attention_mask [B, T]`), and writes
`JOB/outputs.safetensors`: `outputs`, logits or last hidden states, with the library's version as metadata.
"""

import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Do one job."""
    import adapters  # type: ignore[import-not-found,unused-ignore]  # of the other environment
    import torch
    from safetensors.torch import load_file, save_file

    job = json.loads((folder / "job.json").read_text("utf-8"))
    model = adapters.AutoAdapterModel.from_pretrained(job["backbone"], torch_dtype=getattr(torch, job["dtype"]))
    model.config.pad_token_id = job["pad_id"]
    model.load_adapter(job["adapter"], use_safetensors=True, with_head=job["head"], set_active=True)
    if not job["head"]:
        model.active_head = None
    rows = load_file(folder / "rows.safetensors")
    with torch.no_grad():
        found = model.eval()(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
    outputs = found.logits if job["head"] else found.last_hidden_state
    save_file({"outputs": outputs.contiguous()}, folder / "outputs.safetensors", {"version": adapters.__version__})


if __name__ == "__main__":
    for job in sys.argv[1:]:
        main(Path(job))
