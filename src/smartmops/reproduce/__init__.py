"""The paper's tables and figures on a model and data of the user's: cells, each run once, and their pages."""
