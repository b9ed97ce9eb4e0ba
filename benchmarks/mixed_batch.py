"""What a batch costs whose rows use many adapters: time by the bare backbone's, loading, and memory.

    python benchmarks/mixed_batch.py [--quick] [--cases a,c,f] [--json FILE] [--plot FILE] [--write docs/results.md]

All on the backbone `minilm`, float32, in one process. The systems of a case are timed in turn, round after round,
on the same token ids (drawn evenly from the vocabulary, other ones each round; no padding):

- `backbone`: the bare transformers model. It, multitune's and PEFT's share their weights in memory, so that none
  of them finds the processor's cache warmer than the others do.
- `multitune, new batch`: `bank.plan(names)` and `backbone.run(plan, ids)`. The names are drawn anew each round from a
  bank that holds more adapters than the batch.
- `multitune, plan reused`: the next step of that batch, with the plan it has.
- `PEFT`: a LoRA model with the same tensors and an adapter name per row.

Before anything is timed, every row of a mixed batch is compared with that row alone, and PEFT with multitune.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from _harness import (
    Result,
    machine,
    plot,
    print_memory,
    print_times,
    results,
    synchronise,
    write_json,
)
from _markdown import markdown
from _memory import memory_in_use
from _store import check_markers, write_between
from _systems import (
    BANK_SIZE,
    EVERY_LINEAR,
    Batch,
    Setup,
    Steps,
    bare_model,
    check_peft,
    check_rows,
    difference,
    peft_model,
)
from torch import Tensor
from transformers.utils import logging

from multitune import (
    IA3,
    AoTFC,
    Backbone,
    Bank,
    BitFit,
    Houlsby,
    LayerNormTuning,
    LoRA,
    Method,
    PromptTuning,
    PTuningV2,
)
from multitune.bank import AotStore

LORA = LoRA(r=8, alpha=16)
LORA_EVERYWHERE = LoRA(r=8, alpha=16, targets=EVERY_LINEAR)
PROMPT = PromptTuning(length=16)
EIGHT: tuple[Method, ...] = (
    LORA,
    IA3(),
    BitFit(),
    LayerNormTuning(),
    Houlsby(bottleneck=64),
    PROMPT,
    PTuningV2(length=16),
    AoTFC(r=64),
)
NEW, REUSED = "multitune, new batch", "multitune, plan reused"


def lora_case(
    setup: Setup, case: str, method: LoRA, num_rows: int, num_tokens: int, limits: Mapping[str, float]
) -> list[Result]:
    """Every row another adapter, all LoRA: the bare backbone, multitune and PEFT."""
    bank = setup.bank([method])
    num_theirs = min(num_rows, 16) if setup.quick else num_rows
    theirs = setup.rng.sample(bank.names, num_theirs)
    model = peft_model(setup.backbone, {name: bank.adapter(name) for name in theirs})
    names = (theirs * num_rows)[:num_rows]

    def draw() -> Batch:
        return Batch(names=setup.rng.sample(bank.names, num_rows), ids=setup.ids(num_rows, num_tokens))

    def run_peft(batch: Batch) -> Tensor:
        hidden: Tensor = model(input_ids=batch.ids, adapter_names=names).last_hidden_state
        return hidden

    check_rows(setup, bank, draw())
    check_peft(setup, bank, model, replace(draw(), names=names))
    steps = Steps(bank)
    systems = {"backbone": setup.run_bare, NEW: steps.first, REUSED: steps.second, "PEFT": run_peft}
    notes = {"PEFT": f"only {num_theirs} adapters"} if num_theirs < num_rows else {}
    return results(case, setup.time(systems, draw), limits=limits, notes=notes)


def case_a(setup: Setup) -> list[Result]:
    """32 rows of 64 tokens, LoRA r=8 on query and value, 32 adapters."""
    return lora_case(setup, "a", LORA, 32, 64, {NEW: 1.08})


def case_b(setup: Setup) -> list[Result]:
    """64 rows of 16 tokens, LoRA r=8 on query and value, 64 adapters."""
    return lora_case(setup, "b", LORA, 64, 16, {NEW: 1.12})


def case_c(setup: Setup) -> list[Result]:
    """64 rows of 1 token, LoRA r=8 on every linear, 64 adapters."""
    return lora_case(setup, "c", LORA_EVERYWHERE, 64, 1, {NEW: 1.6, REUSED: 1.35})


def case_d(setup: Setup) -> list[Result]:
    """32 rows of 64 tokens, AoT P-Tuning (FC, r=64), 32 adapters."""
    num_rows, num_tokens = 32, 64
    bank = setup.bank([AoTFC(r=64)])
    stores: dict[AotStore, Bank] = {"ram": Bank(setup.backbone, aot_store="ram")}
    stores["mmap"] = Bank(setup.backbone, aot_store="mmap")
    table_bytes = 2 * setup.backbone.vocab_size * setup.backbone.num_layers * setup.backbone.hidden_size
    room = min(psutil.virtual_memory().available // 3, shutil.disk_usage(setup.folder).free // 2) // table_bytes
    tabled = setup.rng.sample(bank.names, max(1, min(4 if setup.quick else num_rows, room)))
    for name in tabled:
        adapter = bank.adapter(name).save(setup.folder / name).fuse(setup.backbone, torch.bfloat16)
        for store in stores.values():
            store.add(name, adapter)
    size = f"{table_bytes / 1e6:.0f} MB each, bfloat16, page cache warm"
    print(f"  tables: {len(tabled)} distinct, {size}; a batch uses all of them, in a new order")

    def draw() -> Batch:
        return Batch(names=setup.rng.sample(bank.names, num_rows), ids=setup.ids(num_rows, num_tokens))

    def of_tables(batch: Batch) -> Batch:
        names = (tabled * num_rows)[:num_rows]
        return replace(batch, names=setup.rng.sample(names, num_rows))

    check_rows(setup, bank, draw())
    batch = of_tables(draw())
    check_rows(setup, stores["mmap"], batch)
    mapped = Steps(stores["mmap"]).once(batch)
    worst = difference(mapped, Steps(bank).once(batch))
    assert difference(mapped, Steps(stores["ram"]).once(batch)) == 0, "ram and mmap differ"
    assert worst < 0.05, f"tables and factors differ by {worst}"
    print(f"  checked: ram = mmap, exactly; tables = factors, within {worst:.0e}")
    systems: dict[str, Callable[[Batch], object]] = {"backbone": setup.run_bare, f"{NEW}, factors": Steps(bank).once}
    for name, store in stores.items():
        steps = Steps(store)
        systems[f"{NEW}, {name}"] = lambda batch, steps=steps: steps.once(of_tables(batch))
    limits = {name: 1.05 for name in systems if name != "backbone"}
    notes = {name: f"only {len(tabled)} tables" for name in systems if name.endswith(("ram", "mmap"))}
    return results("d", setup.time(systems, draw), limits=limits, notes=notes if len(tabled) < num_rows else {})


def case_e(setup: Setup) -> list[Result]:
    """32 rows of 64 tokens, eight methods, four adapters of each, rows shuffled."""
    num_tokens, each = 64, 4
    bank = setup.bank(EIGHT)
    for method in EIGHT:
        print(f"  {method.name}: " + ", ".join(f"{k}={v}" for k, v in method.settings().items()))

    def draw(methods: Sequence[Method] = EIGHT) -> Batch:
        names = [
            n for m in methods for n in setup.rng.sample([b for b in bank.names if b.split("-")[0] == m.name], each)
        ]
        setup.rng.shuffle(names)
        return Batch(names=names, ids=setup.ids(len(names), num_tokens))

    check_rows(setup, bank, draw())
    steps = Steps(bank)
    longer = PROMPT.length + num_tokens
    wide = f"backbone, {longer} tokens a row"

    def run_wide(batch: Batch) -> Tensor:
        more = batch.ids[:, : PROMPT.length]
        return setup.run_bare(replace(batch, ids=torch.cat([more, batch.ids], 1)))

    systems = {"backbone": setup.run_bare, NEW: steps.first, REUSED: steps.second, wide: run_wide}
    notes = {NEW: f"prompts make every row {longer} positions long", wide: "what the length alone costs"}
    found = results("e", setup.time(systems, draw), limits={NEW: 1.25}, notes=notes)
    seven = [m for m in EIGHT if m is not PROMPT]
    num_rows = each * len(seven)
    systems = {f"backbone, {num_rows} rows": setup.run_bare, f"{NEW}, no prompts": Steps(bank).once}
    times = setup.time(systems, lambda: draw(seven))
    note = {f"{NEW}, no prompts": f"{num_rows} rows, the seven other methods"}
    found += results("e", times, limits=dict.fromkeys(note, 1.25), notes=note)
    return found


def case_f(setup: Setup) -> list[Result]:
    """Adding the 1st and the 500th adapter to a bank: LoRA r=8 on query and value, from its folder."""
    repeats, target = 15, 500
    folders = [setup.folder / f"added-{i}" for i in range(repeats)]
    for folder in folders:
        setup.adapter(LORA).save(folder)
    large = Bank(setup.backbone)
    while len(large) < target - 1 - repeats // 2:
        large.add(f"adapter-{len(large)}", folders[len(large) % repeats])
    fresh: list[Bank] = []  # kept, so that the 1st adapter gets no memory that a bank before it gave back
    times: dict[str, list[float]] = {"1st adapter": [], "500th adapter": []}
    for i in range(repeats):
        fresh.append(Bank(setup.backbone))
        for system, bank, folder in (
            ("1st adapter", fresh[-1], folders[i]),
            ("500th adapter", large, folders[i - repeats // 2]),
        ):
            name = f"adapter-{len(bank)}"
            synchronise(setup.device)
            start = time.perf_counter()
            bank.add(name, folder)
            synchronise(setup.device)
            times[system].append(1e3 * (time.perf_counter() - start))
    notes = {"500th adapter": f"adapters {target - repeats // 2} to {len(large)}"}
    return results("f", times, limits={"500th adapter": 1.5}, notes=notes, to_first=True)


def case_g(setup: Setup) -> list[Result]:
    """Memory for each adapter in a bank."""
    number, found = 32 if setup.quick else 500, []
    for method in (LORA, LORA_EVERYWHERE, *EIGHT[1:]):
        title = f"{method.name}, every linear" if method is LORA_EVERYWHERE else method.name
        folders = [setup.folder / f"{title}-{i}" for i in range(4)]
        adapters = [setup.adapter(method).save(folder) for folder in folders]
        bank = Bank(setup.backbone)
        for folder in folders:
            bank.add(folder.name, folder)
        resident, in_use = bank.resident_bytes, memory_in_use(setup.device)
        for i in range(number):
            bank.add(f"adapter-{i}", folders[i % len(folders)])
        found.append(
            Result(
                case="g",
                system=title,
                resident_bytes=(bank.resident_bytes - resident) // number,
                growth_bytes=(memory_in_use(setup.device) - in_use) // number,
                parameters=adapters[0].num_method_parameters,
                note=f"over {number} adapters",
            )
        )
    return found


CASES: dict[str, Callable[[Setup], list[Result]]] = {
    "a": case_a,
    "b": case_b,
    "c": case_c,
    "d": case_d,
    "e": case_e,
    "f": case_f,
    "g": case_g,
}


def title_of(case: str) -> str:
    """The first line of a case's docstring, without its full stop."""
    return str(CASES[case].__doc__).split("\n", maxsplit=1)[0].rstrip(".")


def main() -> None:
    """Parse the options, run the cases, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, tables and PEFT adapters: a minute in all")
    parser.add_argument(
        "--cases", default=",".join(CASES), help="which cases, with commas between (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, help="time for the rounds of a case (default: 60, quick 1)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on the CPU (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of tensors, token ids and draws (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this document")
    options = parser.parse_args()
    check_markers(options.write, "mixed_batch")
    cases = [c.strip() for c in options.cases.split(",")]
    if unknown := [c for c in cases if c not in CASES]:
        parser.error(f"no case is called {', '.join(unknown)}; choose from {', '.join(CASES)}")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"torch sees no device '{options.device}' on this machine; use --device cpu")
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT asks for it
    torch.set_num_threads(options.threads)
    backbone = Backbone.load("minilm", device=options.device)
    print(machine(options.threads, backbone.device))
    found: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="multitune-bench-") as folder, torch.no_grad():
        setup = Setup(
            backbone=backbone,
            bare=bare_model(backbone),
            device=backbone.device,
            rng=random.Random(options.seed),
            folder=Path(folder),
            quick=options.quick,
            seconds=options.seconds or (1 if options.quick else 60),
            least_rounds=3 if options.quick else 15,
            warm_up=0 if options.quick else 3,  # the checks have run every system once
        )
        print(f"{backbone}, float32; banks of {BANK_SIZE} adapters")
        if options.quick:
            print("--quick: so few rounds that the ratios are rough")
        for case in cases:
            print(f"\n{case}: {title_of(case)}", flush=True)
            rows = CASES[case](setup)
            (print_memory if case == "g" else print_times)(rows)
            found += rows
    missed = [r for r in found if r.verdict == "MISSED"]
    limited = sum(bool(r.verdict) for r in found)
    print(f"\n{limited - len(missed)} of {limited} limits kept" + (", missed: " if missed else ""), end="")
    print("; ".join(f"{r.case} {r.system} {r.ratio:.3f} > {r.limit}" for r in missed))
    if options.json:
        write_json(options.json, found)
    if options.write:
        write_between(options.write, "mixed_batch", markdown(found, {c: title_of(c) for c in CASES}, options.threads))
    if options.plot:
        subtitle = "minilm, float32, " + machine(options.threads, backbone.device).split(";")[0]
        plot(options.plot, found, {c: title_of(c) for c in CASES}, subtitle)


if __name__ == "__main__":
    main()
