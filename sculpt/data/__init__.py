"""Images and labels: readers of files and data sets, and the three disjoint splits that they become."""

from sculpt.data.named import load_data, load_folder, load_parquet
from sculpt.data.splits import Split, Splits, from_arrays, from_examples, from_sources
from sculpt.data.stream import Source, StreamedImages

__all__ = [
    "Source",
    "Split",
    "Splits",
    "StreamedImages",
    "from_arrays",
    "from_examples",
    "from_sources",
    "load_data",
    "load_folder",
    "load_parquet",
]
