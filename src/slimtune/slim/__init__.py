"""Making a model smaller: distilled, pruned, quantized, each step measured. What a step writes loads as any model."""
