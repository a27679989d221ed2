"""What a device is: profiles with sources, and a probe of this host."""
