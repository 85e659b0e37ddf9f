"""Converted models in TensorRT: nodes with bodies that its parser reads, and plugins made of the kernels."""
