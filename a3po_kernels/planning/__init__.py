"""Before a run: memory of one device, collectives of a step, its time on many, and what others would take beside it."""

from .beside import Formula, formulas
from .cards import CARDS, Card, find_card
from .estimate import Machine, StepEstimate, estimate_step, seconds_of_collective, wire_bytes
from .memory import MemoryEstimate, estimate_memory
from .model import Model, assumed_model, read_model
from .plan import Plan, make_plan
from .step import HeadStep, Traffic, collectives_of_step, traffic_of_step

__all__ = [
    "CARDS", "Card", "Formula", "HeadStep", "Machine", "MemoryEstimate", "Model", "Plan", "StepEstimate", "Traffic",
    "assumed_model", "collectives_of_step", "estimate_memory", "estimate_step", "find_card", "formulas", "make_plan",
    "read_model", "seconds_of_collective", "traffic_of_step", "wire_bytes",
]  # fmt: skip
