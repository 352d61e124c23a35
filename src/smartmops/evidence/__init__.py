"""Results in, evidence out: numbers beside the paper's, pictures, pages. Runs nothing, loads no model."""
