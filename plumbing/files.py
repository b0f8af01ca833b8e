"""Files and data sets to rows: dictionaries, read as the files are now, with their pictures still compressed.

    read_json(path)                what a .json or .jsonl file holds, plain or .gz
    read_rows(source, split, ..)   [(name, row)] of a file, of a folder, or of a set on the hub

Nothing local is read through the cache of `datasets`: it knows a folder by its last name, and gives the rows of another
folder of that name, or those that a file had before it was replaced.
"""
import gzip
import json
import os


def printable(text) -> str:
    """The text with an escape in place of what cannot be printed: line ends, terminal codes, half surrogates."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in str(text))


class InputError(ValueError):
    """Bad user input. The message is one line: what is wrong, where (file, row, qid or flag), and what to do. Whatever
    it quotes, it has at most 300 characters, beginning and end, and cannot pass for a second line."""

    code = 2  # of the program's exit

    def __init__(self, message: str):
        line = printable(message)
        super().__init__(line if len(line) <= 300 else f"{line[:200]} .. {line[-96:]}")


def checked(value, types: tuple, found: str, expected: str):
    """The value, if it has one of these types; else InputError, "{found} type list; expected {expected}". In Python
    True is a number; here it is not."""
    if not isinstance(value, types) or isinstance(value, bool):
        raise InputError(f"{found} type {type(value).__name__}; expected {expected}")
    return value


# ---- one file
KINDS = (".parquet", ".json", ".jsonl", ".json.gz", ".jsonl.gz")


def read_json(path: str):
    """What a .json file holds, plain or .gz; of a .jsonl file, its rows by the number of their line, from 1."""
    line, rows, kind = 0, {}, path.lower()
    try:
        with (gzip.open if kind.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            if not kind.removesuffix(".gz").endswith(".jsonl"):
                return json.load(file)
            for line, text in enumerate(file):
                if text.strip():
                    rows[line + 1] = json.loads(text.strip())
            return rows
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {line + error.lineno}: not valid JSON ({error.msg}); fix that line") from error
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); check the path and that the file is whole") from error


def read_file(path: str) -> list[tuple]:
    """[(name, row)]: name is the key in an object of rows, the line in a .jsonl file, else the number from 1."""
    if not path.lower().endswith(".parquet"):
        rows = checked(read_json(path), (list, dict), f"{path}: has", "a list or an object of rows")
        return list(rows.items() if isinstance(rows, dict) else enumerate(rows, 1))
    from pyarrow.parquet import ParquetFile  # most runs read a .json file
    try:
        with ParquetFile(path) as file:
            rows = [row for group in range(file.num_row_groups)  # the reader keeps what it has read of a group
                    for batch in file.iter_batches(100, [group]) for row in batch.to_pylist()]
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError) as error:  # pyarrow's are such
        raise InputError(f"{path}: cannot be read ({error}); check the path and that the file is whole") from error
    return list(enumerate(rows, 1))


# ---- a folder of files, or a set on the hub
def read_rows(source: str, split: str, config: str | None = None, only_split: bool = False) -> list[tuple]:
    """[(name, row)] of a .json, .jsonl (plain or .gz) or .parquet file; or of one split of a folder of such files or of
    a set on the hub. With only_split, the split of a set that has a single one is taken whatever its name. Pictures
    stay as stored, a path or bytes. InputError when it cannot be read."""
    if source.lower().endswith(KINDS) and not os.path.isdir(source):
        return read_file(source)
    if os.path.isfile(source):
        raise InputError(f"{source}: only .json, .jsonl (plain or .gz) and .parquet files are read; convert it")
    import datasets  # takes a second, and most runs read a file
    from huggingface_hub.utils import logging
    datasets.disable_progress_bars()
    logging.set_verbosity_error()  # otherwise a hub that cannot be reached prints a line for each attempt
    try:
        load = datasets.load_dataset_builder if os.path.exists(source) else datasets.load_dataset
        try:
            found = load(source, config)
        except ValueError:  # no such config
            found = load(source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).split("\n")[0][:150]
        raise InputError(f"data set {source!r}: cannot be loaded ({reason}); download it first: `hf download "
                         "--repo-type dataset NAME --local-dir FOLDER`, and give --data FOLDER or a file, or point "
                         "HF_HOME to a cache") from error
    if isinstance(found, datasets.DatasetBuilder):  # it knows which files a split has, from a README or their names
        found = {str(name): paths for name, paths in found.config.data_files.items()}
    if isinstance(found, dict):  # all splits by name
        name = next(iter(found)) if only_split and len(found) == 1 else split
        if name not in found:
            raise InputError(f"{source}: no split {split}; it has {', '.join(found)}: give one with --split")
        found = found[name]
    if isinstance(found, list):  # of files, among them perhaps pictures
        rows = (row for path in found if path.lower().endswith(KINDS) for _, row in read_file(path))
    else:
        rows = (row for batch in found.with_format("arrow").iter(100) for row in batch.to_pylist())
    return list(enumerate(rows, 1))
