"""The bundle: what bench, generate and a board read. No torch."""
