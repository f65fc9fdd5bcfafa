"""The importances that are compared."""
