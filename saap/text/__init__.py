"""Text for calibration, tuning and evaluation, as rows of token ids."""
