"""Decisions about models that are called with arrays: precision by node, measured where they are made."""
