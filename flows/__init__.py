"""The DAGs, read like sentences; the command line and the servers it needs are here too."""
