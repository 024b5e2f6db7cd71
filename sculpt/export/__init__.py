"""Files for other programs: StableHLO, ONNX, LiteRT, safetensors, and model files that Python code is not needed for."""

from sculpt.export.folding.folder import fold
from sculpt.export.litert import export_litert
from sculpt.export.model_file.files import load_model, save_model
from sculpt.export.onnx.exporter import export_onnx
from sculpt.export.params import load_metadata, load_params, save_params
from sculpt.export.stablehlo import ExportedModel, export_stablehlo, load_stablehlo

__all__ = [
    "ExportedModel",
    "export_litert",
    "export_onnx",
    "export_stablehlo",
    "fold",
    "load_metadata",
    "load_model",
    "load_params",
    "load_stablehlo",
    "save_model",
    "save_params",
]
