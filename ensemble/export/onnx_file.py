"""An ensemble as one ONNX file, in fp32."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ensemble.export.check import Runtime
from ensemble.export.torch_file import last_line, silence, traced
from trainables.data.decode import Canvas
from trainables.errors import UserError

OPSET = 20
LARGEST_ONNX = 2**31 - 2**24  # bytes of weights: one protobuf message, so one file, ends at 2 GiB


def need_onnx() -> None:
    """Raise UserError when a package of the extra `export` is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs the package {error.name}; pip install 'ninefold[export]'") from None


def write_onnx(module: nn.Module, canvas: Canvas, metadata: dict[str, str], path: Path) -> Runtime:
    """Write the file and open it again. Raises UserError when it would be too large or ONNX cannot express it."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    if weights > LARGEST_ONNX:
        raise UserError(f"the weights are {weights / 2**30:.1f} GiB, one ONNX file ends at 2 GiB; use --to torch")
    with silence():
        program = traced(module, canvas)
        try:
            converted = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=["images"], output_names=["probs"], verbose=False
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(f"ONNX cannot express this ensemble ({last_line(error)}); use --to torch") from None
    assert converted is not None
    converted.model.metadata_props.update(metadata)
    converted.save(path, external_data=False)
    return open_onnx(path)


def open_onnx(path: Path) -> Runtime:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # its own default takes every core, whoever else uses them
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(["probs"], {"images": images})[0])
