"""Read a table from wherever the user keeps it: a file, a folder, memory, or the Hugging Face hub."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from multitune.errors import DataError, suggest, suggest_file
from multitune.tasks.files import READERS, from_rows, read_file

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Source: TypeAlias = "str | Path | Dataset | DatasetDict | Sequence[Mapping[str, Any]]"
"""What `read_table` reads."""

_WORD = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"(?P<name>{_WORD}/{_WORD}|{_WORD}(?=:))(:(?P<config>[\w.-]+))?", re.ASCII)


def read_table(source: Source, *, split: str | None = None) -> "Dataset":
    """One split of a source, as a table.

    source: a .csv, .tsv, .jsonl, .json or .parquet file; a folder with one such file a split (train.csv, …);
        a `datasets.Dataset` or `DatasetDict`; a list of mappings; or a data set on the Hugging Face hub,
        "owner/name", "owner/name:config" or "name:config".
    split: which one; needed when the source holds several. A file, list or table holds one, "train".

    Text files are UTF-8. A CSV file has a header; its columns are integers, floats or texts, whichever fits
    every cell. In a TSV file quotation marks are text. Local sources are read into memory and leave no cache;
    hub data sets are cached by `datasets`. No code of a data set is run.

    Raises DataError when the source cannot be found or read, or the split is unknown or missing.
    """
    splits = _open(source, split)
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))()
    known = ", ".join(splits)
    if split is None:
        raise DataError(f"{_named(source)} holds several splits: {known}. Choose one: split={next(iter(splits))!r}")
    if split not in splits:
        raise DataError(f"{_named(source)} has no split {split!r}; it has {known}.{suggest(split, splits)}")
    return splits[split]()


def list_splits(source: Source) -> tuple[str, ...]:
    """The names of the splits that `read_table` can read from a source. Raises DataError as it does."""
    return tuple(_open(source, None))


def _open(source: Source, split: str | None) -> dict[str, Callable[[], "Dataset"]]:
    """The splits of a source by name, each read only when called."""
    from datasets import Dataset, DatasetDict

    if isinstance(source, Dataset):
        return {str(source.split or "train"): lambda: source}
    if isinstance(source, DatasetDict):
        return {str(name): partial(source.__getitem__, name) for name in source}
    if isinstance(source, (list, tuple)):
        return {"train": partial(from_rows, source)}
    if not isinstance(source, (str, Path)):
        raise DataError(f"cannot read a table from a {type(source).__name__}; give a path, a Dataset or a list of rows")
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return {"train": partial(read_file, path)}
    hub_id = _HUB_ID.fullmatch(str(source))
    if hub_id and path.suffix.lower() not in READERS:
        table = _from_hub(hub_id["name"], hub_id["config"], split)
        return {split: lambda: table} if split else _open(table, None)
    raise DataError(f"no file or folder {str(source)!r}.{_neighbours(path)}")


def _folder(folder: Path) -> dict[str, Callable[[], "Dataset"]]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in READERS and file.is_file())
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            raise DataError(f"folder {str(folder)!r} holds {found[file.stem].name} and {file.name}; keep one of them")
        found[file.stem] = file
    if not found:
        others = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
        raise DataError(
            f"folder {str(folder)!r} holds no table; it holds {others}. Name its files after their splits: "
            f"train.csv, validation.csv (or {', '.join(READERS)})"
        )
    usual = [name for name in ("train", "validation", "test") if name in found]
    return {name: partial(read_file, found[name]) for name in dict.fromkeys([*usual, *found])}


def _from_hub(name: str, config: str | None, split: str | None) -> "Dataset | DatasetDict":
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # the many libraries below it raise errors of their own, with no common root
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name!r} is no local file or folder, and the data set could not be read from the Hugging "
            f"Face hub: {reason}. Check the id (owner/name or owner/name:config) and the network; without "
            "one, save the table as a .csv, .jsonl or .parquet file and give its path"
        ) from error


def _neighbours(path: Path) -> str:
    """The end of a message about a missing file: what stands in its folder."""
    if not path.parent.is_dir():
        return f" There is no folder {str(path.parent)!r} either"
    names = sorted(file.name for file in path.parent.iterdir())
    near = suggest_file(path)
    return near or f" Folder {str(path.parent)!r} holds {', '.join(names[:10]) or 'nothing'}"


def _named(source: Source) -> str:
    return repr(str(source)) if isinstance(source, (str, Path)) else f"the {type(source).__name__}"
