"""Watches the refusals of deployed models: traces are read, sampled, judged and counted, and drifts raise alarms."""
