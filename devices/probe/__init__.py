"""The probe of a device: board, CPU, caches, memory, clocks and versions (``devices.probe.host.probe``)."""
