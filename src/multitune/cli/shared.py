"""The application that the commands register with, and what they share: options, backbones, output."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from multitune.errors import BackboneError, ConfigError, DataWarning, MultituneError
from multitune.version import __version__

if TYPE_CHECKING:  # torch and transformers take seconds to load, and --help needs neither
    from multitune.adapter import Adapter
    from multitune.backbone import Backbone

#: Width of a table in a pipe: no line of it is ever broken, so that `grep` finds whole rows.
PIPE_WIDTH = 1000


#: The commands in the order in which a newcomer meets them: the module of each beside this one, which is imported when
#: the command is called, and the command's help, for the list of commands.
COMMANDS = {
    "demo": ("demo", "Train eight adapters with eight methods, then answer one batch that mixes them all; "
             "offline, in minutes."),
    "methods": ("catalogue", "List the tuning methods, or print the hyper-parameters of one."),
    "tasks": ("catalogue", "List the tasks that can be trained by name, or print what one holds."),
    "plan": ("plan", "Say what each method costs on a backbone, whether it meets the limits, and which to try first."),
    "layers": ("layers", "Measure on a task's rows where hidden states turn, and choose the layers to train."),
    "train": ("train", "Train an adapter for one task with one method, and write it to a folder."),
    "train-many": ("train_many", "Train many adapters together on one backbone, and write each to a folder of its "
                   "own."),
    "compare": ("compare", "Compare methods on tasks or on your own table: scores over seeds, a report, and a "
                "recommendation."),
    "report": ("report", "Write the report of a comparison: one HTML page, Markdown, CSV; and recommend a method."),
    "claims": ("claims", "Judge the papers' claims by comparisons and benchmarks: the paper's figure, ours with its "
               "interval, a verdict."),
    "evaluate": ("evaluate", "Judge adapters on rows with labels."),
    "predict": ("predict", "Answer rows, each by the adapter it names, in one mixed batch; JSON lines in, JSON lines "
                "out, in order."),
    "generate": ("generate", "Write texts, each by the adapter its row names, in one mixed batch; or for a task's "
                 "rows, and judge them."),
    "inspect": ("adapters", "Print what an adapter is: task, method, parameters, score, backbone, recipe, files. "
                "Loads no backbone."),
    "fuse": ("adapters", "Compute an AoT adapter's table of token rows once, and write it into its folder."),
    "merge": ("adapters", "Fold an adapter into a copy of the backbone and write an ordinary transformers checkpoint."),
    "import": ("convert", "Take over another library's checkpoint as an adapter, and compare what both compute."),
    "export": ("convert", "Write an adapter as another library's checkpoint, and compare what both compute."),
}  # fmt: skip


#: What other tools call an option that is no setting of training, whose names `training.config` has.
ALSO_CALLED = {
    "--model": "--backbone",
    "--model-name-or-path": "--backbone",
    "--output": "--out",
    "--output-dir": "--out",
    "--train-file": "--train",
    "--rank": "--set",
    "--force": "--overwrite",
}


def _usual(option: str) -> str | None:
    """What an option is called here that has another name in other tools; none where no such name is known."""
    from multitune.training.config import ALSO_CALLED as settings  # in here: it takes a while to load

    setting = settings.get(option.removeprefix("--").replace("-", "_"))
    return ALSO_CALLED.get(option) if setting is None else f"--{setting.replace('_', '-')}"


class Group(TyperGroup):
    """The commands in their order, loaded when called; an expected error becomes one line and exit code 1."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, (_, text) in COMMANDS.items():
            self.commands.setdefault(name, TyperCommand(name, help=text))

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=list(COMMANDS).index)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = load_command(args[0])
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", DataWarning)
                before = warnings.showwarning
                warnings.showwarning = partial(_show_warning, before)
                return super().invoke(ctx)
        except MultituneError as error:
            problem = str(error)
        except OSError as error:
            if error.filename is None:  # no file's fault: our own, or a pipe whose reader has gone
                raise
            problem = f"{error.strerror}: {error.filename}"
        except Exception as error:
            usual = _usual(getattr(error, "option_name", ""))
            if usual is not None and hasattr(error, "possibilities"):  # typer's error about an unknown option
                error.possibilities = [usual]
            raise
        note(f"error: {problem}")
        raise typer.Exit(1)


app = typer.Typer(cls=Group, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


def load_command(name: str) -> Any:
    """The command of this name of `COMMANDS`, with its options; imports the module that registers it."""
    importlib.import_module(f"{__package__}.{COMMANDS[name][0]}")
    made: Any = typer.main.get_command(app)
    return made.commands[name]


def _show_warning(before: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any) -> None:
    """A warning about the user's rows as a note, any other as it was shown before."""
    if issubclass(category, DataWarning):
        note(f"warning: {message}")
    else:
        before(message, category, *where)


def main() -> None:
    """Run the command line."""
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao where it is, and it has much to say
        logging.getLogger(name).setLevel(logging.ERROR)
    app(prog_name="multitune")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"multitune {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """One frozen backbone, every parameter-efficient tuning method, any mix of tasks in one batch."""


# -------------------------------------------------------------------- options

BackboneName = Annotated[
    str,
    typer.Option(
        "--backbone",
        metavar="NAME",
        help="Backbone: minilm (ships with multitune), smollm2 (a package), a folder, or a hub id; with +lsg behind it "
        "for long inputs, +decoder for an encoder-decoder that writes, +int8 or +nf4 to hold it in 8 or 4 bits.",
    ),
]
OptionalBackboneName = Annotated[
    str | None,
    typer.Option("--backbone", metavar="NAME", help="Backbone; by default the one that the adapter names."),
]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="Where the backbone runs, as torch names devices: cpu, cuda, cuda:1.")
]
Dtype = Annotated[str, typer.Option(metavar="WORD", help="Number type of the backbone: float32, bfloat16 or float16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Overhead = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Measured times of serving, as benchmarks/overhead.py writes them; may be repeated.",
        show_default=False,
    ),
]
AdapterFolders = Annotated[
    list[str] | None,
    typer.Option(
        "--adapters",
        metavar="[NAME=]FOLDER...",
        help="Adapters, or a folder of adapters. An adapter goes by the name of its folder, or by NAME.",
        show_default=False,
    ),
]
DropLayers = Annotated[
    str | None,
    typer.Option(
        metavar="LAYERS",
        help="Layers in which the adapters are left out, from 0, such as 0,1 (AdapterDrop).",
        show_default=False,
    ),
]
AdapterFolder = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of the adapter.", show_default=False)]


def load_backbone(name: str, device: str = "cpu", dtype: str = "float32") -> Backbone:
    """`Backbone.load`, with transformers kept quiet."""
    from transformers.utils import logging

    from multitune.backbone import Backbone

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return Backbone.load(name, device=device, dtype=dtype)


def backbone_of(adapter: Adapter, name: str | None, device: str = "cpu", dtype: str = "float32") -> Backbone:
    """The backbone asked for, or the one an adapter was trained on.

    Raises:
        BackboneError: it cannot be loaded; where the adapter named it, says so.
    """
    if name is not None:
        return load_backbone(name, device, dtype)
    try:
        return load_backbone(adapter.backbone["name"], device, dtype)
    except BackboneError as error:
        raise BackboneError(
            f"adapter '{adapter.name}' names the backbone it was trained on, which is not there by that name: give "
            f"--backbone FOLDER. ({error})"
        ) from error


def layer_numbers(given: str | None) -> tuple[int, ...]:
    """What `--drop-layers` says."""
    try:
        return tuple(int(layer) for layer in given.split(",")) if given is not None else ()
    except ValueError:
        raise ConfigError(f"--drop-layers takes layer numbers, such as 0,1, not '{given}'") from None


# -------------------------------------------------------------------- output


def note(message: str) -> None:
    """One line on stderr."""
    print(" ".join(message.split()), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """A value on stdout, indented."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def show(*things: RenderableType) -> None:
    """Tables and texts on stdout: as wide as the terminal, or as wide as they need to be in a pipe."""
    if sys.stdout.isatty():
        Console(highlight=False).print(*things, sep="\n")
        return
    console = Console(width=PIPE_WIDTH, highlight=False)
    with console.capture() as captured:
        console.print(*things, sep="\n")
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def table(rows: Iterable[Sequence[Any]], columns: Sequence[str], *, right: Iterable[str] = ()) -> Table:
    """A table of cells; the columns named in `right` hold numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False, padding=(0, 1, 0, 0))
    numeric = set(right)
    for column in columns:
        justify = "right" if column in numeric else "left"
        made.add_column(column, justify=justify, no_wrap=column in numeric, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*(escape(str(cell)) for cell in row))
    return made


def pairs(values: Iterable[tuple[str, Any]]) -> Table:
    """Names and values, one pair a line."""
    made = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    made.add_column(no_wrap=True, style="bold")
    made.add_column(overflow="fold")
    for name, value in values:
        made.add_row(name, escape(str(value)))
    return made


def count(number: int) -> str:
    """A whole number with separators."""
    return f"{number:,}"


def size(num_bytes: int) -> str:
    """Bytes in the largest unit that leaves a number of at least one."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def adapter_size(folder: Path) -> int:
    """Bytes of an adapter's own two files."""
    from multitune.adapter import CONFIG_FILE, TENSOR_FILE

    return sum((folder / name).stat().st_size for name in (CONFIG_FILE, TENSOR_FILE))


def written(value: object) -> str:
    """A setting's value as options and recipes take it."""
    if value is None:
        return "none"
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def score(value: float) -> str:
    """A metric's value to three places."""
    return f"{value:.3f}"
