"""Group-wise integers: their layout, how they are chosen, and mixed bits."""
