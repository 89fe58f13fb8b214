"""A run: parameters bound to a rule, their options, their state, and the core's plan that steps them."""
