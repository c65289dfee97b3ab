"""Pictures for training and evaluation, from parquet files or folders: read, classed, captioned; views of them."""

from bozzetto.data.reading import ImageSet, read_captions, read_images
from bozzetto.data.views import augment, evaluation_view, to_float

__all__ = ["ImageSet", "augment", "evaluation_view", "read_captions", "read_images", "to_float"]
