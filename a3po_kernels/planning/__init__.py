"""Bytes and time before a run: memory of one device, collectives of a step, and its time on many devices."""

from .estimate import Machine, StepEstimate, estimate_step, seconds_of_collective, wire_bytes
from .memory import estimate_memory
from .step import HeadStep, Traffic, collectives_of_step, traffic_of_step

__all__ = [
    "HeadStep", "Machine", "StepEstimate", "Traffic", "collectives_of_step", "estimate_memory", "estimate_step",
    "seconds_of_collective", "traffic_of_step", "wire_bytes",
]  # fmt: skip
