"""What a device is: profiles with sources, and a probe of this host."""

from saap.base.telemetry import turn_off

turn_off()
