"""Which files are meant: text is the name of what exists, and a pattern only if there is nothing.

``datasets`` takes every name for a pattern. The folder `data [v1]` would then stand for `data v`
or `data 1`, and be found empty or be another one. It has no way to state a name literally that
does not search the folder around it as well, so such a folder is searched through a link whose own
name is plain.
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Files = Mapping[str, str | list[str]]  # files of each split


def named_files(data_files: Files, base: Path) -> dict[str, Any]:
    """Return the files of each split: found, if a pattern would not find them, else as given.

    Args:
        data_files: Names, patterns or URLs, by split.
        base: Folder to which names are relative.

    Raises:
        ValueError: If there are none, or one is empty.
    """
    if isinstance(data_files, str | list):  # both from Python only
        data_files = {"train": data_files}
    files = {
        str(split): [names] if isinstance(names, str) else list(names)
        for split, names in data_files.items()
    }
    empty = [
        split for split, names in files.items() if not all(map(str.strip, names)) or not names
    ]
    if empty or not files:
        raise ValueError(
            "expected the name of a file for each split in data.data_files, got an empty one"
            f"{f' for {empty[0]!r}' if empty else ''}; name its files, or leave it out"
        )
    return {split: _found(names, base) for split, names in files.items()}


def files_of_folder(folder: Path) -> dict[str, Any] | None:
    """Return the files of each split of a folder whose name is also a pattern, else None.

    Args:
        folder: An absolute path.

    Raises:
        FileNotFoundError: If it contains neither parquet files nor images.
    """
    from datasets.packaged_modules.imagefolder.imagefolder import (  # type: ignore[import-untyped]
        ImageFolder,
    )

    if not _is_pattern(folder):
        return None
    images = [*ImageFolder.EXTENSIONS, ".zip", ".csv", ".jsonl"]
    for extensions in ([".parquet"], images):
        if files := _through_link(folder, None, extensions):
            return files
    raise FileNotFoundError(f"no parquet files and no images in {str(folder)!r}")


def _found(names: list[str], base: Path) -> Any:
    parts = [_literal(name, base) for name in names]
    if not any(parts):
        return names
    from datasets.data_files import DataFilesList  # type: ignore[import-untyped]

    lists = [
        DataFilesList.from_patterns([name], base_path=str(base)) if part is None else part
        for name, part in zip(names, parts, strict=True)
    ]
    return sum(lists[1:], start=lists[0])


def _literal(name: str, base: Path) -> Any:
    """Return the files of a name whose beginning exists and is a pattern, too; else None."""
    if "://" in name or "::" in name:
        return None
    whole = base / Path(name).expanduser()
    there = Path(whole.anchor)
    rest = list(whole.parts[1:])
    while rest and (there / rest[0]).exists():
        there /= rest.pop(0)
    if not _is_pattern(there):
        return None
    folder, pattern = (there, "/".join(rest)) if rest else (there.parent, glob.escape(there.name))
    return _through_link(folder, {"": [pattern]}, None)[""]


def _through_link(
    folder: Path, patterns: dict[str, list[str]] | None, extensions: Sequence[str] | None
) -> dict[str, Any]:
    from datasets.data_files import (
        DataFilesDict,
        DataFilesList,
        EmptyDatasetError,
        get_data_patterns,
    )

    with tempfile.TemporaryDirectory() as plain:
        link = Path(plain) / "data"
        link.symlink_to(folder, target_is_directory=True)
        try:
            found = DataFilesDict.from_patterns(
                get_data_patterns(str(link)) if patterns is None else patterns,
                base_path=str(link),
                allowed_extensions=extensions,
            )
        except (EmptyDatasetError, FileNotFoundError):
            if patterns is None:
                return {}
            raise
    return {
        split: DataFilesList(
            [f"{folder}{file[len(str(link)) :]}" for file in files], files.origin_metadata
        )
        for split, files in found.items()
        if files
    }


def _is_pattern(path: Path) -> bool:
    return any(character in str(path) for character in "*?[")
