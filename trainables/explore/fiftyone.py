"""A data set as FiftyOne's image classification format: data/<id>.<ending> and labels.json.

    fiftyone.Dataset.from_dir(FOLDER, dataset_type=fiftyone.types.FiftyOneImageClassificationDataset)

opens it; what was found about an image becomes attributes of its label. FiftyOne itself is not needed to write it.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from upath import UPath

from trainables.errors import UserError
from trainables.storage import write_json


def export(
    folder: Path,
    classes: list[str],
    images: list[np.ndarray | Path],
    ids: list[str],
    labels: list[int | None],
    attributes: list[dict[str, Any]],
) -> None:
    """Write the images of a data set with their labels (indices into `classes`; None: unknown) and attributes.

    images: files, which are linked where the file system allows it and else copied, or uint8 pixels (H, W, 3), which
    become PNG. labels.json comes last. Raises UserError when the folder holds something else already.
    """
    if folder.exists() and not (folder / "data").is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is neither empty nor an earlier export; name another folder with --fiftyone")
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for id, image in zip(ids, images, strict=True):
        if isinstance(image, Path):
            _link(image, data / f"{id}{image.suffix.lower()}")
        else:
            Image.fromarray(image).save(data / f"{id}.png")
    entries = {
        id: {"label": None if label is None else classes[label], "attributes": more}
        for id, label, more in zip(ids, labels, attributes, strict=True)
    }
    write_json(UPath(folder / "labels.json"), {"classes": classes, "labels": entries})


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
