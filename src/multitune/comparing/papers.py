"""What the papers claim, as comparisons that runs can decide; with the papers' figures and the evidence for them.

Evidence tags: [V] read in the paper or in its authors' files, [D] derived by arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MARGIN = 0.01
"""A method that is on par is at most a point worse."""
MOST = 0.95
"""A method that reaches most of another's score reaches this share of it."""
COLLECTIONS = {"glue": "glue", "superglue": "super_glue"}
"""By suite the collection of its tasks: what stands in front of the slash in their names."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One comparison that a claim makes."""

    method: str
    other: str
    relation: Literal["beats", "on par", "most of"]
    most_parameters: float | None = None
    """Share of the backbone's parameters that the method must stay below."""

    @property
    def words(self) -> str:
        """The comparison as text."""
        meant = {
            "beats": "scores higher than {other}",
            "on par": f"scores at most {100 * MARGIN:g} point below {{other}}",
            "most of": f"reaches {MOST:.0%} of the score of {{other}}",
        }[self.relation].format(other=self.other)
        limit = f", with under {self.most_parameters:.1%} of its parameters" if self.most_parameters else ""
        return f"{self.method} {meant}{limit}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says."""

    number: int
    """In the list of claims that the project set out to test."""
    statement: str
    source: str
    figure: str
    """The paper's, with its evidence tag."""
    parts: tuple[Part, ...] = ()
    suites: tuple[str, ...] = tuple(COLLECTIONS)
    missing: str = ""
    """Of a claim without parts: why it is not judged yet."""


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
        missing="benchmarks/overhead.py measures it and has not been run in full",
    ),
    Claim(
        number=3,
        statement="Prefix-tuning beats adapters at 0.1 % of the parameters on table-to-text, and falls behind full "
        "tuning on summarisation.",
        source="Li and Liang 2021, arXiv 2101.00190",
        figure="GPT-2 medium, BLEU on E2E, WebNLG (all) and DART: prefix 69.7, 55.1, 46.4; adapter 66.3, 50.2, 42.4; "
        "XSum ROUGE-L, BART-large: prefix 36.05 (2 %), full 37.25 [V]",
        missing="needs the suite table-to-text on a decoder",
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
        figure="see the page of LoRA",
        missing="benchmarks/overhead.py measures it and has not been run in full",
    ),
    Claim(
        number=6,
        statement="(IA)³ with T-Few's recipe beats in-context learning at a fraction of the FLOPs of inference.",
        source="Liu et al. 2022, arXiv 2205.05638",
        figure="see the page of (IA)³",
        missing="needs the suite raft and a decoder",
    ),
    Claim(
        number=7,
        statement="BitFit, and LayerNorm with the head, reach most of full tuning with under 0.1 % of the parameters.",
        source="Ben-Zaken et al. 2021, arXiv 2106.10199",
        figure="RoBERTa-base, mean of GLUE: BitFit 85.2, full 86.4 (LoRA's Table 2) [V], 98.6 % of it [D]; 0.082 % of "
        "the parameters, LayerNorm 0.030 % [D]; for LayerNorm no verified score",
        parts=(
            Part(method="bitfit", other="full", relation="most of", most_parameters=0.001),
            Part(method="layernorm", other="full", relation="most of", most_parameters=0.001),
        ),
    ),
    Claim(
        number=8,
        statement="SIFT matches LoRA at equal parameters; DSEE keeps quality with pruned FLOPs; SoTU forgets less than "
        "sequential tuning; semantic freezing beats freezing by position; DCoT beats single-chain training; "
        "instruction tuning improves held-out tasks.",
        source="the papers of each method, see their pages",
        figure="see the pages of the methods",
        missing="its parts need runs of their own, none of which a suite has yet",
    ),
)
