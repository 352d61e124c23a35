"""How experts and gate start: recovery prompts, experts from real text, a gate that already tells tasks apart."""
