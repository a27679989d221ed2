"""Will a bundle load on a device, how much memory does it take, how fast could it be."""
