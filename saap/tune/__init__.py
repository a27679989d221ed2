"""Tuning: heal a pruned model while it is quantised."""
