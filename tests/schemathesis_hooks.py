"""What schemathesis sends as a picture, loaded by `st` in tests/contract.py: good pictures, cut ones, and any bytes."""

import io

import numpy as np
import schemathesis
from hypothesis import strategies
from PIL import Image

random = np.random.default_rng(0)
files = []
for format, side in (("PNG", 12), ("JPEG", 40), ("WEBP", 7), ("GIF", 16), ("BMP", 3), ("TIFF", 20)):
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (side, side + 1, 3), np.uint8)).save(file, format)
    files.append(file.getvalue())

good = strategies.sampled_from(files)
cut = strategies.builds(lambda content, share: content[: int(share * len(content))], good, strategies.floats(0, 1))
schemathesis.openapi.format("binary", strategies.one_of(good, good, cut, strategies.binary()))


@schemathesis.hook
def filter_body(context: schemathesis.HookContext, body: object) -> bool:
    """Leave out forms with another field that has no values: it counts as one too many, but nothing of it is sent."""
    return not isinstance(body, dict) or [] not in [value for name, value in body.items() if name != "files"]
