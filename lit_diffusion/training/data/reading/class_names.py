"""The names of the classes of a data set, which it declares beside their numbers."""

from __future__ import annotations

from typing import Any

from lit_diffusion.training.data.reading.parquet import open_parquet
from lit_diffusion.training.data.reading.sources import find_splits

__all__ = ["class_names"]


def class_names(data: Any) -> list[str] | None:
    """The names of the classes, by their numbers; None if the data do not name them.

    They are those of the label's column (a ClassLabel of datasets) or, for a folder of images,
    of its subfolders.

    Args:
        data: An `DataModule`, or any with an attribute `class_names`.
    """
    own = getattr(data, "class_names", None)
    if own is not None:
        return [str(name) for name in own]
    if getattr(data, "label_key", None) is None or not hasattr(data, "data_files"):
        return None
    import datasets  # type: ignore[import-untyped]

    splits = find_splits(data.path, data.data_files, data.config_name, data.streaming)
    split = splits.get(data.train_split)
    if isinstance(split, list):  # of parquet files, the first of which says
        footers = open_parquet(split[:1], skip=True).footers
        schemas = [footer.schema.to_arrow_schema() for footer in footers.values()]
        features: Any = datasets.Features.from_arrow_schema(schemas[0]) if schemas else {}
    else:
        features = getattr(split, "features", None) or {}
    names = getattr(features.get(data.label_key), "names", None)
    if not names or names == [str(i) for i in range(len(names))]:  # what datasets makes up
        return None
    return list(names)
