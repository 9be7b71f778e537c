"""Rows as they stand in files, folders and data sets on the Hub, each with where it stands."""

from __future__ import annotations

import csv
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slimtune.data.settings import Source
from slimtune.errors import DataError, did_you_mean, listing, require
from slimtune.storage.text_files import open_file, parse_json

Record = tuple[dict[str, Any], str]
"""A row, and where it stands: for complaints."""

OnBad = Callable[[DataError], None]
"""What is done with a row that can't be read: raises the error, or keeps it and returns."""

_QUOTE = "put fields with commas or line breaks in them between quotation marks"


def refuse(error: DataError) -> None:
    """Raise the error: what is done with a bad row unless something else was asked for."""
    raise error


def records(source: Source, streaming: bool = False, on_bad: OnBad = refuse) -> Iterator[Record]:
    """The rows of a source, its columns renamed as it says, read one by one; raises DataError."""
    is_empty = True

    def bad(error: DataError) -> None:
        nonlocal is_empty
        is_empty = False
        on_bad(error)

    for value, where in _opened(source, streaming, bad):
        is_empty = False
        try:
            row = renamed(value, where, source.fields)
        except DataError as error:
            on_bad(error)
            continue
        yield row, where
    if is_empty:
        raise DataError(f"the data in {source.path} holds no example; write at least one row")


def files_of(source: Source) -> list[Path]:
    """The files that a path means, none for a data set on the Hub; raises DataError for what is neither."""
    path = Path(source.path)
    if path.is_dir():
        return _files_in(path, source.split)
    if path.exists() or kind_of(path) in READERS or not _is_hub_id(source.path):
        if source.split or source.subset or source.revision:
            raise DataError(f"{path} is a file, and a file has no split, subset or revision; leave them out")
        return [path]
    return []


def name_of(source: Source) -> str:
    """What a source is called: a folder with those of its files that are read."""
    if not Path(source.path).is_dir() or _is_saved(Path(source.path)):
        return source.path
    return f"{source.path} ({listing((file.name for file in files_of(source)), 3)})"


def _is_saved(folder: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _opened(source: Source, streaming: bool, bad: OnBad) -> Iterator[Record]:
    path = Path(source.path)
    if path.is_dir() and _is_saved(path):
        yield from _from_disk(source)
        return
    files = files_of(source)
    if not files:
        yield from _from_hub(source, streaming)
    for file in files:
        yield from _reader_of(file)(file, bad)


def _reader_of(path: Path) -> Callable[[Path, OnBad], Iterator[Record]]:
    suffix = kind_of(path)
    if suffix and suffix not in READERS and not path.exists():
        _refuse_missing(path)
    if suffix and suffix not in READERS:
        raise DataError(f"{path} ends in {suffix}{PACKED * is_packed(path)}, but {_known()}; convert or rename it")
    if is_packed(path) and READERS.get(suffix) is _parquet:
        raise DataError(f"{path} is packed twice: {suffix[1:]} packs what it holds itself; unpack it with gunzip")
    return READERS.get(suffix, _lines)


def renamed(value: dict[str, Any], where: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """The row with its columns called as in `fields`, name to column; raises DataError for one that isn't there."""
    for column in fields.values():
        if column not in value:
            near = did_you_mean(column, value)
            raise DataError(f"{where} has no column '{column}', which fields names; it has {listing(value)}{near}")
    taken = set(fields.values())
    rest = {name: content for name, content in value.items() if name not in taken}
    return rest | {name: value[column] for name, column in fields.items()}


def _lines(path: Path, bad: OnBad) -> Iterator[Record]:
    # In bytes: a string in JSON may hold separators that only Python takes for the end of a line.
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                text = _decoded(line, where)
                row = _object(text, where) if text.strip() else None
            except DataError as error:
                bad(error)
                continue
            if row is not None:
                yield row, where


def _json(path: Path, bad: OnBad) -> Iterator[Record]:
    with _open(path) as file:
        # An array or lines: many `.json` files of data sets hold one object a line.
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        if not start.startswith(b"["):
            yield from _lines(path, bad)
            return
        file.seek(0)
        text = _decoded(file.read(), str(path))
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); write an array of objects") from error
    for number, row in enumerate(rows, 1):
        where = f"{path}, item {number}"
        if isinstance(row, dict):
            yield row, where
        else:
            bad(DataError(f"{where} is a {type(row).__name__}, not an object; write an array of objects"))


def _csv(path: Path, bad: OnBad) -> Iterator[Record]:
    delimiter = delimiter_of(path)
    # The default of 131,072 characters is less than a long document; a C long ends the range on Windows.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open(path) as file:
        lines = (_decoded(line, f"{path}, line {number}") for number, line in enumerate(file, 1))
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            names = reader.fieldnames or []
            if twice := {name for name in names if names.count(name) > 1}:
                raise DataError(f"{path} has more than one column {listing(twice)}; give each a name of its own")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                # DictReader puts surplus fields under None, and None under names without a field.
                if None in row or None in row.values():
                    bad(DataError(f"{where} has another number of fields than the first line; {_QUOTE}"))
                else:
                    yield row, where
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num} is not CSV ({error}); {_QUOTE}") from error


DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""What separates columns, with its name."""


def delimiter_of(path: Path) -> str:
    """What separates the columns of a table: what its name says, unless its first line has only another one."""
    usual = _usual_delimiter(path)
    with _open(path) as file:
        first = _decoded(file.readline(), f"{path}, line 1")
    # What stands between quotation marks is part of a name.
    names = "".join(first.split('"')[::2])
    others = [delimiter for delimiter in DELIMITERS if delimiter in names and delimiter != usual]
    return others[0] if usual not in names and len(others) == 1 else usual


def unusual_delimiters(source: Source) -> dict[str, str]:
    """The tables of a source whose columns aren't separated as their names say, each with what separates them."""
    if Path(source.path).is_dir() and _is_saved(Path(source.path)):
        return {}
    tables = [file for file in files_of(source) if READERS.get(kind_of(file)) is _csv]
    delimiters = {file: delimiter_of(file) for file in tables}
    return {file.name: DELIMITERS[d] for file, d in delimiters.items() if d != _usual_delimiter(file)}


def _usual_delimiter(path: Path) -> str:
    return "\t" if kind_of(path) == ".tsv" else ","


def text_of(path: Path) -> str:
    """The whole of a text file; raises DataError."""
    with _open(path) as file:
        return _decoded(file.read(), str(path))


def _text(path: Path, bad: OnBad) -> Iterator[Record]:
    text = text_of(path)
    if text.strip():
        yield {"text": text}, str(path)


def _parquet(path: Path, bad: OnBad) -> Iterator[Record]:
    kind = "parquet" if path.suffix.lower() == ".parquet" else "arrow"
    _open(path).close()
    # Streamed, because a copy in a cache of its own is of no use for a file that is here.
    yield from _from_datasets(
        str(path), lambda d: d.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    )


READERS: dict[str, Callable[[Path, OnBad], Iterator[Record]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _parquet,
    ".txt": _text,
}
"""How each kind of file is read; a file without a suffix holds JSON lines."""


def _files_in(folder: Path, split: str | None) -> list[Path]:
    """The files of a split, found by their names as `datasets` does it."""
    data_files = load_datasets().data_files
    try:
        patterns = data_files.get_data_patterns(str(folder.resolve()))
        by_split = data_files.DataFilesDict.from_patterns(patterns, base_path=str(folder.resolve()))
    except data_files.EmptyDatasetError as error:
        raise DataError(f"the folder {folder} holds no data file; {_known()}") from error
    splits = {str(name): sorted(map(Path, files)) for name, files in by_split.items()}
    wanted = split or "train"
    if wanted not in splits:
        near = did_you_mean(wanted, splits)
        raise DataError(f"the folder {folder} has no split '{wanted}'; its files are of {listing(splits)}{near}")
    files = [file for file in splits[wanted] if kind_of(file) in READERS]
    if not files:
        raise DataError(f"the folder {folder} holds no data file of split {wanted}; {_known()}")
    return [folder / file.relative_to(folder.resolve()) for file in files]


def _from_disk(source: Source) -> Iterator[Record]:
    def load(datasets: Any) -> Any:
        data = datasets.load_from_disk(source.path)
        return _split_of(data, source) if isinstance(data, datasets.DatasetDict) else data

    yield from _from_datasets(source.path, load)


def _split_of(data: Any, source: Source) -> Any:
    wanted = source.split or "train"
    if wanted not in data:
        near = did_you_mean(wanted, data)
        raise DataError(f"the folder {source.path} has no split '{wanted}'; it has {listing(data)}{near}")
    return data[wanted]


def _from_hub(source: Source, streaming: bool) -> Iterator[Record]:
    split = source.split or "train"

    def load(datasets: Any) -> Any:
        how = {"split": split, "streaming": streaming, "revision": source.revision}
        return datasets.load_dataset(source.path, source.subset, **how)

    yield from _from_datasets(f"{source.path} ({split})", load)


def _from_datasets(name: str, load: Callable[[Any], Any]) -> Iterator[Record]:
    datasets = load_datasets()
    try:
        rows = load(datasets)
        names = _label_names(datasets, rows.features or {})
        for number, row in enumerate(rows, 1):
            yield (
                {key: _said(value, names.get(key)) for key, value in row.items() if value is not None},
                f"{name}, row {number}",
            )
    except DataError:
        raise
    except ConnectionError as error:
        raise DataError(
            f"there is no file or folder {name.partition(' (')[0]}, and the Hub can't be reached to look for a data "
            f"set of that name; go online, or download it and give its folder"
        ) from error
    except Exception as error:
        # The libraries below raise of their own what they like, for a damaged file as for an unknown split.
        text = str(error).strip().splitlines()
        raise DataError(f"{name} can't be read: {text[0] if text else type(error).__name__}") from error


def _label_names(datasets: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that hold numbers of labels, alone or in lists, and the names of those."""
    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    return {name: feature.names for name, feature in inner.items() if isinstance(feature, datasets.ClassLabel)}


def _said(value: Any, names: list[str] | None) -> Any:
    """A value of a table as it was said: a label by its name, and no fields that only other rows have."""
    if names is not None:
        # -1 stands for "no label" in the test splits of GLUE and others; as an index it would be the last one.
        return [names[item] for item in value] if isinstance(value, list) else names[value] if value >= 0 else value
    if isinstance(value, list):
        return [_said(item, None) for item in value]
    if isinstance(value, dict):
        return {key: _said(item, None) for key, item in value.items() if item is not None}
    return value


def load_datasets() -> Any:
    """The library, without its bars; raises MissingDependencyError."""
    require("datasets", extra="train", purpose="reading a folder, a Parquet file or a data set of the Hub")
    import datasets
    import datasets.data_files

    datasets.disable_progress_bars()
    # What it logs of a file that can't be read it raises too, and that becomes a sentence.
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    return datasets


def _is_hub_id(name: str) -> bool:
    return 1 <= len(name.split("/")) <= 2 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def _known() -> str:
    return f"data is read from {listing(READERS, 12)}, text also packed as .gz"


def _open(path: Path) -> Any:
    try:
        return opened(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            _refuse_missing(path)
        raise DataError(f"the data file {path} can't be read: {error.strerror}; pass another file") from error


def _refuse_missing(path: Path) -> None:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    advice = did_you_mean(path.name, siblings) or "; pass a file, a folder or the id of a data set on the Hub"
    raise DataError(f"the data file {path} can't be read: it is not there{advice}")


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); write one JSON object a line") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, not an object; write one JSON object a line")
    return value


PACKED = ".gz"
MOST_TIMES = 100
"""How many times its own size a packed file may have unpacked. Text packs to a fifth, a bomb to a thousandth."""
ANY_BYTES = 256_000_000
"""Unpacked, this much is read of any file."""


def kind_of(path: Path) -> str:
    """The suffix that tells how a file is read, in small letters and without that of the packing."""
    return (path.with_suffix("") if is_packed(path) else path).suffix.lower()


def is_packed(path: Path) -> bool:
    """Whether gzip packed the file, by its name."""
    return path.suffix.lower() == PACKED


def opened(path: Path) -> Any:
    """The bytes of a file, unpacked where it is packed; raises OSError, and DataError while a packed one is read."""
    # A buffer of 1 MiB: without it each line would be a call through zlib.
    return io.BufferedReader(_Unpacked(path), 2**20) if is_packed(path) else open_file(path)


class _Unpacked(io.RawIOBase):
    """Raises: DataError, where the file is damaged, or unpacks to more than its size allows."""

    def __init__(self, path: Path) -> None:
        self.path, self.packed, self.seen = path, open_file(path), 0
        self.file = gzip.GzipFile(fileobj=self.packed)
        self.most = max(ANY_BYTES, MOST_TIMES * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.seen = self.file.seek(offset, whence)
        return self.seen

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.file.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.path} can't be unpacked ({error}); fetch it again, or pack it with gzip") from error
        self.seen += len(data)
        if self.seen > self.most:
            raise DataError(
                f"{self.path} unpacks to more than {self.most / 1e6:,.0f} MB, {MOST_TIMES} times its size or more; "
                "unpack it yourself if you trust it"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        self.packed.close()
        super().close()
