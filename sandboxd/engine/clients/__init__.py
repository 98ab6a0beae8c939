"""The clients of an engine: their connections, their leases on parked cells, their reading of the audit log."""
