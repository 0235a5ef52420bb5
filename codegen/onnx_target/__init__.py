"""ONNX files with real low-bit weights, checked by onnx.checker and against ONNX Runtime."""

from .check import Check
from .export import OnnxReport, export_onnx
from .lowering import Onnx

__all__ = ["Check", "Onnx", "OnnxReport", "export_onnx"]
