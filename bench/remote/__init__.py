"""Measuring on boards and farms."""
