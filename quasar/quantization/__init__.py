"""Quantization: functions on weights and calibration statistics, and linear layers with quantized weights."""
