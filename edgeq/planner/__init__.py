"""The planner: every decision about a bundle, made from headers and profiles before a weight is read."""
