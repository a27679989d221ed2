"""Layer costs: what the parts of a decoder layer take on a device, at every size, for a budget in milliseconds."""
