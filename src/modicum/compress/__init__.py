"""Model-level compression: from a checkpoint folder to a smaller one."""
