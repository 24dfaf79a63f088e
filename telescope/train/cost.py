"""The cost of a step, as a record that needs no torch; `flops.py` counts it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepCost:
    """Parameters, and floating-point operations of one optimizer step."""

    parameters: int
    """Number of parameters in matrices and lookup tables, as the literature counts them. Norm gains
    and biases, less than a ten-thousandth at any relevant size, are left out, and so are frozen
    parameters."""
    embeddings: int
    """Number of those in lookup tables and in the readout onto the vocabulary."""
    active: int
    """Number that one token uses, embeddings aside: all but the experts that it is not sent to."""
    model: float
    """FLOPs of forward and backward, without attention's two products."""
    attention: float
    """FLOPs of scaled-dot-product attention, forward and backward; not halved for causality."""
    optimizer: float
    """FLOPs of Newton–Schulz."""

    @property
    def parameters_as_json(self) -> dict[str, int]:
        """The three numbers of parameters in the keys of `telescope plan --json`."""
        return {
            "parameters": self.parameters,
            "parameters_without_embeddings": self.parameters - self.embeddings,
            "active_parameters": self.active,
        }

    @property
    def total(self) -> float:
        """The sum of the three."""
        return self.model + self.attention + self.optimizer
