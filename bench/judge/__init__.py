"""Judgement: statistics, comparisons, recorded baselines and device tests."""
