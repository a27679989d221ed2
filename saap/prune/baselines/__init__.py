"""The pruning methods that SAAP is compared with."""
