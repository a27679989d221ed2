"""The probe: what this host is and how it is at the moment."""
