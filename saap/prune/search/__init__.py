"""The search: what the user requires, what each option costs and loses, and the best plan."""
