"""Names of earlier releases."""
