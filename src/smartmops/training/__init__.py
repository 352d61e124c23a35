"""From a frozen base and data to a run folder: recovery prompts, gate pretraining, training, evaluation."""
