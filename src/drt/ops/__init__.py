"""Pure functions on tensors: they need torch alone, know no module and no model."""
