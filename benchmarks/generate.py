"""What text costs whose rows use many adapters: prompts and steps apart, by the bare model's time.

    python benchmarks/generate.py [--quick] [--rows 32] [--tokens 32] [--new 16] [--rounds 6] [--json FILE]
    python benchmarks/generate.py --write docs/results.md    # the table between its markers there

On the backbone `smollm2`, float32, greedy, in one process; `--quick` takes a tiny random model instead, to try the
script. All systems generate from the same token ids, drawn evenly from the vocabulary, and share the bare model's
weights in memory. A round begins with the prompts of each system in turn; then the systems take turns step by step, so
that all of them meet the same noise.

- `transformers`: the bare model with its own dynamic cache; the reference of every ratio.
- `multitune, bare`: the same rows without adapters.
- `multitune, mixed`: 32 rows, 32 adapters, four methods: LoRA, prefix-tuning, Houlsby adapters, AoT.
- `multitune, LoRA`: 32 rows, 32 LoRA adapters.
- `PEFT, LoRA`: the same LoRA adapters in Hugging Face PEFT, an adapter name per row.

Before anything is timed, rows of the mixed batch are compared with the same rows alone, the bare rows with
transformers, and PEFT with multitune, token for token.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from _harness import Result, machine, print_times, results, synchronise, write_json
from _store import check_markers, environment, write_between
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from multitune import AoTFC, Backbone, DeltaSet, Houlsby, LoRA, Method, PrefixTuning
from multitune.generation import GenerationSettings
from multitune.generation.batch import DecodingBatch
from multitune.generation.prompts import make_sequence
from multitune.generation.sequences import SingleSequence
from multitune.workspace import Workspace

LORA = LoRA(r=8, alpha=16)
FOUR: tuple[Method, ...] = (LORA, PrefixTuning(length=16), Houlsby(bottleneck=32), AoTFC(r=32))
NAME = "generate"
#: Largest decoding step of the mixed batch by the bare model's.
LIMIT = 1.3
#: Tokens that are compared before anything is timed.
COMPARED = 4

Prompts = list[list[int]]


class Multitune:
    """A batch that is decoded by a plan."""

    def __init__(self, backbone: Backbone, deltas: Sequence[DeltaSet | None], new: int) -> None:
        self.backbone, self.deltas = backbone, deltas
        self.settings = GenerationSettings(max_new_tokens=new, stop_at_eos=False)
        self.workspace = Workspace()

    def prompt(self, prompts: Prompts) -> None:
        """Run the prompts, plan and first tokens included."""
        self.sequences = [
            make_sequence(self.backbone, tuple(p), d, self.settings) for p, d in zip(prompts, self.deltas, strict=True)
        ]
        self.batch = DecodingBatch(self.backbone, self.workspace)
        self.batch.enter(self.sequences)

    def step(self) -> None:
        """One token per row."""
        self.batch.step()

    def tokens(self) -> list[list[int]]:
        """What was generated so far."""
        return [list(s.tokens) for s in self.sequences if isinstance(s, SingleSequence)]


class Plain:
    """A model of transformers, or PEFT's with an adapter name per row, and its own cache."""

    def __init__(self, model: torch.nn.Module, names: list[str] | None = None) -> None:
        self.model = model
        self.extra = {} if names is None else {"adapter_names": names}

    def prompt(self, prompts: Prompts) -> None:
        """Run the prompts, first tokens included."""
        self.cache = DynamicCache()
        self.found: list[Tensor] = []
        self._run(torch.tensor(prompts, device=next(self.model.parameters()).device))

    def step(self) -> None:
        """One token per row."""
        self._run(self.found[-1])

    def _run(self, ids: Tensor) -> None:
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **self.extra)
        self.found.append(output.logits[:, -1].argmax(-1, keepdim=True))

    def tokens(self) -> list[list[int]]:
        """What was generated so far."""
        return torch.cat(self.found, 1).tolist()


System = Multitune | Plain


def tiny() -> PreTrainedModel:
    """A random model for `--quick`, its scores far apart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=512, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_()
    return model


def models(quick: bool, device: str) -> tuple[Backbone, PreTrainedModel]:
    """The backbone, and the bare model with the same weights in memory."""
    if quick:
        bare = tiny().to(device)
        backbone = Backbone(copy.deepcopy(bare), name="tiny")
    else:
        backbone = Backbone.load("smollm2", device=device)
        bare = AutoModelForCausalLM.from_pretrained(backbone.model.config.name_or_path, dtype=backbone.dtype).to(device)
    bare.eval().requires_grad_(False)
    for mine, theirs in zip(bare.base_model.parameters(), backbone.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        mine.data = theirs.data
    return backbone, bare


def adapters(backbone: Backbone, methods: Sequence[Method], count: int) -> list[tuple[Method, dict[str, Tensor]]]:
    """Adapters as training would leave them, the methods in turn; nothing in them is zero."""
    made = []
    for i in range(count):
        method = methods[i % len(methods)]
        generator = torch.Generator().manual_seed(i)
        params = {
            name: t + 0.02 * torch.randn(t.shape, generator=generator)
            for name, t in method.init(backbone, generator).items()
        }
        method, params = method.finish(params, backbone)  # type: ignore[assignment]
        made.append((method, params))
    return made


def served(backbone: Backbone, made: Sequence[tuple[Method, dict[str, Tensor]]]) -> list[DeltaSet]:
    """Their deltas, as a bank serves them."""
    with torch.no_grad():
        return [DeltaSet(m.deltas(p, backbone)).fused(backbone.dtype, backbone.device) for m, p in made]


def peft_model(
    bare: PreTrainedModel, backbone: Backbone, made: Sequence[tuple[Method, dict[str, Tensor]]]
) -> torch.nn.Module:
    """PEFT's model with the same LoRA adapters, named 0, 1, ..."""
    from peft import LoraConfig, get_peft_model

    prefix = f"{bare.base_model_prefix}."
    sites = backbone.find_sites("linear", LORA.targets)
    targets = [prefix + s.module for s in sites]
    model = None
    for i in range(len(made)):
        config = LoraConfig(r=LORA.r, lora_alpha=LORA.alpha, target_modules=targets)
        if model is None:
            model = get_peft_model(copy.copy(bare), config, adapter_name=str(i))
        else:
            model.add_adapter(str(i), config)
    assert model is not None
    tensors = dict(model.named_parameters())
    for i, (_, params) in enumerate(made):
        for site in sites:
            for key in "AB":
                tensors[f"base_model.model.{prefix}{site.module}.lora_{key}.{i}.weight"].data.copy_(
                    params[f"{site.name}.{key}"].T
                )
    return model.eval().requires_grad_(False)


def generated(system: System, prompts: Prompts, count: int) -> list[list[int]]:
    """The first tokens of every row."""
    system.prompt(prompts)
    for _ in range(count - 1):
        system.step()
    return system.tokens()


def check(systems: dict[str, System], prompts: Prompts) -> None:
    """What must hold before a time means anything."""
    found = {name: generated(system, prompts, COMPARED) for name, system in systems.items()}
    assert found["multitune, bare"] == found["transformers"], "bare rows differ from transformers"
    assert found["multitune, LoRA"] == found["PEFT, LoRA"], "LoRA rows differ from PEFT"
    mixed = systems["multitune, mixed"]
    assert isinstance(mixed, Multitune)
    rows = range(0, len(prompts), max(1, len(prompts) // 8))
    for i in rows:
        alone = Multitune(mixed.backbone, [mixed.deltas[i]], COMPARED + 1)
        assert generated(alone, [prompts[i]], COMPARED)[0] == found["multitune, mixed"][i], f"row {i} differs"
    other = sum(a != b for a, b in zip(found["multitune, mixed"], found["transformers"], strict=True))
    assert other, "the adapters change nothing"
    print(
        f"  checked, {COMPARED} tokens a row: bare rows = transformers, LoRA rows = PEFT, {len(rows)} mixed rows = "
        f"alone; {other} of {len(prompts)} mixed rows differ from bare ones"
    )


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds."""
    synchronise(device)
    start = perf_counter()
    work()
    synchronise(device)
    return 1e3 * (perf_counter() - start)


def page(rows: Sequence[Result], arguments: argparse.Namespace, backbone: Backbone) -> str:
    """The table that docs/results.md shows, with how it was measured."""
    about = environment(torch.get_num_threads())
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "transformers", "peft"))
    lines = [
        f"{arguments.rows} rows, prompts of {arguments.tokens} tokens, {arguments.rounds} rounds of {arguments.new} "
        f"new tokens; {backbone.name}, float32, greedy; {about['machine']}, {about['threads']} threads, "
        f"Python {about['python']}, {versions}, {about['date']}.",
        "",
        "| | system | median ms | tokens/s | ratio to transformers | of rounds | limit we set |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        limit = "" if r.limit is None else f"{r.limit}{', **missed**' if r.verdict == 'MISSED' else ''}"
        lines.append(
            f"| {r.case} | {r.system} | {r.median_ms:.1f} | {r.note.removesuffix(' tokens/s')} | {r.ratio:.3f} "
            f"| {r.median_of_ratios:.3f} | {limit} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model, to try the script")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="of every prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens to generate per row and round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between this document's markers")
    arguments = parser.parse_args()
    check_markers(arguments.write, NAME)
    if min(arguments.rounds, arguments.new) < 2:
        parser.error("quartiles need at least --rounds 2 and --new 2")
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="peft")
    torch.set_grad_enabled(False)
    backbone, bare = models(arguments.quick, arguments.device)
    lora, mixed = (adapters(backbone, methods, arguments.rows) for methods in ((LORA,), FOUR))
    new = max(arguments.new, COMPARED) + 1
    systems: dict[str, System] = {
        "transformers": Plain(bare),
        "multitune, bare": Multitune(backbone, [None] * arguments.rows, new),
        "multitune, mixed": Multitune(backbone, served(backbone, mixed), new),
        "multitune, LoRA": Multitune(backbone, served(backbone, lora), new),
    }
    # Last, because PEFT puts its layers into the modules that it wraps.
    wrapped = copy.deepcopy(bare)
    for mine, theirs in zip(wrapped.base_model.parameters(), bare.base_model.parameters(), strict=True):
        mine.data = theirs.data
    systems["PEFT, LoRA"] = Plain(peft_model(wrapped, backbone, lora), [str(i) for i in range(arguments.rows)])
    print(machine(torch.get_num_threads(), backbone.device))
    print(f"{arguments.rows} rows, prompts of {arguments.tokens} tokens, {arguments.new} new ones, {backbone.name}\n")

    generator = torch.Generator().manual_seed(0)
    times: dict[str, dict[str, list[float]]] = {case: {name: [] for name in systems} for case in ("prompts", "step")}
    for round_ in range(-1, arguments.rounds):
        shape = (arguments.rows, arguments.tokens)
        prompts = torch.randint(3, backbone.vocab_size, shape, generator=generator).tolist()
        if round_ < 0:  # also warms up
            check(systems, prompts)
            continue
        for name, system in systems.items():
            times["prompts"][name].append(timed(partial(system.prompt, prompts), backbone.device))
        for _ in range(arguments.new - 1):
            for name, system in systems.items():
                times["step"][name].append(timed(system.step, backbone.device))
    found = []
    for case, of_case in times.items():
        tokens = arguments.rows * (arguments.tokens if case == "prompts" else 1)
        rates = {n: f"{tokens / (sorted(v)[len(v) // 2] / 1e3):,.0f} tokens/s" for n, v in of_case.items()}
        limits = {"multitune, mixed": LIMIT} if case == "step" else None
        rows = results(case, of_case, limits=limits, notes=rates)
        print(f"\n{case}")
        print_times(rows)
        found += rows
    if arguments.json:
        write_json(arguments.json, found)
    if arguments.write:
        write_between(arguments.write, NAME, page(found, arguments, backbone))


if __name__ == "__main__":
    main()
