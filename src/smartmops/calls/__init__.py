"""What one call brings along: its texts and masks, what the gate may read of them, which adapter serves which row."""
