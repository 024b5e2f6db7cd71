"""Leaving for an engine: portable programs, arrays in files, measured latency."""

from sculpt.deploy.environment import device_name, versions
from sculpt.deploy.fold import fold
from sculpt.deploy.group_overheads import measure_group_overheads
from sculpt.deploy.latency import Latency, compare_latency, measure_latency
from sculpt.deploy.layer_latency import LayerLatency, load_layers, measure_layers, save_layers
from sculpt.deploy.litert_export import export_litert
from sculpt.deploy.model_file import load_model, save_model
from sculpt.deploy.onnx_export import export_onnx
from sculpt.deploy.params import load_metadata, load_params, save_params
from sculpt.deploy.stablehlo import ExportedModel, export_stablehlo, load_stablehlo

__all__ = [
    "ExportedModel",
    "Latency",
    "LayerLatency",
    "compare_latency",
    "device_name",
    "export_litert",
    "export_onnx",
    "export_stablehlo",
    "fold",
    "load_layers",
    "load_metadata",
    "load_model",
    "load_params",
    "load_stablehlo",
    "measure_group_overheads",
    "measure_latency",
    "measure_layers",
    "save_layers",
    "save_model",
    "save_params",
    "versions",
]
