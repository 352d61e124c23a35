"""Run folders: the one place that writes them, what lies in an adapter's folder, and what a user sees meanwhile."""
