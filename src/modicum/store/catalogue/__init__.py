"""The meaning of the adapter store: names, versions, aliases, labels, lineage and the audit log."""
