"""One measurement: what is planned, timed, recorded, and whether it may be believed."""
