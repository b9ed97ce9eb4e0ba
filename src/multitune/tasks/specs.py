"""The table of known tasks: what cannot be told from the columns of their tables. A new task is a new row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from multitune.tasks import prepare

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One row of the table of tasks; what is left empty is inferred from the columns."""

    template: tuple[str, ...] = ()
    """Parts of the template."""
    label: str = ""
    """Column of the answer."""
    labels: tuple[str, ...] = ()
    """Label names in id order; empty for those of the class labels."""
    choices: tuple[str, ...] = ()
    """Multiple choice only: a part of a template per choice, or one that reads a column of lists."""
    metric: str = ""
    """Headline metric; empty for the usual one of the kind."""
    group: tuple[str, ...] = ()
    """Columns that say which rows are judged together."""
    folder: str = ""
    """Folder of the task, when it is not its name."""
    hub: str = ""
    """The data set on the Hugging Face hub that has the same columns, as `read_table` takes it; {task} stands for what
    follows the slash in the task's name. Read where no folder is named."""
    train: str = "train"
    """Name of the split to learn from; empty for a task that is for judging alone."""
    validation: str = "validation"
    """Name of the validation split."""
    held_out: float = 0.1
    """Share of the rows to learn from that is held out where there is no split of the usual name."""
    shipped: bool = False
    """Whether the task comes with the library."""
    kind: str = ""
    """Kind of task, where it cannot be told from the columns: generation."""
    format: str = ""
    """Generation only: how prompt and answer are written out, see `Task.format`."""
    prepare: Callable[[Dataset], Dataset] | None = None
    """What is done to every table before it is read."""


_GLUE = Spec(hub="nyu-mll/glue:{task}", label="label")
_SUPER_GLUE = Spec(hub="aps/super_glue:{task}", label="label")
_TWEETS = Spec(hub="cardiffnlp/tweet_eval:{task}", metric="macro_f1")
_STANCE = replace(_TWEETS, metric="stance_f1")
_TITLED = Spec(template=("title", "content"), label="label")
_WRITE = Spec(kind="generation", label="output")
_INSTRUCTION = replace(_WRITE, template=("{instruction}\n{input}",), metric="rouge_l", format="auto")
_COMMONSENSE = replace(_WRITE, template=("{instruction}",), metric="exact_match")
_NATURAL = Spec(
    kind="generation", template=("{definition}\n\n{inputs}",), label="references", metric="rouge_l", format="auto"
)
_QUESTION = replace(_NATURAL, metric="token_f1")
_RAFT = Spec(label="label", metric="macro_f1", held_out=0.5)
_NUMBER = Spec(kind="generation", template=("{question}",), label="answer", metric="number_match", format="auto")
_SYMBOL = Spec(kind="generation", template=("{question}",), label="answer", metric="exact_match")
_DEMO = Spec(shipped=True, template=("text",), label="label")

SPECS: dict[str, Spec] = {
    "demo/sentiment": replace(_DEMO, labels=("negative", "positive")),
    "demo/topic": _DEMO,
    "demo/acceptability": replace(_DEMO, labels=("unacceptable", "acceptable"), metric="matthews"),
    "demo/intent": _DEMO,
    "demo/paraphrase": replace(_DEMO, template=("sentence1", "sentence2"), labels=("different", "paraphrase")),
    "demo/urgency": replace(_DEMO, label="score"),
    "demo/trails": Spec(shipped=True, kind="generation", template=("facts",), label="text", metric="bleu"),
    "glue/cola": replace(_GLUE, template=("sentence",), metric="matthews"),
    "glue/sst2": replace(_GLUE, template=("sentence",)),
    "glue/mrpc": replace(_GLUE, template=("sentence1", "sentence2"), metric="accuracy_and_f1"),
    "glue/stsb": replace(_GLUE, template=("sentence1", "sentence2")),
    "glue/qqp": replace(_GLUE, template=("question1", "question2"), metric="accuracy_and_f1"),
    "glue/mnli": replace(_GLUE, template=("premise", "hypothesis"), validation="validation_matched"),
    "glue/mnli_mismatched": replace(
        _GLUE,
        template=("premise", "hypothesis"),
        validation="validation_mismatched",
        folder="glue/mnli",
        hub="nyu-mll/glue:mnli",
    ),
    "glue/qnli": replace(_GLUE, template=("question", "sentence")),
    "glue/rte": replace(_GLUE, template=("sentence1", "sentence2")),
    "glue/wnli": replace(_GLUE, template=("sentence1", "sentence2")),
    "super_glue/boolq": replace(_SUPER_GLUE, template=("question", "passage")),
    "super_glue/cb": replace(_SUPER_GLUE, template=("premise", "hypothesis"), metric="accuracy_and_macro_f1"),
    "super_glue/copa": replace(
        _SUPER_GLUE, template=("{premise} What was the {question}?",), choices=("choice1", "choice2")
    ),
    # the texts tell the questions apart: the published numbers of some rows are not known
    "super_glue/multirc": replace(
        _SUPER_GLUE, template=("paragraph", "{question} {answer}"), metric="f1a_and_em", group=("paragraph", "question")
    ),
    "super_glue/record": replace(
        _SUPER_GLUE,
        template=("passage",),
        choices=("{query_start}{entities}{query_end}",),
        label="answers",
        metric="choice_f1_and_em",
        prepare=prepare.cloze,
    ),
    "super_glue/rte": replace(_SUPER_GLUE, template=("premise", "hypothesis")),
    # the word stands before the text, for a pair of sentences alone does not say which word is meant
    "super_glue/wic": replace(_SUPER_GLUE, template=("{word}: {sentence1}", "{sentence2}")),
    "super_glue/wsc": replace(
        _SUPER_GLUE,
        template=("{marked}", "{span2_text} stands for {span1_text}"),
        hub="aps/super_glue:wsc.fixed",
        prepare=prepare.marked_pronoun,
    ),
    "text_classification/trec": Spec(label="coarse_label"),
    "text_classification/trec_fine": Spec(label="fine_label", folder="text_classification/trec"),
    "text_classification/ag_news": Spec(template=("text",), label="label", hub="fancyzhx/ag_news"),
    "text_classification/imdb": Spec(template=("text",), label="label", hub="stanfordnlp/imdb"),
    "text_classification/rotten_tomatoes": Spec(
        template=("text",), label="label", hub="cornell-movie-review-data/rotten_tomatoes"
    ),
    "text_classification/yelp_review_full": Spec(template=("text",), label="label", hub="Yelp/yelp_review_full"),
    "text_classification/dbpedia_14": replace(_TITLED, hub="fancyzhx/dbpedia_14"),
    "text_classification/amazon_review_full": _TITLED,
    "tweet_eval/hate": _TWEETS,
    "tweet_eval/offensive": _TWEETS,
    "tweet_eval/emoji": _TWEETS,
    "tweet_eval/stance_abortion": _STANCE,
    "tweet_eval/stance_atheism": _STANCE,
    "tweet_eval/stance_climate": _STANCE,
    "tweet_eval/stance_feminist": _STANCE,
    "tweet_eval/stance_hillary": _STANCE,
    "intent/clinc150": Spec(template=("text",), label="intent", hub="clinc/clinc_oos:plus"),
    # RAFT: the texts that the authors' baseline reads first, where rows have several
    "raft/neurips_impact_statement_risks": replace(_RAFT, template=("paper_title", "impact_statement")),
    "raft/semiconductor_org_types": replace(_RAFT, template=("organization_name", "paper_title")),
    "raft/systematic_review_inclusion": replace(_RAFT, template=("title", "abstract")),
    "raft/tai_safety_research": replace(_RAFT, template=("title", "abstract_note")),
    # table to text
    "nlg/e2e_nlg": Spec(
        kind="generation",
        template=("{meaning_representation}",),
        label="human_reference",
        metric="bleu",
        group=("meaning_representation",),  # every text is a row of its own, and all of one meaning are its references
    ),
    "nlg/webnlg_2017": Spec(kind="generation", template=("{modified_triple_sets}",), label="references", metric="bleu"),
    # its own training rows are not in the folder of suites: the validation split trains, a tenth of it is held out
    "nlg/dart": Spec(
        kind="generation", template=("{tripleset}",), label="references", metric="bleu", train="validation"
    ),
    "summarization/dialogsum": Spec(
        kind="generation", template=("{dialogue}\nSummary:",), label="references", metric="rouge_l"
    ),
    "instruction/alpaca": replace(_INSTRUCTION, hub="tatsu-lab/alpaca"),
    "instruction/self_instruct_seed": _INSTRUCTION,
    # short answers, most of them words of the passage: by the words they share with a right one, as SQuAD's are
    "super_natural_instructions/task002_quoref_answer_generation": _QUESTION,
    "super_natural_instructions/task591_sciq_answer_generation": _QUESTION,
    # reasoning; what the authors publish for judging alone has nothing to learn from
    "reasoning/gsm8k": replace(_NUMBER, hub="openai/gsm8k:main"),
    "reasoning/addsub": replace(_NUMBER, train=""),
    "reasoning/multiarith": replace(_NUMBER, train=""),
    "reasoning/singleeq": replace(_NUMBER, train=""),
    "reasoning/svamp": replace(_NUMBER, train=""),
    "reasoning/aqua_rat": Spec(
        template=("{question}",), choices=("options",), label="right", train="", prepare=prepare.lettered_answer
    ),
    "reasoning/coin_flip": _SYMBOL,
    "reasoning/last_letters": _SYMBOL,
    "reasoning/strategyqa": Spec(template=("question",), label="label"),
    "reasoning/commonsense_qa": Spec(template=("{question}",), choices=("choices",), label="label"),
    "commonsense/piqa": replace(_COMMONSENSE, train=""),
    "commonsense/social_i_qa": replace(_COMMONSENSE, train=""),
    "commonsense/winogrande": replace(_COMMONSENSE, train=""),
    "medical/pubmed_qa": Spec(
        template=("question", "context"), label="final_decision", prepare=prepare.joined_contexts
    ),
    "code/bug_fix_java": Spec(kind="generation", template=("{buggy}",), label="fixed", metric="bleu"),
    "code/java_to_cs": Spec(kind="generation", template=("{java}",), label="cs", metric="bleu"),
}

FAMILIES: dict[str, Spec] = {
    "raft": _RAFT,
    "commonsense": _COMMONSENSE,
    "super_natural_instructions": _NATURAL,
    "instruction_induction": Spec(
        kind="generation", template=("Input: {input}\nOutput:",), label="references", metric="exact_match"
    ),
    # its makers ask that it never be trained on
    "bbh": Spec(
        kind="generation", template=("{input}",), label="target", metric="exact_match", format="auto", train=""
    ),
    "medical": Spec(template=("{question}",), choices=("choices",), label="answer"),
}
"""Collections all of whose tasks are read in one way, where `SPECS` does not name the task."""


def find_spec(name: str) -> Spec | None:
    """What is known of a task beside its columns: of itself, or of all in its collection."""
    return SPECS.get(name) or FAMILIES.get(name.partition("/")[0])
