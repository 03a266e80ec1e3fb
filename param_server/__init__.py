"""Versioned parameters: the log and its shard, the synchronisation rules, and the serving replicas."""
