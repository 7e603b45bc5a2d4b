"""From the arguments of a layer to a plan: spec, selection, plans, driver."""
