"""Parquet files as the ecosystem writes them: the Hugging Face schema, shards, splits by column, file or folder."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bozzetto.common.extras import needed
from bozzetto.data.rows import Row, Source, split_named
from bozzetto.errors import UsageError

if TYPE_CHECKING:
    from pyarrow import DataType, Schema
    from pyarrow.parquet import ParquetFile

_IMAGES, _LABELS, _CAPTIONS = ("image", "img"), ("label", "labels", "class_name", "style"), ("caption", "text")
_BATCH = 64
_SHARD = re.compile(r"(.*)-\d+-of-(\d{1,6})")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of the file become errors of the user."""
    with needed(f"{path}: parquet needs", "train"):
        from pyarrow import ArrowException
    try:
        yield
    except UsageError:
        raise
    except (ArrowException, OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]})") from error


def parquet_source(root: Path, files: Sequence[Path]) -> Source:
    """The rows of parquet files: one that was asked for by name, or the shards below a folder.

    Raises UsageError for a file that is no parquet or lacks a column with pictures.
    """
    rows: list[Row] = []
    names: list[str] | None = None
    for file in files:
        with _reading(file):
            found, declared = _shard(root, file)
        if names is not None and declared is not None and declared != names:
            raise UsageError(f"{file}: its names of classes are not those of {files[0]}")
        names, rows = declared if names is None else names, rows + found
    return Source(root, rows, _pictures, names, _missing(root, files))


def _open(path: Path) -> ParquetFile:
    import pyarrow.parquet as pq

    opened = pq.ParquetFile(path)
    if opened.metadata.num_rows > path.stat().st_size:
        raise UsageError(f"{path}: claims {opened.metadata.num_rows} rows in {path.stat().st_size} bytes")
    return opened


def _shard(root: Path, path: Path) -> tuple[list[Row], list[str] | None]:
    """All rows of a file, and the names of its numbered classes, if it declares them."""
    with _open(path) as opened:
        schema = opened.schema_arrow
        _image_column(path, schema)
        label = _label_column(path, schema)
        caption = next((name for name in _CAPTIONS if name in schema.names), None)
        chosen = {"label": label, "caption": caption, "split": "split", "name": "class_name", "style": "style"}
        wanted = {key: name for key, name in chosen.items() if name is not None and name in schema.names}
        table = opened.read(columns=list(set(wanted.values())))
        count = opened.metadata.num_rows
    if wanted and table.num_rows != count:
        raise UsageError(f"{path}: claims {count} rows and has {table.num_rows}")
    columns = {key: table[name].to_pylist() for key, name in wanted.items()}
    whole = split_of_file(root, path)
    rows = []
    for i in range(count):
        own = {key: column[i] for key, column in columns.items()}
        where = f"{path}, row {i}"
        number = _label(own.pop("label", None), where)
        said = {key: _words(key, value, where) for key, value in own.items()}
        name = said.get("name") if isinstance(number, int) else None
        style = said.get("style") or ""
        rows.append(Row(where, (path, i), said.get("split", whole), number, name, said.get("caption"), style))
    return rows, _declared(schema).get(label or "")


def _image_column(path: Path, schema: Schema) -> str:
    """The column with pictures: a usual name, else the only one that is declared to hold them."""
    features = _features(schema)
    images = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    name = next((n for n in _IMAGES if n in schema.names), images[0] if len(images) == 1 else None)
    if name is None:
        raise UsageError(f"{path}: missing column 'image'; found {schema.names}")
    if not _holds_bytes(schema.field(name).type):
        raise UsageError(f"{path}: column {name!r} is {schema.field(name).type} (allowed: binary, or struct of bytes)")
    return name


def _holds_bytes(kind: DataType) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(kind.field(i).name in ("bytes", "path") for i in range(kind.num_fields))
    return "binary" in str(kind.value_type if types.is_dictionary(kind) else kind)  # plain, large, view, of fixed size


def _label_column(path: Path, schema: Schema) -> str | None:
    """The column with classes: a usual name, else the only one that is declared to hold them."""
    usual = next((name for name in _LABELS[:2] if name in schema.names), None)
    declared = sorted(_declared(schema))
    if usual is None and len(declared) > 1:
        raise UsageError(f"{path}: columns {declared} are all classes: rename the one that is meant to 'label'")
    return usual or next((name for name in [*declared, *_LABELS] if name in schema.names), None)


def _features(schema: Schema) -> dict[str, Any]:
    """What `datasets` notes of the columns, by name."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def _declared(schema: Schema) -> dict[str, list[str]]:
    """Names of numbered classes by column."""
    found = {k: v.get("names") for k, v in _features(schema).items() if v.get("_type") == "ClassLabel"}
    return {k: [str(name) for name in names] for k, names in found.items() if isinstance(names, list)}


def _label(value: Any, where: str) -> int | str | None:
    """A number from 0 on, or a word; None for null and for -1, which says that the class is not known."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0 and value >= -1:
        return int(value) if value >= 0 else None
    if isinstance(value, bool):
        return str(value)
    raise UsageError(f"{where}: label {value!r} is not allowed: a whole number >= 0, a word, or null or -1 for none")


def _words(kind: str, value: Any, where: str) -> str | None:
    """A text; None for null, and for captions and styles that are none: not everybody asks for them."""
    if value is None or isinstance(value, str):
        return value
    if kind in ("caption", "style"):
        return None
    raise UsageError(f"{where}: {kind} {str(value)[:60]!r} is not allowed: a text")


def split_of_file(root: Path, path: Path) -> str | None:
    """The split that a file's name says (`train-00000-of-00002.parquet`), else that of the nearest folder below root
    (`train/0000.parquet`, `split=train/0.parquet`)."""
    words = [w for w in re.split(r"[^A-Za-z]+", path.stem) if split_named(w)]
    if len({split_named(w) for w in words}) == 1:
        return words[0]
    folders = path.relative_to(root).parts[:-1] if path != root else ()
    return next((w for w in (f.removeprefix("split=") for f in reversed(folders)) if split_named(w)), None)


def _missing(root: Path, files: Sequence[Path]) -> list[tuple[str | None, str]]:
    """Shards that the names of others speak of."""
    if list(files) == [root]:
        return []
    there: Counter[tuple[Path, str, int, str | None]] = Counter()
    for file in files:
        if match := _SHARD.fullmatch(file.stem):
            there[file.parent, match[1], int(match[2]), split_of_file(root, file)] += 1
    kind = "shards that are not there"
    return [(split, kind) for (_, _, total, split), n in there.items() for _ in range(total - n)]


def _pictures(rows: Sequence[Row]) -> Iterator[bytes | None]:
    """Bytes of rows, which come file by file and in order. Raises UsageError for a row with nothing but a path."""
    for path, group in groupby(rows, key=lambda row: row.at[0]):
        wanted, start = {row.at[1]: row.where for row in group}, 0
        with _reading(path), _open(path) as opened:
            column = _image_column(path, opened.schema_arrow)
            for batch in opened.iter_batches(_BATCH, columns=[column]):
                values = batch.column(0)
                for i in range(len(values)):
                    if start + i in wanted:
                        yield _bytes(values[i].as_py(), wanted[start + i])
                start += len(values)
            if start <= max(wanted):
                raise UsageError(f"{path}: claims more rows than the {start} with pictures")


def _bytes(value: Any, where: str) -> bytes | None:
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            raise UsageError(f"{where} has only the path of a picture, {value['path']!r}: store the bytes with it")
        value = value.get("bytes")
    if value is not None and not isinstance(value, bytes):
        raise UsageError(f"{where}: the picture is {type(value).__name__} (allowed: bytes)")
    return value
