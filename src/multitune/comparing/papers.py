"""What the papers claim, as comparisons that runs can decide; with the papers' figures and the evidence for them.

Evidence tags: [V] read in the paper or in its authors' files, [D] derived by arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from multitune.comparing.parts import AnyPart, Part, Side, Size, Stored, Timed, Untested

ROBERTA_BASE = 124_055_040
"""Parameters of the papers' smallest backbone without its pooler."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says."""

    number: int
    """In the list of claims that the project set out to test."""
    statement: str
    source: str
    figure: str
    """The paper's, with its evidence tag."""
    parts: tuple[AnyPart, ...]
    suites: tuple[str, ...] = ("glue", "superglue")
    """On which the parts that name none are judged."""


_EQUAL = "0.25%"
#: The whole stream of benchmarks/continual_intents.py.
_STREAM = [
    "auto_and_commute", "banking", "credit_cards", "home", "kitchen_and_dining", "meta", "small_talk", "travel",
    "utility", "work",
]  # fmt: skip
#: How many chains benchmarks/dcot.py asks for; its quick runs stop before the three that are judged.
_CHAINS = [1, 2, 3]

CLAIMS = (
    Claim(
        number=1,
        statement="AoT P-Tuning beats BitFit and is on par with or better than P-tuning v2 on GLUE and SuperGLUE.",
        source="Gavrilov and Balagansky 2023, arXiv 2305.10835",
        figure="stated in the abstract and in the earlier text [V]; its tables were not readable, so no figure",
        parts=(
            Part(method="aot_fc", other="bitfit", relation="beats"),
            Part(method="aot_kronecker", other="bitfit", relation="beats"),
            Part(method="aot_fc", other="ptuning_v2", relation="on par"),
            Part(method="aot_kronecker", other="ptuning_v2", relation="on par"),
        ),
    ),
    Claim(
        number=2,
        statement="AoT's inference overhead is negligible beside LoRA unmerged, adapters and prefixes.",
        source="Gavrilov and Balagansky 2023, arXiv 2305.10835",
        figure="stated in the abstract [V]; the speed table was not readable",
        parts=(
            Timed(method="aot_fc", form="fused"),
            Timed(method="aot_fc", form="fused", other=("lora", "alone")),
            Timed(method="aot_fc", form="fused", other=("houlsby", "alone")),
            Timed(method="aot_fc", form="fused", other=("prefix", "alone")),
            Timed(method="aot_fc", form="factors"),
            Timed(method="aot_fc", form="factors", other=("lora", "alone")),
            Timed(method="aot_fc", form="factors", other=("houlsby", "alone")),
            Timed(method="aot_fc", form="factors", other=("prefix", "alone")),
        ),
    ),
    Claim(
        number=3,
        statement="Prefix-tuning beats adapters at 0.1 % of the parameters on table-to-text, and falls behind full "
        "tuning on summarisation.",
        source="Li and Liang 2021, arXiv 2101.00190",
        figure="GPT-2 medium, BLEU on E2E, WebNLG (all) and DART: prefix 69.7, 55.1, 46.4; adapter 66.3, 50.2, 42.4; "
        "XSum ROUGE-L, BART-large: prefix 36.05 (2 %), full 37.25 [V]",
        suites=("table-to-text",),
        parts=(
            Part(method="prefix", other="houlsby", relation="beats", budget="0.1%"),
            Part(method="prefix", other="pfeiffer", relation="beats", budget="0.1%"),
            Stored(
                store="table_to_text",
                one=Side(title="prefix", cell={"method": "prefix"}, score="scores.bleu", per=100.0),
                other=Side(title="pfeiffer", cell={"method": "pfeiffer"}, score="scores.bleu", per=100.0),
                alike=("backbone", "train_rows", "test_prompts"),
                seed="training.seed",
                command="python benchmarks/table_to_text.py --seeds 0 1 2",
            ),
            Untested(
                words="prefix scores below full on summarisation",
                reason="neither XSum nor a backbone of BART-large's kind is among the data and models used here",
            ),
        ),
    ),
    Claim(
        number=4,
        statement="P-tuning v2 is comparable to full tuning; prompts in the input alone trail on small models.",
        source="Liu et al. 2022, arXiv 2110.07602",
        figure="RTE, RoBERTa-large: P-tuning v2 86.6 (the authors' re-implementation), full tuning 86.6 (LoRA's Table "
        "2) [V]; mean of nine tasks, RoBERTa-large: prompt 77.7, adapter 87.4 (Ding et al. 2023, Table 2) [V]",
        parts=(
            Part(method="ptuning_v2", other="full", relation="on par"),
            Part(method="ptuning_v2", other="prompt", relation="beats"),
        ),
    ),
    Claim(
        number=5,
        statement="LoRA adds no latency when merged, at a small share of full tuning's parameters.",
        source="Hu et al. 2021, arXiv 2106.09685",
        figure="GPT-2 medium, time of a batch (Table 1): merged LoRA as full tuning, adapters 2.2 to 30.3 % more [V]; "
        "RoBERTa-base (Table 2): 0.3M of 125.0M parameters [V]",
        suites=("glue",),
        parts=(
            Timed(method="lora", form="merged"),
            Timed(method="lora", form="merged", other=("lora", "alone")),
            Size(method="lora", most=0.01, paper_size=ROBERTA_BASE),
        ),
    ),
    Claim(
        number=6,
        statement="(IA)³ with T-Few's recipe beats in-context learning at a fraction of the FLOPs of inference.",
        source="Liu et al. 2022, arXiv 2205.05638",
        figure="held-out tasks of T0: T-Few (11B) 72.4 at 1.1e12 FLOP an example, GPT-3 175B in context 66.6 at "
        "1.4e15; RAFT: T-Few 75.8, GPT-3 62.7 [V]",
        parts=(
            Stored(
                store="few_shot_language",
                one=Side(title="T-Few", cell={"system": "tfew"}, score="scores.accuracy"),
                other=Side(
                    title="the same backbone with examples in the prompt",
                    cell={"system": "few"},
                    score="scores.accuracy",
                ),
                alike=("backbone", "task", "num_train", "num_judged"),
                command="python benchmarks/few_shot_language.py --seeds 0 1 2",
            ),
            Untested(
                words="T-Few takes a fraction of the FLOPs of inference",
                reason="no model of the two sizes compared (11 and 175 billion parameters) runs here, and on one "
                "backbone it is arithmetic: FLOPs are in proportion to the tokens read, and a prompt with examples has "
                "theirs beside its own",
            ),
        ),
    ),
    Claim(
        number=7,
        statement="BitFit, and LayerNorm with the head, reach most of full tuning with under 0.1 % of the parameters.",
        source="Ben-Zaken et al. 2021, arXiv 2106.10199",
        figure="RoBERTa-base, mean of GLUE: BitFit 85.2, full 86.4 (LoRA's Table 2) [V], 98.6 % of it [D]; 0.082 % of "
        "the parameters, LayerNorm 0.030 % [D]; for LayerNorm no verified score",
        parts=(
            Part(method="bitfit", other="full", relation="most of"),
            Size(method="bitfit", most=0.001, paper_size=ROBERTA_BASE),
            Part(method="layernorm", other="full", relation="most of"),
            Size(method="layernorm", most=0.001, paper_size=ROBERTA_BASE),
        ),
    ),
    Claim(
        number=8,
        statement="SIFT matches LoRA at equal parameters; DSEE keeps quality with pruned FLOPs; SoTU forgets less than "
        "sequential tuning; semantic freezing beats freezing by position; DCoT beats single-chain training; "
        "instruction tuning improves held-out tasks.",
        source="Song et al. 2024, arXiv 2312.11875; Chen et al. 2021, arXiv 2111.00160; Ning et al. 2024, arXiv "
        "2411.02813; Gu et al. 2024, arXiv 2406.11753; Puerto et al. 2024, arXiv 2407.03181; Wei et al. 2021, arXiv "
        "2109.01652",
        figure="GLUE, RoBERTa-large, 0.8M parameters each: SIFT 88.6, LoRA 88.6 [V]; DSEE: about 25 % of the FLOPs "
        "saved at comparable quality [V, abstract]; DCoT: better than one chain at every size from 1.3B to 70B [V, "
        "abstract]; instruction tuning: beats zero-shot GPT-3 175B on 20 of 25 data sets [V, abstract]; of SoTU and of "
        "semantic freezing no verified score",
        suites=("glue",),
        parts=(
            Part(
                method="sift",
                other="lora",
                relation="on par",
                budget=_EQUAL,
                options=f" --methods sift,lora --budgets {_EQUAL}",
            ),
            Part(
                method="dsee",
                other="lora",
                relation="on par",
                budget=_EQUAL,
                options=f" --methods dsee,lora --budgets {_EQUAL}",
            ),
            Untested(
                words="DSEE saves FLOPs by pruning",
                reason="heads are shut by a scale and not taken out of the frozen model, which other tasks share, so "
                "that nothing runs faster",
            ),
            Stored(
                store="continual_intents",
                one=Side(title="SoTU after ten tasks", cell={"domains": _STREAM}, score="accuracy.sotu"),
                other=Side(title="tuning task after task", cell={"domains": _STREAM}, score="accuracy.sequential"),
                alike=("backbone", "density", "epochs", "rows"),
                same=("targets", "rate", "full_rate"),
                command="python benchmarks/continual_intents.py --seeds 0 1 2",
            ),
            Stored(
                store="frozen_layers",
                one=Side(title="freezing below the layer that turns most", cell={"trained": "semantic"}, score="score"),
                other=Side(title="freezing the lower half", cell={"trained": "upper half"}, score="score"),
                alike=("backbone", "task", "rows"),
                command=(
                    "python benchmarks/frozen_layers.py --cases choice --choice-task intent/clinc_banking "
                    "--choice-rows 400"
                ),
            ),
            Stored(
                store="dcot",
                one=Side(
                    title="DCoT with three chains",
                    cell={"training_rows": "dcot", "k": _CHAINS},
                    score="scores.*.3.right",
                    per="scores.*.3.questions",
                ),
                other=Side(
                    title="training on single chains",
                    cell={"training_rows": "cot", "k": _CHAINS},
                    score="scores.*.1.right",
                    per="scores.*.1.questions",
                ),
                alike=("backbone", "questions", "test_questions"),
                same=("settings", "learnt", "tested"),
                seed="training.seed",
                command="python benchmarks/dcot.py --seeds 0 1 2",
            ),
            Stored(
                store="instruction_mixture",
                one=Side(
                    title="LoRA tuned on other tasks' instructions", cell={"method": "lora"}, score="scores.*.score"
                ),
                other=Side(title="the bare backbone", cell={"method": "none"}, score="scores.*.score"),
                alike=("backbone", "test_rows", "wordings"),
                same=("learnt", "held_out", "mixture"),
                seed="training.seed",
                command="python benchmarks/instruction_mixture.py --seeds 0 1 2",
            ),
        ),
    ),
)
