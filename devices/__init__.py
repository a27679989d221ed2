"""Devices: profiles with sources, and a probe of this host."""
